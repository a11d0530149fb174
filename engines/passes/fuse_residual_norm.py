"""Join residual additions and the RMSNorm that follows."""

from __future__ import annotations

import onnx_ir as ir

from engines.onnx_text import MICROSOFT


class FuseResidualNormPass(ir.passes.InPlacePass):
    """Exchange RMSNormalization for the kernels that ONNX Runtime has for it.

    After an Add it becomes SkipSimplifiedLayerNormalization, which gives the sum too; elsewhere
    SimplifiedLayerNormalization.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every RMSNormalization over the last axis."""
        modified = False
        for norm in list(model.graph):
            if norm.op_type != "RMSNormalization" or norm.domain != "":
                continue
            x, weight = norm.inputs
            assert x is not None and weight is not None
            epsilon = norm.attributes["epsilon"].as_float()
            add = x.producer()
            if add is not None and add.op_type == "Add" and add.domain == "" and all(v is not None for v in add.inputs):
                fused = ir.node(
                    "SkipSimplifiedLayerNormalization",
                    [*add.inputs, weight],
                    attributes={"epsilon": epsilon},
                    domain=MICROSOFT,
                    num_outputs=4,
                    name=norm.name,
                )
                # Outputs 1 and 2 are for training; 3 is the sum, which the next residual needs.
                fused.outputs[1].name = fused.outputs[2].name = ""
                model.graph.insert_before(add, fused)
                _replace(model, norm, fused.outputs[0])
                _replace(model, add, fused.outputs[3])
            else:
                simple = ir.node(
                    "SimplifiedLayerNormalization",
                    [x, weight],
                    attributes={"axis": -1, "epsilon": epsilon},
                    name=norm.name,
                )
                model.graph.insert_before(norm, simple)
                _replace(model, norm, simple.outputs[0])
            modified = True
        if modified:
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified)


def _replace(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    old = node.outputs[0]
    value.name, value.shape, value.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
