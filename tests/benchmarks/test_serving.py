"""`python -m benchmarks serving`: what it makes of timed calls, its parts on a tiny engine, tables and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.report import render
from benchmarks.serving import chart, company, fairness, overload, scaling, tables
from benchmarks.serving.part import PARTS, measure
from benchmarks.serving.workload import DECODE, PREFILL, VISION, TimedCall, TimedSession, Workload, opened
from qwen3vl_export.load.generator import Trace
from runtime.errors import UsageError

ENVIRONMENT = {"cpu": "Abacus", "cores": 2, "memory_bytes": 1 << 30, "system": "Linux", "python": "3", "libraries": {}}
SMALL = {
    "threads": 1,
    "batches": (1, 2),
    "pasts": (4, 20),
    "repeats": 1,
    "clients": 2,
    "prompt_tokens": 8,
    "new_tokens": 4,
    "image_side": 96,
    "long_tokens": 40,
    "minutes": 0.005,
    "overload": 3.0,
    "capacity_s": 0.2,
}


@pytest.fixture(scope="module")
def measured(tiny_engine: Path) -> dict[str, Any]:
    work = Workload(str(tiny_engine), str(tiny_engine), **SMALL)  # type: ignore[arg-type]
    return {name: json.loads(json.dumps(measure(name, work))) for name in PARTS}


def result_of(parts: dict[str, Any]) -> dict[str, Any]:
    head = {"model": "tiny", "target": "ort-cpu-fp32", "demo_target": "ort-cpu-fp32", "workload": SMALL}
    return head | parts | {"environment": ENVIRONMENT | {"load_average_1min": 0.5}}


def test_scaling_times_each_number_of_sequences_and_rows(measured: dict[str, Any]) -> None:
    part = measured["scaling"]
    assert {(each["batch"], each["past"]) for each in part["steps"]} == {(1, 4), (2, 4), (1, 20), (2, 20)}
    assert all(each["median_s"] > 0 for each in part["steps"])
    for each in part["profiles"]:
        assert each["seconds"]["attention"] > 0 and each["seconds"]["products"] > 0


def test_requests_at_once_are_all_answered(measured: dict[str, Any]) -> None:
    part = measured["company"]
    (alone,), (together,) = part["rounds"]["alone"], part["rounds"]["together"]
    assert (alone["done"], together["done"]) == (2, 4) and together["batch_size"] >= alone["batch_size"] == 1.0
    assert part["ratios"]["tokens_per_s"] == pytest.approx(
        part["speeds"]["together"]["tokens_per_s"] / part["speeds"]["alone"]["tokens_per_s"]
    )


def test_what_the_model_adds_is_the_difference(measured: dict[str, Any]) -> None:
    part = measured["alone"]["engine"]
    assert part["answers"] == 4
    for name, value in part["added"].items():
        assert value == pytest.approx(part["model"][name] - part["direct"][name])
        assert part["direct"][name] > 0


def test_a_full_house_has_steps_of_all(measured: dict[str, Any]) -> None:
    part = measured["scheduler"]
    assert part["sequences"] == 32 and 1 < part["batch_size"] <= 32 and part["scheduler_ms"] > 0


def test_the_long_prompt_runs_beside_the_others(measured: dict[str, Any]) -> None:
    part = measured["fairness"]
    assert part["streams"] == 4 and part["visual_tokens"] == 9 and part["prompt_tokens"] > 40
    assert sum(each["tokens"] for each in part["chunks"]) == part["prompt_tokens"]
    assert {each["kind"] for each in part["phases"]} == {VISION, PREFILL}


def test_a_second_turn_finds_the_first_and_another_prompt_its_image(measured: dict[str, Any]) -> None:
    part = measured["conversation"]
    for each in part["rounds"]:
        assert each["second"]["cached_tokens"] > 0.8 * each["first"]["prompt_tokens"]
        assert [each[name]["cached_images"] for name in ("first", "second", "again")] == [0, 1, 1]
        assert each["again"]["cached_tokens"] == 0
    assert part["ttft_share"] > 0 and part["images_found"] == 1


def test_nothing_is_lost_in_an_overload(measured: dict[str, Any]) -> None:
    part = measured["overload"]
    assert part["lost"] == part["left_running"] == part["report"]["failed"] == 0
    assert part["report"]["done"] > 0 and part["rss"]["end_bytes"] > 0


def test_tables_and_plot_are_made_of_the_result(measured: dict[str, Any]) -> None:
    result = result_of(measured)
    text = render("serving-tiny-ort-cpu-fp32", result)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(PARTS)
    root = ElementTree.fromstring(chart.draw(result))
    dots = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == len(measured["fairness"]["gaps"])


def test_goals_are_judged(measured: dict[str, Any]) -> None:
    parts = json.loads(json.dumps(measured))
    parts["company"]["ratios"] = {"tokens_per_s": 1.99, "decode_tokens_per_s": 2.0}
    parts["scheduler"]["scheduler_ms"] = 0.31
    parts["overload"]["latency_ratio"], parts["overload"]["lost"] = 2.5, 1
    parts["conversation"] |= {"ttft_share": 0.16, "images_found": 0}
    text = tables.table(result_of(parts))
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line}
    assert rows["all, tokens/s"] == "**no**" and rows["decode steps, tokens/s"] == "yes"
    assert rows["decisions"] == rows["p95 over p50"] == rows["failed, lost or left"] == "**no**"
    assert rows["TTFT of turn 2 over that of turn 1"] == rows["embeddings of the image found"] == "**no**"


def test_a_timed_session_gives_what_the_session_gives(tiny_engine: Path) -> None:
    model, session = opened(str(tiny_engine), 1, max_context=128, max_sequences=2)
    answer = model.generate([{"role": "user", "content": "hello"}], max_new_tokens=3, do_sample=False, eos_token_id=[])
    assert [call.kind for call in session.calls] == [PREFILL, DECODE, DECODE]
    assert session.calls[0].num_tokens == answer.stats.prompt_tokens
    assert all(call.start_s < call.end_s for call in session.calls)
    assert session.runs_vision_beside is session.session.runs_vision_beside  # type: ignore[attr-defined]
    model.close()


def calls(*steps: tuple[str, float, float, int]) -> list[TimedCall]:
    return [TimedCall(kind, start, end, batch, 1) for kind, start, end, batch in steps]


def test_decode_speed_leaves_out_steps_with_a_prompt_between_them() -> None:
    steps = calls((DECODE, 0, 1, 2), (DECODE, 1, 2, 2), (DECODE, 5, 6, 2), (DECODE, 6, 7, 1))
    assert company.decode_speed(steps, 2) == 2.0
    assert company.decode_speed(steps, 3) == 0.0


def test_gaps_are_from_the_end_of_a_step_to_the_end_of_the_next() -> None:
    session = TimedSession(None)  # type: ignore[arg-type]
    session.calls = calls(
        (DECODE, 8.0, 9.0, 4),
        (DECODE, 9.0, 9.5, 4),
        (PREFILL, 10.2, 10.9, 1),
        (DECODE, 10.9, 11.5, 4),
        (DECODE, 20, 21, 4),
    )
    found = fairness.gaps(session, 10.0, 12.0)
    assert (found["gap_before_ms"], found["longest_gap_ms"]) == (pytest.approx(500), pytest.approx(2000))
    assert found["longest_step_ms"] == pytest.approx(600)
    assert [each["start_s"] for each in found["phases"]] == [pytest.approx(0.2)]


def test_the_profile_counts_the_last_steps() -> None:
    def node(operator: str, at: int, taken: int) -> dict[str, Any]:
        return {"cat": "Node", "name": "x_kernel_time", "ts": at, "dur": taken, "args": {"op_name": operator}}

    runs = [{"cat": "Session", "name": "model_run", "ts": at, "dur": 1} for at in (0, 100, 200)]
    nodes = [node("MatMulNBits", 10, 9), node("MatMulNBits", 110, 4), node("GroupQueryAttention", 120, 6)]
    found = scaling.node_seconds([*runs, *nodes, node("Add", 210, 2)], 2)
    assert found == {"attention": pytest.approx(3e-6), "products": pytest.approx(2e-6), "other": pytest.approx(1e-6)}


def test_memory_is_that_of_a_warm_process() -> None:
    trace = Trace(rss=[(0.0, 10), (1.0, 50), (2.0, 51), (9.0, 53), (10.0, 52)])
    found = overload.memory(trace)
    assert (found["start_bytes"], found["middle_bytes"], found["end_bytes"], found["largest_bytes"]) == (50, 53, 52, 53)


def test_command_runs_a_part_in_a_process_of_its_own(tiny_engine: Path, tmp_path: Path) -> None:
    options = ["--demo", str(tiny_engine), "--threads", "1", "--new-tokens", "4", "--prompt-tokens", "8"]
    done = CliRunner().invoke(
        app, ["serving", str(tiny_engine), *options, "--only", "scheduler", "--results", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("serving-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["scheduler"]["sequences"] == 32 and "overload" not in result
    assert path.with_suffix(".md").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--only", "scaling"], "--only without --results"), (["--only", "nothing", "--results", "x"], "no such part")],
)
def test_a_part_does_not_replace_the_whole(tiny_engine: Path, options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["serving", str(tiny_engine), *options])
    assert isinstance(done.exception, UsageError) and said in str(done.exception)
