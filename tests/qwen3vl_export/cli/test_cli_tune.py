"""`qwen3vl tune`: measure, keep, list and remove, on the demo's engine; and what is kept is taken."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from helpers.command_line import call
from qwen3vl_export.cli.run import app
from qwen3vl_export.tune import rig, search, store, tuner
from qwen3vl_export.tune.answers import Answer
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.tuning import Tuning
from runtime.tuning_store import Key

COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def documented(row: str) -> list[str]:
    (cell,) = re.findall(rf"^\| {re.escape(row)} \| (.+) \|$", COMMANDS, re.MULTILINE)
    return re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cell))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("runtime.tuning_store.user_cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cache" / "qwen3vl" / "tuning"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Let times follow a script: shorter chunks are faster; `noise` is the factor of every second time."""
    script = {"noise": 1.0, "gain": 0.8, "calls": 0.0}

    def taken(tuning: Tuning) -> float:
        script["calls"] += 1
        noise = script["noise"] if script["calls"] % 2 == 0 else 1.0
        return noise * (script["gain"] if tuning.prefill_chunk == 256 else 1.0 + 0.1 * bool(tuning.values()))

    monkeypatch.setattr(rig.Rig, "time", lambda self, tuning, metric: taken(tuning))
    request = {"ttft_s": 1.0, "image_s": 0.1, "prefill_s": 0.8, "tpot_s": 0.01}
    monkeypatch.setattr(
        rig.Rig,
        "request",
        lambda self, tuning, index: {name: each * taken(tuning) for name, each in request.items()},
    )
    return script


def tune(*arguments: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = call(app, "tune", *arguments, "--json")
    return code, json.loads(out) if out else {}, err


def test_what_was_found_is_kept_listed_taken_and_removed(
    cache: Path, scripted: dict[str, float], demo_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, found, err = tune(str(demo_engine))
    assert code == 0, err
    assert list(found) == documented("`qwen3vl tune`")
    assert found["settings"] == {"prefill_chunk": 256} and found["verdict"] == "faster than the defaults"
    assert list(found["changes"]) == ["ttft_s", "image_s", "prefill_s", "tpot_s"]
    assert documented("its `changes`") == [*found["changes"], *found["changes"]["ttft_s"]]
    assert found["changes"]["ttft_s"]["ratio"] == pytest.approx(0.8)
    tried = {each["setting"]: each for each in found["tried"]}
    assert list(found["tried"][0]) == documented("its `tried`")
    row = next(line for line in COMMANDS.splitlines() if line.startswith("| its `tried`"))
    assert all(f"`{name}`" in row for name in tried["prefill_chunk"]["candidates"][0])
    (chosen,) = [each for each in tried["prefill_chunk"]["candidates"] if each["value"] == 256]
    assert chosen["verdict"] == "chosen" and chosen["logits_scaled"] < 1e-4
    assert found["reason"] is None and Path(found["stored"]).parent == cache
    assert [path.name for path in cache.iterdir()] == [Key.of(Manifest.read(demo_engine)).file_name]

    listed = json.loads(call(app, "tune", "--list", "--json")[1])
    assert list(listed) == documented("`qwen3vl tune --list`") and listed["folder"] == str(cache)
    (entry,) = listed["tunings"]
    assert list(entry) == documented("its `tunings`")
    assert (entry["settings"], entry["problem"]) == ({"prefill_chunk": 256}, None)
    assert "prefill_chunk 256" in call(app, "tune", "--list")[1]

    assert Qwen3VLModel.from_engine(demo_engine).limits.prefill_chunk == 256
    assert json.loads(call(app, "inspect", str(demo_engine), "--json")[1])["tuning"] == {"prefill_chunk": 256}
    assert "tuned      prefill_chunk 256" in call(app, "inspect", str(demo_engine))[1]
    asked = ("run", str(demo_engine), "Read", "--max-new-tokens", "1")
    assert "note: opened as tuned on this machine: prefill_chunk 256" in call(app, *asked)[2]
    assert call(app, *asked, "--no-tuned")[2] == call(app, *asked, "--quiet")[2] == ""

    removed = json.loads(call(app, "tune", "--remove", entry["file"], "--json")[1])
    assert list(removed) == documented("`qwen3vl tune --remove`") and list(cache.iterdir()) == []
    assert call(app, *asked)[2] == ""
    code, _, err = call(app, "tune", "--remove", entry["file"])
    assert code == 2 and "no stored tuning" in err


def test_a_bench_says_with_what_it_opened(cache: Path, scripted: dict[str, float], demo_engine: Path) -> None:
    assert tune(str(demo_engine))[0] == 0
    bench = ("bench", str(demo_engine), "--image-size", "none", "--repeats", "1", "--output", "json")
    for more, tuning in (((), {"prefill_chunk": 256}), (("--no-tuned",), {})):
        (point,) = json.loads(call(app, *bench, *more)[1])["points"]
        assert point["tuning"] == tuning


def test_on_a_busy_machine_nothing_is_kept_unless_forced(
    cache: Path, scripted: dict[str, float], demo_engine: Path
) -> None:
    scripted["noise"] = 2.0
    code, found, _ = tune(str(demo_engine))
    assert code == 0 and found["noise"] > search.NOISE_LIMIT
    assert found["stored"] is None and "this machine is busy" in found["reason"] and not cache.exists()
    said = call(app, "tune", str(demo_engine))[1]
    assert "nothing is stored: the same calls differ by " in said and "pass --force" in said
    code, found, _ = tune(str(demo_engine), "--force")
    assert found["reason"] is None and Path(found["stored"]).is_file()


def test_defaults_that_are_the_best_are_kept_and_change_nothing(
    cache: Path, scripted: dict[str, float], demo_engine: Path
) -> None:
    scripted["gain"] = 1.1
    code, found, _ = tune(str(demo_engine))
    assert (code, found["settings"], found["changes"]) == (0, {}, {})
    assert found["verdict"] == "the defaults are the best that was found" and found["stored"] is not None
    assert "the defaults" in call(app, "tune", "--list")[1]
    assert call(app, "run", str(demo_engine), "Read", "--max-new-tokens", "1")[2] == ""
    assert "tuned      the defaults are the best" in call(app, "inspect", str(demo_engine))[1]


def test_the_table_says_what_was_tried(cache: Path, scripted: dict[str, float], demo_engine: Path) -> None:
    said = call(app, "tune", str(demo_engine))[1]
    rows = [re.split(r" {2,}", line.strip()) for line in said.splitlines()]
    (row,) = [each for each in rows if each[0] == "prefill_chunk"]
    assert row[1:3] == ["512", "256"] and row[3].startswith("256: chosen, ") and "0.80 × (0.80 to 0.80)" in row[3]
    (first,) = [each for each in rows if each[0] == "time to first token"]
    assert first[1:] == ["1000.0 ms", "800.0 ms", "0.80 × (0.80 to 0.80)"]
    assert "verdict: faster than the defaults" in said and f"stored: {cache}" in said


def test_ctrl_c_leaves_what_was_kept(
    cache: Path, scripted: dict[str, float], demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune(str(demo_engine))[0] == 0
    (path,) = cache.iterdir()
    before = path.read_bytes()

    def interrupted(*_: Any) -> Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr(rig.Rig, "answer", interrupted)
    assert call(app, "tune", str(demo_engine))[0] == 130
    assert [each.name for each in cache.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_write_that_fails_leaves_what_was_kept(
    cache: Path, scripted: dict[str, float], demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tune(str(demo_engine))[0] == 0
    (path,) = cache.iterdir()
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    code, _, err = tune(str(demo_engine))
    assert code == 8 and "the disk is full" in err
    assert [each.name for each in cache.iterdir()] == [path.name] and path.read_bytes() == before


def test_without_a_home_it_measures_and_says_that_nothing_is_kept(
    cache: Path, scripted: dict[str, float], demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.tuning_store.user_cache_folder", lambda: None)
    code, found, _ = tune(str(demo_engine))
    assert code == 0 and found["settings"] == {"prefill_chunk": 256}
    assert (found["stored"], found["reason"]) == (None, "this user has no home folder; set XDG_CACHE_HOME")
    code, _, err = call(app, "tune", "--list")
    assert code == 2 and "no home folder" in err


def test_what_cannot_be_used_is_listed_with_the_reason(
    cache: Path, scripted: dict[str, float], demo_engine: Path
) -> None:
    assert tune(str(demo_engine))[0] == 0
    (path,) = cache.iterdir()
    values = json.loads(path.read_text())
    (cache / "a-machine.json").write_text(json.dumps(values | {"machine": {"cpu": "Abacus"}}))
    (cache / "b-library.json").write_text(json.dumps(values | {"versions": {"onnxruntime": "0.1"}}))
    (cache / "c-damaged.json").write_text("{")
    (cache / "d-setting.json").write_text(json.dumps(values | {"settings": {"threads": 0}}))
    problems = {each.file: each.problem for each in store.entries(cache)}
    assert problems.pop(path.name) == ""
    expected = (
        "it is of another machine",
        "with other versions of the libraries",
        "as JSON",
        "threads = 0, expected 1",
    )
    assert all(said in problem for said, problem in zip(expected, problems.values(), strict=True)), problems
    said = call(app, "tune", "--list")[1]
    assert "not used: it is of another machine" in said and said.endswith(": 5 tunings\n")
    for name in list(problems):
        assert call(app, "tune", "--remove", name)[0] == 0
    assert [each.name for each in cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give ENGINE, --list or --remove"),
        (("engine", "--list"), "give ENGINE, --list or --remove"),
        (("--list", "--budget", "60"), "are of measuring"),
        (("--remove", "x", "--force"), "are of measuring"),
        (("http://host/engine",), "URL"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: tuple[str, ...], said: str, cache: Path) -> None:
    code, _, err = call(app, "tune", *arguments)
    assert code == 2 and said in err


@pytest.mark.parametrize("budget", ["9", "3601", "-1"])
def test_a_budget_has_bounds(budget: str, cache: Path, demo_engine: Path) -> None:
    code, _, err = call(app, "tune", str(demo_engine), "--budget", budget)
    assert code == 2 and "expected 10 to 3600 seconds" in err


def test_an_engine_that_is_none_is_refused(cache: Path, tmp_path: Path) -> None:
    assert call(app, "tune", str(tmp_path / "none"))[0] == 5


def test_it_measures_in_earnest(
    cache: Path, demo_engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every part on a real engine, with a clock so slow that there is time for all of it on any machine."""
    steps: list[str] = []
    monkeypatch.setattr(search, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(search, "MOST_ROUNDS", 2)
    report = tuner.tune(
        demo_engine,
        10,
        force=True,
        opening={"max_context": 448},
        on_step=steps.append,
        clock=lambda: time.perf_counter() / 1000,
    )
    assert {each.setting.name for each in report.outcome.choices} >= {"prefill_chunk", "vision_patches"}
    assert steps[0] == "opening the engine" and any(step.startswith("prefill_chunk: ") for step in steps)
    assert report.path is not None and report.path.is_file()
    assert report.render().startswith("SETTING")
