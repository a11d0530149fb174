"""Accuracy of quantised engines on the held-out questions, paired with float32, and the gate that holds it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from helpers import DOCS
from helpers.command_line import call
from helpers.damage import noisy_scales
from helpers.engines import build
from qwen3vl_export.cli.run import app
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity import plots, tasks
from qwen3vl_export.parity.layers import LayerErrors, plot_layers
from qwen3vl_export.parity.task_report import Question, TaskReport, paired_interval, write_sections
from qwen3vl_export.parity.tasks import ask, run_tasks
from qwen3vl_export.parity.verify import verify
from runtime.contract import DecoderInputs
from runtime.errors import ParityError, UsageError
from runtime.generation import prefill
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.positions import mrope_positions
from runtime.preparation import Prepared

CANVASES = 400  # of which two lost questions are 0.5 points, what the int8 engine may lose
SOME, FEW = 50, 10
PRECISIONS = ("int8", "int4", "int4p8")


@pytest.fixture(scope="module")
def quantised(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of the demo by precision."""
    folder = tmp_path_factory.mktemp("quantised")
    return {name: build(demo_bundle, f"ort-cpu-{name}", folder / name) for name in PRECISIONS}


@pytest.fixture
def built_reference(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 engine is the session's, not one more build."""
    monkeypatch.setattr(tasks, "build_reference", lambda *_: Qwen3VLModel.from_engine(demo_engine, threads=1))


def test_interval_of_known_counts() -> None:
    # Bonett and Price by hand: (1 + 1) / 102 and (9 + 1) / 102; half = 1.959964 · sqrt((12/102 - (8/102)²) / 102).
    low, high = paired_interval(1, 9, 100)
    assert (low, high) == (pytest.approx(-7.8431 - 6.4800, abs=2e-4), pytest.approx(-7.8431 + 6.4800, abs=2e-4))
    # No answer differs, and yet the interval has a width: 100 · 1.959964 · sqrt(2 / 2002 / 2002).
    assert paired_interval(0, 0, 2000) == (pytest.approx(-0.13845, abs=1e-5), pytest.approx(0.13845, abs=1e-5))


def question(index: int, expected: str, answer: str, **fields: float) -> Question:
    values = {"kl": 0.5, "same_top1": 1, "expected_nll": 0.0, "nll": np.log(4), "tokens": 2} | fields
    return Question(index, "count", "How many?", "2", expected, answer, **values)  # type: ignore[arg-type]


def report(*questions: Question, limit: float = 2.0, target: str = "ort-cpu-int4") -> TaskReport:
    manifest = SimpleNamespace(target=target, weight_bytes=1500000, versions={}, capabilities={}, source={})
    errors = LayerErrors((0.1,), (0.2, 0.4), (0.1, 0.3))
    return TaskReport.of(manifest, "demo", questions, limit, errors)  # type: ignore[arg-type]


def test_report_counts_pairs() -> None:
    found = report(question(0, "2", "2"), question(1, "2", "3"), question(2, "1", " 2\n"), question(3, "1", "1"))
    (row,) = found.rows
    assert (row.questions, row.expected_right, row.right, row.lost, row.gained) == (4, 2, 2, 1, 1)
    assert (row.points, row.kl, row.top1, row.expected_perplexity) == (0, 0.25, 0.5, 1)
    assert row.perplexity == pytest.approx(2)
    assert [entry["index"] for entry in found.differing] == [1, 2]
    assert TaskReport.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


@pytest.mark.parametrize(("lost", "passes"), [(0, True), (4, True), (5, False)])
def test_gate_is_the_limit(lost: int, passes: bool) -> None:
    found = report(*(question(i, "2", "3" if i < lost else "2") for i in range(200)))
    assert found.passed is passes
    assert ("passed" if passes else "FAILED") in found.render()


def test_one_question_may_be_lost_on_few_canvases() -> None:
    assert report(*(question(i, "2", "3" if i < 1 else "2") for i in range(20)), limit=0.5).passed
    assert not report(*(question(i, "2", "3" if i < 2 else "2") for i in range(20)), limit=0.5).passed
    assert not report(*(question(i, "2", "3" if i < 2 else "2") for i in range(300)), limit=0.5).passed


def test_what_is_not_finite_becomes_null() -> None:
    values = report(question(0, "2", "2", kl=float("nan"), nll=1e6)).to_dict()
    json.dumps(values, allow_nan=False)
    assert (values["rows"][0]["kl"], values["rows"][0]["perplexity"]) == (None, None)


def test_sections_replace_their_own_text_only(tmp_path: Path) -> None:
    file = tmp_path / "accuracy.md"
    file.write_text("Head.\n")
    one, other = report(question(0, "2", "2")), report(question(0, "2", "2"), target="ort-cpu-int8")
    write_sections(file, [one, other])
    before = file.read_text()
    assert before.startswith("Head.\n\n<!-- begin ort-cpu-int4 -->\n## ort-cpu-int4\n")
    write_sections(file, [one])
    assert file.read_text() == before
    write_sections(file, [report(question(0, "2", "3"), question(1, "2", "2"))])
    after = file.read_text()
    assert "-50.00" in after
    assert after[after.index("<!-- begin ort-cpu-int8") :] == before[before.index("<!-- begin ort-cpu-int8") :]


def test_documented_tables_are_those_of_the_results(tmp_path: Path) -> None:
    """docs/accuracy.md holds exactly what its JSON files say, of all canvases, within the limits."""
    files = sorted((DOCS / "accuracy").glob("*.json"))
    assert files
    reports = [TaskReport.from_dict(json.loads(file.read_text())) for file in files]
    for found in reports:
        assert found.passed
        assert [(row.task, row.questions) for row in found.rows] == [
            (task, 2000) for task in ("read", "count", "where", "json")
        ]
    copy = tmp_path / "accuracy.md"
    shutil.copy(DOCS / "accuracy.md", copy)
    write_sections(copy, reports)
    assert copy.read_text() == (DOCS / "accuracy.md").read_text()


def test_plot_is_the_same_twice_and_has_a_line_for_each_target(tmp_path: Path) -> None:
    errors = LayerErrors((0.1, 0.2), (0.2, 0.4, 0.1), (0.1, 0.3, 0.2))
    for name in ("a.svg", "b.svg"):
        plot_layers({"ort-cpu-int8": errors, "ort-cpu-int4": errors}, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "ort-cpu-int8" in text
    assert "ort-cpu-int4" in text
    with pytest.raises(UsageError, match=r"\.png or a \.svg"):
        plot_layers({"t": errors}, tmp_path / "a.pdf")


def test_plot_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(plots, "importlib", absent)
    with pytest.raises(UsageError, match="extra `plot`"):
        plot_layers({}, tmp_path / "a.svg")


def prepare(model: Qwen3VLModel, index: int) -> tuple[Prepared, str, str]:
    example = held_out(index)
    text, truth = example.tasks["json"]
    return model.prepare(user_message(text, [example.image])), text, truth


def test_asking_is_plain_greedy_decoding(demo_engine: Path) -> None:
    """Whatever true answer it is led along, `ask` returns what `generate` does."""
    model = Qwen3VLModel.from_engine(demo_engine, threads=1)
    for index in range(3):
        prepared, text, truth = prepare(model, index)
        embeds = model.encode_images(prepared.images)
        plain = model.generate(user_message(text, [held_out(index).image]), do_sample=False).token_ids
        # The last one is wrong from its first token on, and longer than the true one.
        for claimed in (truth, truth.replace('"count"', '"other"'), "9" * 30):
            ids, logits_TV, _ = ask(model, prepared, embeds, [*model.tokenizer.encode(claimed), plain[-1]])
            assert ids == plain
            assert len(logits_TV) == len(model.tokenizer.encode(claimed)) + 1


def test_logits_of_the_true_answer_are_those_of_one_prefill(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, threads=1)
    prepared, _, truth = prepare(model, 0)
    embeds = model.encode_images(prepared.images)
    truth_ids = [*model.tokenizer.encode(truth.replace("1", "7")), model.defaults.eos_token_ids[0]]
    _, logits_TV, _ = ask(model, prepared, embeds, truth_ids)
    ids = [*prepared.prompt.input_ids, *truth_ids]
    positions = mrope_positions(len(ids), prepared.prompt.spans)
    inputs = DecoderInputs.prompt(ids, positions, embeds, all_logits=True)
    whole = prefill(model.session, model.session.new_cache(len(ids)), inputs)
    expected = whole[len(prepared.prompt.input_ids) - 1 : -1]
    np.testing.assert_allclose(logits_TV, expected, atol=1e-3 * max(1.0, float(expected.std())))


@pytest.mark.parametrize("canvases", [SOME, pytest.param(CANVASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_engines_keep_the_accuracy(
    precision: str, canvases: int, quantised: dict[str, Path], built_reference: None
) -> None:
    found = run_tasks(quantised[precision], "demo", limit=canvases)
    assert found.passed, found.render()
    assert [row.questions for row in found.rows] == [canvases] * 4
    # The reference answers as it did when all canvases were evaluated.
    known = json.loads((DOCS / "demo_accuracy_ort-cpu-fp32.json").read_text())["wrong"]
    for row in found.rows:
        wrong = [entry for entry in known if entry["task"] == row.task and entry["index"] < canvases]
        assert row.expected_right == canvases - len(wrong)
        # Not float32 compared with itself, and nothing like the KL of a broken engine.
        assert 1e-9 < row.kl < 0.1
    config = Qwen3VLModel.from_engine(quantised[precision]).config
    assert len(found.layers.keys) == len(found.layers.values) == config.text.num_layers
    assert len(found.layers.visual_levels) == config.num_visual_levels
    assert all(0 < error < 0.5 for error in (*found.layers.keys, *found.layers.values, *found.layers.visual_levels))


def test_float32_compared_with_itself_is_exact(demo_engine: Path, built_reference: None) -> None:
    found = run_tasks(demo_engine, "demo", limit=3)
    assert found.passed
    assert {(row.lost, row.gained, row.kl, row.top1) for row in found.rows} == {(0, 0, 0.0, 1.0)}
    assert {*found.layers.keys, *found.layers.values, *found.layers.visual_levels} == {0.0}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_perturbed_scales_fail_the_gates(
    precision: str, quantised: dict[str, Path], built_reference: None, tmp_path: Path
) -> None:
    broken = noisy_scales(quantised[precision], tmp_path / "broken")
    arguments = ["verify", str(broken), "--checkpoint", "demo", "--tasks", "--limit", str(FEW), "--json"]
    code, out, err = call(app, *arguments)
    assert code == ParityError.exit_code, err
    found = json.loads(out)
    assert found["passed"] is False
    assert min(row["points"] for row in found["rows"]) < -10
    checks = verify(broken, "demo", max_new_tokens=1)
    assert {check.name for check in checks.checks if not check.passed} >= {"keys", "values", "prompt logits"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_verify_passes(precision: str, quantised: dict[str, Path]) -> None:
    found = verify(quantised[precision], "demo", max_new_tokens=16)
    assert found.passed, found.render()


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    base = ["verify", str(tmp_path), "--checkpoint", "demo"]
    code, _, err = call(app, *base, "--limit", "3")
    assert (code, "add --tasks" in err) == (2, True)
    code, _, err = call(app, *base, "--tasks", "--max-new-tokens", "3")
    assert (code, "--max-new-tokens" in err) == (2, True)
    code, _, err = call(app, *base, "--tasks", "--plot", "plot.pdf")
    assert (code, "plot.pdf" in err) == (2, True)


@pytest.mark.parametrize(
    ("capabilities", "source", "name"),
    [
        ({}, {}, "ort-cpu-int4"),
        ({"cache_bits": 4}, {}, "ort-cpu-int4, int4 cache"),
        ({"cache_bits": 8}, {"calibration": {"method": "gptq"}}, "ort-cpu-int4, calibrated, int8 cache"),
    ],
)
def test_a_report_names_calibration_and_cache(
    capabilities: dict[str, Any], source: dict[str, Any], name: str, demo_engine: Path
) -> None:
    manifest = dataclasses.replace(
        Manifest.read(demo_engine), target="ort-cpu-int4", capabilities=capabilities, source=source
    )
    assert TaskReport.of(manifest, "demo", [], 2.0, LayerErrors((), (), ())).target == name
