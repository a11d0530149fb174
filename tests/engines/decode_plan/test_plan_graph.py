"""What is read out of a lowered decoder for its decode plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir
import pytest

from engines import registry
from engines.bundle import DECODER, Bundle
from engines.decode_plan.graph import Decoder, read_decoder
from engines.kernels.launch import FP8, HALF, INT4, INT8, Unserved
from engines.lower import lower
from engines.weight_shapes import EMBEDDING_KEY
from helpers.targets import by_name

TARGETS = registry.load_family("ort_cuda")


def lowered(bundle: Bundle, target: str) -> ir.Model:
    found = registry.get(target)
    return lower(bundle.graphs[DECODER].clone(), found, bundle.config, found.passes(found.formats))


@pytest.mark.parametrize("target", TARGETS, ids=by_name)
def test_every_target_has_a_plan(target: registry.Target, demo_bundle: Bundle) -> None:
    decoder = read_decoder(lowered(demo_bundle, target.name), demo_bundle.config)
    text = demo_bundle.config.text
    assert len(decoder.layers) == text.num_layers
    assert decoder.dtype == ("bfloat16" if target.precision == "bf16" else "float16")
    assert (decoder.head.rows, decoder.head.columns) == (text.vocab_size, text.hidden_size)
    assert all(layer.qkv.columns == text.hidden_size == layer.output.rows for layer in decoder.layers)


def test_weights_are_those_of_their_layer(demo_bundle: Bundle) -> None:
    decoder = read_decoder(lowered(demo_bundle, "ort-cuda-fp16"), demo_bundle.config)
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.language_model.layers.{index}."
        named = {
            "input_layernorm.weight": layer.attention_norm.gain,
            "self_attn.{q_proj,k_proj,v_proj}.weight": layer.qkv.data,
            "self_attn.q_norm.weight": layer.q_norm.gain,
            "self_attn.k_norm.weight": layer.k_norm.gain,
            "self_attn.o_proj.weight": layer.output.data,
            "post_attention_layernorm.weight": layer.mlp_norm.gain,
            "mlp.{gate_proj,up_proj}.weight": layer.gate_up and layer.gate_up.data,
            "mlp.down_proj.weight": layer.down and layer.down.data,
        }
        assert named == {name: prefix + name for name in named}
    assert decoder.final_norm.gain == "model.language_model.norm.weight"
    assert decoder.table.data == decoder.head.data == "model.language_model.embed_tokens.weight"


def test_formats_and_blocks(demo_bundle: Bundle) -> None:
    decoder = read_decoder(lowered(demo_bundle, "ort-cuda-int4"), demo_bundle.config)
    assert [layer.qkv.kind for layer in decoder.layers] == [INT8, INT8, INT4, INT4]
    assert {layer.qkv.block for layer in decoder.layers} == {128}
    assert all(layer.output.zero_points and layer.output.scales for layer in decoder.layers)
    assert (decoder.table.kind, decoder.table.block, decoder.head.block) == (INT4, 32, 32)


def test_float8_weights(demo_bundle: Bundle) -> None:
    decoder = read_decoder(lowered(demo_bundle, "ort-cuda-fp8"), demo_bundle.config)
    weights = [decoder.table, decoder.head, *(layer.qkv for layer in decoder.layers)]
    assert {(each.kind, each.block, each.zero_points) for each in weights} == {(FP8, 128, None)}
    assert (decoder.table.data, decoder.table.scales) == (decoder.head.data, decoder.head.scales)
    assert decoder.table.scales == f"{EMBEDDING_KEY}.scales"


def test_experts(demo_moe_bundle: Bundle) -> None:
    experts = demo_moe_bundle.config.text.experts
    assert experts is not None
    for target, kinds in (("ort-cuda-fp16", [HALF] * 4), ("ort-cuda-int4", [INT8, INT8, INT4, INT4])):
        decoder = read_decoder(lowered(demo_moe_bundle, target), demo_moe_bundle.config)
        found = [layer.experts for layer in decoder.layers]
        assert [each and each.gate_up.kind for each in found] == kinds
        assert all(each and (each.num_experts, each.top_k) == (experts.num_experts, experts.top_k) for each in found)
        assert all(each and each.gate_up.rows == 2 * experts.intermediate_size for each in found)


def _other_attention(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "GroupQueryAttention").op_type = "Attention"


def _other_shape(model: ir.Model) -> None:
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    model.graph.initializers[name].shape = ir.Shape([192, 511])


def _up_before_gate(model: ir.Model) -> None:
    split = next(node for node in model.graph if node.op_type == "Split" and len(node.outputs) == 2)
    gate, up = split.outputs
    (sigmoid,) = (node for node in gate.consumers() if node.op_type == "Sigmoid")
    sigmoid.replace_input_with(0, up)


def _no_norm(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "FusedMatMul")
    before = node.inputs[0]
    assert before is not None
    norm = before.producer()
    assert norm is not None
    node.replace_input_with(0, norm.inputs[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_other_attention, "3 nodes of attention for 4 layers"),
        (_other_shape, "expected"),
        (_up_before_gate, "gate and up"),
        (_no_norm, "no RMSNorm"),
    ],
)
def test_other_graphs_are_refused(change: Callable[[ir.Model], None], problem: str, demo_bundle: Bundle) -> None:
    model = lowered(demo_bundle, "ort-cuda-fp16")
    change(model)
    with pytest.raises(Unserved, match=problem):
        read_decoder(model, demo_bundle.config)


def test_a_config_of_another_model_is_refused(demo_bundle: Bundle) -> None:
    text = dataclasses.replace(demo_bundle.config.text, num_kv_heads=3)
    with pytest.raises(Unserved, match="expected"):
        read_decoder(lowered(demo_bundle, "ort-cuda-fp16"), dataclasses.replace(demo_bundle.config, text=text))


def test_constants_are_the_rotary_tables(demo_bundle: Bundle) -> None:
    decoder: Decoder = read_decoder(lowered(demo_bundle, "ort-cuda-fp16"), demo_bundle.config)
    half = demo_bundle.config.text.head_dim // 2
    assert decoder.constants["inv_freq"].shape == decoder.constants["axis_of_frequency"].shape == (half,)
    assert set(decoder.constants["axis_of_frequency"].tolist()) == {0, 1, 2}
