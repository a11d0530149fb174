"""Quantised weights as MatMul takes them, without a Transpose in the graph.

Shapes: N rows (outputs) and K columns (inputs) of a weight, R rows of a part of it, J = ceil(K / G) blocks of a row, G
weights of a block.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import pack_codes, quantize_rows_int8
from engines.quantize.float8 import NVFP4_BLOCK, nvfp4_global_scale, quantize_blocks_nvfp4
from engines.quantize.tensors import QuantizedWeight, blocks_of, map_ahead, row_chunks
from engines.weights import StreamedTensor

_SYMMETRIC_BITS = 4


class TransposedWeight(QuantizedWeight):
    """A weight [N, K] transposed to the codes [K, N] that a product takes.

    The codes of the whole weight are in memory while it is written, since they are written column by column.
    """

    @abc.abstractmethod
    def quantized_rows(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield codes [R, K], a byte each, and scales, [R] or [R, J], of some rows in order."""

    def quantized(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield everything at once; codes of 4 bits packed in row-major order, with an odd N of two rows in a byte."""
        codes, all_scales = self.tensors[0], []
        is_packed = codes.dtype.bitwidth == 4
        codes_KN = np.empty(codes.shape.numpy(), np.uint8 if is_packed else codes.dtype.numpy())
        done = 0
        for codes_RK, scales in self.quantized_rows():
            codes_KN[:, done : done + len(scales)] = codes_RK.T
            all_scales.append(scales)
            done += len(scales)
        flat = codes_KN.reshape(-1)
        yield pack_codes(flat, 4) if is_packed else flat, np.ascontiguousarray(np.concatenate(all_scales).T).reshape(-1)


class RowwiseWeight(TransposedWeight):
    """A weight [N, K] in 8 bits with one scale a row.

    Args:
        source: The weight.
        dtype: Dtype of the codes.
        quantize: Makes codes [R, K] and scales [R] of some rows.

    Attributes:
        transposed: Codes [K, N].
        scales: float32 [N].
    """

    def __init__(
        self,
        source: StreamedTensor,
        dtype: ir.DataType = ir.DataType.INT8,
        quantize: Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[np.float32]]] = quantize_rows_int8,
    ) -> None:
        self._source, self._quantize = source, quantize
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        suffix = "s8" if dtype == ir.DataType.INT8 else "f8"
        scales = ("scales", (num_rows,), ir.DataType.FLOAT)
        super().__init__(str(source.name), [(suffix, (num_columns, num_rows), dtype), scales])
        self.transposed, self.scales = self.tensors

    def quantized_rows(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield codes and scales of some rows."""
        return map_ahead(self._quantize, row_chunks(self._source))


class SymmetricWeight(TransposedWeight):
    """A weight [N, K] as int4 codes in -8 … 7 with one scale for each block along K; padding is zero.

    Codes that a checkpoint or a calibration holds are kept if they are of this format and have no zero point of their
    own; else the weight is rounded anew.

    Attributes:
        codes: INT4 [J · G, N], two a byte, the first in the low half.
        scales: float32 [J, N].
    """

    def __init__(self, source: StreamedTensor, block: int) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        self._source, self._block, self._num_blocks = source, block, -(-num_columns // block)
        codes = ("s4", (self._num_blocks * block, num_rows), ir.DataType.INT4)
        super().__init__(str(source.name), [codes, ("scales", (self._num_blocks, num_rows), ir.DataType.FLOAT)])
        self.codes, self.scales = self.tensors

    def quantized_rows(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield codes and scales of some rows."""
        for found in blocks_of(self._source, _SYMMETRIC_BITS, self._block, symmetric=True):
            # Two's complement of code - 8 is the code with its highest bit flipped.
            codes_RK = found.codes.reshape(-1, self._num_blocks * self._block) ^ np.uint8(1 << (_SYMMETRIC_BITS - 1))
            yield codes_RK, found.scales.reshape(-1, self._num_blocks)


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
