"""Each custom op: the body in standard ops, the ONNX Runtime body, and the reference agree."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

import configs
from engines.onnx_text import DOMAIN, parse_function
from engines.registry import get
from qwen3vl_export.ops import causal_attention, vision_attention
from runtime.model_config import ModelConfig

N, K, H = 4, 2, 32


def _config() -> ModelConfig:
    return ModelConfig.from_hf(configs.load("models/tiny") | {"model_type": "qwen3_vl"})


def _run(body: str, inputs: dict[str, np.ndarray], attributes: dict[str, float]) -> list[np.ndarray]:
    """Run a model of one call to the function."""
    function = parse_function(body)
    values = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in inputs.items()
    ]
    node = ir.node(function.name, values, attributes=attributes, domain=DOMAIN, num_outputs=len(function.outputs))
    like = {"out": "q", "present_key": "past_key", "present_value": "past_value"}
    for value, formal in zip(node.outputs, function.outputs, strict=True):
        value.name, value.type = formal.name, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(inputs[like[str(formal.name)]].shape)
    imports = {"": 24, DOMAIN: 1, "com.microsoft": 1}
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=imports, name="g")
    model = ir.Model(graph, ir_version=11, functions=[function])
    if "com.microsoft" in body:
        # As every lowering does; ONNX Runtime 1.32 dies of contrib ops inside functions.
        common.InlinePass()(model)
    proto = ir.to_proto(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, inputs)


def _causal_inputs(num_new: int, past: list[int], capacity: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(num_new)
    B = len(past)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    angles = normal(B, num_new, H // 2)
    return {
        "q": normal(B, num_new, N * H),
        "k": normal(B, num_new, K * H),
        "v": normal(B, num_new, K * H),
        "q_norm": normal(H),
        "k_norm": normal(H),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "past_key": normal(B, K, capacity, H),
        "past_value": normal(B, K, capacity, H),
        "past_lengths": np.array(past),
    }


@pytest.mark.portable
@pytest.mark.parametrize(
    ("native", "num_new", "past"),
    [
        (False, 5, [0]),
        (False, 3, [7, 0, 2]),
        (False, 1, [11, 4]),
        (True, 5, [0]),
        (True, 3, [7]),
        (True, 1, [11, 4]),
    ],
)
def test_causal_attention(native: bool, num_new: int, past: list[int]) -> None:
    body = get("ort-cpu-fp32").native_ops["CausalAttention"](_config()) if native else causal_attention.BODY
    inputs = _causal_inputs(num_new, past)
    attributes = {"scale": 0.2, "epsilon": 1e-6}
    found = _run(body, inputs, attributes)
    expected = causal_attention.reference(**inputs, **attributes)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    for got, want in zip(found[1:], expected[1:], strict=True):
        for b, length in enumerate(past):  # rows past the valid length are undefined with separate buffers
            valid = slice(0, length + num_new)
            np.testing.assert_allclose(got[b, :, valid], want[b, :, valid], atol=2e-5)


@pytest.mark.portable
@pytest.mark.parametrize("native", [False, True])
def test_vision_attention(native: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 12, 2 * 20)).astype(np.float32) for _ in range(3))
    angles = rng.standard_normal((12, 10)).astype(np.float32)
    inputs = {"q": q, "k": k, "v": v, "cos": np.cos(angles), "sin": np.sin(angles)}
    attributes = {"num_heads": 2, "scale": 0.3}
    body = get("ort-cpu-fp32").native_ops["VisionAttention"](_config()) if native else vision_attention.BODY
    (found,) = _run(body, inputs, attributes)
    np.testing.assert_allclose(found, vision_attention.reference(**inputs, **attributes), atol=1e-5)
