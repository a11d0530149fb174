"""Weights in NVIDIA's 4-bit floats, in the layout of ONNX's block DequantizeLinear.

Shapes: N rows (outputs) and K columns (inputs) of a weight, J = ceil(K / 16) blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import pack_codes
from engines.quantize.float8 import NVFP4_BLOCK, nvfp4_global_scale, quantize_blocks_nvfp4
from engines.quantize.tensors import ProducedTensor, map_ahead, row_chunks
from engines.weights import StreamedTensor

_BITS = 4


class Nvfp4Weight:
    """A weight [N, K] as E2M1 codes, with an E4M3 scale for each 16 along K and one scale for all of these.

    Transposed to [J · 16, N], as MatMul takes it; padding is zero. The weight is read twice: its largest magnitude is
    needed before its first code. The codes of the whole weight are in memory while it is written, a byte each.

    Attributes:
        codes: FLOAT4E2M1 [J · 16, N], two a byte, the first in the low half.
        block_scales: FLOAT8E4M3FN [J, N].
        global_scale: float32, a scalar that float16 holds.
    """

    def __init__(self, source: StreamedTensor) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self._num_blocks = source, -(-num_columns // NVFP4_BLOCK)
        self._block_scales: list[NDArray[Any]] = []
        self._global_scale: float | None = None
        shape, name = (self._num_blocks, num_rows), str(source.name)
        self.codes = ProducedTensor(
            f"{name}.f4", (shape[0] * NVFP4_BLOCK, num_rows), ir.DataType.FLOAT4E2M1, self._transpose
        )
        self.block_scales = ProducedTensor(
            f"{name}.block_scales", shape, ir.DataType.FLOAT8E4M3FN, self._take_block_scales
        )
        self.global_scale = ProducedTensor(f"{name}.global_scale", (), ir.DataType.FLOAT, self._take_global_scale)

    def _scale(self) -> float:
        if self._global_scale is None:
            largest = max(float(np.abs(rows_RK).max()) for rows_RK in row_chunks(self._source))
            self._global_scale = nvfp4_global_scale(largest)
        return self._global_scale

    def _transpose(self) -> Iterator[NDArray[Any]]:
        num_padded, num_rows = (int(n) for n in self.codes.shape.numpy())
        codes_KN = np.empty((num_padded, num_rows), np.uint8)
        self._block_scales = []
        self._scale()
        done = 0
        for codes_RK, scales_RJ in map_ahead(self._quantize, row_chunks(self._source)):
            codes_KN[:, done : done + len(codes_RK)] = codes_RK.T
            self._block_scales.append(scales_RJ)
            done += len(codes_RK)
        # Packed in row-major order; with an odd N a byte holds codes of two rows.
        yield pack_codes(codes_KN.reshape(-1), _BITS)

    def _quantize(self, weights_RK: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        num_padded = self._num_blocks * NVFP4_BLOCK
        weights_RK = np.pad(weights_RK, ((0, 0), (0, num_padded - weights_RK.shape[1])))
        codes_MG, scales_M = quantize_blocks_nvfp4(weights_RK.reshape(-1, NVFP4_BLOCK), self._scale())
        return codes_MG.view(np.uint8).reshape(-1, num_padded), scales_M.reshape(-1, self._num_blocks)

    def _take_block_scales(self) -> Iterator[NDArray[Any]]:
        if not self._block_scales:
            for _ in self._transpose():
                pass
        scales_NJ = np.concatenate(self._block_scales)
        self._block_scales = []
        yield np.ascontiguousarray(scales_NJ.T).reshape(-1)

    def _take_global_scale(self) -> Iterator[NDArray[Any]]:
        yield np.asarray([self._scale()], np.float32)
