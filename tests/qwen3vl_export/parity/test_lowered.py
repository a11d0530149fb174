"""`verify` on lowered graphs whose device is not here: what runs, what is refused, and faults of the half path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from engines import registry
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers.command_line import call
from helpers.lowered_fixtures import CAPACITY, edit_graph, half_target, lower_to
from qwen3vl_export.cli.run import app
from qwen3vl_export.parity import tasks
from qwen3vl_export.parity import verify as verify_module
from qwen3vl_export.parity.cases import Case
from qwen3vl_export.parity.lowered import CPU_NOTE, LoweredSession, open_graph, open_model
from qwen3vl_export.parity.report import Check, Report
from qwen3vl_export.parity.verify import verify
from runtime.errors import CapacityError, EngineError, ParityError
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

STEPS = 4


@pytest.fixture(scope="module")
def lowered(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's lowered graphs in float16."""
    return lower_to(demo_bundle, half_target(), tmp_path_factory.mktemp("lowered") / "fp16")


def test_lowered_graphs_pass_and_the_report_says_what_they_prove(lowered: Path) -> None:
    code, out, err = call(app, "verify", str(lowered), "--checkpoint", "demo", "--max-new-tokens", "16", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["passed"], report["target"], report["notes"]) == (True, "elsewhere-fp16", [CPU_NOTE])
    cases = ("text", "one image", "three images", "small chunks", "video", "videos and image")
    cosines = {(c["case"], c["name"]): c for c in report["checks"] if c["name"].endswith("cosine")}
    assert {*cosines} == {(case, f"{part} logits cosine") for case in cases for part in ("prompt", "greedy")}
    assert all(check["limit"] == 0.9995 and check["is_minimum"] for check in cosines.values())
    # What the graph computes is half precision, and not float32 by mistake.
    keys = [check["value"] for check in report["checks"] if check["name"] == "keys"]
    assert min(keys) > 1e-5


def test_cosines_follow_of_the_relative_limits() -> None:
    """The norm of a difference of at most r bounds the angle: cosine ≥ sqrt(1 - r²)."""
    import configs

    limits = configs.load("tolerances")["fp16"]
    for name in ("visual_embeds_relative", "cache_relative"):
        assert np.sqrt(1 - limits[name] ** 2) >= limits["logits_cosine"] == 0.9995


def test_tasks_take_lowered_graphs(lowered: Path, demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "build_reference", lambda *_: Qwen3VLModel.from_engine(demo_engine, threads=1))
    code, out, _ = call(app, "verify", str(lowered), "--checkpoint", "demo", "--tasks", "--limit", "3", "--json")
    report = json.loads(out)
    assert (code, report["canvases"], report["notes"]) == (0, 3, [CPU_NOTE])
    assert all(row["lost"] == 0 for row in report["rows"])


def test_a_fixed_capacity_is_the_limit(lowered: Path) -> None:
    model = open_model(lowered)
    assert isinstance(model.session, LoweredSession)
    assert (model.max_context, model.session.new_cache(7).capacity) == (CAPACITY, CAPACITY)
    with pytest.raises(CapacityError, match=f"{CAPACITY + 1} positions, the lowered graph has {CAPACITY}"):
        model.session.new_cache(CAPACITY + 1)
    with pytest.raises(CapacityError):
        model.generate(user_message("digit " * CAPACITY, []))


def test_a_capacity_that_is_left_open_is_the_one_asked_for(demo_engine: Path, tmp_path: Path) -> None:
    """The graphs of an engine for this machine are lowered graphs too, GroupQueryAttention among their operators."""
    folder = shutil.copytree(demo_engine, tmp_path / "lowered")
    (folder / "engine.json").rename(folder / "lowered.json")
    model = open_model(folder)
    assert model.session.new_cache(7).capacity == 7
    messages = user_message("Count the digits.", [])
    expected = Qwen3VLModel.from_engine(demo_engine).logits(messages)
    np.testing.assert_allclose(model.logits(messages), expected, atol=1e-4)


def test_an_engine_is_opened_as_one(demo_engine: Path, tmp_path: Path) -> None:
    assert not isinstance(open_model(demo_engine).session, LoweredSession)
    with pytest.raises(EngineError, match=r"engine\.json is missing"):
        open_model(tmp_path)


def test_an_altered_file_is_an_error(lowered: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lowered, tmp_path / "altered")
    (folder / "decoder.onnx").write_bytes(b"x" * (folder / "decoder.onnx").stat().st_size)
    with pytest.raises(EngineError, match=r"its SHA-256 is not the one in lowered\.json"):
        open_model(folder)


def test_what_the_cpu_cannot_execute_is_named(demo_bundle: Bundle, tmp_path: Path) -> None:
    folder = lower_to(demo_bundle, half_target(ir.DataType.BFLOAT16), tmp_path / "refused")
    with pytest.raises(ParityError) as raised:
        open_model(folder)
    assert "vision.onnx: ONNX Runtime's CPU provider has no kernel for MatMul (bfloat16, bfloat16)" in str(raised.value)
    assert "its own device" in str(raised.value.remedy)


def test_a_tensor_of_float16_is_rounded_and_overflows(tmp_path: Path) -> None:
    """ONNX Runtime alone drops the casts between nodes that it computes in float32: 300 squared would be 90000."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "half"], ["square"]),
        helper.make_node("Sqrt", ["square"], ["root"]),
        helper.make_node("Cast", ["root"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy")
    opsets = [helper.make_opsetid("", 24)]
    graph = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "g.onnx")
    values = np.array([300, 3.001], np.float32)
    (found,) = open_graph(tmp_path / "g.onnx").run(None, {"x": values})
    half = values.astype(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, np.sqrt((half * half).astype(np.float32)).astype(np.float16))
    assert np.isinf(found[0]) and found[1] != values[1]


def swap_caches(graph: onnx.GraphProto) -> int:
    """Keys of layer 0 go on with those of layer 1, and the other way round."""
    other = {"past_key_values.0.key": "past_key_values.1.key", "past_key_values.1.key": "past_key_values.0.key"}
    return rename_inputs(graph, "TensorScatter", lambda name: other.get(name, name))


def stale_cache(graph: onnx.GraphProto) -> int:
    """Attention reads the values of before the call, where the call's own rows are not yet written."""
    sources = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "TensorScatter" and ".value" in n.output[0]}
    return rename_inputs(graph, "Attention", lambda name: sources.get(name, name))


def angles_in_half(graph: onnx.GraphProto) -> int:
    """Angles are positions times frequencies: in float16, one of 300 is off by up to 0.125."""
    places = [i for i, node in enumerate(graph.node) if node.op_type in ("Cos", "Sin")]
    for i in reversed(places):
        node = graph.node[i]
        source, node.input[0] = node.input[0], f"{node.name}/angle"
        graph.node.insert(i, helper.make_node("Cast", [f"{node.name}/half"], [f"{node.name}/angle"], to=1))
        graph.node.insert(i, helper.make_node("Cast", [source], [f"{node.name}/half"], to=10))
    return len(places)


def large_norms(graph: onnx.GraphProto, square_dtype: int = onnx.TensorProto.FLOAT) -> int:
    """Write the layers' norms as their formula, on inputs 32 times as large, which does not change a norm."""
    graph.initializer.append(numpy_helper.from_array(np.array(32, np.float32), "times"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last"))
    nodes, met = [], 0
    for node in graph.node:
        if node.op_type != "RMSNormalization" or not node.input[1].endswith("layernorm.weight"):
            nodes.append(node)
            continue
        met += 1
        x, square, wide, mean, root, unit = (
            f"{node.name}/{part}" for part in ("x", "square", "wide", "mean", "root", "unit")
        )
        nodes += [
            helper.make_node("Mul", [node.input[0], "times"], [x]),
            helper.make_node("Cast", [x], [f"{x}.cast"], to=square_dtype),
            helper.make_node("Mul", [f"{x}.cast", f"{x}.cast"], [square]),
            helper.make_node("Cast", [square], [wide], to=1),
            helper.make_node("ReduceMean", [wide, "last"], [mean]),
            helper.make_node("Sqrt", [mean], [root]),
            helper.make_node("Div", [x, root], [unit]),
            helper.make_node("Mul", [unit, node.input[1]], list(node.output)),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return met


def norms_in_half(graph: onnx.GraphProto) -> int:
    """Squares of the residual stream in float16 overflow beyond 255."""
    return large_norms(graph, onnx.TensorProto.FLOAT16)


def cache_in_float8(graph: onnx.GraphProto) -> int:
    """Keys and values that went through 3 bits of mantissa."""
    places = [i for i, node in enumerate(graph.node) if node.op_type == "TensorScatter"]
    for i in reversed(places):
        node = graph.node[i]
        source, node.input[1] = node.input[1], f"{node.name}/rounded"
        graph.node.insert(i, helper.make_node("Cast", [f"{node.name}/float8"], [f"{node.name}/rounded"], to=10))
        graph.node.insert(i, helper.make_node("Cast", [source], [f"{node.name}/float8"], to=17))
    return len(places)


def rename_inputs(graph: onnx.GraphProto, op_type: str, rename: Callable[[str], str]) -> int:
    changed = 0
    for node in graph.node:
        if node.op_type == op_type:
            names = [rename(name) for name in node.input]
            changed += names != list(node.input)
            node.input[:] = names
    return changed


def failed(report: Report) -> Iterator[Check]:
    return (check for check in report.checks if not check.passed)


@pytest.mark.parametrize(
    ("change", "case", "names"),
    [
        (swap_caches, "text", {"greedy logits"}),
        (stale_cache, "text", {"keys", "values"}),
        (norms_in_half, "text", {"keys", "values"}),
        (cache_in_float8, "text", {"keys", "values"}),
    ],
)
def test_faults_of_the_half_path_fail(
    change: Callable[[onnx.GraphProto], int], case: str, names: set[str], lowered: Path, tmp_path: Path
) -> None:
    report = verify(edit_graph(lowered, tmp_path / "edited", "decoder.onnx", change), "demo", max_new_tokens=STEPS)
    first = next(failed(report), None)
    assert first is not None, report.render()
    assert first.case == case and first.name in names, report.render()


@pytest.mark.parametrize("is_broken", [False, True])
def test_angles_of_a_long_prompt_need_float32(
    is_broken: bool, lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the start, float16 holds an angle well enough: of the cases' prompts, none fails for it."""
    long = Case("long text", "Count the digits and say where they are. " * 40)
    monkeypatch.setattr(verify_module, "make_cases", lambda folder, **_: [long])
    if is_broken:
        lowered = edit_graph(lowered, tmp_path / "edited", "decoder.onnx", angles_in_half)
    report = verify(lowered, "demo", max_new_tokens=STEPS)
    tokens = next(check.detail["tokens"] for check in report.checks if check.name == "prompt tokens agree")
    assert tokens > 300
    assert report.passed != is_broken, report.render()
    if is_broken:
        assert next(failed(report)).name == "keys"


def test_large_inputs_of_norms_in_float32_pass(lowered: Path, tmp_path: Path) -> None:
    """The control of `norms_in_half`: the same graph, squares in float32."""
    report = verify(edit_graph(lowered, tmp_path / "edited", "decoder.onnx", large_norms), "demo", max_new_tokens=STEPS)
    assert report.passed, report.render()


def test_a_type_that_the_cpu_lacks_is_named_shortly(demo_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "lowered"
    options = BuildOptions(max_context=64, prefill_chunk=64)
    build_engine(demo_bundle, registry.get("trt-nvfp4"), folder, runnable=False, options=options)
    with pytest.raises(ParityError, match=r"no kernel for DequantizeLinear \(float4e2m1") as caught:
        open_graph(folder / "decoder.onnx", None)
    assert len(caught.value.message) < 300
