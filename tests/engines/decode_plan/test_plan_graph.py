"""What is read out of a lowered decoder for its decode plan."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.external_data_helper import ExternalDataInfo

from engines import registry
from engines.bundle import DECODER, Bundle
from engines.decode_plan.compile import Code, Job
from engines.decode_plan.decoder import Decoder
from engines.decode_plan.graph import read_decoder
from engines.decode_plan.steps import FAST, make_steps
from engines.decode_plan.write import check_weights, write_plan
from engines.external_data import write_model
from engines.kernels.launch import FP8, GPUS, HALF, INT4, INT8, Unserved
from engines.lower import lower
from engines.quantize.formats import WeightFormats
from engines.weight_shapes import EMBEDDING_KEY
from helpers.moe_checkpoints import write_experts
from helpers.random_checkpoints import write_random
from helpers.targets import by_name
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle

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
    assert decoder.top_k == target.top_k
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


def test_a_config_of_another_model_is_refused(demo_bundle: Bundle) -> None:
    text = dataclasses.replace(demo_bundle.config.text, num_kv_heads=3)
    with pytest.raises(Unserved, match="expected"):
        read_decoder(lowered(demo_bundle, "ort-cuda-fp16"), dataclasses.replace(demo_bundle.config, text=text))


def test_constants_are_the_rotary_tables(demo_bundle: Bundle) -> None:
    decoder: Decoder = read_decoder(lowered(demo_bundle, "ort-cuda-fp16"), demo_bundle.config)
    half = demo_bundle.config.text.head_dim // 2
    assert decoder.constants["inv_freq"].shape == decoder.constants["axis_of_frequency"].shape == (half,)
    assert set(decoder.constants["axis_of_frequency"].tolist()) == {0, 1, 2}


def test_what_layers_differ_in_is_read(demo_bundle: Bundle) -> None:
    model = lowered(demo_bundle, "ort-cuda-fp16")
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    attention[2].attributes["scale"] = ir.AttrFloat32("scale", 0.25)
    norms = [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization"]
    norms[0].attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    del norms[1].attributes["epsilon"], norms[2].attributes["epsilon"]
    decoder = read_decoder(model, demo_bundle.config)
    assert [layer.scale for layer in decoder.layers] == [0.125, 0.125, 0.25, 0.125]
    assert [layer.attention_norm.epsilon for layer in decoder.layers] == pytest.approx([0.5, 1e-6, 1e-6, 1e-6])
    assert [layer.q_norm.epsilon for layer in decoder.layers] == pytest.approx([1e-5, 1e-6, 1e-6, 1e-6])
    launches = [each for each in make_steps(decoder, GPUS[90]).of(1, FAST) if each.function == "attention"]
    assert [each.arguments["scale"].source for each in launches] == pytest.approx(
        [scale / math.log(2) for scale in (0.125, 0.125, 0.25, 0.125)]
    )
    assert [each.arguments["eps"].source for each in launches] == pytest.approx([1e-5, 1e-6, 1e-6, 1e-6])


@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-int4", "ort-cuda-fp8"])
def test_inputs_that_are_left_out_may_be_written_as_none(target: str, demo_moe_bundle: Bundle) -> None:
    model = lowered(demo_moe_bundle, target)
    expected = read_decoder(model, demo_moe_bundle.config)
    for node in model.graph:
        if node.domain:
            node.resize_inputs(len(node.inputs) + 4)
    found = read_decoder(model, demo_moe_bundle.config)
    assert found.layers == expected.layers and (found.table, found.head) == (expected.table, expected.head)


def test_unequal_epsilons_of_queries_and_keys_have_no_kernel(demo_bundle: Bundle) -> None:
    model = lowered(demo_bundle, "ort-cuda-fp16")
    norms = [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization"]
    norms[1].attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    with pytest.raises(Unserved, match="unequal epsilons"):
        make_steps(read_decoder(model, demo_bundle.config), GPUS[90])


@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-fp8"])
def test_a_head_of_its_own_is_not_the_table(target: str, tmp_path: Path) -> None:
    bundle = make_bundle(Checkpoint.open(str(write_random(tmp_path, tie_word_embeddings=False))))
    decoder = read_decoder(lowered(bundle, target), bundle.config)
    assert (decoder.table.data.split(".f8")[0], decoder.head.data.split(".f8")[0]) == (EMBEDDING_KEY, "lm_head.weight")


def test_one_layer_may_be_dense_among_experts(tmp_path: Path) -> None:
    bundle = make_bundle(Checkpoint.open(str(write_experts(tmp_path))))
    decoder = read_decoder(lowered(bundle, "ort-cuda-fp16"), bundle.config)
    assert [layer.experts is None for layer in decoder.layers] == [False, False, False, True, False]
    assert [layer.gate_up is None for layer in decoder.layers] == [True, True, True, False, True]


def test_the_last_block_of_a_row_is_filled_up(demo_bundle: Bundle) -> None:
    decoder = read_decoder(lowered(demo_bundle, "ort-cuda-int4"), demo_bundle.config)
    products = [each for each in make_steps(decoder, GPUS[90]).of(1, FAST) if each.module == "product"]
    qkv = next(each for each in products if each.arguments["W"].source == f"weight:{decoder.layers[0].qkv.data}")
    # Rows of 192 codes of 8 bits in blocks of 128.
    assert (qkv.constants["K"], qkv.constants["ROW_BYTES"], qkv.constants["SCALES"]) == (192, 256, 2)


def test_small_blocks_have_no_kernel(demo_bundle: Bundle) -> None:
    formats = WeightFormats.from_rules([{"match": ["*"], "kind": "blockwise", "bits": 4, "block": 16}])
    found = registry.get("ort-cuda-int4")
    model = lower(demo_bundle.graphs[DECODER].clone(), found, demo_bundle.config, found.passes(formats))
    decoder = read_decoder(model, demo_bundle.config)
    assert decoder.head.block == 16
    with pytest.raises(Unserved, match="in blocks of 16"):
        make_steps(decoder, GPUS[90])


def test_the_plan_says_of_the_weights_what_the_decoder_says(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Neither is made of the other: the decoder is read by onnx, the plan from its file."""
    model = lowered(demo_bundle, "ort-cuda-int4")
    write_model(model, tmp_path / "decoder.onnx", with_weights=True)
    decoder = read_decoder(model, demo_bundle.config)
    steps = {90: make_steps(decoder, GPUS[90])}
    check_weights(model, steps)

    def compiled(jobs: list[Job]) -> dict[Job, Code]:
        return {job: Code("kernel", 0, "12.9.86", b"code") for job in jobs}

    write_plan(tmp_path, model, decoder, steps, compiled)
    plan = json.loads((tmp_path / "decode_plan.json").read_text())
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    expected = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = ExternalDataInfo(tensor)
            expected[tensor.name] = {
                "file": place.location,
                "offset": place.offset,
                "bytes": place.length,
                "onnx_type": tensor.data_type,
                "shape": list(tensor.dims),
            }
    assert plan["weights"] == expected
    read = {
        source for row in plan["steps"]["90"]["1"]["fast"] for source in row[2] if str(source).startswith("weight:")
    }
    assert {source.partition(":")[2] for source in read} <= set(expected) and len(read) > 50


def test_a_weight_inside_the_graph_has_no_place_that_a_plan_could_name(demo_bundle: Bundle, tmp_path: Path) -> None:
    model = lowered(demo_bundle, "ort-cuda-fp16")
    write_model(model, tmp_path / "decoder.onnx", with_weights=True)
    gain = model.graph.initializers["model.language_model.norm.weight"]
    gain.const_value = ir.Tensor(np.ones(192, np.float16), name=gain.name)
    steps = {90: make_steps(read_decoder(model, demo_bundle.config), GPUS[90])}
    with pytest.raises(Unserved, match=r"norm\.weight lies inside decoder\.onnx"):
        check_weights(model, steps)
