"""Weights in NVIDIA's 4-bit floats, in the layout of ONNX's block DequantizeLinear.

Shapes: N rows (outputs) and K columns (inputs) of a weight, J = ceil(K / 16) blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.float8 import NVFP4_BLOCK, nvfp4_global_scale, quantize_blocks_nvfp4
from engines.quantize.tensors import TransposedWeight, map_ahead, row_chunks
from engines.weights import StreamedTensor


class Nvfp4Weight(TransposedWeight):
    """A weight [N, K] as E2M1 codes, with an E4M3 scale for each 16 along K and one scale for all of these.

    Padding is zero. The weight is read twice: its largest magnitude is needed before its first code.

    Attributes:
        codes: FLOAT4E2M1 [J · 16, N], two a byte, the first in the low half.
        block_scales: FLOAT8E4M3FN [J, N].
        global_scale: float32, a scalar that float16 holds.
    """

    def __init__(self, source: StreamedTensor) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self._num_blocks = source, -(-num_columns // NVFP4_BLOCK)
        super().__init__(
            str(source.name),
            [
                ("f4", (self._num_blocks * NVFP4_BLOCK, num_rows), ir.DataType.FLOAT4E2M1),
                ("block_scales", (self._num_blocks, num_rows), ir.DataType.FLOAT8E4M3FN),
                ("global_scale", (), ir.DataType.FLOAT),
            ],
        )
        self.codes, self.block_scales, self.global_scale = self.tensors
        self._scale = 1.0

    def quantized(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Find the global scale, then yield everything at once."""
        self._scale = nvfp4_global_scale(max(float(np.abs(rows_RK).max()) for rows_RK in row_chunks(self._source)))
        for parts in super().quantized():
            yield *parts, np.asarray([self._scale], np.float32)

    def quantized_rows(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield codes and block scales of some rows."""
        return map_ahead(self._quantize, row_chunks(self._source))

    def _quantize(self, weights_RK: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        num_padded = self._num_blocks * NVFP4_BLOCK
        weights_RK = np.pad(weights_RK, ((0, 0), (0, num_padded - weights_RK.shape[1])))
        codes_MG, scales_M = quantize_blocks_nvfp4(weights_RK.reshape(-1, NVFP4_BLOCK), self._scale)
        return codes_MG.view(np.uint8).reshape(-1, num_padded), scales_M.reshape(-1, self._num_blocks)
