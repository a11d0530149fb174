"""Store weights in 4 bits and multiply by what DequantizeLinear makes of them, as TensorRT fuses it."""

from __future__ import annotations

import onnx_ir as ir

from engines.initializers import add_initializer, add_integers
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.passes.quantize_weights import stored_block
from engines.quantize.formats import BLOCKWISE, WeightPlan
from engines.quantize.symmetric import SymmetricWeight
from runtime.errors import TargetError

# TensorRT reads blocks of these sizes (tensorrt_rtx 1.7.1 builds no other).
_BLOCK_SIZES = (64, 128)


class DequantizeWeightsPass(ir.passes.InPlacePass):
    """Exchange x · Wᵀ + b for MatMul(x, DequantizeLinear(codes, scales)) + b, codes [K, N] in blocks along axis 0.

    Where a block does not divide K, the codes are padded, and x with zeros. A table that is also looked up keeps its
    rows as they are for the lookup.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every product whose weight the plan has a blockwise format for."""
        products = [found for node in model.graph if (found := find_weight(node)) is not None]
        chosen = [found for found in products if self.plan.format_of(found.key).kind == BLOCKWISE]
        for found in chosen:
            self._quantize(model, found)
        return ir.passes.PassResult(model, bool(chosen))

    def _quantize(self, model: ir.Model, found: MatMulWeight) -> None:
        weight_format = self.plan.format_of(found.key)
        if weight_format.bits != 4 or not weight_format.symmetric or weight_format.block not in _BLOCK_SIZES:
            raise TargetError(
                f"{found.key}: {weight_format} in a block DequantizeLinear",
                remedy=f"choose 4 bits, symmetric, blocks of {' or '.join(map(str, _BLOCK_SIZES))}",
            )
        stored = stored_block(found, weight_format)
        block = stored if stored in _BLOCK_SIZES else weight_format.block
        weight = SymmetricWeight(found.tensor, block)
        name = found.nodes[0].name
        codes, scales = add_initializer(model, weight.codes), add_initializer(model, weight.scales)
        nodes: list[ir.Node] = []
        x = found.x
        missing = int(weight.codes.shape.numpy()[0]) - found.num_inputs
        if missing:
            padding = add_integers(model, f"quantize.pad_{missing}", [0, missing])
            last_axis = add_integers(model, "quantize.last_axis", [-1])
            nodes.append(ir.node("Pad", [x, padding, None, last_axis], name=f"{name}/pad"))
            x = nodes[-1].outputs[0]
        attributes = {"axis": 0, "block_size": block}
        nodes.append(ir.node("DequantizeLinear", [codes, scales], attributes=attributes, name=f"{name}/dequantize"))
        nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name=name))
        if found.bias is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], found.bias], name=f"{name}/bias"))
        found.replace(model, nodes, nodes[-1].outputs[0])
