"""Every size of Qwen3-VL is exported without weights, from files whose data are holes: names, ops and shapes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

import configs
from benchmarks.synthetic import tensor_shapes, write_checkpoint
from engines import registry
from engines.build import build_engine
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle
from runtime.chat import ChatTemplate, template_source
from runtime.messages import user_message

SIZES = ("2b", "4b", "8b", "32b")
OPENING = "'<|im_start|>assistant\\n'"
PATCHES = "model.visual.patch_embed.proj.weight"


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def check_interface(vision: onnx.GraphProto, decoder: onnx.GraphProto, config: dict[str, Any]) -> None:
    """Compare names and dims of inputs and outputs with the contract, spelled out here."""
    text, levels = config["text_config"], 1 + len(config["vision_config"]["deepstack_visual_indexes"])
    tower, hidden = config["vision_config"], text["hidden_size"]
    quarter = tower["hidden_size"] // tower["num_heads"] // 2
    patch = 3 * tower["temporal_patch_size"] * tower["patch_size"] ** 2
    assert {value.name: dims(value) for value in vision.input} == {
        "pixel_values": ["I", "P", patch],
        "pos_indices": ["P", 4],
        "pos_weights": ["P", 4],
        "rope_cos": ["P", quarter],
        "rope_sin": ["P", quarter],
    }
    assert {value.name: dims(value) for value in vision.output} == {"visual_embeds": [levels, "V", hidden]}
    cache = ["B", text["num_key_value_heads"], "T", text["head_dim"]]
    entries = [f"{i}.{kind}" for i in range(text["num_hidden_layers"]) for kind in ("key", "value")]
    assert {value.name: dims(value) for value in decoder.input} == {
        "input_ids": ["B", "S"],
        "position_ids": [3, "B", "S"],
        "visual_rows": ["B", "S"],
        "visual_embeds": [levels, "V", hidden],
        "past_lengths": ["B"],
        "logits_positions": ["B", "L"],
    } | {f"past_key_values.{entry}": cache for entry in entries}
    assert {value.name: dims(value) for value in decoder.output} == {
        "logits": ["B", "L", text["vocab_size"]],
    } | {f"present_key_values.{entry}": cache for entry in entries}


def check_ops(vision: onnx.GraphProto, decoder: onnx.GraphProto, config: dict[str, Any]) -> None:
    """Count what the network has: products, norms, attention."""
    layers, depth = config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"]
    mergers = 1 + len(config["vision_config"]["deepstack_visual_indexes"])
    ops = Counter(node.op_type for node in decoder.node)
    assert ops["GroupQueryAttention"] == layers
    assert ops["RotaryEmbedding"] == 2 * layers
    assert ops["SimplifiedLayerNormalization"] + ops["SkipSimplifiedLayerNormalization"] == 4 * layers + 1
    assert ops["FusedMatMul"] + ops["MatMul"] + ops["Gemm"] == 4 * layers + 1  # q, k and v in one, gate and up in one
    ops = Counter(node.op_type for node in vision.node)
    assert ops["MultiHeadAttention"] == depth
    assert ops["RotaryEmbedding"] == 2 * depth
    assert ops["LayerNormalization"] == 2 * depth + mergers
    assert ops["Gelu"] == depth + mergers
    assert ops["FusedMatMul"] + ops["MatMul"] + ops["Gemm"] == 4 * depth + 2 * mergers + 1  # the patches' projection


def check_weights(graphs: dict[str, onnx.GraphProto], shapes: dict[str, tuple[int, ...]]) -> None:
    """All elements of the checkpoint are in the data files, once, and what was not fused has its shape."""
    stored, found = {}, {}
    for name, graph in graphs.items():
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
                stored[name, offset] = math.prod(tensor.dims)
                found[tensor.name] = tuple(tensor.dims)
    assert sum(stored.values()) == sum(math.prod(shape) for shape in shapes.values())
    kept = {key: shape for key, shape in found.items() if key in shapes and key != PATCHES}
    assert kept == {key: shapes[key] for key in kept}
    rows, columns = shapes[PATCHES][0], math.prod(shapes[PATCHES][1:])
    assert found[PATCHES] in ((rows, columns), (columns, rows))
    assert len(kept) > len(shapes) // 2


def check_export(size: str, folder: Path, *, is_thinking: bool) -> None:
    checkpoint = folder / "checkpoint"
    config = write_checkpoint(checkpoint, f"qwen3-vl-{size}", sparse=True)
    template = checkpoint / "chat_template.jinja"
    if is_thinking:
        text = template.read_text()
        assert text.count(OPENING) == 1
        template.write_text(text.replace(OPENING, OPENING[:-1] + "<think>\\n'"))
    shapes = tensor_shapes(config)
    bundle = make_bundle(Checkpoint.open(str(checkpoint)))

    # The neutral graphs refer to each key once, in the checkpoint's own shape.
    neutral: dict[str, tuple[int, ...]] = {}
    for model in bundle.graphs.values():
        for key, value in model.graph.initializers.items():
            if key in shapes:
                assert key not in neutral
                neutral[key] = tuple(int(n) for n in value.const_value.shape.numpy())
    assert neutral.pop(PATCHES) == (shapes[PATCHES][0], math.prod(shapes[PATCHES][1:]))
    assert neutral == {key: shape for key, shape in shapes.items() if key != PATCHES}

    build_engine(bundle, registry.get("ort-cpu-fp32"), folder / "engine", with_weights=False)
    graphs = {
        name: onnx.load(folder / "engine" / f"{name}.onnx", load_external_data=False).graph
        for name in ("vision", "decoder")
    }
    check_interface(graphs["vision"], graphs["decoder"], config)
    check_ops(graphs["vision"], graphs["decoder"], config)
    check_weights(graphs, shapes)
    prompt = ChatTemplate(template_source(folder / "engine")).render(user_message("Read.")).text
    assert prompt.endswith("<|im_start|>assistant\n" + "<think>\n" * is_thinking)


@pytest.mark.portable
def test_2b(tmp_path: Path) -> None:
    check_export("2b", tmp_path, is_thinking=False)


@pytest.mark.slow
@pytest.mark.parametrize("is_thinking", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_each_size_and_template(tmp_path: Path, size: str, is_thinking: bool) -> None:
    check_export(size, tmp_path, is_thinking=is_thinking)


@pytest.mark.portable
def test_no_size_is_left_out() -> None:
    assert {f"qwen3-vl-{size}" for size in SIZES} == {
        name for name in configs.names("models") if name.startswith("qwen3-vl-") and "-a" not in name
    }
