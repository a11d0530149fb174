"""Find products with a streamed weight, in the forms that the traced graphs have."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from engines.weights import ConcatenatedTensor, StreamedTensor


@dataclass(frozen=True)
class MatMulWeight:
    """One product x · Wᵀ + bias, with W [out, in] as the checkpoint holds it.

    Attributes:
        nodes: MatMul and, with a bias, the Add after it; or Gemm with transB.
        x: The other operand.
        value: The weight's initializer.
        tensor: The elements of the weight.
        bias: [out], or None.
        output: What the last of `nodes` gives.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    value: ir.Value
    tensor: StreamedTensor
    bias: ir.Value | None
    output: ir.Value

    @property
    def key(self) -> str:
        """Checkpoint key of the weight, or of the first of several that were joined."""
        first = self.tensor.parts[0] if isinstance(self.tensor, ConcatenatedTensor) else self.tensor
        return str(first.name)

    @property
    def is_table(self) -> bool:
        """Whether rows of W are also looked up."""
        return any(node.op_type == "Gather" for node, _ in self.value.uses())

    @property
    def num_outputs(self) -> int:
        """Rows of W."""
        return int(self.tensor.shape.numpy()[0])

    @property
    def num_inputs(self) -> int:
        """Columns of W."""
        return int(self.tensor.shape.numpy()[1])

    def replace(self, model: ir.Model, new_nodes: list[ir.Node], output: ir.Value) -> None:
        """Put other nodes in the product's place and remove what only it used."""
        transpose = self.nodes[0].inputs[1].producer() if self.nodes[0].op_type == "MatMul" else None  # type: ignore[union-attr]
        model.graph.insert_after(self.nodes[-1], new_nodes)
        output.name, output.shape, output.type = self.output.name, self.output.shape, self.output.type
        ir.convenience.replace_all_uses_with(self.output, output, replace_graph_outputs=True)
        for node in reversed(self.nodes):
            model.graph.remove(node, safe=True)
        if transpose is not None and not transpose.outputs[0].uses():
            model.graph.remove(transpose, safe=True)
        if not self.value.uses():
            assert self.value.name is not None
            del model.graph.initializers[self.value.name]


def find_weight(node: ir.Node) -> MatMulWeight | None:
    """Return the product that `node`, a MatMul or a Gemm, computes, or None for any other node."""
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    x, operand, bias = node.inputs[0], node.inputs[1], None
    nodes: tuple[ir.Node, ...] = (node,)
    if node.op_type == "MatMul":
        stored = transposed_initializer(operand)
        add = _bias_add(node)
        if add is not None:
            nodes, bias = (node, add), add.inputs[1]
    elif node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        if transposed is None or transposed.as_int() != 1:
            return None
        stored, bias = operand, node.inputs[2] if len(node.inputs) > 2 else None
    else:
        return None
    if stored is None or not isinstance(stored.const_value, StreamedTensor):
        return None
    return MatMulWeight(nodes, x, stored, stored.const_value, bias, nodes[-1].outputs[0])


def transposed_initializer(value: ir.Value) -> ir.Value | None:
    """Return the initializer whose transpose a value is, None if it is no such thing."""
    transpose = value.producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.attributes["perm"].as_ints() != (1, 0):
        return None
    stored = transpose.inputs[0]
    return stored if stored is not None and stored.is_initializer() else None


def _bias_add(product: ir.Node) -> ir.Node | None:
    """Return the Add of an initializer [out] that is the product's only use."""
    uses = list(product.outputs[0].uses())
    if len(uses) != 1 or product.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    if add.op_type != "Add" or add.domain != "" or index != 0:
        return None
    bias = add.inputs[1]
    is_bias = bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1
    return add if is_bias else None
