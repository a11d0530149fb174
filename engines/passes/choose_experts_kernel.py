"""Choose the kernel of ONNX Runtime that runs the experts, and give it their weights."""

from __future__ import annotations

import onnx_ir as ir

from engines.initializers import add_initializer
from engines.onnx_text import MICROSOFT
from engines.onnxruntime.storage import CPU_STORAGE, OrtStorage
from engines.quantize.experts import interleaved
from engines.quantize.formats import FLOAT, WeightFormats
from engines.weights import StackedTensor
from runtime.errors import TargetError


class ChooseExpertsKernelPass(ir.passes.InPlacePass):
    """Give every node MoE the layout that the kernel reads, or make it QMoE if its weights are stored in few bits.

    The one place that chooses how experts are computed:

    | format | node | gate and up | weights |
    |---|---|---|---|
    | float32 | MoE | rows take turns | stacked, as they are |
    | blockwise | QMoE | rows take turns | stacked codes, scales and, unless symmetric, zero points |

    The codes are those of the schema (`weights_prepacked` 0), which every provider packs for its own kernel when it
    opens the graph. docs/experiments.md has the other nodes that were tried, and their times.

    Args:
        formats: Which weight gets which format.
        storage: How the provider stores them.
    """

    def __init__(self, formats: WeightFormats, storage: OrtStorage = CPU_STORAGE) -> None:
        super().__init__()
        self._formats, self._storage = formats, storage

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the weights of every MoE."""
        nodes = [node for node in model.graph if node.op_type == "MoE" and node.domain == MICROSOFT]
        for node in nodes:
            self._choose(model, node)
        return ir.passes.PassResult(model, bool(nodes))

    def _choose(self, model: ir.Model, node: ir.Node) -> None:
        x, logits, gate_up_value, _, down_value = node.inputs
        assert gate_up_value is not None and down_value is not None
        gate_up, down = gate_up_value.const_value, down_value.const_value
        assert isinstance(gate_up, StackedTensor) and isinstance(down, StackedTensor), f"{node.name}: weights"
        formats = [self._formats.format_of(str(weight.name)) for weight in (gate_up, down)]
        if all(each.kind == FLOAT for each in formats):
            rows = [int(weight.shape.numpy()[2]) for weight in (gate_up, down)]
            if any(row % self._storage.expert_multiple for row in rows):
                raise TargetError(
                    f"{gate_up.name}: rows of {rows[0]} and {rows[1]}, the kernel takes multiples of "
                    f"{self._storage.expert_multiple}",
                    remedy="build a trt-* or trt-rtx-* target",
                )
            node.replace_input_with(2, add_initializer(model, interleaved(gate_up)))
            del model.graph.initializers[str(gate_up_value.name)]
            return
        first, second = self._storage.experts((gate_up, down), formats)
        inputs: list[ir.Value | None] = [x, logits]
        for weight in (first, second):
            inputs += [add_initializer(model, weight.packed), add_initializer(model, weight.scales), None]
        inputs += [None, None, None]  # a third product, which a fused gate and up does not have
        zero_points = [weight.zero_points for weight in (first, second)]
        inputs += [None if tensor is None else add_initializer(model, tensor) for tensor in zero_points]
        integers = {
            "expert_weight_bits": first.bits,
            "block_size": first.block,
            "accuracy_level": self._storage.accuracy_level,
            "weights_prepacked": 0,
        }
        if second.bits != first.bits:
            integers["fc2_expert_weight_bits"] = second.bits
        attributes = dict(node.attributes) | {name: ir.AttrInt64(name, value) for name, value in integers.items()}
        new = ir.Node(MICROSOFT, "QMoE", inputs, list(attributes.values()), name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
        for value in (gate_up_value, down_value):
            del model.graph.initializers[str(value.name)]
