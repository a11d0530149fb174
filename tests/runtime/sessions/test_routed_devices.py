"""Engines on the processor and on a GPU that share the work of one; the GPU's are on the host, in checked memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import CPU
from helpers.host_engine import build_host_engine
from helpers.host_graphs import HostGraphs
from helpers.serving import asked, held_until_submitted, serving
from runtime import generation
from runtime.contract import FloatArray, no_visual_embeds, on_host
from runtime.device_arrays import DeviceEmbeds
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.session import PARTS, Session, SessionOptions
from runtime.sessions import ort_cpu, ort_cuda, tensorrt
from runtime.sessions.ort_cuda import OrtCudaSession

NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_ids": ()}
LONG = "Say where each of the digits is. " * 12
QUESTIONS = [
    asked("Read the digits.", 0),
    asked(LONG + "What is the sum of the digits?", 1, 2),
    asked("Hello."),
    asked(LONG + "What is the sum of the digits?", 1, 2),
]
Opened = Callable[..., Qwen3VLModel]


@dataclasses.dataclass
class Machine:
    """The GPU's memory, and what was opened on it."""

    memory: HostDevice
    parts: list[frozenset[str]]

    def open(self, folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        self.parts.append(options.parts)
        return OrtCudaSession(folder, manifest, options, device=dataclasses.replace(CPU, memory=lambda: self.memory))


@pytest.fixture(scope="module")
def gpu_fp16(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("routed") / "cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    HostGraphs(monkeypatch)
    machine = Machine(HostDevice(), [])
    monkeypatch.setattr(ort_cuda, "open_session", machine.open)
    return machine


@pytest.fixture
def opened(machine: Machine) -> Iterator[Opened]:
    models: list[Qwen3VLModel] = []

    def open_model(*arguments: Any, **options: Any) -> Qwen3VLModel:
        models.append(Qwen3VLModel.from_engine(*arguments, max_context=1024, **options))
        return models[-1]

    yield open_model
    for model in models:
        model.close(drain=False)


def by_hand(
    decode: Session, prefill: Session, vision: Session, model: Qwen3VLModel, question: Any, dtype: Any
) -> list[int]:
    """Encode, prefill, round the rows to the type of the cache that decodes, decode greedily."""
    prepared = model.prepare(question)
    ids, positions = prepared.prompt.input_ids, prepared.positions
    images = [on_host(vision.vision(model.preparation.vision_inputs(image))) for image in prepared.images]
    embeds = np.concatenate(images, axis=1) if images else no_visual_embeds(model.config)
    source = prefill.new_cache(len(ids) + NEW_TOKENS)
    logits = generation.prefill(prefill, source, prepared.decoder_inputs(embeds))[-1]
    cache: Any = decode.new_cache(len(ids) + NEW_TOKENS)
    layers = [source.layer(index) for index in range(model.config.text.num_layers)]
    cache.write_rows(0, 0, [array[0, :, : len(ids)].astype(dtype) for pair in layers for array in pair])
    choose: Callable[[FloatArray], int] = lambda each: int(each.argmax())  # noqa: E731
    none = no_visual_embeds(model.config)
    steps = generation.decode_steps(decode, cache, logits, len(ids), positions.delta, none, choose)
    return [next(steps) for _ in range(NEW_TOKENS)]


def sessions(machine: Machine, demo_engine: Path, gpu_fp16: Path) -> tuple[Session, Session]:
    cpu = ort_cpu.open_session(demo_engine, Manifest.read(demo_engine), SessionOptions(threads=1))
    return cpu, machine.open(gpu_fp16, Manifest.read(gpu_fp16), SessionOptions())


def test_prompts_on_the_gpu_and_steps_on_the_processor(
    machine: Machine, opened: Opened, demo_engine: Path, gpu_fp16: Path
) -> None:
    model = opened(demo_engine, prefill_engine=gpu_fp16, vision_engine=gpu_fp16, prefix_cache=False)
    assert machine.parts == [{"vision", "prefill"}]
    cpu, gpu = sessions(machine, demo_engine, gpu_fp16)
    for question in QUESTIONS:
        prepared = model.prepare(question)
        assert not prepared.images or isinstance(
            model.session.vision(model.preparation.vision_inputs(prepared.images[0])), DeviceEmbeds
        ), "embeddings do not leave the device on which prompts run"
        assert model.generate(question, **GREEDY).token_ids == by_hand(cpu, gpu, gpu, model, question, np.float32)
    assert model.session.chunk_sizes == OrtCudaSession.chunk_sizes
    assert not model.session.runs_vision_beside


def test_the_vision_tower_alone_on_the_gpu(machine: Machine, opened: Opened, demo_engine: Path, gpu_fp16: Path) -> None:
    model = opened(demo_engine, vision_engine=gpu_fp16, prefix_cache=False)
    assert machine.parts == [{"vision"}]
    assert model.session.runs_vision_beside
    cpu, gpu = sessions(machine, demo_engine, gpu_fp16)
    for question in QUESTIONS:
        assert model.generate(question, **GREEDY).token_ids == by_hand(cpu, cpu, gpu, model, question, np.float32)
    assert isinstance(model.encode_images(model.prepare(QUESTIONS[0]).images), np.ndarray)


@pytest.mark.parametrize("parts", ["prefill", "vision", "both"])
def test_steps_on_the_gpu_and_the_rest_on_the_processor(
    parts: str, machine: Machine, opened: Opened, demo_engine: Path, gpu_fp16: Path
) -> None:
    route = {f"{part}_engine": demo_engine for part in ("prefill", "vision") if parts in (part, "both")}
    model = opened(gpu_fp16, **route, prefix_cache=False)
    assert machine.parts == [PARTS - {"prefill", "vision"} | ({"prefill", "vision"} - {each[:-7] for each in route})]
    cpu, gpu = sessions(machine, demo_engine, gpu_fp16)
    prefill, vision = (cpu if f"{part}_engine" in route else gpu for part in ("prefill", "vision"))
    for question in QUESTIONS:
        expected = by_hand(gpu, prefill, vision, model, question, np.float16)
        assert model.generate(question, **GREEDY).token_ids == expected
    assert model.statistics()["decode_kernels"] == "onnxruntime"


def test_plans_decode_after_prompts_on_the_processor(
    opened: Opened,
    demo_bundle: Bundle,
    demo_engine: Path,
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = BuildOptions(max_context=256, max_batch=2, prefill_chunk=128, patch_buckets=(1024,))
    plans = build_host_engine(demo_bundle, tmp_path / "plans", options)
    monkeypatch.setattr(tensorrt, "CudaDevice", lambda: machine.memory)
    sizes = {"max_context": 256, "prefix_cache": False}
    model = Qwen3VLModel.from_engine(plans, prefill_engine=demo_engine, vision_engine=demo_engine, **sizes)
    cpu = ort_cpu.open_session(demo_engine, Manifest.read(demo_engine), SessionOptions(threads=1))
    gpu = tensorrt.open_session(plans, Manifest.read(plans), SessionOptions())
    for question in (QUESTIONS[0], QUESTIONS[2]):
        assert model.generate(question, **GREEDY).token_ids == by_hand(gpu, cpu, cpu, model, question, np.float16)
    model.close()


def test_prompts_that_take_turns_get_the_answers_that_they_get_alone(
    opened: Opened, demo_engine: Path, gpu_fp16: Path
) -> None:
    """On one machine: the GPU decodes in float16, so rows are rounded on their way."""
    model = opened(gpu_fp16, prefill_engine=demo_engine, vision_engine=demo_engine)
    small = partial(serving, model, prefill_chunk=24, last_chunk=24)
    expected = [small(max_sequences=1, prefix_cache=False).generate(each, **GREEDY).token_ids for each in QUESTIONS]
    together = small(max_sequences=3)
    with held_until_submitted(together, 3):
        found = together.generate_batch([*QUESTIONS, *QUESTIONS], **GREEDY)
    assert [each.token_ids for each in found] == [*expected, *expected]
    stats = together.statistics()
    assert stats["batch_size"]["sum"] > stats["batch_size"]["count"] and stats["cached_tokens"] > 100


def test_everything_on_the_device_is_freed(machine: Machine, demo_engine: Path, gpu_fp16: Path) -> None:
    for route in ({"vision_engine": gpu_fp16}, {"prefill_engine": gpu_fp16}):
        model = Qwen3VLModel.from_engine(demo_engine, max_context=256, **route)
        assert model.generate(QUESTIONS[0], **GREEDY).token_ids
        model.warm_up()
        model.close()
        del model
        gc.collect()
        assert machine.memory.leaks() == []


def test_the_first_calls_of_each_kind_disturb_no_answer(opened: Opened, demo_engine: Path, gpu_fp16: Path) -> None:
    model = opened(gpu_fp16, prefill_engine=demo_engine)
    first = model.generate(QUESTIONS[1], **GREEDY)
    model.warm_up()
    again = model.generate(QUESTIONS[3], **GREEDY)
    assert again.token_ids == first.token_ids and again.stats.cached_tokens > 100
