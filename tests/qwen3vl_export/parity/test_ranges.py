"""`verify --ranges`: the magnitudes are those of the tensors, and what float16 does not hold is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

from helpers.command_line import call
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli.run import app
from qwen3vl_export.parity.cases import make_cases
from qwen3vl_export.parity.range_report import FLOAT16_MAX, RangeReport, TensorRange, plot_ranges
from qwen3vl_export.parity.ranges import measure_ranges, tap
from qwen3vl_export.parity.transformers_reference import TransformersReference
from runtime.model import Qwen3VLModel

STEPS = 2


def test_magnitudes_are_those_of_transformers(tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    report = measure_ranges(str(tiny_checkpoint), max_new_tokens=STEPS)
    assert report.passed
    found = {(each.graph, each.name): each for each in report.tensors}
    model, reference = (
        Qwen3VLModel.from_engine(tiny_engine),
        TransformersReference(Checkpoint.open(str(tiny_checkpoint))),
    )
    levels, logits, values = [], [], []
    for case in [each for each in make_cases(tmp_path) if not each.videos]:
        prepared = model.prepare(case.messages)
        output = reference.run(prepared, STEPS)
        logits += [np.abs(output.logits).max(), np.abs(output.step_logits).max()]
        values.append(np.abs(output.layers[1][1]).max())
        if output.visual_embeds is not None:
            levels.append(np.abs(output.visual_embeds).max())
    assert found["decoder", "logits"].max_abs == pytest.approx(max(logits), rel=1e-4)
    assert found["vision", "visual_embeds"].max_abs == pytest.approx(max(levels), rel=1e-4)
    cached = found["decoder", "present_key_values.1.value"]
    assert cached.max_abs >= max(values) * (1 - 1e-4)  # the rows of generated tokens are in it too
    assert (cached.scope, cached.op) == ("layers.1", "TensorScatter")
    weights = load_file(tiny_checkpoint / "model.safetensors")
    key = "model.language_model.layers.1.mlp.down_proj.weight"
    assert found["decoder", key].max_abs == pytest.approx(np.abs(weights[key].astype(np.float32)).max())
    assert [each.max_abs for each in report.tensors] == sorted((e.max_abs for e in report.tensors), reverse=True)


def test_what_float16_does_not_hold_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A gate, an up and a down projection that keep the answer finite in float32, beyond float16 after layer 1."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.layers.1.mlp.down_proj.weight"] *= 1e7
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, out, err = call(
        app, "verify", "--ranges", "--checkpoint", str(folder), "--max-new-tokens", "1", "--json",
        "--plot", str(tmp_path / "ranges.svg"),
    )  # fmt: skip
    report = json.loads(out)
    assert (code, report["passed"], report["float16_max"]) == (9, False, FLOAT16_MAX)
    assert "float16 does not hold every tensor" in err and "bfloat16" in err
    beyond = [each for each in report["tensors"] if not each["fits"]]
    assert beyond and all(each["headroom"] < 1 for each in beyond)
    assert {each["graph"] for each in beyond} == {"decoder"}
    scopes = {each["scope"] for each in beyond}
    assert "layers.1" in scopes and "layers.0" not in scopes
    assert "float16" in (tmp_path / "ranges.svg").read_text()


def test_a_tap_sees_the_largest_of_all_elements(tmp_path: Path) -> None:
    import onnxruntime as ort

    weight = numpy_helper.from_array(np.array([[-3, 2]], np.float32), "blocks.7.weight")
    nodes = [helper.make_node("Mul", ["x", "blocks.7.weight"], ["y"]), helper.make_node("Shape", ["y"], ["shape"])]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2]) for name in "xy")
    shape = helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [2])
    graph = helper.make_graph(nodes, "g", [x], [y, shape], [weight])
    opsets = [helper.make_opsetid("", 24)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "vision.onnx")
    ranges = tap(tmp_path / "vision.onnx")
    assert [(each.scope, each.op, each.name, each.max_abs) for each in ranges] == [
        ("blocks.7", "weight", "blocks.7.weight", 3.0),
        ("blocks.7", "Mul", "y", 0.0),
    ]
    session = ort.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["largest magnitude of y"], {"x": np.array([[1, 2], [-5, 1]], np.float32)})
    assert float(found[0]) == 15.0


def test_the_table_marks_what_does_not_fit(tmp_path: Path) -> None:
    tensors = [TensorRange("decoder", f"layers.{i}", "Mul", f"mul_{i}", value) for i, value in enumerate((1e5, 655.04))]
    nan = TensorRange("vision", "blocks.0", "Add", "add", float("nan"))
    report = RangeReport("c", (*tensors, nan))
    assert [each.fits for each in report.tensors] == [False, True, False]
    lines = report.render().splitlines()
    assert lines[1].split() == ["decoder", "layers.0", "Mul", "1e+05", "0.655", "BEYOND", "mul_0"]
    assert lines[2].split() == ["decoder", "layers.1", "Mul", "655", "100", "mul_1"]
    assert lines[-1] == "c, 3 tensors against 65504: 2 tensors are BEYOND float16: take bfloat16"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["tensors"][2]["max_abs"] is None
    assert not RangeReport("c", ()).passed
    for name in ("a.svg", "b.svg"):
        plot_ranges(report, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    "args",
    [["folder", "--ranges"], ["--ranges", "--tasks"], ["--ranges", "--limit", "3"], ["--plot", "a.svg", "folder"], []],
)
def test_options_that_do_not_go_together(args: list[str]) -> None:
    code, out, err = call(app, "verify", *args, "--checkpoint", "demo")
    assert (code, out) == (2, "")
    assert "remedy" in err
