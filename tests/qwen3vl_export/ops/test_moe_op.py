"""`MixtureOfExperts`: its body in standard ops, its reference, and transformers agree; ties go one way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.onnx_text import DOMAIN, parse_function
from helpers import judge
from helpers.experts_op import WIDTH, Arrays, D, E, random_inputs, with_ties
from helpers.random_checkpoints import tiny_values
from qwen3vl_export.ops import mixture_of_experts


def run_body(inputs: Arrays, top_k: int) -> np.ndarray[Any, Any]:
    function = parse_function(mixture_of_experts.BODY)
    values = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, array in inputs.items()
    ]
    node = ir.node(function.name, values, attributes={"top_k": top_k}, domain=DOMAIN)
    out = node.outputs[0]
    out.name, out.shape, out.type = "out", ir.Shape(inputs["x"].shape), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, [out], nodes=[node], opset_imports={"": 24, DOMAIN: 1}, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[function]))
    onnx.checker.check_model(proto, full_check=True)
    (found,) = ort.InferenceSession(proto.SerializeToString()).run(None, inputs)
    return found


@pytest.mark.portable
@pytest.mark.parametrize("top_k", [1, 3, E])
@pytest.mark.parametrize("num_tokens", [(1, 1), (3, 1), (2, 9)])
def test_body_equals_reference(num_tokens: tuple[int, int], top_k: int) -> None:
    inputs = random_inputs(num_tokens, top_k)
    expected = mixture_of_experts.reference(**inputs, top_k=top_k)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(run_body(inputs, top_k), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.judge
@pytest.mark.parametrize("top_k", [2, 5])
def test_reference_equals_transformers(top_k: int) -> None:
    """A decoder of one layer whose attention gives 0: what it adds to a token is what its experts make of its norm."""
    import torch
    from transformers import Qwen3VLMoeTextModel

    values = tiny_values(
        "tiny-moe",
        text_config={
            **{"hidden_size": D, "moe_intermediate_size": WIDTH, "num_experts": E, "num_experts_per_tok": top_k},
            **{"num_hidden_layers": 1, "mlp_only_layers": []},
        },
        vision_config={"out_hidden_size": D},
    )
    inputs = random_inputs((2, 6))
    decoder = Qwen3VLMoeTextModel(judge.config_of(values).text_config).eval()
    weights = {name: torch.from_numpy(inputs[name]) for name in ("router_weight", "gate_up", "down")}
    if judge.experts_lie_as_on_the_hub():
        weights |= {name: weights[name].transpose(1, 2) for name in ("gate_up", "down")}
    names = {"gate.weight": "router_weight", "experts.gate_up_proj": "gate_up", "experts.down_proj": "down"}
    state = {key: torch.ones_like(value) for key, value in decoder.state_dict().items() if "norm" in key}
    state |= {f"layers.0.mlp.{key}": weights[name] for key, name in names.items()}
    state["layers.0.self_attn.o_proj.weight"] = torch.zeros_like(decoder.layers[0].self_attn.o_proj.weight)
    missing, unexpected = decoder.load_state_dict(state, strict=False)
    assert not unexpected and not [key for key in missing if ".mlp." in key]
    with torch.no_grad():
        expected = decoder(inputs_embeds=torch.from_numpy(inputs["x"])).last_hidden_state.numpy()

    def norm(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    added = mixture_of_experts.reference(norm(inputs["x"]), *(inputs[name] for name in names.values()), top_k=top_k)
    assert np.abs(added).max() > 10 * np.abs(inputs["x"]).max()
    np.testing.assert_allclose(norm(inputs["x"] + added), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.portable
def test_the_lower_index_wins_a_tie() -> None:
    inputs = with_ties(random_inputs((1, 5)))
    found = run_body(inputs, 3)
    # Without experts 1, 2 and 4 the result would be another; without 6 it is not.
    np.testing.assert_allclose(found, mixture_of_experts.reference(**inputs, top_k=3), rtol=1e-4, atol=1e-4)
    inputs["down"][6] = 0
    np.testing.assert_array_equal(run_body(inputs, 3), found)
    for expert in (1, 2, 4):
        broken = {**inputs, "down": inputs["down"].copy()}
        broken["down"][expert] = 0
        assert np.abs(run_body(broken, 3) - found).max() > 0.1


@pytest.mark.portable
def test_experts_that_no_token_chose_are_not_read() -> None:
    inputs = with_ties(random_inputs((1, 5)))
    inputs["gate_up"][[0, 3, 5, 6]] = np.nan
    assert np.isfinite(run_body(inputs, 3)).all()
