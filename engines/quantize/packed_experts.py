"""Weights of stacked experts as integer codes, packed into INT32.

Shapes: E experts, N rows (outputs) and K columns (inputs) of one expert's matrix, G weights of a block, J = K / G
blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import pack_codes, quantize_blocks
from engines.quantize.tensors import ProducedTensor, map_ahead, row_chunks
from engines.weights import StackedTensor


class PackedExperts:
    """Weights [E, N, K] in symmetric blocks along K; K is a multiple of the block, and of the codes of an INT32.

    A weight is scale · (code - 2^(bits - 1)). The first code of an INT32 has its lowest bits.

    As in `BlockwiseWeight`, `packed` must be written first; the scales wait in memory until they are.

    Attributes:
        bits, block: The format.
        packed: int32 [E, N, K · bits / 32].
        scales: float32 [E, N, J, 1].
    """

    def __init__(self, source: StackedTensor, bits: int, block: int) -> None:
        self._source, self.bits, self.block = source, bits, block
        num_experts, num_rows, num_columns = (int(n) for n in source.shape.numpy())
        assert num_columns % block == 0 and num_columns * bits % 32 == 0, f"{source.name}: {num_columns} columns"
        self._scales: list[NDArray[np.float32]] = []
        self.packed = ProducedTensor(
            f"{source.name}.q{bits}", (num_experts, num_rows, num_columns * bits // 32), ir.DataType.INT32, self._pack
        )
        self.scales = ProducedTensor(
            f"{source.name}.scales",
            (num_experts, num_rows, num_columns // block, 1),
            ir.DataType.FLOAT,
            self._take_scales,
        )

    def _pack(self) -> Iterator[NDArray[Any]]:
        self._scales.clear()
        chunks = (chunk for part in self._source.parts for chunk in row_chunks(part))
        for packed, scales in map_ahead(self._quantize, chunks):
            self._scales.append(scales)
            yield packed

    def _quantize(self, weights_RK: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        found = quantize_blocks(weights_RK.reshape(-1, self.block), self.bits, symmetric=True)
        return pack_codes(found.codes, self.bits).reshape(-1).view("<i4"), found.scales

    def _take_scales(self) -> Iterator[NDArray[Any]]:
        if not self._scales:
            for _ in self._pack():
                pass
        yield from self._scales
        self._scales.clear()
