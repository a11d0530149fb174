"""The sections of a GPU pack: order, time, crashes and hangs, one result file, its tables."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_pack_report as shown
from benchmarks import report
from benchmarks.gpu import measure as measured
from benchmarks.gpu.kernel_times import by_kernel
from benchmarks.gpu.measure import FAILED, PASSED, SKIPPED, Section
from benchmarks.gpu.values import Values, repeated, summary
from benchmarks.measure import environment
from helpers import ROOT


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def section(
    name: str, *, after: tuple[str, ...] = (), group: str = "", lane: str = "", limit_s: float = 10.0
) -> Section:
    return Section(name, ("module",), limit_s, after, group, lane)


def taking(clock: Clock, seconds: float, ran: list[tuple[str, float]], fails: str = "") -> Callable[..., Any]:
    def run(each: Section, limit_s: float) -> dict[str, Any]:
        ran.append((each.name, limit_s))
        clock.now += seconds
        return {"state": FAILED if each.name == fails else PASSED, "why": "", "seconds": seconds}

    return run


def test_sections_run_in_order_until_the_time_is_over() -> None:
    clock, ran, told = Clock(), [], []
    chosen = [section(name) for name in "abcd"]
    results = measured.measure(
        chosen, 13.0, run=taking(clock, 5.0, ran), on_result=lambda each: told.append(len(each)), clock=clock
    )
    assert ran == [("a", 10.0), ("b", 8.0), ("c", 3.0)]
    assert [each["state"] for each in results.values()] == [PASSED, PASSED, PASSED, SKIPPED]
    assert results["d"]["why"] == "the 13 s were over"
    assert told == [1, 2, 3, 4]


def test_what_builds_on_a_failed_section_is_skipped_and_the_others_run() -> None:
    clock, ran = Clock(), []
    chosen = [section("fill"), section("speed", after=("fill",)), section("other")]
    results = measured.measure(chosen, 60.0, run=taking(clock, 1.0, ran, fails="fill"), clock=clock)
    assert [name for name, _ in ran] == ["fill", "other"]
    assert results["speed"] == {"state": SKIPPED, "why": "fill did not pass", "seconds": 0.0}


def test_a_section_that_was_not_asked_for_does_not_hold_up_another() -> None:
    clock, ran = Clock(), []
    measured.measure([section("speed", after=("fill",))], 60.0, run=taking(clock, 1.0, ran), clock=clock)
    assert [name for name, _ in ran] == ["speed"]


def test_a_group_runs_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def run(each: Section, limit_s: float) -> dict[str, Any]:
        if each.group:
            meeting.wait()  # breaks unless both are there
        return {"state": PASSED, "why": "", "seconds": 0.0}

    results = measured.measure([section("a", group="g"), section("b", group="g"), section("c")], 60.0, run=run)
    assert list(results) == ["a", "b", "c"]


def test_those_of_one_lane_run_one_after_the_other_beside_the_others_of_their_group() -> None:
    meeting, events = threading.Barrier(2, timeout=30), []

    def run(each: Section, limit_s: float) -> dict[str, Any]:
        if each.lane:
            events.append(f"{each.name} begins")
        if each.name in ("a", "fill"):
            meeting.wait()  # breaks unless both are there
        if each.lane:
            events.append(f"{each.name} ends")
        return {"state": PASSED, "why": "", "seconds": 0.0}

    lane = [section(name, group="g", lane="gpu") for name in "abc"]
    told: list[list[str]] = []
    results = measured.measure(
        [*lane, section("fill", group="g")], 60.0, run=run, on_result=lambda each: told.append(list(each))
    )
    assert events == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]
    assert list(results) == ["a", "b", "c", "fill"]
    assert len(told) == 4 and told[-1] == list(results)


def test_what_a_lane_has_no_time_for_is_skipped() -> None:
    clock, ran = Clock(), []
    lane = [section(name, group="g", lane="gpu") for name in "abc"]
    results = measured.measure(lane, 12.0, run=taking(clock, 5.0, ran), clock=clock)
    assert ran == [("a", 10.0), ("b", 7.0)]
    assert [each["state"] for each in results.values()] == [PASSED, PASSED, SKIPPED]


PROGRAM = """
import json, os, sys, time
from pathlib import Path
from benchmarks.gpu.values import Values
values = Values(Path(sys.argv[sys.argv.index("--values") + 1]))
values["first"] = 1
kind = sys.argv[1]
if kind == "crash":
    os.kill(os.getpid(), 11)
if kind == "hang":
    time.sleep(600)
if kind == "raise":
    raise RuntimeError("no memory left\\n  remedy: free the GPU")
if kind == "problem":
    values["problems"] = ["weights twice"]
"""


@pytest.mark.parametrize(
    ("kind", "limit_s", "why"),
    [
        ("good", 60.0, ""),
        ("crash", 60.0, "killed by SIGSEGV"),
        ("hang", 3.0, "not done after 3 s"),
        ("raise", 60.0, "RuntimeError: no memory left"),
        ("problem", 60.0, "weights twice"),
    ],
)
def test_a_section_that_ends_badly_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limit_s: float, why: str
) -> None:
    (tmp_path / "a_section.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    result = measured.run_section(Section("s", ("a_section", kind), limit_s), limit_s)
    assert (result["state"], result["why"]) == (FAILED if why else PASSED, why)
    assert result["values"]["first"] == 1


def test_what_the_time_of_all_ends_is_skipped_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_section.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    result = measured.run_section(Section("s", ("a_section", "hang"), 60.0), 3.0)
    assert (result["state"], result["values"]["first"]) == (SKIPPED, 1)
    assert result["why"] == "the time was over after 3 s of it"


PLAIN, CODES, EXPERTS = "m-ort-cuda-fp16", "m-ort-cuda-int4", "e-ort-cuda-int4"


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """What an unpacked pack holds, without the graphs themselves."""
    for name in ("demo-ort-cuda-fp16", "demo-ort-cuda-int4"):
        (tmp_path / "engines" / name).mkdir(parents=True)
    weights = {PLAIN: ("w", "float16"), CODES: ("w.q4", "uint8"), EXPERTS: ("mlp.experts.w.q4", "uint8")}
    for name, (weight, dtype) in weights.items():
        (tmp_path / "graphs" / name).mkdir(parents=True)
        layout = {"decoder.onnx.data": {"num_bytes": 2, "tensors": [{"name": weight, "dtype": dtype}]}}
        (tmp_path / "graphs" / name / measured.LAYOUT).write_text(json.dumps(layout))
    for name in (CODES, EXPERTS):
        (tmp_path / "graphs" / name / "decode_plan.json").touch()
    (tmp_path / "description.json").write_text(json.dumps({"graphs": list(weights)}))
    return tmp_path


def test_a_pack_has_sections_for_all_that_it_holds(pack: Path) -> None:
    known = measured.sections(pack)
    assert [each.name for each in known] == [
        "machine",
        *(f"fill {name}" for name in (PLAIN, CODES, EXPERTS)),
        *("parity demo-ort-cuda-fp16", "parity demo-ort-cuda-int4"),
        *(f"speed {name}" for name in (PLAIN, CODES, EXPERTS)),
        f"speed-weights-twice {EXPERTS}",
        *(f"step {name}" for name in (CODES, EXPERTS)),
        f"torch {PLAIN}",
        f"speed-without-plan {CODES}",
        *(f"{kind} {PLAIN}" for kind in ("first-token", "kernels")),
        *(f"{kind} {name}" for name in (CODES, EXPERTS) for kind in ("agreement", "first-token", "kernels")),
        *(f"options {name}" for name in (PLAIN, CODES, EXPERTS)),
    ]
    arguments = {each.name: each.arguments[2:] for each in known}
    assert arguments[f"speed {EXPERTS}"] == ()
    assert arguments[f"speed-weights-twice {EXPERTS}"] == arguments[f"agreement {EXPERTS}"] == ("--weights-twice",)
    assert arguments[f"speed-without-plan {CODES}"] == ("--no-plan",) and arguments[f"agreement {CODES}"] == ()


def test_no_two_sections_that_open_an_engine_run_at_once(pack: Path) -> None:
    for each in measured.sections(pack):
        if not each.name.startswith("fill ") and each.name != "machine":
            assert each.lane == "gpu" if each.group else not each.lane


def test_what_is_extra_runs_only_if_it_is_asked_for(pack: Path) -> None:
    known = measured.sections(pack)
    assert not any(each.name.startswith("options") for each in measured.choose(known, ()))
    for name in (PLAIN, CODES, EXPERTS):
        (pack / "graphs" / name / "engine.json").touch()
    assert [each.name for each in measured.choose(known, ("options m",))] == [f"options {PLAIN}", f"options {CODES}"]


def test_what_is_asked_for_is_filled_first_unless_it_has_been(pack: Path) -> None:
    known = measured.sections(pack)
    chosen = [each.name for each in measured.choose(known, ("step",))]
    assert chosen == [f"fill {CODES}", f"fill {EXPERTS}", f"step {CODES}", f"step {EXPERTS}"]
    (pack / "graphs" / CODES / "engine.json").touch()
    assert [each.name for each in measured.choose(known, ("step",))] == chosen[1:]


def test_a_section_that_is_none_is_refused(pack: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.measure", str(pack), "--json", "x.json", "--only", "speed, stpe"]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=pack)
    assert done.returncode == 2
    assert "--only stpe: no section begins so; there are machine, fill, parity, speed" in done.stderr


def test_without_a_gpu_a_section_fails_and_the_file_says_so(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.measure", str(tmp_path), "--json", str(output), "--seconds", "60"]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)
    result = json.loads(output.read_text())
    assert done.returncode == 1
    assert (result["schema"], list(result["sections"])) == (measured.SCHEMA, ["machine"])
    assert result["sections"]["machine"]["state"] == FAILED
    assert "runtime.errors.EngineError" in result["sections"]["machine"]["why"]
    assert "Sections that did not pass" in report.render("gpu-none", result)


def test_summaries_are_of_all_calls() -> None:
    calls: list[int] = []
    assert repeated(lambda: calls.append(1), warmup=2, repeats=3)["n"] == 3
    assert len(calls) == 5
    ten = summary([float(each) for each in range(10, 0, -1)])
    assert ten == {"median_ms": 5.5, "min_ms": 1.0, "p90_ms": 9.0, "n": 10}


def test_kernels_are_added_up_by_name() -> None:
    found = by_kernel([("gemm", 5.0), ("copy", 1.0), ("gemm", 7.0), ("copy", 1.0)], 2)
    assert (found["total_us"], found["num_launches"]) == (7.0, 2.0)
    assert found["largest"][0] == {"name": "gemm", "us": 6.0, "num_launches": 1.0}


ENGINE = "qwen3-vl-2b-ort-cuda-fp16"


def a_result(step_ms: float = 1.0) -> dict[str, Any]:
    def step(ms: float) -> dict[str, float]:
        return {"median_ms": ms, "min_ms": ms, "p90_ms": ms, "n": 9}

    memory = {"weight_bytes": 4_000, "taken_at_step_bytes": 4_900, "cache_bytes": 500, "taken_at_open_bytes": 4_200}
    speed = {
        "decode_kernels": "own",
        "decode": {"1": step(step_ms), "4": step(1.5)},
        "step_bytes": {"1": 3_500_000_000},
        "prefill": {"512": step(6.0)},
        "first_token": step(31.0),
        "memory": memory,
    }
    cards = {"name": "NVIDIA H200", "sm": "9.0", "driver": "13.0"}
    parity = {"num_same": 11, "num_questions": 12, "min_cosine": 0.9988, "decode_kernels": "own"}
    kernels = {
        "decode": {
            "total_us": 900.0,
            "num_launches": 140.0,
            "largest": [{"name": "p|q", "us": 700.0, "num_launches": 28.0}],
        }
    }
    sections = {
        "machine": {"gpu": cards, "copy_bytes_per_s": 4.0e12},
        f"speed {ENGINE}": speed,
        f"torch {ENGINE}": {"decode": {"1": step(2.9)}},
        "parity demo-ort-cuda-int4": parity,
        f"kernels {ENGINE}": kernels,
    }
    all_passed = {
        name: {"state": PASSED, "why": "", "seconds": 1.0, "values": values} for name, values in sections.items()
    }
    return {"schema": 1, "date": "2026-11-27", "environment": environment(), "sections": all_passed}


def row_of(text: str, *words: str) -> list[str]:
    (line,) = [each for each in text.splitlines() if all(word in each for word in words)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_goals_stand_beside_what_was_reached() -> None:
    table = shown.goals_table(a_result())
    assert row_of(table, "2b", "fp16", "batch 1 ") == [
        ENGINE,
        "decode, batch 1",
        "≤ 1.15 ms",
        "1 ms",
        "yes",
        "",
        "2.9 ms",
    ]
    # 3.5 GB in 1 ms, where copies read and write 4 TB/s.
    assert row_of(table, "2b", "batch 1:")[3:5] == ["87.5 %", "yes"]
    assert row_of(table, "2b", "batch 4")[3:5] == ["1.5 ms", "**no**"]
    assert row_of(table, "2b", "first token")[3:5] == ["31 ms", "**no**"]
    assert row_of(table, "2b", "fp16", "weights")[3:5] == ["1.1 ×", "yes"]
    assert row_of(table, "30b-a3b")[3:5] == ["not measured", ""]
    slower = shown.goals_table(a_result(step_ms=1.16))
    assert row_of(slower, "2b", "fp16", "batch 1 ")[4] == "**no**"


def test_a_result_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "gpu-nvidia-h200.json").write_text(json.dumps(a_result()))
    ((name, result),) = report.load(tmp_path).items()
    text = report.render(name, result)
    assert "NVIDIA H200, SM 9.0, CUDA 13.0, copies on the device 4.00 TB/s, 2026-11-27." in text
    assert row_of(text, "demo-ort-cuda-int4") == ["demo-ort-cuda-int4", "11 of 12", "0.9988000", "", "", "own"]
    assert "`p\\|q`" in text and "All sections passed." in text


def passed(**values: Any) -> dict[str, Any]:
    return {"state": PASSED, "why": "", "seconds": 1.0, "values": values}


def test_parity_has_a_row_for_each_way() -> None:
    def way(kernels: str, same: int, *cosines: float | None) -> dict[str, Any]:
        kinds = {
            kind: {"min_cosine": each} for kind, each in zip(("prompt", "alone", "together"), cosines, strict=True)
        }
        return {"num_same": same, "num_questions": 12, "decode_kernels": kernels, **kinds}

    own, theirs = way("own", 12, 0.9999, 0.9998, None), way("onnxruntime", 11, 0.9997, 0.9996, 0.9995)
    result = a_result()
    result["sections"]["parity demo-ort-cuda-fp8"] = passed(**own, with_plan=own, without_plan=theirs)
    rows = [line.split(" | ")[1:] for line in shown.parity_table(result).splitlines() if "fp8" in line]
    assert rows == [
        ["12 of 12", "0.9999000", "0.9998000", "not a number", "own |"],
        ["11 of 12", "0.9997000", "0.9996000", "0.9995000", "onnxruntime |"],
    ]


def test_steps_of_own_kernels_have_tables() -> None:
    result = a_result()
    kernel = {"name": "product", "grid": [192, 1, 1], "num_launches": 28, "us": 8.0, "weight_bytes": 16_000_000}
    kernel["weight"] = "model.language_model.layers.0.mlp.down_proj.weight"
    bare = {"name": "embed", "grid": [1, 1, 1], "num_launches": 1, "us": 1.5, "weight": "", "weight_bytes": 0}
    result["sections"][f"step {ENGINE}"] = passed(
        step={"1": {"median_ms": 1.1}, "8": {"median_ms": 1.6}},
        invariant_step={"1": {"median_ms": 1.2}},
        num_repeats=60,
        other_bits={"1": 0, "8": 2},
        not_invariant={"8": 0},
        kernels={"1": [kernel, bare]},
    )
    result["sections"][f"agreement {ENGINE}"] = passed(
        own={"1": {"rms": 0.0052}, "8": {"rms": None}}, onnxruntime={"1": {"rms": 0.0}, "8": {"rms": 0.0049}}
    )
    steps = shown.steps_table(result)
    assert row_of(steps, "| 1 |") == [ENGINE, "1", "1.1", "1.2", "0 of 60", "", "0.52 %", "0.00 %"]
    assert row_of(steps, "| 8 |") == [ENGINE, "8", "1.6", "", "2 of 60", "0", "not a number", "0.49 %"]
    kernels = shown.plan_kernels_table(result)
    assert row_of(kernels, "product") == [
        *(f"{ENGINE} `product`", "layers.0.mlp.down_proj.weight"),
        *("1", "192", "28", "8", "2.00"),
    ]
    assert row_of(kernels, "embed") == [f"{ENGINE} `embed`", "", "1", "1", "1", "1.5", ""]
    assert steps in shown.table(result) and kernels in shown.table(result)


def test_parts_of_the_time_to_the_first_token_stand_below_it() -> None:
    result = a_result()
    assert "as a request to the model" not in shown.engines_table(result)
    parts = {name: {"median_ms": ms} for name, ms in (("vision", 16.0), ("prefill", 11.0), ("model", 31.5))}
    result["sections"][f"first-token {ENGINE}"] = passed(**parts)
    table = shown.engines_table(result)
    for label, ms in (("its vision tower", "16"), ("its prompt", "11"), ("as a request to the model", "31.5")):
        assert row_of(table, label)[1] == ms


def test_options_of_the_provider_have_a_table() -> None:
    result = a_result()
    result["sections"][f"options {ENGINE}"] = passed(
        ratios={"baseline": {"decode 1": 0.99}, "use_tf32=0": {"decode 1": 1.25}}, refused={"flash": "no such option"}
    )
    table = shown.options_table(result)
    assert row_of(table, "use_tf32=0") == ["use_tf32=0", "1.250"]
    assert row_of(table, "flash") == ["flash", "no such option"]


def test_experts_with_weights_twice_are_held_against_their_goal() -> None:
    result = a_result()
    name = "speed-weights-twice qwen3-vl-30b-a3b-ort-cuda-int4"
    result["sections"][name] = passed(decode={"1": {"median_ms": 1.7}}, decode_kernels="own")
    assert row_of(shown.goals_table(result), "30b-a3b")[3:5] == ["1.7 ms", "yes"]
    assert "qwen3-vl-30b-a3b-ort-cuda-int4 `weights_twice`" in shown.engines_table(result)


def test_a_value_that_a_section_never_reached_is_a_gap() -> None:
    result = a_result()
    result["sections"][f"speed {ENGINE}"] = {"state": FAILED, "why": "killed by SIGSEGV", "seconds": 1.0, "values": {}}
    text = shown.table(result)
    assert row_of(text, "2b", "fp16", "batch 4")[3] == "not measured"
    assert f"- speed {ENGINE}: failed: killed by SIGSEGV" in text


def test_values_are_written_as_they_come(tmp_path: Path) -> None:
    values = Values(tmp_path / "v.json")
    values["a"] = 1
    assert json.loads((tmp_path / "v.json").read_text()) == {"a": 1}
