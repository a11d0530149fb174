"""Graphs that are not those of the contract, in engines whose manifests fit them: an error, no crash and no answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from helpers.damage import rehash, resign
from runtime.errors import CapacityError, EngineError, Qwen3VLError
from runtime.model import Qwen3VLModel

MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": np.zeros((32, 32, 3), np.uint8)}, {"type": "text", "text": "Read."}],
    }
]


def unknown_op(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Evil", [], ["x"], domain="evil"))
    model.opset_import.append(helper.make_opsetid("evil", 1))


def outside_context(model: onnx.ModelProto) -> None:
    attributes = {"embed_mode": 0, "ep_cache_context": "../../../etc/passwd", "source": "x"}
    model.graph.node.insert(0, helper.make_node("EPContext", [], ["x"], domain="com.microsoft", **attributes))


def enormous_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [1], [1 << 40]))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["big"]))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, []))


def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == key]
        assert entries
        for entry in entries:
            entry.value = value

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vision.onnx", unknown_op),
        ("vision.onnx", outside_context),
        ("vision.onnx", enormous_constant),
        ("vision.onnx", no_outputs),
        ("vision.onnx", lambda model: model.graph.node[0].input.__setitem__(0, "nothing")),
        ("vision.onnx", lambda model: setattr(model.graph.output[0], "name", "x")),
        ("vision.onnx", lambda model: setattr(model.graph.input[0], "name", "x")),
        ("vision.onnx", lambda model: model.graph.input.append(helper.make_tensor_value_info("y", 1, [1]))),
        ("decoder.onnx", external("location", "/etc/passwd")),
        ("decoder.onnx", external("location", "../outside.data")),
        ("decoder.onnx", external("location", "pipe")),
        ("decoder.onnx", external("location", "")),
        ("decoder.onnx", external("offset", "-4096")),
        ("decoder.onnx", external("length", str(1 << 62))),
    ],
)
def test_a_changed_graph(tiny_engine: Path, tmp_path: Path, name: str, change: Callable[[Any], object]) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    shutil.copy(folder / "decoder.onnx.data", tmp_path / "outside.data")
    (folder / "pipe").symlink_to("/dev/zero")
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    rehash(folder, name)
    with pytest.raises((EngineError, CapacityError)) as caught:
        Qwen3VLModel.from_engine(folder, threads=1).generate(MESSAGES, max_new_tokens=2)
    assert caught.value.remedy and len(str(caught.value)) <= 500


def test_names_of_a_graph_do_not_reach_the_terminal(
    tiny_engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime would log the name of a node that fails, as it is."""
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    graph, output = model.graph, model.graph.output[0].name
    (last,) = (node for node in graph.node if output in node.output)
    last.output[list(last.output).index(output)] = "whole"
    graph.initializer.append(helper.make_tensor("seven", TensorProto.INT64, [1], [7]))
    graph.node.append(
        helper.make_node("Reshape", [graph.input[0].name, "seven"], ["few"], name="\x1b]0;title\x07\x1b[2J")
    )
    graph.node.append(helper.make_node("ReduceSum", ["few"], ["sum"], keepdims=0))
    graph.node.append(helper.make_node("Add", ["whole", "sum"], [output]))
    (folder / "vision.onnx").write_bytes(model.SerializeToString())
    rehash(folder, "vision.onnx")
    with pytest.raises(EngineError, match="Reshape") as caught:
        Qwen3VLModel.from_engine(folder, threads=1).generate(MESSAGES, max_new_tokens=2)
    assert "\x1b" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("name", "other"), [("vision.onnx", "decoder.onnx"), ("decoder.onnx", "vision.onnx")])
def test_the_other_graph(tiny_engine: Path, tmp_path: Path, name: str, other: str) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    shutil.copy(tiny_engine / other, folder / name)
    rehash(folder, name)
    with pytest.raises(
        EngineError, match=rf"{name}: the graph lacks the inputs .*, so it does not belong to the model"
    ):
        Qwen3VLModel.from_engine(folder)


@pytest.mark.parametrize("contents", [b"", b"\0", b"\xff" * 1000, b"{}"])
def test_no_graph_at_all(tiny_engine: Path, tmp_path: Path, contents: bytes, capfd: Any) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    (folder / "decoder.onnx").write_bytes(contents)
    rehash(folder, "decoder.onnx")
    with pytest.raises(EngineError, match=r"decoder\.onnx: "):
        Qwen3VLModel.from_engine(folder)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("change", [{"head_dim": 255}, {"num_kv_heads": 7}, {"hidden_size": 7}])
def test_a_model_of_another_shape_than_the_graphs(tiny_engine: Path, tmp_path: Path, change: dict[str, int]) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    resign(folder, lambda values: values["model"]["text"].update(change))
    model = Qwen3VLModel.from_engine(folder)
    for _ in range(2):
        with pytest.raises(Qwen3VLError, match="the engine failed"):
            model.generate("Read.", max_new_tokens=2)
