"""How the rows of a weight are split over the lanes of a warp, in the kernels that multiply on tensor cores.

Four lanes share a row. What a lane loads at once is 16 bytes, or less where a block of codes has less than 64 bytes:
what one accumulator adds up has one scale. A unit is up to 128 columns; of halves it is 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.kernels.launch import FP8, HALF, INT4, INT8, Gpu, Unserved, Weight

BITS = {HALF: 16, INT8: 8, FP8: 8, INT4: 4}
_LANES = 4
_COLUMNS_OF_LOAD = 8
"""Halves of x that a lane loads at once."""


@dataclass(frozen=True)
class Tiling:
    """How a product is split.

    Attributes:
        warps: Warps of a program, which share K.
        depth: Units that a warp has requested at any time.
        ahead: Steps of 8 columns that x is requested ahead.
        tiles: Tiles of 16 rows of a program.
    """

    warps: int
    depth: int
    ahead: int
    tiles: int = 1


def unit_constants(weight: Weight, dtype: str, gpu: Gpu) -> dict[str, int | str]:
    """Return the constants of `engines.kernels.triton.row_products` that follow from a weight's format.

    Raises:
        Unserved: Its lanes cannot be loaded: rows that begin between two loads, or blocks of less than 32 columns,
            or of a number of them that is no power of two.
    """
    if weight.block & (weight.block - 1):
        raise Unserved(f"{weight.data}: blocks of {weight.block}; there are kernels for powers of two")
    bits = BITS[weight.kind]
    codes = 128 // bits
    if weight.kind in (INT4, INT8):
        codes = min(codes, weight.block // _LANES)
    if weight.columns % _COLUMNS_OF_LOAD or codes % _COLUMNS_OF_LOAD or (weight.kind == FP8 and weight.columns % codes):
        raise Unserved(f"{weight.data}: rows of {weight.columns} columns, {weight.kind} in blocks of {weight.block}")
    if weight.kind != HALF and dtype != "float16":
        raise Unserved(f"{weight.data}: {weight.kind} times {dtype}; there are kernels for float16")
    if weight.kind == FP8 and weight.block % 128:
        raise Unserved(f"{weight.data}: fp8 in blocks of {weight.block}; there are kernels for multiples of 128")
    unit = codes * _LANES if weight.kind == HALF else min(weight.block, 128)
    scales = 0 if weight.kind == HALF else -(-weight.columns // weight.block)
    padded = weight.columns if weight.kind in (HALF, FP8) else scales * weight.block
    return {
        "KIND": weight.kind,
        "ROW_BYTES": padded * bits // 8,
        "CODES": codes,
        "UNIT": unit,
        "SCALES": scales,
        "PER": 1 if weight.kind == HALF else weight.block // unit,
        "ZP": int(weight.zero_points is not None),
        "CVT": int(gpu.sm >= 89),
    }


def unit_bytes(weight: Weight) -> int:
    """Return the bytes that a lane loads of a unit of a tile."""
    if weight.kind == HALF:
        return 32
    return min(weight.block, 128) * BITS[weight.kind] // 16


def num_units(weight: Weight) -> int:
    """Return the units of a row."""
    unit = 32 if weight.kind == HALF else min(weight.block, 128)
    return -(-weight.columns // unit)


def dequantized(weight: Weight, memory: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return the numbers that a weight stands for, [N, K] or [E, N, K].

    Args:
        weight: The weight.
        memory: Its initializers by name.
    """
    data = memory[weight.data]
    if weight.kind == HALF:
        return data.astype(np.float64)
    assert weight.scales is not None
    scales = memory[weight.scales].astype(np.float64)
    if weight.kind == FP8:
        values = e4m3(data)
    else:
        codes = data.reshape(*scales.shape[:-1], -1)
        values = _unpacked(codes, BITS[weight.kind]).astype(np.float64)
        if weight.zero_points is None:
            values -= 1 << (BITS[weight.kind] - 1)
        else:
            zeros = _unpacked(memory[weight.zero_points], BITS[weight.kind])[..., : scales.shape[-1]]
            values -= np.repeat(zeros, weight.block, -1)
    values = values[..., : weight.columns]
    return np.asarray(values * np.repeat(scales, weight.block, -1)[..., : weight.columns])


def e4m3(data: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the numbers of float8 e4m3 (OCP 8-bit Floating Point Specification, without its NaN)."""
    exponent, mantissa = (data >> 3 & 15).astype(np.int64), (data & 7).astype(np.float64)
    sizes = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.where(data & 128, -sizes, sizes)


def _unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes of bytes, low bits first."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)
