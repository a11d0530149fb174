"""The section `speed` of a GPU pack says whose kernels ran, also where the decode plan is given up on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.speed import Sizes, measure, problems


class ScriptedEngine:
    """Gives its own kernels up at the first step of a number of sequences."""

    def __init__(self, gives_up_at: int) -> None:
        self.gives_up_at, self.plan_problem = gives_up_at, ""
        self.session = SimpleNamespace(new_cache=lambda capacity, batch=1: SimpleNamespace(batch=batch))

    @property
    def decode_kernels(self) -> str:
        return "onnxruntime" if self.plan_problem else "own"

    def fill(self, cache: Any, length: int) -> None:
        pass

    def decode(self, cache: Any, past: int) -> bool:
        if cache.batch >= self.gives_up_at:
            self.plan_problem = "the decode plan does not run: it differs"
        return True


def measured(engine: ScriptedEngine) -> dict[str, Any]:
    values: dict[str, Any] = {"problems": []}
    sizes = Sizes(batches=(1, 8), long_past=0, repeats=2)
    measure(engine, values, lambda *_: None, sizes, decode_only=True)
    return values


def test_a_plan_that_is_given_up_after_the_first_batch_is_a_problem() -> None:
    engine = ScriptedEngine(gives_up_at=8)
    values = measured(engine)
    assert values["decode_kernels"] == "onnxruntime"
    assert problems(engine, values, with_plan=True) == ["the decode plan does not run: it differs"]
    assert problems(engine, values, with_plan=False) == []


def test_a_plan_that_runs_is_none() -> None:
    engine = ScriptedEngine(gives_up_at=99)
    values = measured(engine)
    assert values["decode_kernels"] == "own"
    assert problems(engine, values, with_plan=True) == []
    assert problems(engine, values | {"finite": False}, with_plan=True) == ["logits that are not numbers"]
