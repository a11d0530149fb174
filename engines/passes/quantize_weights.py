"""Store weights in few bits and multiply with the kernels that read them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from engines.initializers import add_initializer, add_integers
from engines.onnx_text import MICROSOFT
from engines.onnxruntime.storage import CPU_STORAGE, OrtStorage
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.quantize.float8_blocks import Float8Weight
from engines.quantize.formats import FLOAT, WeightFormats
from engines.quantize.tensors import BlockwiseWeight
from engines.quantize.transposed import RowwiseWeight
from engines.weights import StreamedTensor, ViewTensor

# Keeps a row of zeros from being divided by zero.
_SMALLEST = 1e-30
# The code of 0. GELU gives no less than -0.17 (Hendrycks and Gimpel, arXiv:1606.08415), so most codes are for what is
# above: on the demo the errors of the levels are 1.1, 3.0, 2.2 % so, with 128 they are 1.3, 3.1, 2.5 %.
_MIDDLE, _MIDDLE_OF_GELU = 128, 32
_FLOAT8_BITS = 8


class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Exchange products, and the lookup of a tied embedding, for ONNX Runtime's kernels of quantised weights.

    The one place that chooses a kernel for a format:

    | format | product | lookup |
    |---|---|---|
    | blockwise | MatMulNBits | GatherBlockQuantized, on the same bytes of the file |
    | float8_weights | MatMulBlockQuantizedFp8Weight | GatherBlockQuantized, on the same tensors |
    | rowwise | DynamicQuantizeMatMul; MatMulIntegerToFloat with a scale for each token | |

    Args:
        formats: Which weight gets which format.
        storage: How the provider stores them.
    """

    def __init__(self, formats: WeightFormats, storage: OrtStorage = CPU_STORAGE) -> None:
        super().__init__()
        self._formats, self._storage = formats, storage

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every weight that there is a format for."""
        lookups: dict[ir.Value, list[ir.Node]] = {}
        products: list[MatMulWeight] = []
        for node in list(model.graph):
            found = find_weight(node)
            if found is not None and self._formats.format_of(found.key).kind != FLOAT:
                products.append(found)
            elif node.op_type == "Gather" and node.domain == "" and _streamed_matrix(node.inputs[0]):
                lookups.setdefault(node.inputs[0], []).append(node)  # type: ignore[arg-type]
        modified = bool(products)
        for found in products:
            weight_format = self._formats.format_of(found.key)
            weight = self._storage.product(found.tensor, weight_format, is_table=found.is_table)
            if isinstance(weight, Float8Weight):
                _float8(model, found, weight, lookups.pop(found.value, []))
            elif isinstance(weight, BlockwiseWeight):
                self._blockwise(model, found, weight, lookups.pop(found.value, []))
            else:
                _rowwise(model, found, weight, has_scale_per_token=weight_format.has_scale_per_token)
        for value, nodes in lookups.items():
            source = value.const_value
            assert isinstance(source, StreamedTensor)
            table = self._storage.table(source, self._formats.format_of(str(value.name)))
            if table is not None:
                _look_up(model, nodes, table, table.codes if isinstance(table, Float8Weight) else table.packed)
                modified = True
        if modified:
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified)

    def _blockwise(self, model: ir.Model, found: MatMulWeight, weight: BlockwiseWeight, lookups: list[ir.Node]) -> None:
        inputs = [found.x, *(add_initializer(model, tensor) for tensor in weight.tensors)]
        node = ir.node(
            "MatMulNBits",
            [*inputs, None, found.bias] if found.bias is not None else inputs,
            attributes={
                "K": found.num_inputs,
                "N": found.num_outputs,
                "bits": weight.bits,
                "block_size": weight.block,
                "accuracy_level": self._storage.accuracy_level,
            },
            domain=MICROSOFT,
            name=found.nodes[0].name,
        )
        if lookups:
            # The operator wants the codes of a row without an axis for the blocks.
            num_rows, *row = (int(n) for n in weight.packed.shape.numpy())
            table = ViewTensor(f"{weight.packed.name}.table", weight.packed, (num_rows, math.prod(row)))
            _look_up(model, lookups, weight, table)
        found.replace(model, [node], node.outputs[0])


def _float8(model: ir.Model, found: MatMulWeight, weight: Float8Weight, lookups: list[ir.Node]) -> None:
    inputs = [found.x, *(add_initializer(model, tensor) for tensor in weight.tensors)]
    # The input between scales and bias would round the activations to float8, too.
    node = ir.node(
        "MatMulBlockQuantizedFp8Weight",
        [*inputs, None, found.bias] if found.bias is not None else inputs,
        attributes={"block_size": weight.block},
        domain=MICROSOFT,
        name=found.nodes[0].name,
    )
    _look_up(model, lookups, weight, weight.codes)
    found.replace(model, [node], node.outputs[0])


def _rowwise(model: ir.Model, found: MatMulWeight, weight: RowwiseWeight, *, has_scale_per_token: bool) -> None:
    codes, scales = (add_initializer(model, tensor) for tensor in weight.tensors)
    name = found.nodes[0].name
    if not has_scale_per_token:
        # The weights' zero points are 0, which is what a missing input says.
        inputs = [found.x, codes, scales, *([None, found.bias] if found.bias is not None else [])]
        node = ir.node("DynamicQuantizeMatMul", inputs, domain=MICROSOFT, name=name)
        found.replace(model, [node], node.outputs[0])
        return
    # Each row is divided by what takes it into the range of uint8, rounded by constants and multiplied back, so a token
    # of huge activations costs the others no precision, and a row's bits are the same whatever rows are beside it.
    # DynamicQuantizeMatMul would round them all by the range of all.
    producer = found.x.producer()
    middle_code = _MIDDLE_OF_GELU if producer is not None and producer.op_type == "Gelu" else _MIDDLE
    smallest, unit, middle, up, down = (
        add_initializer(model, ir.Tensor(value, name=f"quantize.{key}"))
        for key, value in (
            ("smallest", np.float32(_SMALLEST)),
            ("unit", np.float32(1)),
            (f"middle.{middle_code}", np.uint8(middle_code)),
            (f"up.{middle_code}", np.float32(1 / (255 - middle_code))),
            (f"down.{middle_code}", np.float32(-1 / middle_code)),
        )
    )
    last_axis = add_integers(model, "quantize.last_axis", [-1])
    largest = ir.node("ReduceMax", [found.x, last_axis])
    least = ir.node("ReduceMin", [found.x, last_axis])
    step_up = ir.node("Mul", [largest.outputs[0], up])
    step_down = ir.node("Mul", [least.outputs[0], down])
    step = ir.node("Max", [step_up.outputs[0], step_down.outputs[0], smallest])
    divided = ir.node("Div", [found.x, step.outputs[0]])
    rounded = ir.node("QuantizeLinear", [divided.outputs[0], unit, middle])
    inputs = [rounded.outputs[0], codes, unit, scales, middle]
    product = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=name)
    restored = ir.node("Mul", [product.outputs[0], step.outputs[0]])
    nodes = [largest, least, step_up, step_down, step, divided, rounded, product, restored]
    if found.bias is not None:
        nodes.append(ir.node("Add", [restored.outputs[0], found.bias]))
    found.replace(model, nodes, nodes[-1].outputs[0])


def _look_up(
    model: ir.Model, nodes: list[ir.Node], weight: BlockwiseWeight | Float8Weight, table: StreamedTensor
) -> None:
    """Read rows of a quantised table."""
    if not nodes:
        return
    codes, *others = (add_initializer(model, t) for t in (table, *weight.tensors[1:]))
    bits = weight.bits if isinstance(weight, BlockwiseWeight) else _FLOAT8_BITS
    for node in nodes:
        lookup = ir.node(
            "GatherBlockQuantized",
            [codes, node.inputs[1], *others],
            attributes={"bits": bits, "block_size": weight.block, "gather_axis": 0, "quantize_axis": 1},
            domain=MICROSOFT,
            name=node.name,
        )
        value = node.inputs[0]
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [lookup], node.outputs, lookup.outputs)
        if value is not None and not value.uses():
            del model.graph.initializers[str(value.name)]


def _streamed_matrix(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, StreamedTensor) and len(value.const_value.shape) == 2
