"""Attention of a decode step in Triton's interpreter, against float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.kernels import attention
from engines.kernels.attention import Heads
from engines.kernels.launch import GPUS, Gpu, Launch, Unserved
from helpers.broken_kernels import with_fault
from helpers.interpret import guarded, interpret, untouched
from qwen3vl_export.ops import causal_attention

pytest.importorskip("triton")

# Few multiprocessors make few splits, which the interpreter runs one after the other.
SMALL = Gpu(90, 227 << 10, 8)
EPS = 1e-6
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The result is rounded once, and chances, queries and keys once before; a half has 11 bits, a bfloat16 8.
BOUND = {"float16": 2e-3, "bfloat16": 1.6e-2}


@dataclasses.dataclass
class Case:
    """A step's memory. What nobody may read is NaN, and so is scratch memory that need not begin with zeros."""

    heads: Heads
    lengths: list[int]
    dtype: str = "float16"
    capacity: int = 96
    invariant: bool = False
    gpu: Gpu = SMALL
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        heads, batch, half = self.heads, len(self.lengths), TYPES[self.dtype]
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        angles = rng.uniform(-3, 3, (batch, heads.head_dim // 2)).astype(np.float32)
        slots = rng.permutation(batch + 2)[:batch]
        self.memory: dict[str, np.ndarray[Any, Any]] = {
            "buffer:qkv": rng.standard_normal((batch, width)).astype(half),
            "weight:q_norm": rng.uniform(0.5, 1.5, heads.head_dim).astype(half),
            "weight:k_norm": rng.uniform(0.5, 1.5, heads.head_dim).astype(half),
            "buffer:cos": np.tile(np.cos(angles), 2),
            "buffer:sin": np.tile(np.sin(angles), 2),
            "step:past_lengths": np.array(self.lengths, np.int64),
            "step:slots": slots.astype(np.int64),
        }
        for name in ("key:3", "value:3"):
            cache = np.full((batch + 2, heads.num_kv_heads, self.capacity, heads.head_dim), np.nan, half)
            for slot, length in zip(slots, self.lengths, strict=True):
                cache[slot, :, :length] = rng.standard_normal((heads.num_kv_heads, length, heads.head_dim))
            self.memory[name] = cache
        self._add_results()

    def _add_results(self) -> None:
        batch = len(self.lengths)
        self.out, self._whole_out = guarded((batch, self.heads.num_heads * self.heads.head_dim), TYPES[self.dtype])
        self.memory["buffer:attn"] = self.out
        sizes = attention.buffers(self.heads, batch, self.gpu, invariant=self.invariant)
        for name, (num_bytes, is_zeroed) in sizes.items():
            kind = np.int32 if name == "attention_counters" else np.float32
            self.memory[f"buffer:{name}"] = np.full(num_bytes // 4, 0 if is_zeroed else np.nan, kind)

    def alone(self, row: int) -> Case:
        """Return the step of one row, on a copy of the memory."""
        case = Case(self.heads, [self.lengths[row]], self.dtype, self.capacity, self.invariant, self.gpu)
        for name, array in self.memory.items():
            is_shared = name.startswith(("weight:", "key:", "value:"))
            case.memory[name] = array.copy() if is_shared else array[row : row + 1].copy()
        case._add_results()
        return case

    @property
    def launch(self) -> Launch:
        batch, gpu, dtype = len(self.lengths), self.gpu, self.dtype
        return attention.launch(
            self.heads, 3, "q_norm", "k_norm", batch, gpu, dtype=dtype, eps=EPS, invariant=self.invariant
        )

    def run(self, launch: Launch | None = None) -> float:
        """Return the largest error over the bound, of outputs and appended rows; raise if anything else changed."""
        memory = self.memory
        slots, caches = memory["step:slots"], (memory["key:3"], memory["value:3"])
        before = [cache.copy() for cache in caches]
        wanted = attention.reference(
            self.heads,
            memory["buffer:qkv"],
            (memory["weight:q_norm"], memory["weight:k_norm"]),
            (memory["buffer:cos"], memory["buffer:sin"]),
            (before[0], before[1]),
            np.array(self.lengths),
            slots,
            eps=EPS,
        )
        interpret(launch or self.launch, memory, capacity=self.capacity)
        worst = self._error(self.out, wanted[0])
        for cache, old, new in zip(caches, before, wanted[1:], strict=True):
            for row, (slot, length) in enumerate(zip(slots, self.lengths, strict=True)):
                worst = max(worst, self._error(cache[slot, :, length], new[row]))
                old[slot, :, length] = cache[slot, :, length]
            np.testing.assert_array_equal(cache.view(np.uint16), old.view(np.uint16))
        assert untouched(self._whole_out)
        return worst

    def _error(self, found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
        difference = np.abs(found.astype(np.float64) - wanted) / np.maximum(1.0, np.abs(wanted))
        worst = float(difference.max()) if np.isfinite(difference).all() else np.inf
        return worst / BOUND[self.dtype]


DEMO = Heads(6, 2, 64)
SHAPES = {
    "demo": DEMO,
    "2B": Heads(16, 8, 128),
    "8B": Heads(32, 8, 128),
    "235B": Heads(64, 4, 128),
    "no_groups": Heads(2, 2, 16),
    "wide": Heads(5, 1, 256),
    "narrow": Heads(4, 2, 32),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(shape: str, dtype: str) -> None:
    assert Case(SHAPES[shape], [37], dtype).run() < 1


@pytest.mark.parametrize(("outside", "nearest"), [(96, 95), (-1, 0)])
def test_a_length_outside_appends_at_the_nearest_row(outside: int, nearest: int) -> None:
    case = Case(DEMO, [nearest])
    case.memory["step:past_lengths"][0] = outside
    assert case.run() < 1


@pytest.mark.parametrize("batch", range(2, 9))
def test_ragged_lengths_and_permuted_slots(batch: int) -> None:
    assert Case(DEMO, [70, 0, 1, 95, 16, 33, 2, 64][:batch], seed=batch).run() < 1


@pytest.mark.parametrize("batch", [16, 32])
def test_large_batches(batch: int) -> None:
    case = Case(Heads(4, 1, 32), [(11 * row) % 61 for row in range(batch)], gpu=Gpu(86, 99 << 10, 16), seed=batch)
    assert case.launch.grid[0] == 64 // batch
    assert case.run() < 1


def test_no_past() -> None:
    case = Case(DEMO, [0])
    assert case.run() < 1
    new_v = case.memory["buffer:qkv"].reshape(-1, 64)[8:]
    np.testing.assert_array_equal(case.out.reshape(2, 3, 64), np.broadcast_to(new_v[:, None], (2, 3, 64)))


def test_many_splits() -> None:
    case = Case(Heads(3, 1, 256), [1500], gpu=Gpu(90, 227 << 10, 40), capacity=1501)
    assert case.launch.grid == (32, 1, 1)
    assert case.run() < 1


def test_every_split_takes_several_blocks() -> None:
    case = Case(Heads(2, 1, 32), [700, 333], gpu=Gpu(90, 227 << 10, 2), capacity=701)
    assert case.launch.grid == (2, 1, 2)
    assert case.run() < 1


def test_the_last_row_of_a_slot_is_filled() -> None:
    assert Case(DEMO, [95, 95]).run() < 1


def test_counters_serve_the_next_layer() -> None:
    case = Case(DEMO, [40, 7])
    assert case.run() < 1
    first = case.out.copy()
    case.out[:] = 0
    assert case.run() < 1
    np.testing.assert_array_equal(case.out, first)


@pytest.mark.parametrize("batch", [2, 4])
def test_invariant_bits_do_not_depend_on_the_batch(batch: int) -> None:
    step = Case(DEMO, [80, 5, 33, 0][:batch], invariant=True)
    singles = [step.alone(row) for row in range(batch)]
    assert step.run() < 1
    for row, single in enumerate(singles):
        assert single.run() < 1
        np.testing.assert_array_equal(single.out[0], step.out[row])
        assert single.launch.constants == step.launch.constants


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    step, other = Case(DEMO, [80, 5]), Case(DEMO, [80, 61])
    for name, array in step.memory.items():
        if not name.startswith(("step:", "key:", "value:")):
            other.memory[name][:1] = array[:1]
    for name in ("key:3", "value:3"):
        other.memory[name][other.memory["step:slots"][0]] = step.memory[name][step.memory["step:slots"][0]]
    other.memory["weight:q_norm"][:], other.memory["weight:k_norm"][:] = (
        step.memory["weight:q_norm"],
        step.memory["weight:k_norm"],
    )
    step.run(), other.run()
    np.testing.assert_array_equal(step.out[0], other.out[0])
    assert (step.out[1] != other.out[1]).any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.store(counters + group, 0)", "pass"),
        ("appended = cache + past * D + column", "appended = cache + (past + 1) * D + column"),
        ("(slot * KVH + kv_head)", "(row.to(tl.int64) * KVH + kv_head)"),
        ("split * chunk", "split * chunk + 1"),
        ("shrink = tl.exp2(peak - higher)", "shrink = tl.exp2(higher - higher)"),
        ("partner = column ^ (D // 2)", "partner = column ^ 1"),
        (
            "score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1)",
            "score = tl.sum(q.to(tl.float32), axis=1)",
        ),
    ],
)
def test_faults_are_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(DEMO, [90, 41])
    launch = with_fault(case.launch, old, new, tmp_path, monkeypatch)
    try:
        worst = case.run(launch)
        case.out[:] = np.nan
        worst = max(worst, case.run(launch))
    except AssertionError:
        return
    assert worst > 1


@pytest.mark.parametrize("heads", [Heads(34, 2, 128), Heads(5, 2, 64), Heads(4, 2, 96), Heads(4, 2, 512)])
def test_other_heads_are_refused(heads: Heads) -> None:
    with pytest.raises(Unserved, match="the kernel takes"):
        attention.launch(heads, 0, "q", "k", 1, SMALL, dtype="float16", eps=EPS, invariant=False)


def test_other_types_are_refused() -> None:
    with pytest.raises(Unserved, match="float32"):
        attention.launch(DEMO, 0, "q", "k", 1, SMALL, dtype="float32", eps=EPS, invariant=False)


def test_the_reference_is_the_definition_of_the_op() -> None:
    case = Case(SHAPES["narrow"], [9, 0, 30])
    memory, heads, slots = case.memory, case.heads, case.memory["step:slots"]
    widths = [heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim]
    q, k, v = np.split(memory["buffer:qkv"][:, None], [widths[0], sum(widths)], axis=-1)
    gains = memory["weight:q_norm"], memory["weight:k_norm"]
    halves = [memory[f"buffer:{name}"][:, None, : heads.head_dim // 2] for name in ("cos", "sin")]
    caches = memory["key:3"], memory["value:3"]
    lengths = np.array(case.lengths)
    op = causal_attention.reference(
        q, k, v, *gains, *halves, *(cache[slots] for cache in caches), lengths, scale=heads.head_dim**-0.5, epsilon=EPS
    )
    rotary = memory["buffer:cos"], memory["buffer:sin"]
    own = attention.reference(heads, memory["buffer:qkv"], gains, rotary, caches, lengths, slots, eps=EPS)
    np.testing.assert_allclose(own[0], op[0][:, 0], rtol=1e-12, atol=1e-12)
    for found, present in zip(own[1:], op[1:], strict=True):
        appended = np.stack([present[row, :, length] for row, length in enumerate(lengths)])
        np.testing.assert_allclose(found, appended, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "splits"), [(1, 16), (2, 16), (4, 8), (8, 8), (16, 4), (32, 2)])
def test_splits_on_an_h200(batch: int, splits: int) -> None:
    assert attention.tiles(Heads(16, 8, 128), batch, GPUS[90], invariant=False).splits == splits
    assert attention.tiles(Heads(16, 8, 128), batch, GPUS[90], invariant=True).splits == 16
