"""Quantised checkpoints whose experts lie one by one, in every form that is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers import quantized_fixtures as fixtures
from helpers.engines import build
from helpers.moe_checkpoints import Arrays, as_in_the_graph, one_by_one, rewritten, write_experts
from helpers.quantized_fixtures import FORMS, Form
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle
from qwen3vl_export.parity.verify import verify

SCOPE = "model.language_model.layers.1.mlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_experts(tmp_path_factory.mktemp("tiny-moe") / "stacked", layout=as_in_the_graph)
    return rewritten(source, source.parent / "checkpoint", one_by_one)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_experts_of_every_form_equal_the_naive_reader(folder: Path, tmp_path: Path, form: Form) -> None:
    def of_one_layer(tensors: Arrays) -> Arrays:
        return {key: value for key, value in tensors.items() if key.startswith(f"{SCOPE}.experts.")}

    source = rewritten(folder, tmp_path / "source", of_one_layer)
    expected = fixtures.quantize_checkpoint(source, tmp_path / "quantised", form)
    found, keys = Checkpoint.open(str(tmp_path / "quantised")).experts(1, SCOPE)
    assert keys == set(expected) and len(keys) == 21
    for e in range(7):
        gate, up, down = (expected[f"{SCOPE}.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        np.testing.assert_array_equal(found["experts.gate_up_proj"].parts[e].numpy(), np.concatenate([gate, up]))
        np.testing.assert_array_equal(found["experts.down_proj"].parts[e].numpy(), down)


def test_an_engine_agrees_with_transformers_on_the_dequantised_experts(folder: Path, tmp_path: Path) -> None:
    # One form: the others give the same graph, with the weights that the test above compares.
    fixtures.quantize_checkpoint(folder, tmp_path / "quantised", FORMS["awq"])
    bundle = make_bundle(Checkpoint.open(str(tmp_path / "quantised")))
    engine = build(bundle, "ort-cpu-fp32", tmp_path / "engine")
    report = verify(engine, str(tmp_path / "quantised"), max_new_tokens=2)
    assert report.passed, report.render()
    # The unquantised checkpoint, whose experts lie one by one too, is another model.
    report = verify(engine, str(folder), max_new_tokens=2)
    assert not report.passed
    assert next(check for check in report.checks if not check.passed).name == "keys"
    # A target in few bits rounds the experts again: two tensors in each of layers 0 and 1, and 2 and 4.
    few = onnx.load(build(bundle, "ort-cpu-int4", tmp_path / "few") / "decoder.onnx", load_external_data=False)
    names = [tensor.name for tensor in few.graph.initializer if ".experts." in tensor.name]
    assert [sum(name.endswith(form) for name in names) for form in (".q8", ".q4")] == [4, 4]
