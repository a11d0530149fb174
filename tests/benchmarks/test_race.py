"""Benchmarks of engines of ONNX Runtime: race, overhead, and the pages made of their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import overhead, race, report
from benchmarks.__main__ import app
from benchmarks.speculation import Engine
from runtime.errors import UsageError


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_engines_take_turns(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "CACHED", (3, 20))
    (tmp_path / "other").symlink_to(tiny_engine)
    calls = []
    step = race.decode_step

    def recorded(engine: Engine, num_cached: int, num_new: int, cache: Any) -> float:
        calls.append((engine, num_cached, num_new, cache.capacity))
        step(engine, num_cached, num_new, cache)  # the engine takes these shapes
        return 0.002 * len({each for each, *_ in calls}) if num_new == 1 else 0.5

    monkeypatch.setattr(race, "decode_step", recorded)
    options = ("--name", "x", "--repeats", "4", "--results", str(tmp_path))
    done = invoke("race", str(tiny_engine), str(tmp_path / "other"), *options)
    assert done.exit_code == 0, done.output
    works = [(cached, num_new, capacity) for _, cached, num_new, capacity in calls]
    assert works == [(3, 1, 4)] * 12 + [(20, 1, 21)] * 12 + [(0, 512, 512)] * 10
    for turn in range(0, len(calls), 2):
        assert calls[turn][0] is not calls[turn + 1][0]
    result = json.loads((tmp_path / "race-x.json").read_text())
    assert result["engines"] == [tiny_engine.name, "other"] and result["environment"]["load_average_1min"] >= 0
    assert [row["work"] for row in result["rows"]] == ["decode@3", "decode@20", "prefill 512"]
    assert "| prefill 512 | 500.0 ms | 500.0 ms | 1.00 |" in done.stdout
    assert "load average before the run" in done.stdout


def test_a_race_needs_names_that_differ(tiny_engine: Path, tmp_path: Path) -> None:
    done = invoke("race", str(tiny_engine), str(tiny_engine), "--name", "x", "--results", str(tmp_path))
    assert isinstance(done.exception, UsageError) and not list(tmp_path.iterdir())


def test_the_ratio_is_that_of_the_first_engine_to_the_others() -> None:
    rows = [{"work": "decode@20", "median_s": {"a": 0.03, "b": 0.02}}]
    text = race.table({"engines": ["a", "b"], "threads": 2, "rows": rows})
    assert "| decode@20 | 30.0 ms | 20.0 ms | 1.50 |" in text


def test_host_and_graph_make_a_step(tiny_engine: Path, tmp_path: Path) -> None:
    options = ("--name", "x", "--steps", "7", "--num-cached", "4", "--results", str(tmp_path))
    done = invoke("overhead", str(tiny_engine), *options)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "overhead-x.json").read_text())
    steps, calls, rest = (result[part]["all_s"] for part in ("step", "inside", "outside"))
    assert len(steps) == 7
    for step, call, other in zip(steps, calls, rest, strict=True):
        assert step == pytest.approx(call + other) and call > 0 and other > 0
    assert report.load(tmp_path).keys() == {"overhead-x"}
    assert "| graph |" in done.stdout


def test_onnxruntime_is_left_as_it_was(tiny_engine: Path) -> None:
    import onnxruntime as ort

    before = ort.InferenceSession.run_with_iobinding
    overhead.measure_steps(Engine(tiny_engine, 1, 0), 1)
    assert ort.InferenceSession.run_with_iobinding is before
