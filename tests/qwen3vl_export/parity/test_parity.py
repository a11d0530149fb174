"""Measures on known arrays, the report, and the whole comparison on a random and on the trained checkpoint."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
import runtime.generation
from helpers import ROOT, judge
from helpers.random_checkpoints import write_random
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import export
from qwen3vl_export.parity import transformers_reference
from qwen3vl_export.parity.cases import make_cases, picture
from qwen3vl_export.parity.metrics import agreement, difference, kl_divergence
from qwen3vl_export.parity.report import Check, Report
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.request import ExportRequest
from runtime.errors import ParityError, UsageError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel


def floats(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def test_difference_of_known_arrays() -> None:
    found = difference(floats(3, 4.5), floats(3, 4))
    assert found.max_abs == 0.5
    assert found.relative == pytest.approx(0.1)
    assert found.cosine == pytest.approx(27 / (5 * math.sqrt(29.25)))
    assert found.scaled == 0.5
    assert difference(floats(100, -100), floats(90, -90)).scaled == pytest.approx(10 / 90)


def test_difference_of_zeros_of_not_finite_and_of_shapes() -> None:
    same = difference(floats(0, 0), floats(0, 0))
    assert (same.max_abs, same.relative, same.cosine) == (0, 0, 1)
    one_zero = difference(floats(1, 0), floats(0, 0))
    assert (one_zero.relative, one_zero.cosine) == (math.inf, 0)
    for odd in (floats(math.nan, 0), floats(math.inf, 0), floats(0, 0, 0)):
        found = difference(odd, floats(0, 0))
        assert (found.scaled, found.relative) == (math.inf, math.inf)


def test_kl_of_known_distributions() -> None:
    expected = np.log(floats([0.5, 0.5], [0.9, 0.1]))
    found = np.log(floats([0.25, 0.75], [0.9, 0.1])) + 7
    want = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    np.testing.assert_allclose(kl_divergence(found, expected), [want, 0], atol=1e-6)


def test_near_ties_are_set_aside_with_their_gap() -> None:
    # Rows: a near-tie taken the other way; decided; the same; a near-tie, but the engine's token is the third.
    expected = floats([1, 1.0005, 0], [3, 1, 0], [0, 5, 1], [1, 1.0005, 0])
    found = agreement(np.array([0, 1, 1, 2]), expected, 1e-3)
    assert found.differing == (1, 3)
    assert found.near_ties == ((0, pytest.approx(0.0005, abs=1e-6)),)
    assert found.share == pytest.approx(1 / 2)


def test_pictures_are_the_same_each_time_and_need_a_resize(tmp_path: Path) -> None:
    np.testing.assert_array_equal(picture(40, 30, 1), picture(40, 30, 1))
    assert picture(40, 30, 1).shape == (30, 40, 3)
    from PIL import Image

    cases = make_cases(tmp_path)
    assert [len(case.images) for case in cases] == [0, 1, 3, 2, 0, 1]
    sizes = {Image.open(path).size for case in cases for path in case.images}
    assert len(sizes) == 3
    assert all(side % 32 for size in sizes for side in size)


def test_pictures_straddle_borders_of_small_chunks(demo_engine: Path, tmp_path: Path) -> None:
    (case,) = (each for each in make_cases(tmp_path) if each.name == "small chunks")
    prepared = Qwen3VLModel.from_engine(demo_engine).prepare(case.messages)
    for start, length in ((span.start, span.num_tokens) for span in prepared.prompt.spans):
        assert start // case.chunk < (start + length - 1) // case.chunk
        # A border inside, not only at an end: some chunk begins with a row that is not the picture's first.
        assert any(start < border < start + length for border in range(0, start + length, case.chunk))


def test_report_fails_on_nan_and_on_nothing() -> None:
    assert not Report("t", "c", "fp32", ()).passed
    broken = Report("t", "c", "fp32", (Check("text", "logits", math.nan, 1.0, detail={"max_abs": math.inf}),))
    assert not broken.passed
    (row,) = json.loads(json.dumps(broken.to_dict(), allow_nan=False))["checks"]
    assert (row["value"], row["detail"], row["passed"]) == (None, {"max_abs": None}, False)
    report = Report("t", "c", "fp32", (Check("text", "logits", 0.5, 1.0), Check("text", "agree", 0.5, 1.0, True)))
    assert [check.passed for check in report.checks] == [True, False]
    assert report.render().splitlines()[-1] == "t against c (fp32): FAILED"


def test_table_shows_failed_layers_and_the_worst_of_the_others() -> None:
    values = (0.1, 0.3, 7.0, 0.2)
    checks = tuple(Check("text", "keys", value, 1.0, layer=i) for i, value in enumerate(values))
    lines = Report("t", "c", "fp32", checks, ("a note",)).render().splitlines()
    assert [line.split()[:6] for line in lines[1:3]] == [
        ["text", "keys", "of", "layer", "1", "(worst)"],
        ["text", "keys", "of", "layer", "2", "7"],
    ]
    assert lines[3].startswith("Keys and values of a layer show")
    assert lines[4:] == ["a note", "t against c (fp32): FAILED"]


@pytest.mark.judge
@pytest.mark.parametrize("name", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_engine_agrees_with_transformers(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(f"{name}_engine")
    checkpoint = "demo" if name == "demo" else str(request.getfixturevalue("tiny_checkpoint"))
    report = verify(engine, checkpoint)
    assert report.passed, report.render()
    assert report.notes == ()
    found = {(check.case, check.name, check.layer) for check in report.checks}
    config = Qwen3VLModel.from_engine(engine).config
    for case in ("text", "one image", "three images", "small chunks"):
        assert {(case, kind, layer) for kind in ("keys", "values") for layer in range(config.text.num_layers)} <= found
        named = ["token ids differ from processor", "prompt logits", "prompt tokens agree", "greedy logits"]
        named += ["greedy tokens agree", "answer agrees"]
        if case != "text":
            named += ["grid_thw differs from processor", "pixels, grey levels"]
            named += [f"visual_embeds level {level}" for level in range(config.num_visual_levels)]
        assert {(case, name, None) for name in named} <= found
    assert {check.detail["tokens"] for check in report.checks if check.name == "answer agrees"} == {64}


def test_each_use_of_a_near_tie_is_reported(
    tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gap that forgives everything, a broken decode passes by near-ties alone, and the report names each."""
    load, decode_steps = configs.load, runtime.generation.decode_steps

    def forgiving(name: str) -> dict[str, Any]:
        values = load(name)
        return {"fp32": values["fp32"] | {"near_tie_gap": 1e9}} if name == "tolerances" else values

    def wrong_delta(session: Any, cache: Any, logits: Any, num_cached: int, delta: int, *rest: Any) -> Any:
        return decode_steps(session, cache, logits, num_cached, 0, *rest)

    monkeypatch.setattr(configs, "load", forgiving)
    monkeypatch.setattr(runtime.generation, "decode_steps", wrong_delta)
    report = verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=8)
    (check,) = (c for c in report.checks if (c.case, c.name) == ("one image", "greedy tokens agree"))
    assert check.passed
    assert check.detail["differing"] == []
    ties = check.detail["near_ties"]
    assert len(ties) > 0
    assert all(0 < tie["position"] < 8 and tie["gap"] > 0 for tie in ties)
    (line,) = (x for x in report.render().splitlines() if x.startswith("one image") and "greedy tokens agree" in x)
    assert f"near_ties (position {ties[0]['position']}, gap {ties[0]['gap']:.3g})" in line


@pytest.mark.parametrize("package", ["transformers", "torchvision"])
def test_without_transformers_our_own_definition_is_the_reference(
    package: str, tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else installed(name))
    with pytest.raises(UsageError, match=f"'{package}', which is not installed") as raised:
        verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=1)
    assert "[verify]" in str(raised.value.remedy) and "--reference own" in str(raised.value.remedy)
    monkeypatch.setitem(sys.modules, package, None)
    report = verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=3, reference="own")
    assert report.passed, report.render()
    assert "not compared with transformers" in report.notes[0]
    assert report.to_dict()["reference"].startswith("own definition, torch ")
    assert not [check for check in report.checks if "processor" in check.name]


def test_an_unknown_reference_is_an_error(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="reference 'onnx'") as raised:
        verify(tiny_engine, str(tiny_checkpoint), reference="onnx")
    assert "transformers, own" in str(raised.value.remedy)


def test_another_checkpoint_is_an_error(tiny_engine: Path) -> None:
    with pytest.raises(ParityError, match="another shape than demo"):
        verify(tiny_engine, "demo")


ROPE = {"rope_type": "default", "rope_theta": 12345.0, "mrope_section": [9, 4, 3], "mrope_interleaved": True}
AXIAL = {"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}}


def random_engine(folder: Path, **changes: Any) -> tuple[Path, str]:
    """Export a random checkpoint; return engine and checkpoint."""
    source = write_random(folder / "checkpoint", **changes)
    engine = folder / "engine"
    export(ExportRequest(str(source), "ort-cpu-fp32", engine))
    return engine, str(source)


@pytest.mark.judge
def test_an_engine_of_other_settings_agrees_with_transformers(tmp_path: Path) -> None:
    """Levels whose mergers are listed in another order, another theta and other sections, through the whole product."""
    vision = {"deepstack_visual_indexes": [2, 0]} | (AXIAL if judge.vision_rope_is_read() else {})
    engine, source = random_engine(tmp_path, vision_config=vision, text_config={"rope_parameters": ROPE})
    report = verify(engine, source, max_new_tokens=2)
    assert report.passed, report.render()
    assert report.to_dict()["reference"].startswith("transformers ")


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_config": {"deepstack_visual_indexes": [2, 0]}},
        {"vision_config": AXIAL},
        {"text_config": {"rope_parameters": ROPE}},
    ],
    ids=["levels", "theta of the vision tower", "rotary settings of the decoder"],
)
def test_settings_that_the_engine_has_otherwise_are_noticed(
    changes: dict[str, Any], tiny_engine: Path, tmp_path: Path
) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    manifest = Manifest.read(engine)
    other = write_random(tmp_path / "other", **changes)
    # The engine says of itself what is not so.
    dataclasses.replace(manifest, model=Checkpoint.open(str(other)).config).write(engine)
    report = verify(engine, str(other), max_new_tokens=1, reference="own")
    if "vision_config" in changes and "rope_parameters" in changes["vision_config"]:
        assert report.passed  # the runtime makes these tables, by the manifest
    else:
        assert not report.passed


@pytest.mark.judge
def test_a_checkpoint_that_the_release_does_not_read_is_no_bug_of_ours(
    tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["pad_token_id"] = config["text_config"]["vocab_size"] + 1  # transformers wants an embedding
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"transformers \d.* does not read .*checkpoint \(\w+") as raised:
        verify(tiny_engine, str(folder), max_new_tokens=1)
    assert "--reference own" in str(raised.value.remedy)
    assert verify(tiny_engine, str(folder), max_new_tokens=1, reference="own").passed


@pytest.mark.judge
def test_the_code_of_a_checkpoint_is_neither_run_nor_offered(
    tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In a process whose stdin would say yes; transformers asks where it is not told what to do."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    own = "from pathlib import Path\nPath(__file__).with_name('witness').touch()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(own)
    names = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoModelForImageTextToText")
    own_classes = {
        "config.json": {},
        "preprocessor_config.json": {"processor_class": "Evil"},
        "tokenizer_config.json": {"processor_class": "Evil"},
    }
    for name, classes in own_classes.items():
        auto_map = {each: "evil.Evil" for each in names} | {"AutoTokenizer": ["evil.Evil", None]}
        values = json.loads((folder / name).read_text()) | {"auto_map": auto_map} | classes
        (folder / name).write_text(json.dumps(values))
    command = [sys.executable, "-m", "qwen3vl_export.cli.run", "verify", str(tiny_engine), "--checkpoint", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, env=environment, timeout=120)
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == UsageError.exit_code, done.stderr
    assert re.fullmatch(r"error: transformers .* does not read .*\n  remedy: .*\n", done.stderr)
    assert list(tmp_path.rglob("witness")) == []


@pytest.mark.judge
def test_what_other_libraries_say_is_not_shown(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    arguments = ["verify", str(tiny_engine), "--checkpoint", str(tiny_checkpoint), "--max-new-tokens", "1"]
    # Of an older typer, which warns of its own imports.
    warnings = ["-W", "default", "-W", "ignore::DeprecationWarning:typer"]
    command = [sys.executable, *warnings, "-m", "qwen3vl_export.cli.run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"comparing: text", "comparing: one image"} <= set(done.stderr.splitlines())
    assert all(line.startswith("comparing: ") for line in done.stderr.splitlines())


def test_a_release_that_is_too_old_is_named(
    tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_reference.metadata, "version", lambda name: "4.56.2")
    with pytest.raises(UsageError, match=r"transformers 4\.56\.2 is installed, .* expected 4\.57 or later"):
        verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=1)


@pytest.mark.judge
def test_want_of_memory_is_not_taken_for_a_checkpoint_that_is_not_read(
    tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", exhausted)
    with pytest.raises(MemoryError):
        verify(tiny_engine, str(tiny_checkpoint), max_new_tokens=1)
