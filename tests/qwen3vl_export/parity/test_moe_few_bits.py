"""The shipped mixture of experts in few bits: tolerances and tasks, routes, cache, calibration, drafts, ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import configs
from demo_training.prompts import training_prompts
from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER, Bundle
from engines.quantize.calibration import calibrate
from helpers import DOCS
from helpers.command_line import call
from helpers.damage import noisy_scales
from helpers.engines import build, requantized
from qwen3vl_export.cli.run import app
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity import tasks
from qwen3vl_export.parity.metrics import difference
from qwen3vl_export.parity.ranges import measure_ranges
from qwen3vl_export.parity.tasks import run_tasks
from qwen3vl_export.parity.verify import PLAIN_GREEDY, verify
from runtime.errors import ParityError
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

PRECISIONS = ("int8", "int4", "int4p8")
CANVASES = 30
Arrays = list[np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def bundle(demo_moe_bundle: Bundle) -> Bundle:
    return demo_moe_bundle


@pytest.fixture(scope="module")
def engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return {name: build(bundle, f"ort-cpu-{name}", folder / name) for name in ("fp32", *PRECISIONS)}


@pytest.fixture
def built_reference(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 engine is the module's, not one more build."""
    monkeypatch.setattr(tasks, "build_reference", lambda *_: Qwen3VLModel.from_engine(engines["fp32"], threads=1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_verify_passes(precision: str, engines: dict[str, Path]) -> None:
    report = verify(engines[precision], "demo-moe", max_new_tokens=16)
    assert report.passed, report.render()
    assert set(report.routers.layers) == {0, 1, 2, 3}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tasks_keep_their_accuracy(precision: str, engines: dict[str, Path], built_reference: None) -> None:
    found = run_tasks(engines[precision], "demo-moe", limit=CANVASES)
    assert found.passed, found.render()
    assert found.title == f"demo-moe, ort-cpu-{precision}"
    known = json.loads((DOCS / "demo_moe_accuracy_ort-cpu-fp32.json").read_text())["wrong"]
    for row in found.rows:
        wrong = [entry for entry in known if entry["task"] == row.task and entry["index"] < CANVASES]
        assert row.expected_right == CANVASES - len(wrong)
        assert 1e-9 < row.kl < 0.1


def test_perturbed_scales_fail_the_gates(engines: dict[str, Path], built_reference: None, tmp_path: Path) -> None:
    broken = noisy_scales(engines["int4"], tmp_path / "broken")
    code, out, err = call(app, "verify", str(broken), "--checkpoint", "demo-moe", "--tasks", "--limit", "10", "--json")
    assert code == ParityError.exit_code, err
    assert min(row["points"] for row in json.loads(out)["rows"]) < -10
    report = verify(broken, "demo-moe", max_new_tokens=2)
    assert {check.name for check in report.checks if not check.passed} >= {"keys", "values", "prompt logits"}


def run_routed(engine: Path, messages: Any, chosen: Arrays | None) -> tuple[Arrays, Arrays]:
    """Run a prompt with the experts that the engine chooses, or with others.

    Returns:
        Keys and values of all layers and the logits; the experts [T, k] that each layer's router chose.
    """
    proto = onnx.load(engine / "decoder.onnx", load_external_data=False)
    names = []
    for node in (node for node in proto.graph.node if node.op_type == "TopK"):
        experts = onnx.helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT64, None)
        names.append(node.output[1])
        if chosen is None:
            proto.graph.output.append(experts)
        else:
            proto.graph.input.append(experts)
            node.output[1] += ".own"
    path = engine / "routed.onnx"  # beside its weights
    onnx.save(proto, path)
    session = ort.InferenceSession(path)
    path.unlink()
    model = Qwen3VLModel.from_engine(engine, threads=1)
    prepared, text = model.prepare(messages), model.config.text
    count = len(prepared.prompt.input_ids)
    feeds = prepared.decoder_inputs(model.encode_images(prepared.images), all_logits=True).arrays()
    layers = [f"key_values.{i}.{kind}" for i in range(text.num_layers) for kind in ("key", "value")]
    empty = np.zeros((1, text.num_kv_heads, count, text.head_dim), np.float32)
    feeds |= {f"past_{name}": empty for name in layers}
    if chosen is not None:
        feeds |= dict(zip(names, chosen, strict=True))
    outputs = [*(f"present_{name}" for name in layers), "logits", *(names if chosen is None else ())]
    found = session.run(outputs, feeds)
    return found[: len(layers) + 1], found[len(layers) + 1 :]


def test_what_few_bits_change_beyond_the_dense_limits_is_the_choice_of_experts(engines: dict[str, Path]) -> None:
    """With the experts that float32 chooses, 8 and 4 bits are well within the limits of dense models."""
    messages = user_message("Count the digits and say where each of them is.", [held_out(3).image])
    expected, routes = run_routed(engines["fp32"], messages, None)
    for precision in ("int8", "int4"):
        limits = configs.load("tolerances")[precision]
        own, own_routes = run_routed(engines[precision], messages, None)
        forced, _ = run_routed(engines[precision], messages, routes)
        changed = [(np.sort(a) != np.sort(b)).any(-1).mean() for a, b in zip(own_routes, routes, strict=True)]
        assert 0 < np.mean(changed) < 0.2
        errors = [max(difference(a, b).relative for a, b in zip(found[:-1], expected[:-1], strict=True))
                  for found in (own, forced)]  # fmt: skip
        assert errors[1] < 0.7 * limits["cache_relative"] and errors[1] < errors[0]
        assert difference(forced[-1], expected[-1]).scaled < 0.5 * limits["logits_scaled"]


@pytest.mark.parametrize(
    ("name", "bits"), [("int4", 8), *(pytest.param("fp32", bits, marks=pytest.mark.slow) for bits in (8, 4))]
)
def test_cache_in_few_bits(name: str, bits: int, engines: dict[str, Path], tmp_path: Path) -> None:
    engine = requantized(engines[name], tmp_path / "engine", bits, training_prompts(12))
    report = verify(engine, "demo-moe", max_new_tokens=8)
    assert report.precision == f"{name} with cache_int{bits}"
    assert report.passed, report.render()


def test_calibration_changes_all_weights_but_the_experts(
    bundle: Bundle, engines: dict[str, Path], tmp_path: Path
) -> None:
    target = registry.get("ort-cpu-int4")
    (tmp_path / "work").mkdir()
    found = calibrate(bundle, target, training_prompts(4), tmp_path / "work")
    build_engine(found.applied_to(bundle), target, tmp_path / "engine")
    model = Qwen3VLModel.from_engine(tmp_path / "engine", threads=2)
    assert model.manifest.source["calibration"]["experts"] == "rounded without calibration"
    plain, calibrated = (codes_of(engine) for engine in (engines["int4"], tmp_path / "engine"))
    assert set(plain) == set(calibrated)
    same = {name for name in plain if np.array_equal(plain[name], calibrated[name])}
    experts = {name for name in plain if ".experts." in name}
    assert len(experts) == 8 and same == experts
    report = verify(tmp_path / "engine", "demo-moe", max_new_tokens=2)
    assert report.passed, report.render()


def codes_of(engine: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the codes of all weights in blocks, by name."""
    graph = onnx.load(engine / f"{DECODER}.onnx").graph
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name.endswith((".q4", ".q8"))
    }


@pytest.mark.parametrize("precision", ["fp32", "int4p8"])
def test_drafts_change_no_token(precision: str, engines: dict[str, Path]) -> None:
    model = Qwen3VLModel.from_engine(engines[precision], threads=2)
    messages = user_message(held_out(5).tasks["json"][0], [held_out(5).image])
    # After the end of the answer, too: text that repeats itself is where drafts are.
    plain, drafted = (
        model.generate(messages, max_new_tokens=48, **{**PLAIN_GREEDY, "prompt_lookup_num_tokens": count})
        for count in (0, 6)
    )
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.drafted_tokens > 0


def test_huge_pages_change_no_logit(engines: dict[str, Path]) -> None:
    messages = user_message("Count the digits.")
    plain, moved = (Qwen3VLModel.from_engine(engines["int4"], threads=1, huge_pages=pages) for pages in (False, True))
    np.testing.assert_array_equal(plain.logits(messages), moved.logits(messages))


def test_ranges_see_the_inside_of_the_experts() -> None:
    report = measure_ranges("demo-moe", max_new_tokens=1)
    assert report.passed
    found = {each.name: each for each in report.tensors if each.graph == DECODER}
    for layer, suffix in enumerate(("", "_2", "_3", "_4")):
        gate, silu, inner, out = (found[f"{name}{suffix}"] for name in ("gate_MI", "silu_MI", "inner_MI", "out_MD"))
        assert {each.scope for each in (gate, silu, inner, out)} == {f"layers.{layer}"}
        # silu never exceeds its argument, and both halves come of one product.
        assert 0 < silu.max_abs <= gate.max_abs <= found[f"both_MI{suffix}"].max_abs
        assert inner.max_abs <= silu.max_abs * found[f"up_MI{suffix}"].max_abs
        assert out.max_abs > 0
