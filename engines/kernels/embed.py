"""The first launch of a step: the embedding of each row's token, and its rotary table."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engines.kernels.dtypes import pointer
from engines.kernels.launch import FP8, HALF, INT4, INT8, Argument, Gpu, Launch, Unserved, Weight

_BITS: Final = {HALF: 16, FP8: 8, INT8: 8, INT4: 4}
_COLUMNS: Final = 1024

Array = NDArray[Any]


def launch(
    table: Weight,
    batch: int,
    gpu: Gpu,
    *,
    dtype: str,
    head_dim: int,
    axes: str = "weight:axis_of_frequency",
    inv_freq: str = "weight:inv_freq",
    hidden: str = "buffer:hidden",
) -> Launch:
    """Make the launch; it writes `buffer:cos` and `buffer:sin`, float32 [B, head_dim], with the halves repeated.

    Args:
        table: Of `dtype`, or codes in the layout of GatherBlockQuantized: as those of a product, in rows that no block
            fills up; of float8 the last block may be shorter.
        batch: Rows of the step.
        gpu: Where it runs.
        dtype: Of the embedding, `float16` or `bfloat16`.
        head_dim: D, twice the number of frequencies.
        axes: Source of the axis of each frequency, int64 [D / 2].
        inv_freq: Source of the frequencies, float32 [D / 2].
        hidden: Source of [B, K].

    Raises:
        Unserved: The kernel does not read such a table, or turn such heads.
    """
    bits = _BITS.get(table.kind)
    is_integer = table.kind in (INT8, INT4)
    if bits is None or (is_integer and (table.columns * bits % 8 or table.columns % table.block)):
        raise Unserved(f"a table of {table.kind} with {table.columns} columns in blocks of {table.block}")
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise Unserved(f"heads of {head_dim}; the kernel takes powers of two")
    half, scale = pointer(dtype), "*fp32" if table.kind == FP8 else "*fp16"
    arguments = {
        "ids": Argument("*i64", "step:input_ids"),
        "positions": Argument("*i64", "step:position_ids"),
        "table": Argument(half if bits == 16 else "*u8", f"weight:{table.data}"),
        "scales": Argument(scale, f"weight:{table.scales}" if table.scales else "null"),
        "zero_points": Argument("*u8", f"weight:{table.zero_points}" if table.zero_points else "null"),
        "axes": Argument("*i64", axes),
        "inv_freq": Argument("*fp32", inv_freq),
        "hidden": Argument(half, hidden),
        "cos": Argument("*fp32", "buffer:cos"),
        "sin": Argument("*fp32", "buffer:sin"),
    }
    constants = {
        "VOCAB": table.rows,
        "K": table.columns,
        "BITS": bits,
        "GROUP": table.block or table.columns,
        "FLOAT8": int(table.kind == FP8),
        "ZERO_POINTS": int(table.zero_points is not None),
        "D": head_dim,
        "COLUMNS": _COLUMNS,
    }
    return Launch("embed", "embed", arguments, constants, (-(-table.columns // _COLUMNS), batch, 1))


def buffers(batch: int, head_dim: int) -> dict[str, tuple[int, bool]]:
    """Return the memory of the rotary table: bytes, and whether it begins with zeros."""
    return {name: (4 * batch * head_dim, False) for name in ("cos", "sin")}


def dequantize(codes: Array, scales: Array, zero_points: Array | None, *, bits: int, block: int) -> Array:
    """Return the numbers that a table [V, K · bits / 8] in blocks stands for, float64 [V, K].

    Args:
        codes: uint8, low bits first.
        scales: [V, K / block].
        zero_points: uint8, [V, ceil(K / block · bits / 8)], low bits first; None for 2^(bits - 1).
        bits: Of a code.
        block: Codes with one scale.
    """
    steps = _unpack(codes, bits)
    num_blocks = scales.shape[1]
    zeros = (
        np.full(scales.shape, 1 << (bits - 1)) if zero_points is None else _unpack(zero_points, bits)[:, :num_blocks]
    )
    spread = [np.repeat(each.astype(np.float64), block, axis=1) for each in (zeros, scales)]
    table: Array = (steps - spread[0]) * spread[1]
    return table


def reference(table: Array, ids: Array, positions: Array, axes: Array, inv_freq: Array) -> tuple[Array, Array, Array]:
    """Return the embeddings [B, K], cosines and sines [B, D] in float64, of ids [B] and positions [3, B].

    Angles are products in float32, as the graph has them.
    """
    angles = positions[axes].T.astype(np.float32) * inv_freq
    exact = np.concatenate([angles, angles], 1).astype(np.float64)
    return np.asarray(table, np.float64)[ids], np.cos(exact), np.sin(exact)


def _unpack(packed: Array, bits: int) -> Array:
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    whole: Array = np.stack(parts, -1).reshape(len(packed), -1).astype(np.int64)
    return whole
