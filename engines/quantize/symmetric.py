"""4-bit weights without zero points, in the layout of ONNX's block DequantizeLinear.

Shapes: N rows (outputs) and K columns (inputs) of a weight, J = ceil(K / G) blocks of a row, G weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.tensors import TransposedWeight, blocks_of
from engines.weights import StreamedTensor

_BITS = 4
_ZERO_POINT = 1 << (_BITS - 1)


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
        for found in blocks_of(self._source, _BITS, self._block, symmetric=True):
            # Two's complement of code - 8 is the code with its highest bit flipped.
            codes_RK = found.codes.reshape(-1, self._num_blocks * self._block) ^ np.uint8(_ZERO_POINT)
            yield codes_RK, found.scales.reshape(-1, self._num_blocks)
