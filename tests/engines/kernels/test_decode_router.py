"""The router of a decode step in Triton's interpreter, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.kernels import router
from engines.kernels.launch import GPUS, INT4, Launch, Unserved, Weight
from helpers.broken_kernels import with_fault
from helpers.interpret import guarded, interpret, untouched

pytest.importorskip("triton")

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPS = 1e-6


class Case:
    """A router and the rows that it routes."""

    def __init__(
        self, experts: int, columns: int, top: int, batch: int, *, dtype: str = "float16", invariant: bool = False
    ) -> None:
        rng = np.random.default_rng(experts + batch)
        half = TYPES[dtype]
        self.top, self.batch, self.dtype, self.invariant = top, batch, dtype, invariant
        self.weight = Weight("half", experts, columns, "w")
        self.ids, self._whole_ids = guarded((batch, top), np.int32)
        self.shares, self._whole_shares = guarded((batch, top), np.float32)
        self.memory: dict[str, np.ndarray[Any, Any]] = {
            "buffer:hidden": rng.standard_normal((batch, columns)).astype(half),
            "weight:n": rng.uniform(0.5, 1.5, columns).astype(half),
            "weight:w": (rng.standard_normal((experts, columns)) / np.sqrt(columns)).astype(half),
        }
        for name, (num_bytes, is_zeroed) in router.buffers(experts, batch, top_k=top).items():
            kind = np.float32 if name in ("router_logits", "expert_weights") else np.int32
            self.memory[f"buffer:{name}"] = np.full(num_bytes // 4, 0 if is_zeroed else 77, kind)
        self.memory |= {"buffer:expert_ids": self.ids, "buffer:expert_weights": self.shares}

    @property
    def launch(self) -> Launch:
        return router.launch(
            self.weight,
            "n",
            self.batch,
            GPUS[90],
            dtype=self.dtype,
            top_k=self.top,
            eps=EPS,
            invariant=self.invariant,
        )

    def check(self, launch: Launch | None = None) -> None:
        memory = self.memory
        interpret(launch or self.launch, memory)
        _, _, logits = router.reference(
            memory["buffer:hidden"], memory["weight:n"], memory["weight:w"], top_k=self.top, eps=EPS
        )
        found = memory["buffer:router_logits"].reshape(logits.shape)
        np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5)
        # The choice is exact for the float32 logits.
        ids = np.argsort(-found, axis=-1, kind="stable")[:, : self.top]
        np.testing.assert_array_equal(self.ids, ids)
        shares = np.exp(np.take_along_axis(found, ids, -1).astype(np.float64))
        np.testing.assert_allclose(self.shares, shares / shares.sum(-1, keepdims=True), rtol=2e-6)
        assert untouched(self._whole_ids) and untouched(self._whole_shares)
        assert not memory["buffer:router_counters"].any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("experts", "columns", "top"), [(8, 192, 2), (128, 2048, 8), (20, 2560, 6), (16, 5120, 1)])
def test_shapes(experts: int, columns: int, top: int, dtype: str) -> None:
    Case(experts, columns, top, 1, dtype=dtype).check()


@pytest.mark.parametrize("batch", [*range(2, 9), 16, 32])
def test_batches(batch: int) -> None:
    Case(7, 192, 2, batch).check()


def test_512_experts() -> None:
    Case(512, 64, 10, 1).check()


def test_all_experts_may_be_chosen() -> None:
    Case(3, 64, 3, 2).check()


def test_the_lower_of_equal_experts_comes_first() -> None:
    case = Case(12, 64, 4, 2)
    case.memory["weight:w"][:] = case.memory["weight:w"][0]
    case.check()
    np.testing.assert_array_equal(case.ids, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(case.shares, np.full((2, 4), 0.25, np.float32))


def test_counters_serve_the_next_layer() -> None:
    case = Case(8, 192, 2, 3)
    case.check()
    case.memory["buffer:hidden"][:] = case.memory["buffer:hidden"][::-1].copy()
    case.check()


def test_invariant_bits_do_not_depend_on_the_batch() -> None:
    step = Case(8, 192, 2, 8, invariant=True)
    step.check()
    for row in (0, 7):
        single = Case(8, 192, 2, 1, invariant=True)
        for name in ("weight:n", "weight:w"):
            single.memory[name][:] = step.memory[name]
        single.memory["buffer:hidden"][:] = step.memory["buffer:hidden"][row : row + 1]
        single.check()
        np.testing.assert_array_equal(
            single.memory["buffer:router_logits"], step.memory["buffer:router_logits"][8 * row :][:8]
        )
        np.testing.assert_array_equal(single.shares[0], step.shares[row])
        assert single.launch.constants == step.launch.constants


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.store(counters + row, 0)", "pass"),
        ("tl.where(place == rank, best, chosen)", "tl.where(place == rank, best - 1, chosen)"),
        ("tl.exp(value - first)", "value - first + 1.0"),
        ("gains[chunk]", "gains[0]"),
        ("/ K + eps", "/ (K + 1) + eps"),
    ],
)
def test_faults_are_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, 700, 2, 2)
    launch = with_fault(case.launch, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        case.check(launch)


def test_other_routers_are_refused() -> None:
    for weight, top in (
        (Weight(INT4, 8, 64, "w", 32, "s"), 2),
        (Weight("half", 513, 64, "w"), 2),
        (Weight("half", 8, 64, "w"), 9),
        (Weight("half", 8, 16384, "w"), 2),
    ):
        with pytest.raises(Unserved):
            router.launch(weight, "n", 1, GPUS[90], dtype="float16", top_k=top, eps=EPS, invariant=False)
