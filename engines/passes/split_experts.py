"""Give the layer TRT_MoE its weights: gate, up and down apart, each [in, out]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer
from engines.weights import StackedTensor, StreamedTensor


class SplitExpertsPass(ir.passes.InPlacePass):
    """Exchange the stacked gate_up [E, 2·I, D] and down [E, D, I] of every TRT_MoE.

    Its last three inputs become gate [E, D, I], up [E, D, I] and down [E, I, D].
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange them; the first of the three inputs holds gate and up, the last one down."""
        nodes = [node for node in model.graph if node.op_type == "TRT_MoE"]
        for node in nodes:
            *_, gate_up, _, down = node.inputs
            assert gate_up is not None and down is not None
            for index, (value, suffix, part) in enumerate(
                ((gate_up, "gate", slice(0, 1)), (gate_up, "up", slice(1, 2)), (down, "down", slice(0, 2)))
            ):
                source = value.const_value
                assert isinstance(source, StackedTensor), f"{node.name}: weights"
                experts = [_TransposedPart(f"{each.name}.{suffix}", each, part) for each in source.parts]
                stacked = StackedTensor(f"{source.name}.{suffix}", experts)
                node.replace_input_with(len(node.inputs) - 3 + index, add_initializer(model, stacked))
            for value in (gate_up, down):
                del model.graph.initializers[str(value.name)]
        return ir.passes.PassResult(model, bool(nodes))


class _TransposedPart(StreamedTensor):
    """Some halves of a matrix's rows, transposed. It is read as a whole."""

    def __init__(self, name: str, source: StreamedTensor, halves: slice) -> None:
        num_rows, num_columns = (int(n) for n in source.shape.numpy())
        super().__init__(name, (num_columns, (halves.stop - halves.start) * num_rows // 2), source.dtype)
        self._source, self._halves = source, halves

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the transposed part."""
        matrix = self._source.numpy()
        middle = len(matrix) // 2
        yield np.ascontiguousarray(matrix[self._halves.start * middle : self._halves.stop * middle].T).reshape(-1)
