"""Integer codes for blocks of weights.

Shapes: M blocks, G weights of a block. A block is stored as codes q in 0 … 2^bits - 1, one scale s and one zero
point z; it stands for s · (q - z).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Codes = NDArray[np.uint8]

# Ranges tried for few bits, as shares of a block's own range. A narrower one clips the tails and rounds the rest finer.
# Gaussian weights, blocks of 128, 4 bits, mean squared error: 0.01013 with the whole range alone, 0.0092 with these and
# one refit, 0.0090 with nine and two. With 8 bits the whole range is best.
_SHRINKS = {4: (1.0, 0.9, 0.8, 0.7)}
_REFITS = 1
# Weights of one pass: its arrays stay in a core's own cache, where numpy is twice as fast as beyond.
_PASS_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class QuantizedBlocks:
    """Codes [M, G], scales [M] and zero points [M] of M blocks."""

    codes: Codes
    scales: FloatArray
    zero_points: Codes

    def dequantize(self) -> FloatArray:
        """Return what the codes stand for, [M, G]."""
        steps = self.codes.astype(np.float32) - self.zero_points[:, None]
        return np.asarray(steps * self.scales[:, None], np.float32)


def quantize_blocks(
    weights_MG: FloatArray,
    bits: int,
    *,
    importance_G: FloatArray | None = None,
    shrinks: tuple[float, ...] | None = None,
    symmetric: bool = False,
) -> QuantizedBlocks:
    """Choose scale and zero point of each block by search, to the smallest squared error.

    Each share of the block's range gives a first scale and zero point; then codes and scale are fitted to each other in
    turn (the least-squares scale of given codes is Σ w(q - z) / Σ (q - z)²), and the best pair seen is kept.

    Args:
        weights_MG: Finite weights.
        bits: 2 to 8.
        importance_G: Weight of each column's squared error, such as the mean square of its activation; equal if None.
        shrinks: Shares of the range to try; by default those that suit the bits.
        symmetric: Every zero point is 2^(bits - 1), for kernels that have none.
    """
    num_blocks, size = weights_MG.shape
    tried = shrinks if shrinks is not None else _SHRINKS.get(bits, (1.0,))
    result = QuantizedBlocks(
        np.empty((num_blocks, size), np.uint8), np.empty(num_blocks, np.float32), np.empty(num_blocks, np.uint8)
    )
    step = max(1, _PASS_WEIGHTS // size)
    for start in range(0, num_blocks, step):
        part = slice(start, start + step)
        search = _Search(weights_MG[part], (1 << bits) - 1, importance_G, symmetric)
        for shrink in tried:
            search.try_range(shrink)
        result.codes[part], result.scales[part], result.zero_points[part] = search.best()
    return result


class _Search:
    """The search over the blocks of one pass; its buffers are reused by every try."""

    def __init__(self, weights_MG: FloatArray, top: int, importance_G: FloatArray | None, symmetric: bool) -> None:
        self._w = np.ascontiguousarray(weights_MG)
        self._top = np.float32(top)
        self._middle = np.float32((top + 1) // 2) if symmetric else None
        self._importance = importance_G
        # Zero must be a code: padding, and the blocks that are all zero, stay exact.
        self._low = np.minimum(self._w.min(1), 0)
        self._span = np.maximum(self._w.max(1), 0) - self._low
        self._steps = np.empty_like(self._w)
        self._scratch = np.empty_like(self._w)
        num_blocks = len(self._w)
        self._best_error = np.full(num_blocks, np.inf, np.float32)
        self._best_scale = np.ones(num_blocks, np.float32)
        self._best_zero = np.zeros(num_blocks, np.float32)

    def try_range(self, shrink: float) -> None:
        """Start from a share of each block's range and refit."""
        share, smallest = np.float32(shrink), np.float32(1e-30)
        if self._middle is None:
            scale = np.maximum(self._span * share / self._top, smallest)
            zero = np.clip(np.rint(-self._low * share / scale), 0, self._top)
        else:
            high = self._low + self._span
            widest = np.maximum(-self._low / self._middle, high / (self._top - self._middle))
            scale = np.maximum(widest * share, smallest)
            zero = np.full_like(scale, self._middle)
        for _ in range(_REFITS + 1):
            steps = self._round(scale, zero)
            squares = self._sum(steps, steps)
            products = self._sum(self._w, steps)
            # Σ (w - s·d)² = Σ w² - 2 s Σ w·d + s² Σ d²; Σ w² is the same for every try.
            error = scale * (scale * squares - 2 * products)
            better = error < self._best_error
            self._best_error[better] = error[better]
            self._best_scale[better] = scale[better]
            self._best_zero[better] = zero[better]
            fitted = products / np.maximum(squares, np.float32(1e-30))
            scale = np.where((squares > 0) & (fitted > 0), fitted, scale)

    def best(self) -> tuple[Codes, FloatArray, Codes]:
        """Return codes, scales and zero points of the best tries."""
        steps = self._round(self._best_scale, self._best_zero)
        codes = (steps + self._best_zero[:, None]).astype(np.uint8)
        return codes, self._best_scale, self._best_zero.astype(np.uint8)

    def _round(self, scale: FloatArray, zero: FloatArray) -> FloatArray:
        """Return q - z, [M, G], in a reused buffer."""
        steps = self._steps
        np.multiply(self._w, (1 / scale)[:, None], out=steps)
        np.rint(steps, out=steps)
        np.maximum(steps, -zero[:, None], out=steps)
        np.minimum(steps, (self._top - zero)[:, None], out=steps)
        return steps

    def _sum(self, a: FloatArray, b: FloatArray) -> FloatArray:
        """Return Σ a·b over each block, weighted by the importance."""
        if self._importance is not None:
            b = np.multiply(b, self._importance, out=self._scratch)
        return np.asarray(np.einsum("mg,mg->m", a, b), np.float32)


def quantize_rows_int8(weights_NK: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """Give each row one scale, symmetric about zero: codes [N, K] in -127 … 127 and scales [N].

    -128 stays unused, so that a row and its negative have the same codes.
    """
    largest = np.abs(weights_NK).max(1)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    codes = np.rint(weights_NK / scales[:, None]).astype(np.int8)
    return codes, scales


def pack_codes(codes: Codes, bits: int) -> Codes:
    """Pack codes along the last axis, the first code in the lowest bits; 8 // bits of them share a byte."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], -1)
    packed: NDArray[Any] = codes[..., 0::per_byte].copy()
    for i in range(1, per_byte):
        packed |= codes[..., i::per_byte] << np.uint8(i * bits)
    return packed
