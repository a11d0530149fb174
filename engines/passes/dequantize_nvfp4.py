"""Store weights in NVIDIA's 4-bit floats and multiply by what DequantizeLinear makes of them, as TensorRT fuses it."""

from __future__ import annotations

import onnx_ir as ir

from engines.initializers import add_initializer, add_integers
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.quantize.float8 import NVFP4_BLOCK
from engines.quantize.formats import NVFP4, WeightPlan
from engines.quantize.nvfp4 import Nvfp4Weight


class DequantizeNvfp4Pass(ir.passes.InPlacePass):
    """Exchange x · Wᵀ + b for MatMul(x, DequantizeLinear(codes, DequantizeLinear(block scales, global scale))) + b.

    Codes are [K, N] in blocks along axis 0; where 16 does not divide K, they are padded, and x with zeros. x stays as
    it is: TensorRT's rounding of activations to 4 bits (TRT_FP4DynamicQuantize) is no operator of ONNX and is left out.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every product whose weight the plan has an nvfp4 format for."""
        products = [found for node in model.graph if (found := find_weight(node)) is not None]
        chosen = [found for found in products if self.plan.format_of(found.key).kind == NVFP4]
        for found in chosen:
            _quantize(model, found)
        return ir.passes.PassResult(model, bool(chosen))


def _quantize(model: ir.Model, found: MatMulWeight) -> None:
    weight = Nvfp4Weight(found.tensor)
    tensors = (weight.codes, weight.block_scales, weight.global_scale)
    codes, block_scales, global_scale = (add_initializer(model, tensor) for tensor in tensors)
    name, x = found.nodes[0].name, found.x
    nodes: list[ir.Node] = []
    missing = int(weight.codes.shape.numpy()[0]) - found.num_inputs
    if missing:
        padding = add_integers(model, f"quantize.pad_{missing}", [0, missing])
        last_axis = add_integers(model, "quantize.last_axis", [-1])
        nodes.append(ir.node("Pad", [x, padding, None, last_axis], name=f"{name}/pad"))
        x = nodes[-1].outputs[0]
    nodes.append(ir.node("DequantizeLinear", [block_scales, global_scale], name=f"{name}/scales"))
    scales = nodes[-1].outputs[0]
    blocks = {"axis": 0, "block_size": NVFP4_BLOCK}
    nodes.append(ir.node("DequantizeLinear", [codes, scales], attributes=blocks, name=f"{name}/dequantize"))
    nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name=name))
    if found.bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], found.bias], name=f"{name}/bias"))
    found.replace(model, nodes, nodes[-1].outputs[0])
