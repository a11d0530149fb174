"""Multiply float8 by float8, as TensorRT fuses it: both operands go through DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.quantize.float8 import E4M3_MAX, half_scale, quantize_rows_float8
from engines.quantize.formats import FLOAT8, WeightPlan
from engines.quantize.input_ranges import RangedWeight
from engines.quantize.tensors import ProducedTensor, RowwiseWeight
from runtime.errors import UsageError

# Range of the codes over the largest magnitude that calibration saw. What other prompts put beyond is cut off, and a
# wider range costs nothing until small values become subnormal: demo, all layers in float8, mean KL with 1, 2, 4 and 8
# times 0.00145, 0.00144, 0.00140 and 0.00144; with half of it 0.015.
_MARGIN = 2.0


class QuantizeFloat8Pass(ir.passes.InPlacePass):
    """Exchange x · Wᵀ + b for MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes [K, N])) + b.

    x has one scale, from the range that calibration hung on W; products of the same x share it and its codes. W has one
    scale for each output. A graph whose weights have no range can be made, but not written with its weights.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every product whose weight the plan has a float8 format for."""
        products = [found for node in model.graph if (found := find_weight(node)) is not None]
        chosen = [found for found in products if self.plan.format_of(found.key).kind == FLOAT8]
        rounded: dict[ir.Value, ir.Value] = {}
        for found in chosen:
            if found.x not in rounded:
                rounded[found.x] = _round_input(model, found)
            _quantize(model, found, rounded[found.x])
        return ir.passes.PassResult(model, bool(chosen))


def _round_input(model: ir.Model, found: MatMulWeight) -> ir.Value:
    """Return x as float8 holds it."""
    scale = add_initializer(model, _scale_of(found))
    zero = ir.Tensor(np.zeros((), ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN, name="quantize.float8_zero")
    zero_point = add_initializer(model, zero)
    name, producer = found.nodes[0].name, found.x.producer()
    codes = ir.node("QuantizeLinear", [found.x, scale, zero_point], name=f"{name}/input/quantize")
    result = ir.node("DequantizeLinear", [codes.outputs[0], scale, zero_point], name=f"{name}/input/dequantize")
    if producer is None:
        model.graph.insert_before(model.graph[0], [codes, result])
    else:
        model.graph.insert_after(producer, [codes, result])
    return result.outputs[0]


def _quantize(model: ir.Model, found: MatMulWeight, x: ir.Value) -> None:
    weight = RowwiseWeight(found.tensor, ir.DataType.FLOAT8E4M3FN, quantize_rows_float8)
    codes, scales = add_initializer(model, weight.transposed), add_initializer(model, weight.scales)
    name = found.nodes[0].name
    nodes = [ir.node("DequantizeLinear", [codes, scales], attributes={"axis": 1}, name=f"{name}/dequantize")]
    nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name=name))
    if found.bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], found.bias], name=f"{name}/bias"))
    found.replace(model, nodes, nodes[-1].outputs[0])


def input_scale(largest: float) -> NDArray[np.float32]:
    """Return the scale for inputs of which calibration saw `largest`, [1], float32 that float16 holds."""
    return half_scale(np.asarray([largest * _MARGIN], np.float32), E4M3_MAX)


def _scale_of(found: MatMulWeight) -> ProducedTensor:
    """Return the scale of x."""

    def produce() -> Iterator[NDArray[Any]]:
        if not isinstance(found.tensor, RangedWeight):
            raise UsageError(
                f"{found.key}: no calibration prompt has shown the range of its input",
                remedy="calibrate before the engine is built (--calibration DIR), with an image in a prompt",
            )
        yield input_scale(found.tensor.largest_input)

    return ProducedTensor(f"{found.key}.input_scale", (), ir.DataType.FLOAT, produce)
