"""Let our own products do what stands before and after them."""

from __future__ import annotations

import onnx_ir as ir

from engines.onnx_text import CPU_KERNELS

_PRODUCTS = ("MatMulInt4", "MatMulInt8")
# Places among a product's inputs.
_X, _NORM, _RESIDUAL, _NUM_INPUTS = 0, 3, 4, 5
# Operators whose output has the shape of their first input but for the last axis.
_ROW_BY_ROW = frozenset(
    {
        *_PRODUCTS,
        "DecodeAttention",
        "MatMulNBits",
        "MultiHeadAttention",
        "RotaryEmbedding",
        "RMSNormalization",
        "LayerNormalization",
        "Gelu",
        "Concat",
        "Split",
        "Slice",
    }
)
_MOST_STEPS = 12  # from the output of a block of the model back to its input


class FuseCpuProductsPass(ir.passes.InPlacePass):
    """Give MatMulInt4 and MatMulInt8 the nodes around them as inputs and attributes.

    | around the product | becomes |
    |---|---|
    | RMSNormalization of x, used by such products alone | input `norm` |
    | gate, up = Split(x); gate · Sigmoid(gate) · up | attribute `gated`, x is what was split |
    | Add of a value that the product is computed of, row by row | input `residual` |

    A residual must have the product's shape, which Add alone does not say: it could broadcast. A value from which the
    product is computed by operators that keep all axes but the last has it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse norms, then gates, then residuals."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "RMSNormalization" and node.domain == "":
                modified |= _fuse_norm(model, node)
        for node in [node for node in model.graph if _is_product(node)]:
            modified |= _fuse_gate(model, node)
        for node in [node for node in model.graph if _is_product(node)]:
            modified |= _fuse_residual(model, node)
        return ir.passes.PassResult(model, modified)


def _is_product(node: ir.Node) -> bool:
    return node.domain == CPU_KERNELS and node.op_type in _PRODUCTS


def _fuse_norm(model: ir.Model, norm: ir.Node) -> bool:
    uses = list(norm.outputs[0].uses())
    x, weight = norm.inputs
    axis = norm.attributes.get("axis")
    if not uses or norm.outputs[0].is_graph_output() or (axis is not None and axis.as_int() != -1):
        return False
    if not all(_is_product(node) and index == _X and _is_plain(node) for node, index in uses):
        return False
    for node, _ in uses:
        node.resize_inputs(max(len(node.inputs), _NORM + 1))
        node.replace_input_with(_X, x)
        node.replace_input_with(_NORM, weight)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())
    model.graph.remove(norm, safe=True)
    return True


def _is_plain(product: ir.Node) -> bool:
    """Say whether a product takes x as it is."""
    return "gated" not in product.attributes and (len(product.inputs) <= _NORM or product.inputs[_NORM] is None)


def _fuse_gate(model: ir.Model, product: ir.Node) -> bool:
    nodes = _gate_nodes(product) if _is_plain(product) else None
    if nodes is None:
        return False
    split = nodes[-1]
    product.replace_input_with(_X, split.inputs[0])
    product.attributes["gated"] = ir.AttrInt64("gated", 1)
    model.graph.remove(nodes, safe=True)
    return True


def _gate_nodes(product: ir.Node) -> list[ir.Node] | None:
    """Return the nodes that make a product's x as silu(gate) · up, the Split last; None if nothing does."""
    outer = _only_producer(product.inputs[_X], "Mul")
    for silu_value, up in () if outer is None else (outer.inputs, outer.inputs[::-1]):
        silu, split = _only_producer(silu_value, "Mul"), _only_producer(up, "Split")
        if outer is None or silu is None or split is None or not _is_gate_and_up(split, up, product):
            continue
        gate = split.outputs[0]
        sigmoids = [_only_producer(value, "Sigmoid") for value in silu.inputs if value is not gate]
        sigmoid = sigmoids[0] if len(sigmoids) == 1 else None
        is_alone = {node for node, _ in gate.uses()} == {silu, sigmoid} and not gate.is_graph_output()
        if sigmoid is not None and is_alone and len(gate.uses()) == 2:
            return [outer, silu, sigmoid, split]
    return None


def _is_gate_and_up(split: ir.Node, up: ir.Value | None, product: ir.Node) -> bool:
    """Say whether a Split makes two parts of K columns each, the second of which is `up`."""
    axis, sizes = split.attributes.get("axis"), split.inputs[1] if len(split.inputs) > 1 else None
    if len(split.outputs) != 2 or split.outputs[1] is not up or axis is None or axis.as_int() != -1:
        return False
    num_columns = product.attributes["K"].as_int()
    return (
        sizes is not None and sizes.const_value is not None and sizes.const_value.numpy().tolist() == [num_columns] * 2
    )


def _only_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the standard node that makes a value with one use, None if it is no such operator."""
    node = None if value is None else value.producer()
    if node is None or value is None or node.op_type != op_type or node.domain != "":
        return None
    return node if len(value.uses()) == 1 and not value.is_graph_output() else None


def _fuse_residual(model: ir.Model, product: ir.Node) -> bool:
    output = product.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or len(product.inputs) > _RESIDUAL:
        return False
    add, index = uses[0]
    if add.op_type != "Add" or add.domain != "":
        return False
    residual = add.inputs[1 - index]
    if residual is None or not _has_rows_of(residual, product):
        return False
    product.resize_inputs(_NUM_INPUTS)
    product.replace_input_with(_RESIDUAL, residual)
    total = add.outputs[0]
    output.name, output.shape, output.type = total.name, total.shape, total.type
    ir.convenience.replace_all_uses_with(total, output, replace_graph_outputs=True)
    model.graph.remove(add, safe=True)
    return True


def _has_rows_of(value: ir.Value, product: ir.Node) -> bool:
    """Say whether a value has the shape of a product because the product is computed of it, row by row."""
    num_outputs = product.attributes["N"].as_int()
    node: ir.Node | None = product
    last_axis = {-1}
    for _ in range(_MOST_STEPS):
        if node is None or node.op_type not in _ROW_BY_ROW or not _keeps_rows(node, last_axis):
            return False
        if node.op_type == "MultiHeadAttention":
            last_axis = {-1, 2}  # what comes before is [batch, rows, columns]
        x = node.inputs[0]
        if x is value:
            return _num_columns(node) == num_outputs
        node = None if x is None else x.producer()
    return False


def _keeps_rows(node: ir.Node, last_axis: set[int]) -> bool:
    """Say whether a node changes the last axis alone."""
    if node.op_type in ("Concat", "Split"):
        axis = node.attributes.get("axis")
        return axis is not None and axis.as_int() in last_axis
    if node.op_type == "Slice":
        axes = node.inputs[3] if len(node.inputs) > 3 else None
        return axes is not None and axes.const_value is not None and set(axes.const_value.numpy().tolist()) <= last_axis
    return True


def _num_columns(node: ir.Node) -> int | None:
    """Return the length of the last axis of what a node takes, if the node says it."""
    if _is_product(node):
        return node.attributes["K"].as_int() * (2 if "gated" in node.attributes else 1)
    if node.op_type in ("RMSNormalization", "LayerNormalization"):
        weight = node.inputs[1]
        return None if weight is None or weight.shape is None else int(weight.shape[-1])  # type: ignore[arg-type]
    return None
