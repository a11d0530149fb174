"""Store weights in few bits and multiply by what DequantizeLinear makes of them, as TensorRT fuses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer, add_integers
from engines.passes.matmul_weight import MatMulWeight, find_weight
from engines.quantize.float8 import E4M3_MAX, half_scale
from engines.quantize.formats import FLOAT, FLOAT8, WeightFormats
from engines.quantize.input_ranges import RangedWeight
from engines.quantize.tensors import ProducedTensor
from engines.tensorrt.storage import TensorRtStorage
from runtime.errors import UsageError

# Range of the codes over the largest magnitude that calibration saw. What other prompts put beyond is cut off, and a
# wider range costs nothing until small values become subnormal: demo, all layers in float8, mean KL with 1, 2, 4 and 8
# times 0.00145, 0.00144, 0.00140 and 0.00144; with half of it 0.015.
_MARGIN = 2.0


class DequantizeWeightsPass(ir.passes.InPlacePass):
    """Exchange x · Wᵀ + b for MatMul(x, DequantizeLinear(codes [K, N], scales)) + b.

    | format | scales | x |
    |---|---|---|
    | blockwise | one for each block along K | as it is |
    | nvfp4 | the same, themselves after DequantizeLinear with one scale for all | as it is |
    | float8 | one for each output | through QuantizeLinear and DequantizeLinear |

    Where a block does not divide K, the codes are padded, and x with zeros. A table that is also looked up keeps its
    rows as they are for the lookup. TensorRT's rounding of activations to 4 bits (TRT_FP4DynamicQuantize) is no
    operator of ONNX and is left out.

    x in float8 has one scale, from the range that calibration hung on W; products of the same x share it and its codes.
    A graph whose weights have no range can be made, but not written with its weights.
    """

    def __init__(self, formats: WeightFormats) -> None:
        super().__init__()
        self._formats = formats

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every product whose weight there is a format for."""
        found_all = [found for node in model.graph if (found := find_weight(node)) is not None]
        products = [found for found in found_all if self._formats.format_of(found.key).kind != FLOAT]
        rounded: dict[ir.Value, ir.Value] = {}
        for found in products:
            weight_format, x = self._formats.format_of(found.key), found.x
            if weight_format.kind == FLOAT8:
                if x not in rounded:
                    rounded[x] = _round_input(model, found)
                x = rounded[x]
            weight = TensorRtStorage().product(found.tensor, weight_format, is_table=found.is_table)
            _multiply(model, found, x, [add_initializer(model, tensor) for tensor in weight.tensors])
        return ir.passes.PassResult(model, bool(products))


def _multiply(model: ir.Model, found: MatMulWeight, x: ir.Value, stored: list[ir.Value]) -> None:
    """Put MatMul(x, …) in the product's place; `stored` are codes, scales and, where there is one, their scale."""
    codes, scales, *outer = stored
    assert codes.shape is not None and scales.shape is not None
    name, num_rows = found.nodes[0].name, int(codes.shape.numpy()[0])
    nodes: list[ir.Node] = []
    missing = num_rows - found.num_inputs
    if missing:
        padding = add_integers(model, f"quantize.pad_{missing}", [0, missing])
        last_axis = add_integers(model, "quantize.last_axis", [-1])
        nodes.append(ir.node("Pad", [x, padding, None, last_axis], name=f"{name}/pad"))
        x = nodes[-1].outputs[0]
    is_in_blocks = len(scales.shape) == 2
    attributes = {"axis": 0, "block_size": num_rows // int(scales.shape.numpy()[0])} if is_in_blocks else {"axis": 1}
    if outer:
        nodes.append(ir.node("DequantizeLinear", [scales, *outer], name=f"{name}/scales"))
        scales = nodes[-1].outputs[0]
    nodes.append(ir.node("DequantizeLinear", [codes, scales], attributes=attributes, name=f"{name}/dequantize"))
    nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name=name))
    if found.bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], found.bias], name=f"{name}/bias"))
    found.replace(model, nodes, nodes[-1].outputs[0])


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
