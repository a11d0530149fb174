"""The section `speed` of a GPU pack: whose kernels ran, and how often the weights were on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.speed import Sizes, measure, problems, run

GB = 10**9
WEIGHTS, CACHE, SIZES = 4 * GB, GB // 10, Sizes(batches=(1,), long_past=0, repeats=2)


class ScriptedEngine:
    """Gives its own kernels up at the first step of a number of sequences."""

    def __init__(self, gives_up_at: int, kernels: str = "own") -> None:
        self.gives_up_at, self.plan_problem, self._kernels = gives_up_at, "", kernels
        self.manifest = SimpleNamespace(weight_bytes=WEIGHTS)
        self.config = SimpleNamespace(text=SimpleNamespace(experts=None))
        self.is_open = True
        self.session = SimpleNamespace(
            new_cache=lambda capacity, batch=1: SimpleNamespace(batch=batch, num_bytes=CACHE),
            vision=lambda inputs: None,
        )
        self.preparation = SimpleNamespace(vision_inputs=lambda image: None)

    @property
    def decode_kernels(self) -> str:
        return "onnxruntime" if self.plan_problem else self._kernels

    def fill(self, cache: Any, length: int) -> None:
        pass

    def decode(self, cache: Any, past: int) -> bool:
        if cache.batch >= self.gives_up_at:
            self.plan_problem = "the decode plan does not run: it differs"
        return True

    def prefill(self, cache: Any, length: int) -> None:
        pass

    def prepared(self, grid: tuple[int, int]) -> Any:
        return SimpleNamespace(prompt=SimpleNamespace(input_ids=[1]), images=[None])

    def first_token(self, prepared: Any, cache: Any) -> int:
        return 1

    def close(self) -> None:
        self.is_open = False


def measured(engine: ScriptedEngine) -> dict[str, Any]:
    values: dict[str, Any] = {"problems": []}
    sizes = Sizes(batches=(1, 8), long_past=0, repeats=2)
    measure(engine, values, lambda *_: None, sizes, decode_only=True)
    return values


def test_a_plan_that_is_given_up_after_the_first_batch_is_a_problem() -> None:
    engine = ScriptedEngine(gives_up_at=8)
    values = measured(engine)
    assert values["decode_kernels"] == "onnxruntime"
    assert problems(engine, values, needs_plan=True) == ["the decode plan does not run: it differs"]
    assert problems(engine, values, needs_plan=False) == []


def test_a_plan_that_runs_is_none() -> None:
    engine = ScriptedEngine(gives_up_at=99)
    values = measured(engine)
    assert values["decode_kernels"] == "own"
    assert problems(engine, values, needs_plan=True) == []
    assert problems(engine, values | {"finite": False}, needs_plan=True) == ["logits that are not numbers"]


class Gpu:
    """The free memory of a GPU: an engine takes some while it is open, and another process some from then on."""

    def __init__(self, taken_bytes: int, others_bytes: int = 0) -> None:
        self._taken, self._others = taken_bytes, others_bytes
        self.engine: ScriptedEngine | None = None

    def open(self, gives_up_at: int = 99, kernels: str = "own") -> ScriptedEngine:
        self.engine = ScriptedEngine(gives_up_at, kernels)
        return self.engine

    def free_bytes(self) -> int:
        if self.engine is None:
            return 80 * GB
        return 80 * GB - self._others - (self._taken if self.engine.is_open else 0)


def found_on(gpu: Gpu, open_engine: Callable[[], Any] | None = None, **ways: bool) -> tuple[list[str], dict[str, Any]]:
    values: dict[str, Any] = {}
    problems = run(Path("no-such"), values, gpu.free_bytes, open_engine or gpu.open, sizes=SIZES, **ways)
    assert values["problems"] == problems
    return problems, values["memory"]


def test_weights_once_are_no_problem() -> None:
    problems, memory = found_on(Gpu(WEIGHTS + GB // 2))
    assert problems == []
    assert memory == {
        "weight_bytes": WEIGHTS,
        "taken_at_open_bytes": WEIGHTS + GB // 2,
        "taken_at_step_bytes": WEIGHTS + GB // 2,
        "cache_bytes": CACHE,
        "kept_at_close_bytes": 0,
    }


def test_weights_twice_are_a_problem_where_own_kernels_share_them() -> None:
    (problem,), memory = found_on(Gpu(2 * WEIGHTS))
    assert "expected them once" in problem and memory["kept_at_close_bytes"] == 0


def test_the_memory_of_another_program_is_told_from_a_second_copy() -> None:
    (problem,), memory = found_on(Gpu(WEIGHTS, others_bytes=6 * GB))
    assert "6.00 GB of device memory were still taken when the engine was closed" in problem
    assert memory["kept_at_close_bytes"] == 6 * GB
    (problem,), _ = found_on(Gpu(2 * WEIGHTS, others_bytes=GB))
    assert "expected them once" in problem


def test_where_they_are_not_shared_a_second_copy_is_none() -> None:
    gpu = Gpu(2 * WEIGHTS)
    assert found_on(gpu, lambda: gpu.open(kernels="onnxruntime"), with_plan=False)[0] == []
    assert found_on(Gpu(2 * WEIGHTS), weights_twice=True)[0] == []


def test_a_plan_that_is_given_up_shares_no_weights_and_is_the_problem() -> None:
    gpu = Gpu(2 * WEIGHTS)
    assert found_on(gpu, lambda: gpu.open(gives_up_at=1))[0] == ["the decode plan does not run: it differs"]


def test_experts_decode_in_onnx_runtime_unless_the_weights_may_be_there_twice() -> None:
    def of_experts(gpu: Gpu) -> ScriptedEngine:
        engine = gpu.open(gives_up_at=1)
        engine.config.text.experts = object()
        return engine

    gpu = Gpu(2 * WEIGHTS)
    assert found_on(gpu, lambda: of_experts(gpu))[0] == []
    problems, _ = found_on(gpu, lambda: of_experts(gpu), weights_twice=True)
    assert problems == ["the decode plan does not run: it differs"]
