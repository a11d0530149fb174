"""Weights that a checkpoint already holds as blocks of integer codes."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.quantize.blockwise import QuantizedBlocks
from engines.weights import StreamedTensor


class GroupQuantizedTensor(StreamedTensor):
    """A weight [N, K] whose source is codes in blocks along K: as float32 through `blocks()`, or the codes themselves.

    A target whose format has as many bits, and takes the same block, hands the codes on: nothing is rounded again.

    Args:
        name: Name in the graph.
        shape: [N, K].
        bits: Bits of a code.
        block: Columns of a block, one of `formats.BLOCK_SIZES`; the last block of a row may be padded.
    """

    def __init__(self, name: str, shape: Sequence[int], bits: int, block: int) -> None:
        super().__init__(name, shape, ir.DataType.FLOAT)
        self.bits, self.block = bits, block

    @abc.abstractmethod
    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        """Yield whole rows in order: R rows are R · ceil(K / block) blocks, and padding has the zero point's code."""

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield what the codes stand for, as float32."""
        num_columns = int(self.shape.numpy()[1])
        padded = -(-num_columns // self.block) * self.block
        for quantized in self.quantized_rows():
            weights_RK = quantized.dequantize().reshape(-1, padded)[:, :num_columns]
            yield np.ascontiguousarray(weights_RK).reshape(-1)
