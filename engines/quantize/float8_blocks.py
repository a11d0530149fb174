"""Weights in float8 with a scale for each block, as ONNX Runtime's MatMulBlockQuantizedFp8Weight reads them.

Shapes: N rows (outputs) and K columns (inputs) of a weight, R rows of a part of it, J = ceil(K / G) blocks of a row, G
weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.float8 import E4M3_MAX, FloatArray, to_e4m3
from engines.quantize.tensors import QuantizedWeight, map_ahead, row_chunks
from engines.weights import StreamedTensor


class Float8Weight(QuantizedWeight):
    """A weight [N, K] as E4M3 codes, with a float32 scale for each block along K; the last block may be shorter.

    Args:
        source: The weight.
        block: G.

    Attributes:
        block: G.
        codes: FLOAT8E4M3FN [N, K].
        scales: float32 [N, J]. A code stands for code · scale.
    """

    def __init__(self, source: StreamedTensor, block: int) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self.block = source, block
        codes = ("f8", (num_rows, num_columns), ir.DataType.FLOAT8E4M3FN)
        scales = ("scales", (num_rows, -(-num_columns // block)), ir.DataType.FLOAT)
        super().__init__(str(source.name), [codes, scales])
        self.codes, self.scales = self.tensors

    def num_bytes(self, float_bytes: int) -> int:
        """Return the bytes of both tensors; the scales are float32 in every graph."""
        return sum(each.nbytes for each in self.tensors)

    def quantized(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield codes and scales of some rows."""
        for codes_RK, scales_RJ in map_ahead(
            partial(quantize_blocks_float8, block=self.block), row_chunks(self._source)
        ):
            yield codes_RK.reshape(-1), scales_RJ.reshape(-1)


def quantize_blocks_float8(weights_RK: FloatArray, block: int) -> tuple[NDArray[Any], FloatArray]:
    """Give each block of a row the scale that lets its largest weight be 448: E4M3 codes [R, K] and scales [R, J].

    A block of zeros has the scale 1.
    """
    num_columns = weights_RK.shape[1]
    padded = np.pad(np.abs(weights_RK), ((0, 0), (0, -num_columns % block)))
    largest_RJ = padded.reshape(len(weights_RK), -1, block).max(2)
    # A scale below the least normal number would make codes of a division by zero.
    scales_RJ = np.maximum(largest_RJ / np.float32(E4M3_MAX), np.finfo(np.float32).tiny)
    scales_RJ = np.where(largest_RJ > 0, scales_RJ, np.float32(1))
    return to_e4m3(weights_RK / np.repeat(scales_RJ, block, 1)[:, :num_columns]), scales_RJ
