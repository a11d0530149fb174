"""Weights of the experts of a layer in the layouts of ONNX Runtime's MoE and QMoE: streamed, stacked, a row at a time.

Shapes: E experts, N rows (outputs) and K columns (inputs) of one expert's matrix, J blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import pack_codes, quantize_blocks
from engines.quantize.tensors import ProducedTensor, map_ahead, row_chunks
from engines.weights import StackedTensor, StreamedTensor


class InterleavedTensor(StreamedTensor):
    """A matrix of two halves, gate and up, whose rows take turns: gate 0, up 0, gate 1, … It is read as a whole."""

    def __init__(self, source: StreamedTensor) -> None:
        super().__init__(str(source.name), source.shape.numpy(), source.dtype)
        self._source = source

    def stored_row(self, row: int) -> int:
        """Return where gate and up are not interleaved."""
        return row // 2 + row % 2 * (int(self.shape.numpy()[0]) // 2)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the matrix."""
        num_rows, num_columns = (int(n) for n in self.shape.numpy())
        halves = np.empty(num_rows * num_columns, self.dtype.numpy())
        done = 0
        for block in self._source.blocks():
            halves[done : done + block.size] = block
            done += block.size
        yield np.ascontiguousarray(halves.reshape(2, -1, num_columns).transpose(1, 0, 2)).reshape(-1)


def interleaved(stacked: StackedTensor) -> StackedTensor:
    """Interleave gate and up of every expert."""
    return StackedTensor(f"{stacked.name}.interleaved", [InterleavedTensor(part) for part in stacked.parts])


class BlockwiseExperts:
    """Weights [E, N, K] in blocks along K, in the layout of QMoE; K is a multiple of the block.

    As in `BlockwiseWeight`, `packed` must be written first; scales and zero points wait in memory until they are.

    Attributes:
        bits, block: The format.
        packed: uint8 [E, N, K · bits / 8], low bits first.
        scales: float32 [E, N, J].
        zero_points: uint8 [E, N, ceil(J · bits / 8)], packed along J; None if symmetric: the kernel then takes
            2^(bits - 1).
    """

    def __init__(self, source: StackedTensor, bits: int, block: int, *, symmetric: bool = False) -> None:
        self._source, self.bits, self.block, self._symmetric = source, bits, block, symmetric
        num_experts, num_rows, num_columns = (int(n) for n in source.shape.numpy())
        assert num_columns % block == 0, f"{source.name}: {num_columns} columns in blocks of {block}"
        self._num_blocks = num_columns // block
        self._scales: list[NDArray[np.float32]] = []
        self._zero_points: list[NDArray[np.uint8]] = []
        stacked = (num_experts, num_rows)
        self.packed = ProducedTensor(
            f"{source.name}.q{bits}", (*stacked, num_columns * bits // 8), ir.DataType.UINT8, self._pack
        )
        self.scales = ProducedTensor(
            f"{source.name}.scales",
            (*stacked, self._num_blocks),
            ir.DataType.FLOAT,
            lambda: self._take(self._scales),
        )
        self.zero_points = (
            None
            if symmetric
            else ProducedTensor(
                f"{source.name}.zero_points",
                (*stacked, -(-self._num_blocks * bits // 8)),
                ir.DataType.UINT8,
                lambda: self._take(self._zero_points),
            )
        )

    def _pack(self) -> Iterator[NDArray[Any]]:
        self._scales.clear()
        self._zero_points.clear()
        chunks = (chunk for part in self._source.parts for chunk in row_chunks(part))
        for codes, scales, zero_points in map_ahead(self._quantize, chunks):
            self._scales.append(scales)
            if not self._symmetric:
                self._zero_points.append(zero_points)
            yield codes

    def _quantize(
        self, weights_RK: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """Return packed codes, scales and packed zero points of some rows, each flat."""
        found = quantize_blocks(weights_RK.reshape(-1, self.block), self.bits, symmetric=self._symmetric)
        zeros_RJ = found.zero_points.reshape(-1, self._num_blocks)
        return pack_codes(found.codes, self.bits).reshape(-1), found.scales, pack_codes(zeros_RJ, self.bits).reshape(-1)

    def _take(self, waiting: list[Any]) -> Iterator[NDArray[Any]]:
        if not waiting:
            for _ in self._pack():
                pass
        yield from waiting
        waiting.clear()
