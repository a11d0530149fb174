"""Random weights of each format, as decoder.onnx stores them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engines.kernels.launch import FP8, HALF, INT4, Weight

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def made_weight(
    kind: str,
    rows: int,
    columns: int,
    block: int = 0,
    *,
    zero_points: bool = False,
    experts: int = 0,
    dtype: str = "float16",
    seed: int = 0,
) -> tuple[Weight, dict[str, NDArray[Any]]]:
    """Return a weight and its initializers by name; with `experts` stacked as QMoE and MoE read them."""
    rng = np.random.default_rng(seed)
    leading = (experts, rows) if experts else (rows,)
    if kind == HALF:
        memory: dict[str, NDArray[Any]] = {"w": rng.normal(0, 0.05, (*leading, columns)).astype(HALVES[dtype])}
        return Weight(kind, rows, columns, "w"), memory
    blocks = -(-columns // block)
    if kind == FP8:
        data = rng.integers(0, 256, (*leading, columns), np.uint8)
        data[data & 127 == 127] = 0  # not a number
        scales = rng.uniform(1e-4, 2e-4, (*leading, blocks)).astype(np.float32)
        return Weight(kind, rows, columns, "w", block, "s"), {"w": data, "s": scales}
    bits = 4 if kind == INT4 else 8
    shape = (*leading, blocks * block * bits // 8) if experts else (*leading, blocks, block * bits // 8)
    memory = {
        "w": rng.integers(0, 256, shape, np.uint8),
        "s": rng.uniform(0.005, 0.02, (*leading, blocks)).astype(np.float16) * np.float16(1 if bits == 4 else 0.0625),
    }
    if zero_points:
        memory["z"] = rng.integers(0, 256, (*leading, -(-blocks * bits // 8)), np.uint8)
    return Weight(kind, rows, columns, "w", block, "s", "z" if zero_points else None), memory
