"""README's state of each target: from results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_check, report, status
from engines.hardware import Gpu, Hardware

DEVICES = {"ort-cpu-fp32": "cpu", "ort-cpu-new": "cpu", "trt-fp16": "gpu"}


def check(target: str = "trt-fp16", *, model: str = "demo", gpu: str = "NVIDIA H200", **values: Any) -> dict[str, Any]:
    bench = {"ttft_p50_s": 0.0421, "tokens_per_s": 87.65}
    result = {"model": model, "target": target, "gpu": gpu, "date": "2026-11-24", "result": "passed", "why": ""}
    return {**result, "values": {"bench": bench}, **values}


def rows(
    checks: list[dict[str, Any]] | None = None,
    builds: list[dict[str, Any]] | None = None,
    ran: Sequence[status.OnGpu] = (),
) -> dict[str, Any]:
    accuracies = {"demo": {"": {"read": 0.9}, "ort-cpu-fp32": {"read": 0.9}}}
    results = {f"build-{i}": build for i, build in enumerate(builds or [])}
    text = status.target_states(DEVICES, results, accuracies, [*status.checked(checks or []), *ran])
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {name.strip(" `"): (state.strip(), shown.strip()) for name, state, shown in cells}


def test_without_results() -> None:
    assert rows() == {
        "ort-cpu-fp32": ("run here", "the table above"),
        "ort-cpu-new": ("not run", ""),
        "trt-fp16": ("**needs a GPU to run**", ""),
    }


def test_a_timed_engine_has_run() -> None:
    results = {"run-x-ort-cpu-new": {"target": "ort-cpu-new"}, "compare-x": {"sides": {"trt-fp16": {}}}}
    text = status.target_states(DEVICES, results, {}, [])
    assert "| `ort-cpu-new` | run here |" in text and "| `trt-fp16` | run here |" in text
    assert "| `ort-cpu-fp32` | not run |" in text


def test_plans_are_built_here() -> None:
    built = [
        {"model": "demo", "target": "trt-fp16", "plan_bytes": {"decoder.plan": 12_340_000}},
        {
            "model": "qwen3-vl-2b",
            "target": "trt-fp16",
            "plan_bytes": {"decoder.plan": 4_000_000_000, "vision.plan": 1_000_000},
        },
    ]
    state, shown = rows(builds=built)["trt-fp16"]
    assert state == "built here, needs a GPU to run"
    assert shown == "demo: 12.3 MB of plans<br>qwen3-vl-2b: 4,001.0 MB of plans"


def test_a_check_that_passed_is_a_run_on_that_gpu() -> None:
    checks = [check(), check(model="qwen3-vl-2b", gpu="NVIDIA L4"), check(model="8b", result="FAILED", why="build: x")]
    built = [{"model": "demo", "target": "trt-fp16", "plan_bytes": {"decoder.plan": 1}}]
    state, shown = rows(checks, built)["trt-fp16"]
    assert state == "run on NVIDIA H200, NVIDIA L4"
    assert shown == (
        "demo: TTFT 42 ms, 87.7 tokens/s (NVIDIA H200, 2026-11-24)"
        "<br>qwen3-vl-2b: TTFT 42 ms, 87.7 tokens/s (NVIDIA L4, 2026-11-24)"
        "<br>8b FAILED: build: x"
    )


def test_a_check_that_failed_is_no_run() -> None:
    checks = [check(result="FAILED", why="verify: does not agree")]
    assert rows(checks)["trt-fp16"] == ("**fails on NVIDIA H200**", "demo FAILED: verify: does not agree")


def pack(date: str, gpu: str | None = "NVIDIA H200", **sections: dict[str, Any]) -> dict[str, Any]:
    """A result of a GPU pack; names of sections have _ in place of the space."""
    machine = {"state": "passed", "why": "", "values": {} if gpu is None else {"gpu": {"name": gpu}}}
    named = {name.replace("_", " ", 1).replace("_", "-"): each for name, each in sections.items()}
    return {"date": date, "sections": {"machine": machine, **named}}


def passing(**values: Any) -> dict[str, Any]:
    return {"state": "passed", "why": "", "values": values}


ANSWERS = passing(num_same=11, num_questions=12)
SPEED = passing(decode={"1": {"median_ms": 1.447}}, decode_kernels="own")
FAILING = {"state": "failed", "why": "cosine 0.9", "values": {"num_same": 12, "num_questions": 12}}
SKIPPED = {"state": "skipped", "why": "the 240 s were over", "values": {}}


def test_sections_of_a_gpu_pack_that_passed_are_runs_and_those_that_failed_are_not() -> None:
    result = pack(
        "2026-11-27",
        parity_demo_trt_fp16=ANSWERS,
        parity_demo_moe_trt_fp16=FAILING,
        speed_2b_trt_fp16=SPEED,
        speed_8b_trt_fp16=SKIPPED,
        kernels_8b_trt_fp16=FAILING,
    )
    state, shown = rows(ran=status.packed([result], list(DEVICES)))["trt-fp16"]
    assert state == "run on NVIDIA H200"
    assert shown.split("<br>") == [
        "demo: 11 of 12 answers as on the CPU (NVIDIA H200, 2026-11-27)",
        "2b: a decode step of one sequence 1.45 ms, own kernels, random weights (NVIDIA H200, 2026-11-27)",
        "demo-moe FAILED: cosine 0.9",
    ]


def test_a_target_of_which_nothing_passed_fails_though_it_answered() -> None:
    found = status.packed([pack("2026-11-27", parity_demo_trt_fp16=FAILING)], list(DEVICES))
    assert rows(ran=found)["trt-fp16"] == ("**fails on NVIDIA H200**", "demo FAILED: cosine 0.9")


def test_what_was_skipped_or_ran_on_no_known_gpu_says_nothing() -> None:
    skipped = pack("2026-11-27", parity_demo_trt_fp16=SKIPPED)
    nameless = pack("2026-11-27", None, parity_demo_trt_fp16=ANSWERS)
    assert status.packed([skipped, nameless], list(DEVICES)) == []
    assert rows()["trt-fp16"][0] == "**needs a GPU to run**"


def test_the_latest_result_on_a_gpu_stands() -> None:
    old, new = (
        pack(date, parity_demo_trt_fp16=each) for date, each in (("2026-11-26", FAILING), ("2026-11-28", ANSWERS))
    )
    other = pack("2026-11-25", "NVIDIA L4", parity_demo_trt_fp16=FAILING)
    found = status.packed([new, old, other], list(DEVICES))
    assert [(each.gpu, each.passed) for each in found] == [("NVIDIA L4", False), ("NVIDIA H200", True)]


def test_files_of_the_gpu_check_are_read(tmp_path: Path) -> None:
    machine = Hardware("Abacus", (), 2, 1, (Gpu("NVIDIA H200", "9.0", 1, 1, "570.1"),))
    outcome = gpu_check.Outcome("demo", "trt-fp16", values={"bench": {"ttft_p50_s": 1.0, "tokens_per_s": 2.0}})
    gpu_check.write_result(outcome, machine, tmp_path, "2026-11-25")
    outcome.result, outcome.why = "FAILED", "older"
    gpu_check.write_result(outcome, machine, tmp_path, "2026-11-24")
    (read,) = status.read_checks(tmp_path)
    assert rows([read])["trt-fp16"][0] == "run on NVIDIA H200"
    assert report.load(tmp_path) == {}


def test_builds_are_those_of_the_target() -> None:
    built = [{"model": "demo", "target": "trt-other", "plan_bytes": {"decoder.plan": 7}}]
    assert rows(builds=built) == rows()


def test_every_target_of_the_registry_has_a_row() -> None:
    from engines.registry import all_targets

    text = report.generated()[report.ROOT / "README.md"]
    assert all(f"\n| `{target.name}` | " in text for target in all_targets())


def test_accuracies_are_read_by_checkpoint_and_target(tmp_path: Path) -> None:
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "demo_accuracy.json").write_text(json.dumps({"all": {"read": 0.9}}))
    for name, checkpoint in (("t", "demo"), ("demo-moe-t", "demo-moe")):
        row = {"task": "read", "questions": 10, "expected_right": 8, "right": 7}
        paired = {"checkpoint": checkpoint, "target": "t", "rows": [row]}
        (tmp_path / "accuracy" / f"{name}.json").write_text(json.dumps(paired))
    (tmp_path / "demo_moe_accuracy_f.json").write_text(json.dumps({"all": {"read": 0.6}}))
    assert status.read_accuracies(tmp_path) == {
        "demo": {"": {"read": 0.9}, "t": {"read": 0.7}},
        "demo-moe": {"": {"read": 0.8}, "t": {"read": 0.7}, "f": {"read": 0.6}},
    }
