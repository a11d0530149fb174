"""4-bit weights without zero points, in the layout of ONNX's block DequantizeLinear.

Shapes: N rows (outputs) and K columns (inputs) of a weight, J = ceil(K / G) blocks of a row, G weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import QuantizedBlocks, pack_codes, quantize_blocks
from engines.quantize.imported import GroupQuantizedTensor
from engines.quantize.tensors import ProducedTensor, map_ahead, row_chunks
from engines.weights import ConcatenatedTensor, StreamedTensor

_BITS = 4
_ZERO_POINT = 1 << (_BITS - 1)


class SymmetricWeight:
    """A weight [N, K] as int4 codes in -8 … 7 with one scale for each block along K, transposed to [J · G, N].

    MatMul takes it so, without a Transpose between DequantizeLinear and the product. Padding is zero. The codes of the
    whole weight are in memory while it is written, a byte each, since they are written column by column.

    Codes that a checkpoint or a calibration holds are kept if they are of this format and have no zero point of their
    own; else the weight is rounded anew.

    Attributes:
        codes: INT4 [J · G, N], two a byte, the first in the low half.
        scales: float32 [J, N].
    """

    def __init__(self, source: StreamedTensor, block: int) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self._block, self._num_blocks = source, block, -(-num_columns // block)
        self._scales: list[NDArray[np.float32]] = []
        name, num_padded = str(source.name), self._num_blocks * block
        self.codes = ProducedTensor(f"{name}.s4", (num_padded, num_rows), ir.DataType.INT4, self._transpose)
        self.scales = ProducedTensor(
            f"{name}.scales", (self._num_blocks, num_rows), ir.DataType.FLOAT, self._take_scales
        )

    def _transpose(self) -> Iterator[NDArray[Any]]:
        num_padded, num_rows = (int(n) for n in self.codes.shape.numpy())
        codes_KN = np.empty((num_padded, num_rows), np.uint8)
        self._scales = []
        done = 0
        for quantized in self._quantized_rows():
            codes_RK = quantized.codes.reshape(-1, num_padded)
            codes_KN[:, done : done + len(codes_RK)] = codes_RK.T
            self._scales.append(quantized.scales.reshape(-1, self._num_blocks))
            done += len(codes_RK)
        # Two's complement of code - 8 is the code with its highest bit flipped.
        codes_KN ^= np.uint8(_ZERO_POINT)
        # Packed in row-major order; with an odd N a byte holds codes of two rows.
        yield pack_codes(codes_KN.reshape(-1), _BITS)

    def _quantized_rows(self) -> Iterator[QuantizedBlocks]:
        for part in self._source.parts if isinstance(self._source, ConcatenatedTensor) else (self._source,):
            if isinstance(part, GroupQuantizedTensor) and (part.bits, part.block) == (_BITS, self._block):
                for quantized in part.quantized_rows():
                    if (quantized.zero_points == _ZERO_POINT).all():
                        yield quantized
                    else:
                        yield self._quantize(quantized.dequantize().reshape(-1, self._num_blocks * self._block))
            else:
                yield from map_ahead(self._quantize, row_chunks(part))

    def _quantize(self, weights_RK: NDArray[np.float32]) -> QuantizedBlocks:
        missing = self._num_blocks * self._block - weights_RK.shape[1]
        if missing:
            weights_RK = np.pad(weights_RK, ((0, 0), (0, missing)))
        return quantize_blocks(weights_RK.reshape(-1, self._block), _BITS, symmetric=True)

    def _take_scales(self) -> Iterator[NDArray[Any]]:
        if not self._scales:
            for _ in self._transpose():
                pass
        scales_NJ = np.concatenate(self._scales)
        self._scales = []
        yield np.ascontiguousarray(scales_NJ.T).reshape(-1)
