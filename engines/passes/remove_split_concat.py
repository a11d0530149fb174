"""Hand a value on whole where it is cut up and joined again."""

from __future__ import annotations

import onnx_ir as ir


class RemoveSplitConcatPass(ir.passes.InPlacePass):
    """Exchange Concat of all parts of a Split, in their order and along its axis, for what was split.

    FuseSharedInputPass splits the one product of q, k and v, and the body of an attention that takes them together
    joins them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange every such Concat; a Split without other uses goes."""
        modified = False
        for concat in list(model.graph):
            whole = _whole(concat)
            if whole is None:
                continue
            split = concat.inputs[0].producer()  # type: ignore[union-attr]
            ir.convenience.replace_all_uses_with(concat.outputs[0], whole)
            model.graph.remove(concat, safe=True)
            if split is not None and not any(part.uses() or part.is_graph_output() for part in split.outputs):
                model.graph.remove(split, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _whole(concat: ir.Node) -> ir.Value | None:
    """Return the value whose parts a node joins, None if it does anything else."""
    if concat.op_type != "Concat" or concat.domain != "" or concat.outputs[0].is_graph_output():
        return None
    first = concat.inputs[0]
    split = None if first is None else first.producer()
    if split is None or split.op_type != "Split" or split.domain != "" or list(concat.inputs) != list(split.outputs):
        return None
    axis = split.attributes.get("axis")
    same_axis = (0 if axis is None else axis.as_int()) == concat.attributes["axis"].as_int()
    return split.inputs[0] if same_axis else None
