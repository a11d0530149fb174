"""Every session runs a part of the slots of one KV cache: each sequence gets what it gets in a cache of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.sessions.tensorrt as tensorrt_session
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers.engines import build
from helpers.garbage import set_aside
from helpers.host_cuda import HostDevice
from helpers.host_engine import build_host_engine
from helpers.host_graphs import HostGraphs
from qwen3vl_export.eager import open_eager
from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds
from runtime.cuda import Pieces
from runtime.decode_step import padded_batch
from runtime.errors import EngineError
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig
from runtime.ort_device import Device
from runtime.session import KVCache, SessionOptions, open_session
from runtime.sessions.ort_cuda import OrtCudaSession

CAPACITY, SLOTS = 32, 4
PROMPTS = [[16, 17, 18], [20], [21, 22, 23, 24, 25, 26, 27], [30, 31]]
NEW = [[40, 50, 60], [41, 51, 61], [42, 52, 62], [43, 53, 63]]
KINDS = ["ort_cpu", "eager", "ort_cuda", "tensorrt"]
ON_GPU = ["ort_cuda", "tensorrt"]
CUDA = "ort_cuda on a GPU"


@dataclass
class Bench:
    """A session, and what its logits may be off by; of those on a GPU, the host implementation that they run on."""

    session: Any
    config: ModelConfig
    tolerance: float
    device: HostDevice | None = None
    graphs: HostGraphs | None = None

    def inputs(self, rows: list[list[int]], pasts: list[int]) -> DecoderInputs:
        """Text behind what the cache holds; each token gets logits."""
        return DecoderInputs.text(np.array(rows), np.array(pasts), no_visual_embeds(self.config))

    def alone(self, prompt: list[int], new: list[int]) -> FloatArray:
        """Logits of every token of one sequence in a cache of its own, [tokens, vocab]."""
        cache = self.session.new_cache(CAPACITY)
        logits = [self.session.prefill(self.inputs([prompt], [0]), cache)[0]]
        steps = [self.inputs([[token]], [len(prompt) + i]) for i, token in enumerate(new)]
        logits += [self.session.decode(step, cache)[0] for step in steps]
        return np.concatenate(logits)

    def filled(self, slots: int = SLOTS) -> KVCache:
        """A cache whose slots hold the prompts."""
        cache: KVCache = self.session.new_cache(CAPACITY, slots)
        for slot, prompt in enumerate(PROMPTS[:slots]):
            self.session.prefill(self.inputs([prompt], [0]), cache, slot)
        return cache

    def step(self, cache: KVCache, num_running: int, index: int, batch: int) -> FloatArray:
        """Logits of one new token of slots 0 … num_running - 1, in a batch that others fill up; [B, vocab].

        A padding row writes behind the prompt of its slot, which is all that such a slot holds.
        """
        pasts = [len(prompt) + (index if slot < num_running else 0) for slot, prompt in enumerate(PROMPTS[:batch])]
        tokens = [[new[index]] if slot < num_running else [9] for slot, new in enumerate(NEW[:batch])]
        return np.asarray(self.session.decode(self.inputs(tokens, pasts), cache)[:, 0])

    def check(self, found: FloatArray, expected: FloatArray) -> None:
        np.testing.assert_allclose(found, expected, atol=self.tolerance, rtol=0)
        assert np.array_equal(found.argmax(-1), expected.argmax(-1))

    def check_steps(self, num_running: int, cache: KVCache | None = None) -> KVCache:
        """Run the first slots step by step, in the batch that the session asks for."""
        cache = cache or self.filled()
        batch = self.session.decode_batch(num_running, SLOTS)
        assert num_running <= batch <= SLOTS
        expected = [self.alone(PROMPTS[slot], NEW[slot])[len(PROMPTS[slot]) :] for slot in range(num_running)]
        for index in range(len(NEW[0])):
            found = self.step(cache, num_running, index, batch)
            self.check(found[:num_running], np.stack([logits[index] for logits in expected]))
        return cache


@pytest.fixture(scope="module")
def folders(demo_bundle: Bundle, demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = {"ort_cpu": demo_engine}

    def folder(kind: str) -> Path:
        if kind not in made:
            output = tmp_path_factory.mktemp(kind) / "engine"
            if kind == "ort_cuda":
                made[kind] = build(demo_bundle, "ort-cuda-fp16", output)
            else:
                options = BuildOptions(max_context=CAPACITY, max_batch=SLOTS, prefill_chunk=8, patch_buckets=(64,))
                made[kind] = build_host_engine(demo_bundle, output, options)
            set_aside()  # tests here search for garbage
        return made[kind]

    return folder


@pytest.fixture(params=[*KINDS, pytest.param(CUDA, marks=pytest.mark.gpu)])
def bench(
    request: pytest.FixtureRequest, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    kind = request.param
    if kind == "eager":
        model = open_eager("demo")
        yield Bench(model.session, model.config, 1e-3)
        return
    folder = folders("ort_cuda" if kind == CUDA else kind)
    manifest = Manifest.read(folder)
    if kind == CUDA:
        try:
            session: Any = open_session(folder, manifest, SessionOptions())
        except EngineError as error:
            pytest.skip(error.message)
        yield Bench(session, manifest.model, 0.03)
        return
    if kind == "ort_cpu":
        yield Bench(open_session(folder, manifest, SessionOptions(threads=1)), manifest.model, 1e-3)
        return
    device = HostDevice()
    if kind == "ort_cuda":
        graphs = HostGraphs(monkeypatch)
        on_cpu = Device("CPUExecutionProvider", "cpu", lambda: device, decoder_options={"enable_cuda_graph": "1"})
        made = Bench(OrtCudaSession(folder, manifest, device=on_cpu), manifest.model, 0.03, device, graphs)
    else:
        monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
        session = open_session(folder, manifest, SessionOptions())
        made = Bench(session, manifest.model, 0.03, device)
    yield made
    gc.collect()
    made.session.close()
    assert device.leaks() == []


only = pytest.mark.parametrize("bench", ON_GPU, indirect=True)


@pytest.mark.parametrize("num_running", range(1, SLOTS + 1))
def test_the_first_slots_step_as_their_sequences_do_alone(bench: Bench, num_running: int) -> None:
    bench.check_steps(num_running)


def test_padding_rows_are_harmless_to_the_slots_behind(bench: Bench) -> None:
    cache = bench.filled()
    held = [cache.layer(index) for index in range(bench.config.text.num_layers)]
    expected = [bench.alone(prompt, new)[len(prompt) :] for prompt, new in zip(PROMPTS, NEW, strict=True)]
    for index in range(len(NEW[0])):
        found = bench.step(cache, 2, index, SLOTS)
        bench.check(found[:2], np.stack([logits[index] for logits in expected[:2]]))
    for index, before in enumerate(held):
        for slot in (2, 3):
            valid = (slot, slice(None), slice(len(PROMPTS[slot])))
            for now, then in zip(cache.layer(index), before, strict=True):
                assert np.array_equal(now[valid], then[valid])
    # The slots that were waiting go on as if nothing had been.
    for slot in (2, 3):
        past = len(PROMPTS[slot])
        for index, token in enumerate(NEW[slot]):
            logits = bench.session.decode(bench.inputs([[token]], [past + index]), cache, slot)
            bench.check(logits[0], expected[slot][index : index + 1])


def test_a_prompt_in_chunks_a_draft_and_a_step_run_in_any_slot(bench: Bench) -> None:
    prompt, draft = PROMPTS[2], NEW[2]
    expected = bench.alone(prompt, draft)
    for slot in (0, 2, 3):
        cache = bench.filled()
        # Over what the slot held before.
        found = [bench.session.prefill(bench.inputs([prompt[:4]], [0]), cache, slot)[0]]
        found += [bench.session.prefill(bench.inputs([prompt[4:]], [4]), cache, slot)[0]]
        found += [bench.session.decode(bench.inputs([draft[:2]], [len(prompt)]), cache, slot)[0]]
        found += [bench.session.decode(bench.inputs([draft[2:]], [len(prompt) + 2]), cache, slot)[0]]
        bench.check(np.concatenate(found), expected)
        for other in {0, 1, 2, 3} - {slot}:
            logits = bench.session.decode(bench.inputs([NEW[other][:1]], [len(PROMPTS[other])]), cache, other)
            bench.check(logits[0], bench.alone(PROMPTS[other], NEW[other][:1])[-1:])


def test_two_slots_from_the_middle_step_together(bench: Bench) -> None:
    cache = bench.filled()
    found = bench.session.decode(bench.inputs([NEW[1][:1], NEW[2][:1]], [len(PROMPTS[1]), len(PROMPTS[2])]), cache, 1)
    expected = [bench.alone(PROMPTS[slot], NEW[slot][:1])[-1] for slot in (1, 2)]
    bench.check(found[:, 0], np.stack(expected))


@pytest.mark.parametrize("slot", [0, 1])
def test_the_largest_logits_are_those_of_a_slots_row(bench: Bench, slot: int) -> None:
    if not hasattr(bench.session, "decode_top"):
        pytest.skip("this session does not find the largest logits")
    first, second = bench.filled(), bench.filled()
    slots = range(slot, slot + 2)
    inputs = bench.inputs([NEW[s][:1] for s in slots], [len(PROMPTS[s]) for s in slots])
    rows = bench.session.decode(inputs, first, slot)
    for row, (top,) in zip(rows, bench.session.decode_top(inputs, second, slot), strict=True):
        assert np.array_equal(top.fetch(), row[0])
        assert np.array_equal(top.values, np.sort(row[0])[::-1][: len(top.values)])
        assert np.array_equal(row[0][top.ids], top.values)


# Rows between slots


def check_swap(bench: Bench) -> None:
    """Exchange sequences of 3 and 7 rows, and step both in their new slots."""
    cache = bench.filled()
    layers = range(bench.config.text.num_layers)
    before = [cache.layer(index) for index in layers]
    cache.swap_rows(0, 2, 7)
    order = [2, 1, 0, 3]
    for index in layers:
        for now, then in zip(cache.layer(index), before[index], strict=True):
            assert np.array_equal(now[:, :, :7], then[order, :, :7])
            assert np.array_equal(now[:, :, 7:], then[:, :, 7:]), "rows behind those that were asked for"
    pasts = [len(PROMPTS[slot]) for slot in order]
    found = bench.session.decode(bench.inputs([NEW[slot][:1] for slot in order], pasts), cache)
    bench.check(found[:, 0], np.stack([bench.alone(PROMPTS[slot], NEW[slot][:1])[-1] for slot in order]))


def test_rows_are_exchanged(bench: Bench) -> None:
    check_swap(bench)


def test_rows_are_copied_and_the_source_keeps_them(bench: Bench) -> None:
    cache = bench.filled()
    layers = range(bench.config.text.num_layers)
    before = [cache.layer(index) for index in layers]
    cache.copy_rows(2, 1, 5)
    for index in layers:
        for now, then in zip(cache.layer(index), before[index], strict=True):
            expected = then.copy()
            expected[1, :, :5] = then[2, :, :5]
            assert np.array_equal(now, expected)
    # The copy goes on as the source would, with another end.
    end = PROMPTS[2][5:]
    logits = bench.session.prefill(bench.inputs([end], [5]), cache, 1)
    bench.check(logits[0], bench.alone(PROMPTS[2], [])[5:])


def test_nothing_is_moved_where_nothing_is_asked_for(bench: Bench) -> None:
    cache = bench.filled()
    before = cache.layer(0)
    for move in (cache.copy_rows, cache.swap_rows):
        move(1, 1, 5)
        move(0, 2, 0)
    for now, then in zip(cache.layer(0), before, strict=True):
        assert np.array_equal(now, then)


@only
def test_rows_do_not_pass_through_the_host(bench: Bench) -> None:
    assert bench.device is not None
    cache = bench.filled()
    bench.device.take_events()
    cache.swap_rows(0, 3, 2)
    num_buffers = 2 * bench.config.text.num_layers
    assert bench.device.take_events() == ["copy_pieces"] * 3 * num_buffers + ["synchronize"]
    cache.copy_rows(0, 3, 2)
    assert bench.device.take_events() == ["copy_pieces"] * num_buffers + ["synchronize"]


@only
def test_a_swap_that_forgets_the_values_shows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = HostDevice.copy_pieces, iter(range(10_000))

    def keys_alone(device: HostDevice, target: Pieces, source: Pieces, *sizes: int) -> None:
        if next(calls) // 3 % 2 == 0:  # three copies of a layer's keys, then of its values
            copy(device, target, source, *sizes)

    monkeypatch.setattr(HostDevice, "copy_pieces", keys_alone)
    with pytest.raises(AssertionError):
        check_swap(bench)


@only
def test_a_swap_that_is_not_waited_for_shows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.device is not None
    cache = bench.filled()
    device = bench.device
    with monkeypatch.context() as patch:
        patch.setattr(HostDevice, "synchronize", lambda *_: None)
        cache.swap_rows(0, 2, 7)
    assert any(event == "copy_pieces" for event in device.events)
    address = next(iter(cache_addresses(cache).values()))
    shape = SLOTS, bench.config.text.num_kv_heads, cache.capacity, bench.config.text.head_dim
    before = device.view(address, shape, np.float16).copy()
    cache.swap_rows(0, 1, 0)  # waits for what is enqueued
    assert not np.array_equal(device.view(address, shape, np.float16), before)


def cache_addresses(cache: Any) -> dict[str, int]:
    held = cache if hasattr(cache, "bindings") else cache.buffers.cache
    return dict(held.bindings())


# Graphs


def recorded(bench: Bench, cache: Any) -> list[int]:
    """Batches of the graphs that there are."""
    return bench.graphs.recorded if bench.graphs is not None else sorted(cache.graphs)


@only
def test_a_step_is_recorded_once_for_each_batch_and_cache(bench: Bench) -> None:
    assert bench.device is not None
    cache = bench.filled()
    bench.device.take_events()
    for _ in range(2):
        for num_running in (1, 2, 3, 4):
            for index in range(2):
                bench.step(cache, num_running, index, bench.session.decode_batch(num_running, SLOTS))
    assert recorded(bench, cache) == [1, 2, 4]
    assert bench.session.decode_recorded is True
    if bench.graphs is not None:
        assert [batch for batch in bench.graphs.runs if batch] == 2 * [1, 1, 2, 2, 4, 4, 4, 4]
        del cache
        gc.collect()
        assert bench.graphs.recorded == [1, 2, 4], "they serve the next cache of this size"
        bench.session.new_cache(1000)
        assert bench.graphs.recorded == [], "a graph goes with its buffers"
    else:
        events = bench.device.take_events()
        # The first step of a size sets TensorRT up; that of one sequence was the prompt of one token.
        assert (events.count("begin_capture"), events.count("launch")) == (3, 16 - 2)
        del cache
        gc.collect()
        assert "graph" not in bench.device.leaks(), "a graph goes with its cache"


@only
def test_steps_of_unusual_sizes_and_of_other_slots_are_not_recorded(bench: Bench) -> None:
    assert bench.device is not None
    cache = bench.filled()
    for _ in range(3):
        bench.step(cache, 3, 0, 3)
        bench.session.decode(bench.inputs([NEW[1][:1]], [len(PROMPTS[1])]), cache, 1)
        bench.session.decode(bench.inputs([NEW[0][:2]], [len(PROMPTS[0])]), cache, 0)
    assert recorded(bench, cache) == []
    assert "launch" not in bench.device.events


@only
def test_recorded_steps_take_turns_with_steps_of_other_slots(bench: Bench) -> None:
    """A recorded step keeps its addresses while others of its shape run elsewhere."""
    cache, other = bench.filled(), bench.filled()
    alone = [bench.alone(prompt, new)[len(prompt) :] for prompt, new in zip(PROMPTS, NEW, strict=True)]
    for index in range(len(NEW[0])):
        for each in (cache, other):
            for slot in (0, 2):
                step = bench.inputs([[NEW[slot][index]]], [len(PROMPTS[slot]) + index])
                bench.check(bench.session.decode(step, each, slot)[0], alone[slot][index : index + 1])
    # ONNX Runtime has one of each cache that a sequence ran alone in, too.
    assert recorded(bench, cache) == ([1] if bench.graphs is None else [1, 1, 1])


class OfAnySize(dict[int, Any]):
    """Gives the first graph that was kept, whatever the size asked for."""

    def __contains__(self, key: object) -> bool:
        return bool(self)

    def __getitem__(self, key: int) -> Any:
        return next(iter(self.values()))


@only
def test_a_graph_of_another_size_shows(bench: Bench) -> None:
    cache: Any = bench.filled()
    for index in range(2):
        bench.step(cache, 1, index, 1)  # recorded
    if bench.graphs is not None:
        cache.buffers.steps = OfAnySize(cache.buffers.steps)
    else:
        cache.graphs = OfAnySize(cache.graphs)
    with pytest.raises(AssertionError):
        bench.check_steps(4, cache)
    # As the table is, the same steps are right.
    bench.check_steps(4)


@pytest.mark.parametrize(("num", "slots", "batch"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 8), (5, 6, 6), (6, 6, 6)])
def test_a_batch_is_filled_up_to_a_power_of_two_or_to_all_slots(num: int, slots: int, batch: int) -> None:
    assert padded_batch(num, slots) == batch


@pytest.mark.parametrize("kind", ON_GPU)
def test_without_graphs_a_batch_is_not_filled_up(
    kind: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    folder = folders(kind)
    if kind == "ort_cuda":
        session: Any = OrtCudaSession(
            folder, Manifest.read(folder), device=Device("CPUExecutionProvider", "cpu", lambda: device)
        )
    else:
        monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
        session = open_session(folder, Manifest.read(folder), SessionOptions(cuda_graphs=False))
    assert [session.decode_batch(n, 8) for n in (1, 3, 5, 8)] == [1, 3, 5, 8]
    Bench(session, Manifest.read(folder).model, 0.03).check_steps(3)
    assert session.decode_recorded is False
    gc.collect()
    session.close()
    assert device.leaks() == []


# What a scheduler asks before it plans


@only
def test_free_bytes_are_those_of_the_device_and_of_idle_buffers(bench: Bench) -> None:
    assert bench.device is not None
    before = bench.session.free_bytes
    assert before == bench.device.memory_info()[0]
    cache = bench.session.new_cache(CAPACITY, SLOTS)
    num_bytes = cache.num_bytes
    assert before - bench.session.free_bytes >= num_bytes
    del cache
    gc.collect()
    # A small rest stays with idle buffers.
    assert before - bench.session.free_bytes < num_bytes


@pytest.mark.parametrize("bench", KINDS, indirect=True)
def test_what_a_session_says_of_itself(bench: Bench) -> None:
    on_gpu = bench.device is not None
    assert (getattr(bench.session, "free_bytes", None) is not None) == on_gpu
    segments = getattr(bench.session, "max_segments", None)
    assert segments == (1 if on_gpu and bench.graphs is None else None)
