"""Attention of a decode step in Triton's interpreter, against float64."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.kernels import attention
from engines.kernels.attention import Heads
from engines.kernels.launch import GPUS, Launch, Unserved
from helpers.interpret import guarded, interpret, untouched

pytest.importorskip("triton")

GPU = GPUS[90]
EPS = 1e-6
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The result is rounded once, and chances and keys once before; a half has 11 bits, a bfloat16 8.
BOUND = {"float16": 2e-3, "bfloat16": 2e-2}


@dataclasses.dataclass
class Case:
    """A step's memory. Rows that nobody may read are NaN."""

    heads: Heads
    lengths: list[int]
    dtype: str = "float16"
    capacity: int = 96
    invariant: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        heads, batch, half = self.heads, len(self.lengths), TYPES[self.dtype]
        num_slots = batch + 2
        self.slots = rng.permutation(num_slots)[:batch]
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        angles = rng.uniform(-3, 3, (batch, heads.head_dim // 2)).astype(np.float32)
        shape = (num_slots, heads.num_kv_heads, self.capacity, heads.head_dim)
        self.caches = [np.full(shape, np.nan, half) for _ in range(2)]
        for row, length in enumerate(self.lengths):
            for cache in self.caches:
                rows = rng.standard_normal((heads.num_kv_heads, length, heads.head_dim))
                cache[self.slots[row], :, :length] = rows.astype(half)
        self.out, self.whole_out = guarded((batch, heads.num_heads * heads.head_dim), half)
        self.memory: dict[str, np.ndarray[Any, Any]] = {
            "buffer:qkv": rng.standard_normal((batch, width)).astype(half),
            "weight:q_norm": rng.uniform(0.5, 1.5, heads.head_dim).astype(half),
            "weight:k_norm": rng.uniform(0.5, 1.5, heads.head_dim).astype(half),
            "buffer:cos": np.tile(np.cos(angles), 2),
            "buffer:sin": np.tile(np.sin(angles), 2),
            "step:past_lengths": np.array(self.lengths, np.int64),
            "step:slots": self.slots.astype(np.int64),
            "key:3": self.caches[0],
            "value:3": self.caches[1],
            "buffer:attn": self.out,
        }
        sizes = attention.buffers(heads, batch, GPU, invariant=self.invariant)
        for name, (num_bytes, is_zeroed) in sizes.items():
            kind = np.int32 if name == "attention_counters" else np.float32
            fill = 0 if is_zeroed else np.nan
            self.memory[f"buffer:{name}"] = np.full(num_bytes // 4, fill, kind)

    @property
    def launch(self) -> Launch:
        return attention.launch(
            self.heads,
            3,
            "q_norm",
            "k_norm",
            len(self.lengths),
            GPU,
            dtype=self.dtype,
            eps=EPS,
            invariant=self.invariant,
        )

    def expected(self) -> tuple[np.ndarray[Any, Any], ...]:
        memory = self.memory
        return attention.reference(
            self.heads,
            memory["buffer:qkv"],
            (memory["weight:q_norm"], memory["weight:k_norm"]),
            (memory["buffer:cos"], memory["buffer:sin"]),
            (self.caches[0].copy(), self.caches[1].copy()),
            np.array(self.lengths),
            self.slots,
            eps=EPS,
        )

    def run(self, launch: Launch | None = None) -> float:
        """Return the largest error over the bound, of the outputs and of the rows appended; raise if others changed."""
        out, new_k, new_v = self.expected()
        before = [cache.copy() for cache in self.caches]
        interpret(launch or self.launch, self.memory, capacity=self.capacity)
        worst = self._error(self.out, out)
        for cache, old, new in zip(self.caches, before, (new_k, new_v), strict=True):
            for row, (slot, length) in enumerate(zip(self.slots, self.lengths, strict=True)):
                worst = max(worst, self._error(cache[slot, :, length], new[row]))
                cache[slot, :, length] = old[slot, :, length]
            np.testing.assert_array_equal(cache.view(np.uint16), old.view(np.uint16))
        assert untouched(self.whole_out)
        assert not self.memory["buffer:attention_counters"].any()
        return worst

    def _error(self, found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
        difference = np.abs(found.astype(np.float64) - wanted) / np.maximum(1.0, np.abs(wanted))
        worst = float(difference.max()) if np.isfinite(difference).all() else np.inf
        return worst / BOUND[self.dtype]


SHAPES = {
    "demo": Heads(6, 2, 64),
    "2B": Heads(16, 8, 128),
    "8B": Heads(32, 8, 128),
    "30B": Heads(32, 4, 128),
    "235B": Heads(64, 4, 128),
    "one": Heads(2, 2, 16),
    "wide": Heads(5, 1, 256),
    "tiny": Heads(4, 2, 32),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(shape: str, dtype: str) -> None:
    assert Case(SHAPES[shape], [37], dtype).run() < 1


@pytest.mark.parametrize("batch", range(1, 9))
def test_batches_with_ragged_lengths(batch: int) -> None:
    lengths = [70, 0, 1, 95, 16, 33, 2, 64][:batch]
    assert Case(SHAPES["demo"], lengths, seed=batch).run() < 1


@pytest.mark.parametrize("batch", [16, 32])
def test_large_batches(batch: int) -> None:
    assert Case(SHAPES["tiny"], [(11 * row) % 61 for row in range(batch)], seed=batch).run() < 1
