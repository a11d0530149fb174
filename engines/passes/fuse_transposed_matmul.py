"""Read weights in the checkpoint's own layout [out, in]."""

from __future__ import annotations

import onnx_ir as ir

from engines.onnx_text import MICROSOFT
from engines.passes.matmul_weight import transposed_initializer


class FuseTransposedMatMulPass(ir.passes.InPlacePass):
    """Turn `MatMul(x, Transpose(weight))` into one `FusedMatMul` with `transB`.

    ONNX Runtime would fold the transposes into copies of all weights while it loads; FusedMatMul packs the weight as it
    is. Packed either way, the product takes the same time (measured: 0.90 against 1.03 ms at one row of 2048 x 6144).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every such pair whose weight is an initializer."""
        modified = False
        for node in list(model.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
            stored = None if weight is None else transposed_initializer(weight)
            if weight is None or stored is None:
                continue
            transpose = weight.producer()
            fused = ir.node(
                "FusedMatMul",
                [node.inputs[0], stored],
                attributes={"transB": 1},
                domain=MICROSOFT,
                name=node.name,
            )
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [fused], [node.outputs[0]], [fused.outputs[0]]
            )
            if transpose is not None and not weight.uses():
                model.graph.remove(transpose, safe=True)
            modified = True
        if modified:
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified)
