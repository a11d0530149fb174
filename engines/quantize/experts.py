"""Gate and up of experts in the order of ONNX Runtime's MoE and QMoE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        num_columns = int(self.shape.numpy()[1])
        halves = self._source.numpy().reshape(2, -1, num_columns)
        yield np.ascontiguousarray(halves.transpose(1, 0, 2)).reshape(-1)


def interleaved(stacked: StackedTensor) -> StackedTensor:
    """Interleave gate and up of every expert."""
    return StackedTensor(f"{stacked.name}.interleaved", [InterleavedTensor(part) for part in stacked.parts])
