"""Exchange questions for a fixed dimension for its size."""

from __future__ import annotations

import onnx_ir as ir

from engines.initializers import add_integers


class FoldStaticShapesPass(ir.passes.InPlacePass):
    """Replace Shape of a graph input by a constant where all dimensions that it asks for are fixed.

    With a cache of fixed capacity each layer asks for the same number in a node of its own, from which no pass can see
    that the masks after them are equal.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every such node."""
        modified = False
        for node in list(model.graph):
            value = node.inputs[0] if node.op_type == "Shape" and node.domain == "" else None
            if value is None or not value.is_graph_input() or value.shape is None:
                continue
            attributes = node.attributes
            start = attributes["start"].as_int() if "start" in attributes else 0
            end = attributes["end"].as_int() if "end" in attributes else None
            dims = list(value.shape)[start:end]
            if not all(isinstance(dim, int) for dim in dims):
                continue
            sizes = [int(dim) for dim in dims]  # type: ignore[arg-type]
            constant = add_integers(model, f"static_shape.{'x'.join(map(str, sizes))}", sizes)
            ir.convenience.replace_all_uses_with(node.outputs[0], constant)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def fix_capacity(model: ir.Model, capacity: int) -> None:
    """Give the KV cache inputs and outputs of a decoder, named [B, K, T, H], a fixed T."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and "T" in [str(dim) for dim in value.shape]:
            value.shape = ir.Shape([capacity if str(dim) == "T" else dim for dim in value.shape])
