"""`verify --bisect`: one weight of an engine is scaled, and the layer that it belongs to is named, and no other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from demo_training.prompts import training_prompts
from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER, VISION, Bundle
from engines.kernel_sets import with_kernels
from helpers.command_line import call
from helpers.damage import rehash, rewrite, scaled_weight
from helpers.engines import requantized
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli.run import app
from qwen3vl_export.export import make_bundle
from qwen3vl_export.parity.bisect import PROMPT, STEP, bisect
from qwen3vl_export.parity.bisect_report import BisectReport
from qwen3vl_export.parity.cuts import cut, given_name
from qwen3vl_export.parity.sections import cuts_of, decoder_sections, vision_sections
from runtime.errors import ParityError
from runtime.manifest import Manifest

LAYERS = "model.language_model.layers"
BLOCKS = "model.visual.blocks"


def assert_found(report: BisectReport, graph: str, layer: str, part: str) -> None:
    """Assert that a layer is the first, and the only one, and that the error is far from the limit."""
    assert report.first is not None
    assert (report.first.graph, report.first.layer, report.first.part) == (graph, layer, part)
    assert {(each.graph, each.layer) for each in report.findings if not each.passed} == {(graph, layer)}
    assert report.first.value > 2 * report.first.limit


@pytest.mark.parametrize(
    ("weight", "graph", "layer", "part"),
    [
        ("model.visual.patch_embed.proj.weight", VISION, "patch_embed", ""),
        (f"{BLOCKS}.0.attn.proj.weight", VISION, "blocks.0", "attention"),
        (f"{BLOCKS}.1.mlp.linear_fc1.weight", VISION, "blocks.1", "feed-forward"),
        (f"{BLOCKS}.LAST.mlp.linear_fc2.weight", VISION, "blocks.LAST", "feed-forward"),
        ("model.visual.deepstack_merger_list.0.linear_fc2.weight", VISION, "deepstack_merger_list.0", ""),
        ("model.visual.merger.linear_fc1.weight", VISION, "merger", ""),
        (f"{LAYERS}.0.self_attn.k_norm.weight", DECODER, "layers.0", "keys"),
        (f"{LAYERS}.0.self_attn.q_norm.weight", DECODER, "layers.0", "attention"),
        (f"{LAYERS}.2.mlp.down_proj.weight", DECODER, "layers.2", "feed-forward"),
        (f"{LAYERS}.LAST.self_attn.o_proj.weight", DECODER, "layers.LAST", "attention"),
        ("model.language_model.norm.weight", DECODER, "head", ""),
    ],
)
def test_scaled_weight_is_found_at_its_layer(
    weight: str, graph: str, layer: str, part: str, tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = Manifest.read(tiny_engine).model
    last = str((config.vision.depth if graph == VISION else config.text.num_layers) - 1)
    engine = scaled_weight(tiny_engine, tmp_path / "engine", weight.replace("LAST", last))
    report = bisect(engine, str(tiny_checkpoint))
    assert_found(report, graph, layer.replace("LAST", last), part)
    calls = {each.call for each in report.findings if not each.passed}
    assert calls == ({PROMPT} if graph == VISION else {PROMPT, STEP})


@pytest.mark.parametrize(("layer", "expert"), [(0, 1), (2, 5), (3, 6)])
@pytest.mark.parametrize("weight", ["gate_up_proj.interleaved", "down_proj"])
def test_scaled_expert_is_found(weight: str, layer: int, expert: int, demo_moe_engine: Path, tmp_path: Path) -> None:
    name = f"{LAYERS}.{layer}.mlp.experts.{weight}"
    report = bisect(scaled_weight(demo_moe_engine, tmp_path / "engine", name, expert), "demo-moe")
    assert_found(report, DECODER, f"layers.{layer}", "experts")
    assert report.first is not None and report.first.expert == expert
    assert f"layers.{layer}, experts, expert {expert} of decoder.onnx" in report.render()


def test_scaled_router_is_found(demo_moe_engine: Path, tmp_path: Path) -> None:
    engine = scaled_weight(demo_moe_engine, tmp_path / "engine", f"{LAYERS}.1.mlp.gate.weight", factor=3)
    assert_found(bisect(engine, "demo-moe"), DECODER, "layers.1", "experts")


@pytest.mark.parametrize("target", ["ort-cpu-int4", "trt-rtx-fp16", "ort-cuda-int4"])
def test_fault_in_few_bits_is_told_from_rounding(
    target: str, demo_bundle: Bundle, demo_altered: Bundle, tmp_path: Path
) -> None:
    for name, bundle in (("right", demo_bundle), ("altered", demo_altered)):
        chosen = with_kernels(registry.get(target), None, bundle.config)
        build_engine(bundle, chosen, tmp_path / name, runnable=chosen.device != "gpu")
    right = bisect(tmp_path / "right", "demo")
    assert right.passed and len(right.findings) > 40
    assert 0 < max(each.value for each in right.findings) < max(each.limit for each in right.findings)
    assert_found(bisect(tmp_path / "altered", "demo"), DECODER, "layers.2", "feed-forward")


@pytest.fixture(scope="module")
def demo_altered(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo with a weight of one layer scaled."""
    folder = shutil.copytree(Checkpoint.open("demo").folder, tmp_path_factory.mktemp("altered") / "checkpoint")

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYERS}.2.mlp.down_proj.weight"] *= 2

    rewrite(folder, change)
    return make_bundle(Checkpoint.open(str(folder)))


def test_missing_deepstack_level_is_found(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    (node,) = (node for node in model.graph.node if node.output[0] == "deepstack.0/hidden_states_out")
    node.op_type, node.input[:] = "Identity", [node.input[2]]
    onnx.save(model, folder / "decoder.onnx")
    rehash(folder, "decoder.onnx")
    report = bisect(folder, str(tiny_checkpoint))
    assert report.first is not None and report.first.value == pytest.approx(1)  # nothing is added
    assert_found(report, DECODER, "layers.0", "DeepStack")


def test_value_that_is_not_finite_is_found(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = scaled_weight(tiny_engine, tmp_path / "engine", f"{LAYERS}.1.mlp.down_proj.weight", factor=float("nan"))
    report = bisect(engine, str(tiny_checkpoint))
    assert_found(report, DECODER, "layers.1", "feed-forward")
    assert report.to_dict()["first"]["value"] is None


def test_rounded_cache_has_limits_of_its_own(demo_engine: Path, tmp_path: Path) -> None:
    report = bisect(requantized(demo_engine, tmp_path / "engine", 8, training_prompts(12)), "demo")
    assert report.passed and report.precision == "fp32 with cache_int8"
    assert max(each.value for each in report.findings if each.part == "values") > 1e-3


def test_command_names_the_layer(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", str(tiny_checkpoint), "--bisect", "--json")
    code, out, _ = call(app, "verify", str(tiny_engine), *arguments)
    report = json.loads(out)
    assert (code, report["passed"], report["first"]) == (0, True, None)
    engine = scaled_weight(tiny_engine, tmp_path / "engine", f"{LAYERS}.1.mlp.down_proj.weight")
    code, out, err = call(app, "verify", str(engine), *arguments, "--plot", str(tmp_path / "sections.svg"))
    report = json.loads(out)
    assert (code, report["passed"]) == (ParityError.exit_code, False) and "within the tolerances" in err
    assert report["first"] == next(each for each in report["sections"] if not each["passed"])
    assert {key: report["first"][key] for key in ("graph", "call", "layer", "part", "expert")} == {
        "graph": "decoder", "call": "prompt", "layer": "layers.1", "part": "feed-forward", "expert": None,
    }  # fmt: skip
    assert {"feed-forward", "keys", "limit"} <= {text for text in _texts(tmp_path / "sections.svg")}
    code, out, _ = call(app, "verify", str(engine), *arguments[:-1], "--quiet")
    assert "the first beyond its limit is layers.1, feed-forward of decoder.onnx (prompt)" in out


def _texts(path: Path) -> list[str]:
    import xml.etree.ElementTree as ET

    return [element.text or "" for element in ET.parse(path).iter() if element.tag.endswith("text")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks",), "--tasks and --bisect are two comparisons"),
        (("--max-new-tokens", "3"), "--bisect takes no --max-new-tokens"),
        (("--reference", "own"), "--reference has no use"),
        (("--ranges",), "--ranges looks at the checkpoint alone"),
    ],
)
def test_options_that_exclude_each_other(options: tuple[str, ...], message: str, tiny_engine: Path) -> None:
    code, _, err = call(app, "verify", str(tiny_engine), "--checkpoint", "demo", "--bisect", *options)
    assert code == 2 and message in err


def test_engine_of_a_gpu_is_refused_with_the_way_there(gpu_engine: Path, tiny_checkpoint: Path) -> None:
    dataclasses.replace(Manifest.read(gpu_engine), session="tensorrt").write(gpu_engine)
    with pytest.raises(ParityError, match="run layer by layer") as refused:
        bisect(gpu_engine, str(tiny_checkpoint))
    assert "--no-compile" in refused.value.remedy


ONE_OF_EACH_LIBRARY = ("ort-cpu-int4", "ort-cuda-fp16", "trt-rtx-fp8")


@pytest.mark.parametrize("bundle_name", ["demo_bundle", "demo_moe_bundle"])
@pytest.mark.parametrize("names", [ONE_OF_EACH_LIBRARY, pytest.param((), marks=pytest.mark.slow, id="all")])
def test_targets_have_all_cuts(
    names: tuple[str, ...], bundle_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What lowering does to a graph leaves the values between layers, and one between the halves of each layer."""
    bundle = request.getfixturevalue(bundle_name)
    for found in map(registry.get, names) if names else registry.all_targets():
        for number, target in enumerate((found, *found.other_kernels)):
            folder = tmp_path / f"{target.name}-{number}"
            build_engine(bundle, target, folder, with_weights=False, runnable=False)
            for path in folder.glob("*.onnx"):
                sections = (vision_sections if path.stem == VISION else decoder_sections)(bundle.config)
                graph = onnx.load(path, load_external_data=False).graph
                assert cut(graph, cuts_of(sections)).keys() == set(cuts_of(sections)), path


def layer_graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    """A graph that adds two things to `in/x`, which ends as `out/x`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 2])
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [2], [2, 3]) for name in ("w", "v")]
    first = helper.make_node("Identity", ["x"], ["in/x"])
    last = helper.make_node("Identity", ["out/x"], ["y"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 2])
    return helper.make_graph([first, *nodes, last], "decoder", [x], [y], weights)


CUTS = ["in/x", "layer/attended", "out/x"]


def run_cut(graph: onnx.GraphProto, given: dict[str, list[float]]) -> dict[str, list[float]]:
    import onnxruntime as ort

    values = cut(graph, CUTS)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {given_name(name): np.array([value], np.float32) for name, value in given.items() if name in values}
    found = session.run([*values.values(), "y"], {"x": np.array([[1, 1]], np.float32), **inputs})
    return {name: value[0].tolist() for name, value in zip([*values, "y"], found, strict=True)}


def test_each_section_computes_of_what_is_given() -> None:
    graph = layer_graph(
        helper.make_node("Mul", ["in/x", "w"], ["scaled"]),
        helper.make_node("Add", ["in/x", "scaled"], ["sum"]),
        helper.make_node("Mul", ["sum", "v"], ["scaled again"]),
        helper.make_node("Add", ["sum", "scaled again"], ["out/x"]),
    )
    found = run_cut(graph, {"in/x": [10, 10], "layer/attended": [100, 100], "out/x": [7, 7]})
    assert found == {"in/x": [1, 1], "layer/attended": [30, 40], "out/x": [300, 400], "y": [7, 7]}


def test_norm_of_a_fused_kernel_is_of_what_is_given() -> None:
    graph = layer_graph(
        helper.make_node("Mul", ["in/x", "w"], ["scaled"]),
        helper.make_node(
            "SkipSimplifiedLayerNormalization", ["in/x", "scaled", "v"], ["normed", "", "", "sum"],
            domain="com.microsoft", epsilon=0.0,
        ),
        helper.make_node("Add", ["sum", "normed"], ["out/x"]),
    )  # fmt: skip
    found = run_cut(graph, {"in/x": [10, 10], "layer/attended": [50, -50], "out/x": [0, 0]})
    assert found["layer/attended"] == [30, 40]
    assert found["out/x"] == pytest.approx([52, -53])  # the norm of 50 and -50 is 1 and -1, times v


def test_layer_of_one_kernel_has_no_cut_inside() -> None:
    graph = layer_graph(helper.make_node("Mul", ["in/x", "w"], ["out/x"]))
    found = run_cut(graph, {"in/x": [10, 10], "out/x": [7, 7]})
    assert found == {"in/x": [1, 1], "out/x": [20, 30], "y": [7, 7]}


def test_value_inside_of_a_loop_is_given_too() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Add", ["carried", "in/x"], ["added"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("added", TensorProto.FLOAT, None),
        ],
    )
    graph = layer_graph(helper.make_node("Loop", ["turns", "", "w"], ["out/x"], body=body))
    graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [3]))
    assert run_cut(graph, {"in/x": [10, 10], "out/x": [7, 7]})["out/x"] == [32, 33]


def test_graph_without_a_layer_is_refused() -> None:
    with pytest.raises(ParityError, match="no value 'layers/lost'"):
        cut(layer_graph(helper.make_node("Identity", ["in/x"], ["out/x"])), ["in/x", "layers/lost"])


def test_unknown_fused_kernel_is_refused() -> None:
    graph = layer_graph(
        helper.make_node("Split", ["in/x"], ["out/x", "rest"], axis=-1, num_outputs=2),
        helper.make_node("Abs", ["rest"], ["used"]),
    )
    with pytest.raises(ParityError, match="Split gives 'out/x' and more at once"):
        cut(graph, CUTS)
