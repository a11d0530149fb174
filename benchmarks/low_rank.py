"""Keys and values of low rank, to compare with a KV cache of few bits: what a projection of each head leaves of them.

A cache of rank r keeps, of each head and row, r coordinates in the place of H channels, in float16 or as codes of 8
bits. The basis is that of the calibration prompts' keys, or values, by singular value decomposition, one for each layer
and head. Whether a product with the basis is folded into the weights beside it changes the work and not the numbers.
Keys are projected as the cache holds them, or before their rotary embedding, as Palu (Chang et al. 2024,
arXiv:2407.21118) does, whose ranks are lower; then each read has to rotate all keys again.

Shapes: K kv heads, T rows, H head dim, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.quantize.cache_ranges import scales_of
from engines.quantize.cache_sensitivity import rounded
from runtime.contract import FloatArray, IntArray
from runtime.model_config import TextConfig


@dataclass(frozen=True)
class Basis:
    """A basis, and how coordinates are kept.

    Attributes:
        directions_KHR: Orthonormal, of each head.
        bits: Of a coordinate, 16 or 8.
        steps_KR: Between two codes of a coordinate.
    """

    directions_KHR: FloatArray
    bits: int
    steps_KR: FloatArray

    @classmethod
    def of(cls, rows: Sequence[FloatArray], bits: int) -> Basis:
        """Return the directions that hold most of some prompts' rows [K, T, H], as many as 4 bits a channel pay for."""
        rank = rows[0].shape[-1] * 4 // bits
        directions = []
        for head in range(len(rows[0])):
            gram_HH = sum(np.asarray(each[head].T @ each[head], np.float64) for each in rows)
            _, vectors_HH = np.linalg.eigh(gram_HH)  # by rising eigenvalue
            directions.append(vectors_HH[:, ::-1][:, :rank])
        directions_KHR = np.asarray(directions, np.float32)
        largest_KR = np.max([np.abs(each @ directions_KHR).max(1) for each in rows], axis=0)
        return cls(directions_KHR, bits, scales_of(largest_KR, 8))

    def kept(self, rows_KTH: FloatArray) -> FloatArray:
        """Return rows as a cache of coordinates keeps them."""
        coordinates_KTR = rounded((rows_KTH @ self.directions_KHR)[None], self.bits, self.steps_KR)[0]
        return np.asarray(coordinates_KTR @ self.directions_KHR.transpose(0, 2, 1))


class Rotation:
    """The rotary embedding of a prompt's rows.

    Args:
        config: Shape of the decoder.
        position_ids: mRoPE positions, [3, 1, T].
    """

    def __init__(self, config: TextConfig, position_ids: IntArray) -> None:
        import torch

        from qwen3vl_export.modeling import rotary_frequencies, rotary_table

        frequencies, axes = map(torch.from_numpy, rotary_frequencies(config))
        cos, sin = rotary_table(torch.from_numpy(position_ids), frequencies, axes)
        self._cos_TH, self._sin_TH = cos[0].numpy(), sin[0].numpy()

    def apply(self, rows_KTH: FloatArray) -> FloatArray:
        """Rotate rows."""
        return self._turned(rows_KTH, self._sin_TH)

    def undo(self, rows_KTH: FloatArray) -> FloatArray:
        """Return what rows were before."""
        return self._turned(rows_KTH, -self._sin_TH)

    def _turned(self, rows_KTH: FloatArray, sin_TH: NDArray[np.float32]) -> FloatArray:
        first, second = np.split(rows_KTH, 2, axis=-1)
        cos_TH = self._cos_TH
        return np.concatenate([first * cos_TH - second * sin_TH, second * cos_TH + first * sin_TH], axis=-1)
