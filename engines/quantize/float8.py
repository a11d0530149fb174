"""Codes in 8-bit and 4-bit floats, as NVIDIA's tensor cores multiply them.

E4M3 ("E4M3FN": no infinities) reaches from 2^-9 to 448 with 3 bits after the first (arXiv:2209.05433). E2M1 has the
magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 (OCP Microscaling Formats 1.0).

Scales are float16 in the graph. They are rounded to it here, before the codes are chosen, so that both agree.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_BLOCK = 16
_SMALLEST_HALF = 2.0**-24
# Scales that are tried for a block, over that which lets its largest weight have the code 6; with 1.5 it has 4, and
# those below it finer steps. Mean squared error of Gaussian weights over their mean square: 0.0090 with the first
# alone, 0.0075 with two, 0.0071 with three, 0.0067 with nine.
_NVFP4_STRETCHES = (1.0, 1.5, 0.9)
# Blocks of one pass: its arrays stay in a core's own cache.
_PASS_BLOCKS = 1 << 12


def half_scale(largest: FloatArray, largest_code: float) -> FloatArray:
    """Return the scale that lets a code reach each magnitude, rounded to float16; 1 for 0."""
    scale = np.maximum((largest / np.float32(largest_code)).astype(np.float16), np.float16(_SMALLEST_HALF))
    return np.asarray(np.where(largest > 0, scale.astype(np.float32), np.float32(1)), np.float32)


def to_e4m3(values: FloatArray) -> NDArray[Any]:
    """Round to the nearest E4M3, ties to even; beyond 448 to 448."""
    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


def quantize_rows_float8(weights_NK: FloatArray) -> tuple[NDArray[Any], FloatArray]:
    """Give each row the scale that lets its largest weight be 448: E4M3 codes [N, K] and scales [N]."""
    scales = half_scale(np.abs(weights_NK).max(1), E4M3_MAX)
    return to_e4m3(weights_NK / scales[:, None]), scales


def nvfp4_global_scale(largest: float) -> float:
    """Return the scale of a weight's block scales: that of the block with its largest weight is 448."""
    return float(half_scale(np.asarray([largest], np.float32), E2M1_MAX * E4M3_MAX)[0])


def quantize_blocks_nvfp4(weights_MG: FloatArray, global_scale: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Round blocks of 16 weights: E2M1 codes [M, 16] and E4M3 scales [M], of a few scales the best of each block.

    A block stands for code · float16(scale · global scale), as the graph's two DequantizeLinear compute it.
    """
    codes_MG = np.empty(weights_MG.shape, ml_dtypes.float4_e2m1fn)
    scales_M = np.empty(len(weights_MG), ml_dtypes.float8_e4m3fn)
    for start in range(0, len(weights_MG), _PASS_BLOCKS):
        part = slice(start, start + _PASS_BLOCKS)
        codes_MG[part], scales_M[part] = _search_nvfp4(weights_MG[part], global_scale)
    return codes_MG, scales_M


def nvfp4_steps(scales_M: NDArray[Any], global_scale: float) -> FloatArray:
    """Return what a code of 1 stands for in each block."""
    return np.asarray((scales_M.astype(np.float32) * np.float32(global_scale)).astype(np.float16), np.float32)


def _search_nvfp4(weights_MG: FloatArray, global_scale: float) -> tuple[NDArray[Any], NDArray[Any]]:
    wanted_M = np.abs(weights_MG).max(1) / np.float32(E2M1_MAX) / np.float32(global_scale)
    best_M = np.full(len(weights_MG), np.inf, np.float32)
    codes_MG = np.zeros(weights_MG.shape, ml_dtypes.float4_e2m1fn)
    scales_M = np.zeros(len(weights_MG), ml_dtypes.float8_e4m3fn)
    for stretch in _NVFP4_STRETCHES:
        tried_M = to_e4m3(wanted_M * np.float32(stretch))
        steps_M = nvfp4_steps(tried_M, global_scale)
        # A block whose step is 0 stands for 0, whatever its codes are.
        tried_MG = (weights_MG / np.where(steps_M > 0, steps_M, np.inf)[:, None]).astype(ml_dtypes.float4_e2m1fn)
        errors_MG = tried_MG.astype(np.float32) * steps_M[:, None] - weights_MG
        error_M = np.einsum("mg,mg->m", errors_MG, errors_MG)
        better_M = error_M < best_M
        best_M[better_M], scales_M[better_M], codes_MG[better_M] = (
            error_M[better_M],
            tried_M[better_M],
            tried_MG[better_M],
        )
    return codes_MG, scales_M
