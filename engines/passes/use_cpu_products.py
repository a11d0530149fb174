"""Multiply by weights in tiles, and look rows up in them, with our own CPU kernels."""

from __future__ import annotations

import onnx_ir as ir

from engines.initializers import add_initializer
from engines.onnx_text import CPU_KERNELS, CPU_KERNELS_VERSION
from engines.onnxruntime.packed_storage import PACKED_STORAGE, PackedStorage
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.quantize.formats import FLOAT, WeightFormats
from engines.quantize.packed import PackedWeight
from engines.weights import StreamedTensor


class UseCpuProductsPass(ir.passes.InPlacePass):
    """Exchange x · Wᵀ + bias for MatMulInt4 or MatMulInt8, and Gather of rows of W for LookUpInt4 or LookUpInt8.

    A table that is multiplied and looked up, such as a tied embedding, is one initializer for both. Weights that the
    storage does not put into tiles stay as they are, for a pass that follows.

    Args:
        formats: Which weight gets which format.
        storage: How weights are stored.
    """

    def __init__(self, formats: WeightFormats, storage: PackedStorage = PACKED_STORAGE) -> None:
        super().__init__()
        self._formats, self._storage = formats, storage

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange every product and lookup whose weight is stored in tiles."""
        packed: dict[ir.Value, tuple[PackedWeight, ir.Value]] = {}
        products = [found for node in model.graph if (found := find_weight(node)) is not None]
        for found in products:
            if found.value not in packed:
                weight = self._stored(found)
                if weight is None:
                    continue
                packed[found.value] = weight, add_initializer(model, weight.packed)
            _multiply(model, found, *packed[found.value])
        for node in list(model.graph):
            table = _looked_up(node)
            if table is None:
                continue
            if table not in packed:
                weight = self._stored_table(table)
                if weight is None:
                    continue
                packed[table] = weight, add_initializer(model, weight.packed)
            _look_up(model, node, *packed[table])
        for value in packed:
            if not value.uses():
                model.graph.initializers.pop(str(value.name), None)
        if packed:
            model.graph.opset_imports.setdefault(CPU_KERNELS, CPU_KERNELS_VERSION)
        return ir.passes.PassResult(model, bool(packed))

    def _stored(self, found: MatMulWeight) -> PackedWeight | None:
        weight_format = self._formats.format_of(found.key)
        if weight_format.kind == FLOAT:
            return None
        weight = self._storage.product(found.tensor, weight_format, is_table=found.is_table)
        return weight if isinstance(weight, PackedWeight) else None

    def _stored_table(self, value: ir.Value) -> PackedWeight | None:
        weight_format, source = self._formats.format_of(str(value.name)), value.const_value
        assert isinstance(source, StreamedTensor)
        weight = None if weight_format.kind == FLOAT else self._storage.table(source, weight_format)
        return weight if isinstance(weight, PackedWeight) else None


def _multiply(model: ir.Model, found: MatMulWeight, weight: PackedWeight, packed: ir.Value) -> None:
    inputs = [found.x, packed, *([] if found.bias is None else [found.bias])]
    node = ir.node(
        f"MatMulInt{weight.bits}",
        inputs,
        attributes={"K": found.num_inputs, "N": found.num_outputs, "block_size": weight.block},
        domain=CPU_KERNELS,
        name=found.nodes[0].name,
    )
    found.replace(model, [node], node.outputs[0])


def _looked_up(node: ir.Node) -> ir.Value | None:
    """Return the matrix of weights whose rows a node gathers, None for any other node."""
    value = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
    if value is None or not isinstance(value.const_value, StreamedTensor) or len(value.const_value.shape) != 2:
        return None
    axis = node.attributes.get("axis")
    return value if axis is None or axis.as_int() == 0 else None


def _look_up(model: ir.Model, node: ir.Node, weight: PackedWeight, packed: ir.Value) -> None:
    table = node.inputs[0]
    assert table is not None and table.const_value is not None
    num_rows, num_columns = (int(n) for n in table.const_value.shape.numpy())
    lookup = ir.node(
        f"LookUpInt{weight.bits}",
        [node.inputs[1], packed],
        attributes={"K": num_columns, "N": num_rows, "block_size": weight.block},
        domain=CPU_KERNELS,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [lookup], node.outputs, lookup.outputs)
