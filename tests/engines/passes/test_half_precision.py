"""Conversion to float16 and bfloat16: what stays float32, and how weights are cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.bundle import DECODER, VISION, Bundle
from engines.lower import lower
from engines.passes.half_precision import FLOAT32_OPS, HalfPrecisionPass, stray_casts
from engines.registry import get
from engines.weights import CastTensor, StreamedTensor
from runtime.errors import BundleError

HALF_TARGETS = ("trt-fp16", "trt-bf16", "trt-int4")


class Streamed(StreamedTensor):
    def __init__(self, values: np.ndarray) -> None:
        super().__init__("model.some.weight", values.shape, ir.DataType.FLOAT)
        self._values = values

    def blocks(self) -> Iterator[np.ndarray[Any, Any]]:
        yield self._values.reshape(-1)


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(text)


def types_of(model: ir.Model, op_type: str) -> set[str]:
    return {node.inputs[0].dtype.name for node in model.graph if node.op_type == op_type}


@pytest.fixture(scope="module", params=HALF_TARGETS)
def lowered(request: pytest.FixtureRequest, demo_bundle: Bundle) -> tuple[str, dict[str, ir.Model]]:
    target = get(request.param)
    graphs = {name: graph.clone() for name, graph in demo_bundle.graphs.items()}
    half = "BFLOAT16" if request.param.endswith("bf16") else "FLOAT16"
    return half, {
        name: lower(graph, target, demo_bundle.config, target.passes(target.formats)) for name, graph in graphs.items()
    }


def test_every_product_and_attention_is_half_and_every_listed_op_float32(
    lowered: tuple[str, dict[str, ir.Model]],
) -> None:
    half, graphs = lowered
    for name in (VISION, DECODER):
        assert types_of(graphs[name], "MatMul") == {half}
        assert types_of(graphs[name], "Attention") == {half}
        for op_type in FLOAT32_OPS & {node.op_type for node in graphs[name].graph}:
            assert types_of(graphs[name], op_type) == {"FLOAT"}, op_type
    assert types_of(graphs[DECODER], "TensorScatter") == {half}
    assert {"RMSNormalization", "RotaryEmbedding", "Cos"} <= {node.op_type for node in graphs[DECODER].graph}


def test_casts_stand_at_the_edge_of_float32_alone(lowered: tuple[str, dict[str, ir.Model]]) -> None:
    _, graphs = lowered
    for model in graphs.values():
        assert sum(node.op_type == "Cast" for node in model.graph) > 10
        assert stray_casts(model) == []


def test_a_cast_between_half_places_is_found() -> None:
    model = model_of(
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float16[2,4] x, float[4] w) => (float16[2,4] y) {
            wide = Cast <to = 1> (x)
            doubled = Add (wide, wide)
            half = Cast <to = 10> (doubled)
            again = Cast <to = 1> (half)
            normed = RMSNormalization <axis = -1> (again, w)
            y = Cast <to = 10> (normed)
        }"""
    )
    for node, name in zip(model.graph, ("wide", "", "half", "again", "", "y"), strict=True):
        node.name = name
        node.outputs[0].dtype = ir.DataType.FLOAT if name in ("wide", "", "again") else ir.DataType.FLOAT16
    assert stray_casts(model) == ["wide", "half"]


def test_positions_are_never_rounded_to_half(lowered: tuple[str, dict[str, ir.Model]]) -> None:
    _, graphs = lowered
    waiting = [node for node in graphs[DECODER].graph if node.op_type in ("Cos", "Sin")]
    assert len(waiting) == 2
    while waiting:
        node = waiting.pop()
        for value in node.inputs:
            assert value is not None and value.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            if (producer := value.producer()) is not None:
                waiting.append(producer)


def test_inputs_and_outputs_stay_float32_but_for_the_cache(lowered: tuple[str, dict[str, ir.Model]]) -> None:
    half, graphs = lowered
    for value in (*graphs[DECODER].graph.inputs, *graphs[DECODER].graph.outputs):
        if "key_values" in str(value.name):
            assert value.dtype is not None and value.dtype.name == half
        else:
            assert value.dtype in (ir.DataType.FLOAT, ir.DataType.INT64), value.name


def test_one_cast_serves_all_that_want_it() -> None:
    model = model_of(
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float[2,4] x, float[4] w) => (float[2,4] a, float[2,4] b) {
            y = Add (x, x)
            a = LayerNormalization <axis = -1> (y, w)
            b = RMSNormalization <axis = -1> (y, w)
        }"""
    )
    HalfPrecisionPass(ir.DataType.FLOAT16)(model)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert [node.outputs[0].dtype for node in casts] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert len(casts[1].outputs[0].uses()) == 2


def test_sums_in_float32_hold_what_float16_cannot() -> None:
    model = model_of(
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float[1,64] x, float[64] w) => (float[1,64] y) {
            h = Mul (x, w)
            y = RMSNormalization <axis = -1, epsilon = 1e-6> (h, w)
        }"""
    )
    HalfPrecisionPass(ir.DataType.FLOAT16)(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.full((1, 64), 3000, np.float32)  # its square is beyond float16
    (y,) = session.run(None, {"x": x, "w": np.ones(64, np.float32)})
    np.testing.assert_allclose(y, np.ones((1, 64)), rtol=1e-5)


def test_cast_weights_keep_their_names_and_places() -> None:
    """Scales that were written last would all be held until then."""
    model = model_of("""
        <ir_version: 10, opset_import: ["" : 21]>
        m (float[2] x) => (float[2] y)
        {
            x_a = Mul (x, scale_a)
            both = Add (x_a, scale_b)
            square = Mul (both, scale_b)
            norm = LayerNormalization <axis = -1> (square, scale_a)
            y = Add (norm, shift)
        }""")
    for name in ("codes_a", "scale_a", "codes_b", "scale_b", "shift"):
        tensor = ir.Tensor(np.ones(2, np.int8 if name.startswith("codes") else np.float32), name=name)
        value = next((v for node in model.graph for v in node.inputs if v is not None and v.name == name), None)
        value = value or ir.Value(name=name)
        value.const_value, value.shape, value.type = tensor, ir.Shape([2]), ir.TensorType(tensor.dtype)
        model.graph.register_initializer(value)
    HalfPrecisionPass(ir.DataType.FLOAT16)(model)
    initializers = model.graph.initializers
    # scale_a is wanted in both types; its copy stands at the end.
    assert list(initializers)[:5] == ["codes_a", "scale_a", "codes_b", "scale_b", "shift"]
    assert [initializers[name].dtype.name for name in ("scale_a", "scale_b", "shift")] == [
        "FLOAT",
        "FLOAT16",
        "FLOAT16",
    ]
    assert len(initializers) == 6


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_weights_are_rounded_to_nearest_even(dtype: str) -> None:
    values = np.float32([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-9, -(1 + 2**-8), 1 + 3 * 2**-8])
    (cast,) = CastTensor("w", Streamed(values), ir.DataType[dtype]).blocks()
    expected = {
        "FLOAT16": [1, 1 + 2**-9, 1 + 2**-9, -(1 + 2**-8), 1 + 3 * 2**-8],
        "BFLOAT16": [1, 1, 1, -1, 1 + 2**-6],
    }[dtype]
    assert cast.astype(np.float32).tolist() == expected


@pytest.mark.parametrize(("value", "dtype"), [(70000.0, "FLOAT16"), (np.nan, "FLOAT16"), (np.inf, "BFLOAT16")])
def test_a_weight_that_is_no_number_in_half_is_an_error_that_names_it(value: float, dtype: str) -> None:
    tensor = CastTensor("w", Streamed(np.float32([0, value])), ir.DataType[dtype])
    with pytest.raises(BundleError, match=r"model\.some\.weight.*" + dtype.lower()):
        list(tensor.blocks())
    assert np.isfinite(next(CastTensor("w", Streamed(np.float32([0, 65504])), ir.DataType.FLOAT16).blocks())).all()
