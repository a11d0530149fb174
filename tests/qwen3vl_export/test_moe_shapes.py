"""The large sizes are exported without weights, from files whose data are holes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from benchmarks.synthetic import write_checkpoint
from qwen3vl_export.export import export
from qwen3vl_export.request import ExportRequest


@pytest.mark.parametrize(
    ("name", "num_layers", "hidden", "width"),
    [("qwen3-vl-30b-a3b", 48, 2048, 768), pytest.param("qwen3-vl-235b-a22b", 94, 4096, 1536, marks=pytest.mark.slow)],
)
def test_sizes_are_exported_from_holes(tmp_path: Path, name: str, num_layers: int, hidden: int, width: int) -> None:
    write_checkpoint(tmp_path / "checkpoint", name, sparse=True)
    export(ExportRequest(str(tmp_path / "checkpoint"), "ort-cpu-int4", tmp_path / "engine", weights=False))
    graph = onnx.load(tmp_path / "engine" / "decoder.onnx", load_external_data=False).graph
    ops = Counter(node.op_type for node in graph.node)
    attention = ops["DecodeAttention"] + ops["GroupQueryAttention"]  # our own where its library is, or ONNX Runtime's
    assert (ops["QMoE"], attention, ops["MoE"], ops["Loop"]) == (num_layers, num_layers, 0, 0)
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    experts = "model.language_model.layers.{}.mlp.experts."
    # The first two layers in 8 bits.
    assert shapes[experts.format(1) + "gate_up_proj.interleaved.q8"] == [128, 2 * width, hidden]
    assert shapes[experts.format(2) + "gate_up_proj.interleaved.q4"] == [128, 2 * width, hidden // 2]
    assert shapes[experts.format(2) + "down_proj.q4"] == [128, hidden, width // 2]
    assert shapes[experts.format(2) + "down_proj.scales"] == [128, hidden, width // 128]
    levels = [node.attribute for node in graph.node if node.op_type == "QMoE"]
    assert {a.i for attributes in levels for a in attributes if a.name == "accuracy_level"} == {4}
