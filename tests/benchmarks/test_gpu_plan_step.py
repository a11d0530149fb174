"""The section `step` of a GPU pack: the plan's kernels without ONNX Runtime, their times and their bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.events import StreamTimer, timed
from benchmarks.gpu.plan_step import PlanStep, Sizes, groups_of, measure, problems
from benchmarks.gpu.values import Values
from engines.bundle import Bundle
from helpers import host_step
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_kernels import array_at
from helpers.host_plan import BATCHES, TABLE, write_host_plan
from runtime.contract import DecoderInputs
from runtime.decode_plan import FAST, PlannedLaunch
from runtime.errors import EngineError

SIZES = Sizes(past=40, rounds=2, calls=3, repeats=4, kernel_batches=(1, 2, 32))


class CountingTimer:
    """Takes a millisecond for everything, and counts what was enqueued."""

    def __init__(self) -> None:
        self.num_rounds = 0

    def ms(self, enqueue: Callable[[], object]) -> float:
        self.num_rounds += 1
        enqueue()
        return 6.0


@pytest.fixture(scope="module")
def engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("planned") / "demo-ort-cuda-fp16")
    return write_host_plan(folder)


def measured(engine: Path, tmp_path: Path) -> dict[str, Any]:
    device, values = HostDevice(), Values(tmp_path / "values.json")
    step = PlanStep(engine, device, SIZES.past)
    measure(step, values, CountingTimer(), SIZES)
    step.close()
    assert device.leaks() == []
    return values


def test_everything_is_measured_and_no_bit_differs(engine: Path, tmp_path: Path) -> None:
    values = measured(engine, tmp_path)
    batches = [str(batch) for batch in BATCHES]
    for name in ("step", "invariant_step"):
        assert {batch: each["median_ms"] for batch, each in values[name].items()} == dict.fromkeys(batches, 2.0)
    assert values["other_bits"] == dict.fromkeys(batches, 0)
    assert values["not_invariant"] == dict.fromkeys(batches[1:], 0)
    assert values["problems"] == []


def test_kernels_are_timed_by_their_launches_with_the_weights_that_they_read(engine: Path, tmp_path: Path) -> None:
    kernels = measured(engine, tmp_path)["kernels"]
    assert set(kernels) == {"1", "2"}  # of those that the plan has
    assert {row["name"] for row in kernels["2"]} == {"embed_rows", "whole_step"}
    table = next(each.num_bytes for name, each in PlanStep(engine, HostDevice(), 8).weights.items() if name == TABLE)
    for row in kernels["2"]:
        assert (row["grid"], row["num_launches"], row["us"]) == ([2, 1, 1], 1, 2000.0)
        assert (row["weight"], row["weight_bytes"]) == (TABLE, table)


def test_launches_are_grouped_by_kernel_and_grid() -> None:
    launches = tuple(PlannedLaunch(kernel, (x, 1, 1), ("a",)) for kernel, x in [(0, 1), (1, 2), (0, 1), (1, 3)])
    assert [len(each) for each in groups_of(launches).values()] == [2, 1, 1]
    assert sum(groups_of(launches).values(), ()) == (launches[0], launches[2], launches[1], launches[3])


def test_a_step_gives_the_logits_of_its_own_sequences(engine: Path) -> None:
    step = PlanStep(engine, HostDevice(), 40)
    pasts = np.array([40, 27, 14, 1])
    step.io.write_padded(step.inputs(4, pasts), 0, 4)
    step.enqueue(4, FAST)
    logits = step.io.logits(4)
    assert np.isfinite(logits).all() and len(np.unique(logits[:, 0, 0])) == 4
    step.close()


def altered(change: Callable[[int, np.ndarray], None], patch: pytest.MonkeyPatch) -> None:
    """Let the host's step change its logits [B, V], told its batch."""
    plain = host_step.whole_step

    def whole_step(grid: tuple[int, int, int], *arguments: int, config: dict[str, int], **constants: Any) -> None:
        plain(grid, *arguments, config=config, **constants)
        change(grid[0], array_at(arguments[4], (grid[0], config["vocab"]), np.float32))

    patch.setattr(host_step, "whole_step", whole_step)


def test_a_step_whose_bits_depend_on_chance_is_found(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1 << 20))

    def change(batch: int, logits: np.ndarray) -> None:
        if batch == 2 and next(calls) % 2:
            logits[1, 7] = np.nextafter(logits[1, 7], np.float32(np.inf))

    altered(change, monkeypatch)
    values = measured(engine, tmp_path)
    assert values["other_bits"]["1"] == values["other_bits"]["4"] == 0 < values["other_bits"]["2"]
    assert any("repetitions of a step of 2 sequences" in each for each in values["problems"])


def test_a_step_whose_bits_depend_on_the_batch_is_found(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(batch: int, logits: np.ndarray) -> None:
        if batch == 4:
            logits[2, 7] = np.nextafter(logits[2, 7], np.float32(np.inf))

    altered(change, monkeypatch)
    values = measured(engine, tmp_path)
    assert values["other_bits"] == {"1": 0, "2": 0, "4": 0}
    assert values["not_invariant"] == {"2": 0, "4": 1}
    assert values["problems"] == ["the batch-invariant step of 4 sequences gave 1 of them other logits than alone"]


def test_a_plan_of_another_gpu_says_so(engine: Path) -> None:
    device = HostDevice(compute_capability="9.0")
    with pytest.raises(EngineError, match=r"compute capability 8\.9, and this GPU has 9\.0"):
        PlanStep(engine, device, 8)
    assert device.leaks() == []


def test_rounds_of_several_calls_are_divided_by_them() -> None:
    timer, calls = CountingTimer(), []
    found = timed(timer, lambda: calls.append(1), rounds=3, calls=4)
    assert (found["median_ms"], found["n"], len(calls), timer.num_rounds) == (1.5, 3, 16, 4)


def test_without_other_bits_there_is_no_problem() -> None:
    assert problems({"num_repeats": 60, "other_bits": {"1": 0}, "not_invariant": {"2": 0}}) == []


def test_inputs_are_of_distinct_tokens(engine: Path) -> None:
    step = PlanStep(engine, HostDevice(), 8)
    inputs: DecoderInputs = step.inputs(4, np.array([8, 7, 6, 5]))
    assert len(set(inputs.input_ids[:, 0].tolist())) == 4
    assert inputs.past_lengths.tolist() == [8, 7, 6, 5]


class Cuda:
    """The functions of cuda-bindings for events, which keep what they were called with."""

    def __init__(self, fails: str = "") -> None:
        self.cudaError_t = SimpleNamespace(cudaSuccess=OK)
        self.calls: list[tuple[Any, ...]] = []
        self._fails = fails

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self._fails:
                return (SimpleNamespace(name="cudaErrorInvalidValue"),)
            results = {"cudaEventCreate": (f"event {len(self.calls)}",), "cudaEventElapsedTime": (1.25,)}
            return (OK, *results.get(name, ()))

        return call


OK = SimpleNamespace(name="cudaSuccess")


def test_events_stand_before_and_behind_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    timer = StreamTimer(7)
    assert timer.ms(lambda: cuda.calls.append(("work",))) == 1.25
    assert cuda.calls[2:] == [
        ("cudaEventRecord", "event 1", 7),
        ("work",),
        ("cudaEventRecord", "event 2", 7),
        ("cudaEventSynchronize", "event 2"),
        ("cudaEventElapsedTime", "event 1", "event 2"),
    ]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Cuda(fails="cudaEventSynchronize"))
    with pytest.raises(RuntimeError, match="cudaEventSynchronize: cudaErrorInvalidValue"):
        StreamTimer(7).ms(lambda: None)


def test_the_functions_of_events_are_those_of_cuda_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    expected = {
        "cudaEventCreate": "()",
        "cudaEventRecord": "(event, stream)",
        "cudaEventSynchronize": "(event)",
        "cudaEventElapsedTime": "(start, end)",
    }
    assert {name: getattr(real, name).__doc__.splitlines()[0].removeprefix(name) for name in expected} == expected
