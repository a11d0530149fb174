"""Store experts in few bits and expand those that are gathered."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.initializers import add_initializer, add_integers
from engines.quantize.formats import FLOAT, WeightFormats
from engines.quantize.tensors import ProducedTensor
from engines.tensorrt.storage import TensorRtStorage
from engines.weights import StackedTensor


class PackExpertsPass(ir.passes.InPlacePass):
    """Exchange Gather(experts, index) for Gather(packed, index), expanded by arithmetic.

    TensorRT lets nothing but DequantizeLinear read a constant of type INT4, INT8, FP8 or FP4 (tensorrt_rtx 1.7.1,
    "validateQuantizedTypesProducersConsumers"), and after DequantizeLinear all experts would be expanded. So the codes
    are parts of an INT32, and only the experts of a block are expanded:

        digit = (v - v mod 2^(b·i)) / 2^(b·i) mod 2^b        weight = (digit - 2^(b-1)) · scale
    """

    def __init__(self, formats: WeightFormats) -> None:
        super().__init__()
        self._formats = formats

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack the experts that there is a blockwise format for; of other formats none has a meaning here."""
        modified = False
        for node in list(model.graph):
            data = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
            source = None if data is None else data.const_value
            if isinstance(source, StackedTensor):
                modified |= self._pack(model, node, source)
        return ir.passes.PassResult(model, modified)

    def _pack(self, model: ir.Model, node: ir.Node, source: StackedTensor) -> bool:
        chosen = self._formats.format_of(str(source.name))
        if chosen.kind == FLOAT:
            return False
        num_columns = int(source.shape.numpy()[2])
        (experts,) = TensorRtStorage().experts([source], [chosen])
        num_experts, num_rows, num_bytes = (int(n) for n in experts.packed.shape.numpy())
        words = ProducedTensor(
            str(experts.packed.name),
            (num_experts, num_rows, num_bytes // 4),
            ir.DataType.INT32,
            lambda: (block.view("<i4") for block in experts.packed.blocks()),
        )
        packed, scales = add_initializer(model, words), add_initializer(model, experts.scales)
        name = str(node.name)
        num_codes, half = 32 // chosen.bits, 1 << (chosen.bits - 1)
        powers = (1 << chosen.bits) ** np.arange(num_codes, dtype=np.int64)

        def integers(what: str, value: object) -> ir.Value:
            array = np.asarray(value, np.int32)
            return add_initializer(model, ir.Tensor(array, name=f"unpack.{what}_{chosen.bits}"))

        powers_C, base = integers("powers", powers), integers("base", 2 * half)
        zero_point = add_initializer(model, ir.Tensor(np.float32(half), name=f"unpack.zero_point_{chosen.bits}"))
        last = add_integers(model, "unpack.last_axis", [-1])
        in_blocks = add_integers(model, f"unpack.blocks_{experts.block}", [0, 0, -1, experts.block])
        in_rows = add_integers(model, f"unpack.rows_{num_columns}", [0, 0, num_columns])
        nodes: list[ir.Node] = []

        def add(op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
            nodes.append(ir.node(op_type, inputs, attributes=attributes, name=f"{name}/{op_type.lower()}_{len(nodes)}"))
            return nodes[-1].outputs[0]

        codes = add("Unsqueeze", add("Gather", packed, node.inputs[1], axis=0), last)
        whole = add("Sub", codes, add("Mod", codes, powers_C))
        digits = add("Mod", add("Div", whole, powers_C), base)
        steps = add("Reshape", add("Sub", add("Cast", digits, to=ir.DataType.FLOAT), zero_point), in_blocks)
        scale = add("Unsqueeze", add("Gather", scales, node.inputs[1], axis=0), last)
        add("Reshape", add("Mul", steps, scale), in_rows)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
        return True
