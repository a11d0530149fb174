"""One copy of the weights: what ONNX Runtime reads where it is, and what happens where it reads copies."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines.bundle import Bundle
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import device_of, keep_in_place
from helpers.host_plan import TABLE, stored_weights, write_host_plan
from helpers.plan_session import CONFIG, KERNELS, filled, inputs_of, opened, steps
from runtime.contract import FloatArray
from runtime.decode_plan import DecodePlan
from runtime.device_buffers import Staging
from runtime.device_weights import DeviceWeights
from runtime.manifest import Manifest
from runtime.ort_device import OpenedGraph, open_graph
from runtime.stored_weight import StoredWeight
from runtime.weights_in_place import WeightsInPlace


def test_onnx_runtime_and_the_kernels_read_the_same_memory(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    folder = planned("")
    stream = memory.new_stream()
    weights = DeviceWeights(folder, DecodePlan(folder, Manifest.read(folder)).weights, memory, stream)
    options = onnxruntime.SessionOptions()
    keep_in_place(options)
    weights.give_to(options, "cpu")
    session = onnxruntime.InferenceSession(folder / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    table = memory.view(weights.addresses[TABLE], (CONFIG.text.vocab_size, CONFIG.text.hidden_size), np.float16)
    before = logits_of(session)
    table[5] *= -1
    assert not np.array_equal(logits_of(session), before)
    table[5] *= -1
    assert np.array_equal(logits_of(session), before)


def logits_of(session: onnxruntime.InferenceSession) -> FloatArray:
    shape = (1, CONFIG.text.num_kv_heads, 4, CONFIG.text.head_dim)
    cached = {
        f"past_key_values.{i}.{kind}": np.zeros(shape, np.float16)
        for i in range(CONFIG.text.num_layers)
        for kind in ("key", "value")
    }
    logits: FloatArray = session.run(["logits"], inputs_of([[5]], [0]).arrays() | cached)[0]
    return logits


@pytest.fixture(scope="module")
def coded(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose weights are codes and scales."""
    return build(demo_bundle, "ort-cuda-int4", tmp_path_factory.mktemp("coded") / "engine")


class Bench:
    """A decoder that was given its weights."""

    def __init__(self, folder: Path, *, copies: bool) -> None:
        self.memory = HostDevice()
        self.staging = Staging(self.memory, self.memory.new_stream())
        self.stored: dict[str, StoredWeight] = stored_weights(folder)
        self.weights = DeviceWeights(folder, self.stored, self.memory, self.staging.stream)
        device = device_of(self.memory, copies=copies)
        self.decoder: OpenedGraph = open_graph(folder / "decoder.onnx", device, {}, 1, self.weights)
        self.asked = WeightsInPlace(self.decoder, self.weights, CONFIG, "float16", device, self.memory, self.staging)

    def bytes_of(self, name: str) -> np.ndarray:
        return self.memory.view(self.weights.addresses[name], (self.stored[name].num_bytes,), np.uint8)

    def copied(self) -> set[tuple[int, tuple[int, ...]]]:
        """Kinds of large weights of which no change of any byte shows."""
        found = {}
        session = self.decoder.session
        expected = logits_of(session)
        for name, weight in self.stored.items():
            before = self.bytes_of(name).copy()
            self.bytes_of(name)[:] = 0xFF
            if not np.array_equal(logits_of(session), expected):
                found[weight.onnx_type, weight.shape] = True
            self.bytes_of(name)[:] = before
        return {(each.onnx_type, each.shape) for each in self.stored.values()} - set(found)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_the_copies_that_a_decoder_reads_are_those_that_no_change_of_a_weight_reaches(
    kind: str, copies: bool, request: pytest.FixtureRequest
) -> None:
    bench = Bench(request.getfixturevalue(kind), copies=copies)
    found = bench.asked.copied_bytes()
    large = {each for each in bench.copied() if bytes_of_kind(bench, each) * 64 >= bench.weights.num_bytes}
    assert found == sum(bytes_of_kind(bench, each) for each in large)
    assert (found > 0) == copies
    for name, weight in bench.stored.items():
        data = (request.getfixturevalue(kind) / weight.file).read_bytes()
        assert bench.bytes_of(name).tobytes() == data[weight.offset : weight.offset + weight.num_bytes]
    before = bench.memory.leaks()
    bench.asked.close()
    assert len(bench.memory.leaks()) < len(before)
    bench.weights.close()
    bench.staging.close()
    assert bench.memory.leaks() == ["stream"]


def bytes_of_kind(bench: Bench, kind: tuple[int, tuple[int, ...]]) -> int:
    return sum(each.num_bytes for each in bench.stored.values() if (each.onnx_type, each.shape) == kind)


def test_weights_at_one_place_are_there_once_and_all_bytes_arrive(planned: Callable[[str], Path]) -> None:
    memory, folder = HostDevice(), planned("")
    stored = dict(DecodePlan(folder, Manifest.read(folder)).weights)
    stored["again"] = stored[TABLE]
    stream = memory.new_stream()
    weights = DeviceWeights(folder, stored, memory, stream)
    assert weights.addresses["again"] == weights.addresses[TABLE]
    assert weights.num_bytes == sum(each.num_bytes for each in stored.values()) - stored[TABLE].num_bytes
    data = (folder / "decoder.onnx.data").read_bytes()
    for name, each in stored.items():
        found = memory.view(weights.addresses[name], (each.num_bytes,), np.uint8)
        assert found.tobytes() == data[each.offset : each.offset + each.num_bytes]
    weights.close()
    assert memory.leaks() == ["stream"]


class Crowded(HostDevice):
    """A device whose memory other processes take, or give back, while an engine is opened."""

    def __init__(self, taken_bytes: int) -> None:
        super().__init__(total_bytes=1 << 40)
        self.taken_bytes = taken_bytes

    def new_stream(self) -> int:
        self.total_bytes -= self.taken_bytes
        return super().new_stream()

    def load_module(self, code: bytes) -> int:
        self.total_bytes -= self.taken_bytes
        return super().load_module(code)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Crowded]:
    def make(taken_bytes: int) -> Crowded:
        memory, open_it = Crowded(taken_bytes), onnxruntime.InferenceSession

        def beside_others(path: str, *options: Any, **keywords: Any) -> Any:
            memory.total_bytes -= taken_bytes
            session = open_it(path, *options, **keywords)
            memory.total_bytes -= taken_bytes
            return session

        monkeypatch.setattr(onnxruntime, "InferenceSession", beside_others)
        return memory

    return make


@pytest.mark.parametrize("taken_bytes", [1 << 30, -(1 << 30)])
def test_what_other_processes_take_and_free_is_not_held_against_an_engine(
    planned: Callable[[str], Path], crowd: Callable[[int], Crowded], caplog: pytest.LogCaptureFixture, taken_bytes: int
) -> None:
    with caplog.at_level(logging.WARNING):
        session = opened(planned(""), crowd(taken_bytes))
    assert (session.decode_kernels, caplog.text) == ("own", "")


@pytest.mark.parametrize("taken_bytes", [0, 1 << 30, -(1 << 30)])
@pytest.mark.parametrize("allows", [False, True])
def test_a_second_copy_is_taken_on_request_alone_whatever_others_take_and_free(
    planned: Callable[[str], Path], crowd: Callable[[int], Crowded], caplog: pytest.LogCaptureFixture,
    taken_bytes: int, allows: bool,
) -> None:  # fmt: skip
    memory = crowd(taken_bytes)
    with caplog.at_level(logging.WARNING):
        session = opened(planned(""), memory, copies=True, weights_twice=allows)
    assert "reads a second copy of 0.00 of 0.00 GB of weights" in caplog.text
    assert session.decode_kernels == ("own" if allows else "onnxruntime")
    cache = filled(session)
    memory.take_events()
    steps(session, cache, 1, 0)
    assert set(KERNELS) <= set(memory.take_events()) if allows else not set(KERNELS) & set(memory.take_events())
    del cache, session
    gc.collect()
    assert memory.leaks() == []


def test_a_decoder_without_numbers_opens_without_the_plan(plain: Path, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(plain, tmp_path / "engine")))
    table = stored_weights(folder)[TABLE]
    with (folder / table.file).open("r+b") as file:
        file.seek(table.offset)
        file.write(b"\xff" * table.num_bytes)
    memory = HostDevice()
    session = opened(folder, memory)
    assert "ONNX Runtime's logits are not finite" in str(session.decode_plan_problem)
    session.close()
    assert memory.leaks() == []
