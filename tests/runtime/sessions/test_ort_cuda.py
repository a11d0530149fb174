"""The session of ONNX Runtime on CUDA, and the graphs of its targets, on the CPU's kernels."""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines import registry
from engines.bundle import Bundle
from engines.target import Target
from helpers import PICTURES
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import CPU
from helpers.targets import by_name
from qwen3vl_export.checkpoint import Checkpoint
from runtime import generation, ort_device
from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache
from runtime.errors import CapacityError, EngineError
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.ort_cache import OrtDeviceCache
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cuda import OrtCudaSession

TARGETS = registry.load_family("ort_cuda")
# bfloat16 has no CPU kernels of Where and FusedMatMul, and ONNX Runtime casts for float16 alone; float8 weights none of
# their product.
ON_CPU = [target for target in TARGETS if not target.name.endswith(("bf16", "fp8"))]
CONFIG = Checkpoint.open("demo").config
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": str(PICTURES / "held_out_0.png")},
            {"type": "text", "text": "Read the digits."},
        ],
    }
]

Models = Callable[[str], Qwen3VLModel]


@pytest.fixture(scope="module")
def models(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Models:
    opened: dict[str, Qwen3VLModel] = {}

    def model(name: str) -> Qwen3VLModel:
        if name not in opened:
            folder = build(demo_bundle, name, tmp_path_factory.mktemp("engine") / name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ort_cuda, "open_session", on_cpu)
                opened[name] = Qwen3VLModel.from_engine(folder)
        return opened[name]

    return model


def on_cpu(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
    return OrtCudaSession(folder, manifest, device=CPU)


def run(model: Qwen3VLModel, chunk: int = 512) -> tuple[FloatArray, FloatArray, list[tuple[FloatArray, FloatArray]]]:
    """Return the levels of a picture, the logits of its prompt, and the cache."""
    prepared = model.prepare(MESSAGES)
    ids = prepared.prompt.input_ids
    cache = model.session.new_cache(len(ids))
    embeds = model.encode_images(prepared.images)
    inputs = prepared.decoder_inputs(embeds, all_logits=True)
    logits = generation.prefill(model.session, cache, inputs, chunk=chunk)
    layers = [cache.layer(index) for index in range(model.config.text.num_layers)]
    return embeds, logits, [(key[:, :, : len(ids)], value[:, :, : len(ids)]) for key, value in layers]


def cosine(found: FloatArray, expected: FloatArray) -> float:
    a, b = found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# Parity, on the CPU's kernels, which may compute float16 in float32


def test_float16_graphs_equal_the_float32_engine(models: Models) -> None:
    embeds, logits, cache = run(models("ort-cuda-fp16"))
    expected_embeds, expected_logits, expected_cache = run(models("ort-cpu-fp32"))
    pairs = [*zip(embeds, expected_embeds, strict=True), (logits, expected_logits)]
    pairs += [pair for layers in zip(cache, expected_cache, strict=True) for pair in zip(*layers, strict=True)]
    # Measured 0.9999997 at worst, of a level.
    assert min(cosine(found, expected) for found, expected in pairs) >= 0.99999
    assert np.array_equal(logits.argmax(-1), expected_logits.argmax(-1))
    # It is another computation, not the same one.
    assert not np.array_equal(logits, expected_logits)


def test_int4_graphs_are_near_the_float32_engine(models: Models) -> None:
    embeds, logits, _ = run(models("ort-cuda-int4"))
    expected_embeds, expected_logits, _ = run(models("ort-cpu-fp32"))
    # The vision tower keeps float16; measured 0.9998 for the logits of the 4-bit decoder.
    assert cosine(embeds, expected_embeds) >= 0.99999
    assert 0.9995 <= cosine(logits, expected_logits) < 0.99999
    moved = logits.argmax(-1) != expected_logits.argmax(-1)
    top_two = np.sort(expected_logits, axis=-1)[:, -2:]
    assert (top_two[moved, 1] - top_two[moved, 0] < 1.2).all(), "a token changed that was no near-tie"


@pytest.mark.parametrize("target", ON_CPU, ids=by_name)
def test_a_held_out_picture_is_read(target: Target, models: Models) -> None:
    assert models(target.name).generate(MESSAGES).text == "1654"


@pytest.mark.parametrize("target", ON_CPU, ids=by_name)
def test_requests_beside_each_other_get_the_answers_that_they_get_alone(target: Target, models: Models) -> None:
    texts = ["Read the digits.", "What is the sum of the digits?", "Read the digits, and then read them again."]
    prompts = [user_message(text, [PICTURES / f"held_out_{i}.png"]) for i, text in enumerate(texts)]
    alone = [models(target.name).generate(each, max_new_tokens=12).token_ids for each in prompts]
    for _ in range(2):  # the second time, prompts take rows over that lie in other slots
        together = models(target.name).generate_batch(prompts, max_new_tokens=12)
        assert [each.token_ids for each in together] == alone
    sizes = models(target.name).statistics()["batch_size"]
    assert sizes["sum"] > sizes["count"], "several sequences stepped together"


# The session, on the CPU


@pytest.mark.parametrize("target", ON_CPU, ids=by_name)
def test_chunks_give_the_logits_of_the_whole_prompt(target: Target, models: Models) -> None:
    whole, chunked = run(models(target.name))[1], run(models(target.name), chunk=5)[1]
    assert np.linalg.norm(whole - chunked) <= 0.01 * np.linalg.norm(whole)
    assert np.array_equal(whole.argmax(-1), chunked.argmax(-1))


def decode(session: OrtCudaSession, cache: OrtDeviceCache, ids: np.ndarray, past: np.ndarray) -> FloatArray:
    """Run text alone; logits of the last position."""
    return session.decode(inputs_of(ids, past), cache)


def inputs_of(ids: np.ndarray, past: np.ndarray) -> DecoderInputs:
    last = np.full((len(ids), 1), ids.shape[1] - 1)
    return DecoderInputs.text(ids, past, no_visual_embeds(CONFIG), logits_positions=last)


@pytest.fixture(scope="module")
def folder(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("session") / "engine")


@pytest.fixture()
def session(folder: Path) -> OrtCudaSession:
    """A session of its own, with nothing idle."""
    return OrtCudaSession(folder, Manifest.read(folder), device=CPU)


def test_a_batch_gives_what_its_sequences_give_alone(session: OrtCudaSession) -> None:
    ids = np.random.default_rng(0).integers(0, 100, (3, 6))
    batched = session.new_cache(8, batch=3)
    zero, six = np.zeros(3, np.int64), np.full(3, 6)
    first = decode(session, batched, ids, zero)
    second = decode(session, batched, ids[:, :1], six)
    for row in range(3):
        cache = session.new_cache(8)
        assert np.array_equal(decode(session, cache, ids[row : row + 1], zero[:1])[0], first[row])
        alone = decode(session, cache, ids[row : row + 1, :1], six[:1])[0]
        np.testing.assert_allclose(alone, second[row], atol=0.02)
        for one, several in zip(cache.layer(1), batched.layer(1), strict=True):
            np.testing.assert_allclose(one[0, :, :7], several[row, :, :7], atol=0.01)


def test_steps_of_an_answer_share_one_binding(session: OrtCudaSession) -> None:
    ids = np.arange(5)[None]
    cache = session.new_cache(16)
    decode(session, cache, ids, np.array([0]))
    assert not cache.buffers.steps, "several tokens are not what a step repeats"
    decode(session, cache, ids[:, :1], np.array([5]))
    (step,) = cache.buffers.steps.values()
    decode(session, cache, ids[:, 1:2], np.array([6]))
    assert list(cache.buffers.steps.values()) == [step]


def test_a_step_gives_what_an_uncaptured_call_gives(session: OrtCudaSession) -> None:
    ids = np.array([[7, 8, 9, 10]])
    whole = decode(session, session.new_cache(16), ids, np.array([0]))
    cache = session.new_cache(16)
    for position in range(4):
        last = decode(session, cache, ids[:, position : position + 1], np.array([position]))
    np.testing.assert_allclose(last, whole, atol=0.02)


def test_idle_buffers_serve_the_next_cache_of_their_size(session: OrtCudaSession) -> None:
    ids = np.array([[3, 4, 5]])
    cache = session.new_cache(16)
    fresh = [decode(session, cache, ids, np.array([0])), decode(session, cache, ids[:, :1], np.array([3]))]
    for position in range(4, 12):  # leave something behind
        decode(session, cache, ids[:, :1], np.array([position]))
    buffers = cache.buffers
    other = session.new_cache(16)
    assert other.buffers is not buffers, "they are in use"
    del cache
    gc.collect()
    again = session.new_cache(9)
    assert again.buffers is buffers
    assert np.array_equal(decode(session, again, ids, np.array([0])), fresh[0])
    assert np.array_equal(decode(session, again, ids[:, :1], np.array([3])), fresh[1])


def test_a_cache_of_another_size_frees_the_idle_ones(session: OrtCudaSession) -> None:
    cache = session.new_cache(16)
    idle = weakref.ref(cache.buffers)
    del cache
    gc.collect()
    assert idle() is not None
    larger = session.new_cache(1000)
    assert larger.capacity >= 1000
    gc.collect()
    assert idle() is None


def test_the_largest_logits_are_those_of_the_whole(session: OrtCudaSession) -> None:
    k = min(TARGETS[0].top_k, CONFIG.text.vocab_size)
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    past = np.zeros(2, np.int64)
    everything = decode(session, session.new_cache(8, batch=2), ids, past)
    top = session.decode_top(inputs_of(ids, past), session.new_cache(8, batch=2))
    for row in range(2):
        found = top[row][0]
        assert found.ids.shape == found.values.shape == (k,)
        assert np.array_equal(found.values, np.sort(everything[row, 0])[::-1][:k])
        assert np.array_equal(everything[row, 0, found.ids], found.values)
        assert np.array_equal(found.fetch(), everything[row, 0])


def test_the_largest_logits_of_a_step_are_gone_with_the_next_call(session: OrtCudaSession) -> None:
    cache = session.new_cache(8)
    (row,) = session.decode_top(inputs_of(np.array([[3]]), np.array([0])), cache)[0]
    ids, whole = row.ids.copy(), row.fetch()
    assert whole[ids].tolist() == row.values.tolist()
    session.decode_top(inputs_of(np.array([[9]]), np.array([1])), cache)
    assert np.array_equal(row.ids, ids), "the next call has overwritten what this one returned"
    with pytest.raises(AssertionError, match="an earlier call"):
        row.fetch()


def test_a_chunk_uploads_the_embeddings_that_it_takes(session: OrtCudaSession, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    bind = onnxruntime.IOBinding.bind_input

    def counted(binding: Any, name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        if name == "visual_embeds":
            given.append(shape[1])
        bind(binding, name, device, index, dtype, shape, address)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", counted)
    inputs = inputs_of(np.array([[3, 4, 5, 6]]), np.array([0]))
    embeds = np.random.default_rng(0).normal(size=(CONFIG.num_visual_levels, 50, CONFIG.text.hidden_size))
    rows = np.array([[-1, 30, 31, -1]])
    seen = dataclasses.replace(inputs, visual_rows=rows, visual_embeds=embeds.astype(np.float32))
    found = session.prefill(seen, session.new_cache(8))
    assert given == [2]
    cut = dataclasses.replace(seen, visual_rows=rows - 30 * (rows > 0), visual_embeds=seen.visual_embeds[:, 30:32])
    assert np.array_equal(session.prefill(cut, session.new_cache(8)), found)
    assert not np.array_equal(session.prefill(inputs, session.new_cache(8)), found)


def test_bfloat16_is_read_as_the_upper_half_of_a_float32() -> None:
    device = HostDevice()
    staging = Staging(device, device.new_stream())
    cache = DeviceKVCache(device, staging, 1, (1, 1, 2, 2), "bfloat16")
    bits = np.array([0x3F80, 0xC000, 0x3F00, 0x0000], np.uint16)
    staging.upload(cache.bindings()["past_key_values.0.key"], bits)
    key, value = cache.layer(0)
    assert key.ravel().tolist() == [1.0, -2.0, 0.5, 0.0]
    assert value.ravel().tolist() == [0.0] * 4


# Errors


def test_without_the_provider_nothing_runs_on_the_cpu(folder: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider") as caught:
        Qwen3VLModel.from_engine(folder)
    assert "onnxruntime-gpu" in str(caught.value.remedy)


@pytest.mark.parametrize("missing_bytes", [3_000_000, 1])
def test_too_little_memory_for_a_cache_leaves_nothing_behind_and_says_what_to_lower(
    folder: Path, missing_bytes: int
) -> None:
    device = HostDevice()
    session = OrtCudaSession(folder, Manifest.read(folder), device=dataclasses.replace(CPU, memory=lambda: device))
    before = device.leaks(), device.memory_info()[0]
    cache = session.new_cache(512, batch=4)
    taken_bytes = before[1] - device.memory_info()[0]
    assert taken_bytes > cache.num_bytes > 3_000_000
    session.close()
    del cache
    gc.collect()

    session = OrtCudaSession(folder, Manifest.read(folder), device=dataclasses.replace(CPU, memory=lambda: device))
    device.total_bytes -= before[1] - (taken_bytes - missing_bytes)
    with pytest.raises(CapacityError, match="out of memory") as caught:
        session.new_cache(512, batch=4)
    assert "lower max_context" in str(caught.value.remedy)
    assert (device.leaks(), device.memory_info()[0]) == (before[0], taken_bytes - missing_bytes)
    assert session.new_cache(64).batch == 1, "it goes on"


def test_a_session_that_nobody_holds_is_freed(folder: Path) -> None:
    device = HostDevice()
    session = OrtCudaSession(folder, Manifest.read(folder), device=dataclasses.replace(CPU, memory=lambda: device))
    decode(session, session.new_cache(8), np.array([[3]]), np.array([0]))
    assert device.leaks()
    del session
    gc.collect()
    assert device.leaks() == []


def test_without_cuda_bindings_the_extra_is_named(
    tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match="cuda-bindings, which is not installed") as caught:
        ort_cuda.open_session(tmp_path, Manifest.read(tiny_engine), SessionOptions())
    assert "`cuda`" in str(caught.value.remedy)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_onnx_runtime_records_unless_told_otherwise(
    tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    options: dict[str, Any] = {}

    def opened(path: str, _: Any, providers: list[tuple[str, dict[str, str]]], **__: Any) -> Any:
        options[Path(path).name] = providers[0][1]
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    monkeypatch.setattr(ort_device, "CudaDevice", lambda extra: HostDevice())
    ort_cuda.open_session(tmp_path, Manifest.read(tiny_engine), SessionOptions(cuda_graphs=cuda_graphs))
    assert ("enable_cuda_graph" in options["decoder.onnx"]) == cuda_graphs
    assert "enable_cuda_graph" not in options["vision.onnx"]
    assert all("enable_skip_layer_norm_strict_mode" in each for each in options.values())


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9", CapacityError),
        ("CUDA failure 2: out of memory ; GPU=0", CapacityError),
        ("No such operator", EngineError),
    ],
)
def test_out_of_memory_while_opening_is_a_capacity_error(
    tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, message: str, error: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(error, match=message.split()[0]):
        ort_cuda.OrtCudaSession(tmp_path, Manifest.read(tiny_engine), device=CPU)
