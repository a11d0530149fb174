"""Attention of a decode step, over a cache that lies in slots and is split between programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engines.kernels.dtypes import pointer, power_of_two
from engines.kernels.launch import Argument, Gpu, Launch, Unserved

_MAX_GROUP: Final = 16  # rows of a tensor-core product
_HEAD_DIMS: Final = (16, 32, 64, 128, 256)
_MAX_SPLITS: Final = 32
_WIDTH_OF_SPLIT: Final = 8  # columns of a cached row, over all heads, for which a row gets one split at most
_INVARIANT_BATCH: Final = 2  # whose tiles all batches take

Array = NDArray[Any]


@dataclass(frozen=True)
class Heads:
    """Heads of an attention layer: query head h reads key/value head h // group."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        splits: Programs that share a row's cache, for each key/value head.
        block: Cached rows that a program takes at a time.
        stages: Blocks on their way at a time.
        warps: Warps of a program.
    """

    splits: int
    block: int
    stages: int
    warps: int


def tiles(heads: Heads, batch: int, gpu: Gpu, *, invariant: bool) -> Tiles:
    """Return the tiles for a batch; with `invariant` the same ones for all batches.

    As many programs as multiprocessors for one sequence, twice as many for up to 4, then four times as many: of a
    prototype on an H200 with 512 cached rows and 8 key/value heads, 16 splits were the fastest for one sequence, 8 for
    4 and for 8.
    """
    if invariant:
        batch = _INVARIANT_BATCH
    per_multiprocessor = 1 if batch == 1 else 2 if batch <= 4 else 4
    wanted = per_multiprocessor * gpu.num_sms // (heads.num_kv_heads * batch)
    # Of narrow rows a program has little to read.
    wanted = min(wanted, _MAX_SPLITS, heads.num_kv_heads * heads.head_dim // _WIDTH_OF_SPLIT)
    splits = 1 << max(0, wanted.bit_length() - 1)
    # Two stages of keys and values of 64 rows of 128 take 64 KiB.
    return Tiles(splits, block=64 if heads.head_dim <= 128 else 32, stages=2, warps=4)


def check(heads: Heads) -> None:
    """Raise for heads that the kernel does not serve.

    Raises:
        Unserved: The kernel does not serve them.
    """
    if heads.num_heads % heads.num_kv_heads or heads.group > _MAX_GROUP:
        raise Unserved(
            f"{heads.num_heads} query heads of {heads.num_kv_heads} key/value heads; the kernel takes groups of the "
            f"same size, of at most {_MAX_GROUP}"
        )
    if heads.head_dim not in _HEAD_DIMS:
        raise Unserved(f"heads of {heads.head_dim}; the kernel takes {', '.join(map(str, _HEAD_DIMS))}")


def buffers(heads: Heads, batch: int, gpu: Gpu, *, invariant: bool) -> dict[str, tuple[int, bool]]:
    """Return the scratch memory of a launch, which all layers share: bytes, and whether it begins with zeros."""
    groups = batch * heads.num_kv_heads
    rows = groups * heads.group * tiles(heads, batch, gpu, invariant=invariant).splits
    return {
        "attention_partial": (4 * rows * heads.head_dim, False),
        "attention_peaks": (4 * rows, False),
        "attention_totals": (4 * rows, False),
        "attention_counters": (4 * groups, True),
    }


def launch(
    heads: Heads,
    layer: int,
    q_norm: str,
    k_norm: str,
    batch: int,
    gpu: Gpu,
    *,
    dtype: str,
    eps: float,
    invariant: bool,
    scale: float | None = None,
    qkv: str = "buffer:qkv",
    out: str = "buffer:attn",
) -> Launch:
    """Make the launch of one layer's attention; it reads `buffer:cos` and `buffer:sin`.

    Args:
        heads: The layer's heads.
        layer: Whose cache is read and appended to.
        q_norm: Initializer of the gain [D] of each query head.
        k_norm: Initializer of the gain [D] of each key head.
        batch: Rows of the step.
        gpu: Where it runs.
        dtype: Of activations, gains and cache, `float16` or `bfloat16`.
        eps: Of both norms.
        invariant: Whether a row's bits may not depend on the batch.
        scale: Of the scores; 1 / sqrt(D) by default.
        qkv: Source of [B, (H + 2 KVH) D]: queries, keys, values.
        out: Source of [B, H D].

    Raises:
        Unserved: The kernel does not serve these heads or this type.
    """
    check(heads)
    half = pointer(dtype)
    cut = tiles(heads, batch, gpu, invariant=invariant)
    factor = heads.head_dim**-0.5 if scale is None else scale
    arguments = {
        "qkv": Argument(half, qkv),
        "q_norm": Argument(half, f"weight:{q_norm}"),
        "k_norm": Argument(half, f"weight:{k_norm}"),
        "cos": Argument("*fp32", "buffer:cos"),
        "sin": Argument("*fp32", "buffer:sin"),
        "lengths": Argument("*i64", "step:past_lengths"),
        "slots": Argument("*i64", "step:slots"),
        "keys": Argument(half, f"key:{layer}"),
        "values": Argument(half, f"value:{layer}"),
        "out": Argument(half, out),
        "partial": Argument("*fp32", "buffer:attention_partial"),
        "peaks": Argument("*fp32", "buffer:attention_peaks"),
        "totals": Argument("*fp32", "buffer:attention_totals"),
        "counters": Argument("*i32", "buffer:attention_counters"),
        "capacity": Argument("i32", "capacity"),
        "eps": Argument("fp32", eps),
        "scale": Argument("fp32", factor / math.log(2.0)),
    }
    constants = _constants(heads, cut)
    grid = (cut.splits, heads.num_kv_heads, batch)
    return Launch("attention", "attention", arguments, constants, grid, cut.warps, cut.stages)


def _constants(heads: Heads, cut: Tiles) -> dict[str, int]:
    return {
        "H": heads.num_heads,
        "KVH": heads.num_kv_heads,
        "PADDED": power_of_two(heads.group),
        "D": heads.head_dim,
        "SPLITS": cut.splits,
        "BLOCK": cut.block,
        "STAGES": cut.stages,
    }


def reference(
    heads: Heads,
    qkv: Array,
    gains: tuple[Array, Array],
    rotary: tuple[Array, Array],
    caches: tuple[Array, Array],
    lengths: Array,
    slots: Array,
    *,
    eps: float,
) -> tuple[Array, Array, Array]:
    """Compute it in float64.

    Args:
        heads: The heads.
        qkv: [B, (H + 2 KVH) D].
        gains: Of queries and keys, [D] each.
        rotary: Cosines and sines [B, D], whose second half repeats the first.
        caches: Keys and values [slots, KVH, T, D].
        lengths: Rows of each sequence's slot that are valid, [B].
        slots: Of each sequence, [B].
        eps: Of the norms.

    Returns:
        Outputs [B, H D], and the keys and values [B, KVH, D] that belong at row `lengths` of the cache.
    """
    batch, dim = len(qkv), heads.head_dim
    cos, sin = (np.asarray(each, np.float64)[:, None] for each in rotary)
    joined = np.asarray(qkv, np.float64).reshape(batch, -1, dim)
    q, k, new_v = np.split(joined, [heads.num_heads, heads.num_heads + heads.num_kv_heads], axis=1)

    def turned(x: Array, gain: Array) -> Array:
        normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(gain, np.float64)
        low, high = np.split(normed, 2, axis=-1)
        half_turned: Array = np.concatenate([-high, low], -1)
        return normed * cos + half_turned * sin

    q, new_k = turned(q, gains[0]), turned(k, gains[1])
    out = np.empty((batch, heads.num_heads, dim))
    for row, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        for head in range(heads.num_heads):
            kv_head = head // heads.group
            rows_k, rows_v = (
                np.concatenate([np.asarray(cache[slot, kv_head, :length], np.float64), new[row, kv_head][None]])
                for cache, new in zip(caches, (new_k, new_v), strict=True)
            )
            scores = rows_k @ q[row, head] * dim**-0.5
            chances = np.exp(scores - scores.max())
            out[row, head] = chances / chances.sum() @ rows_v
    return out.reshape(batch, -1), new_k, new_v
