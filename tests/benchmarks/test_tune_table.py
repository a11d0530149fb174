"""`python -m benchmarks tune`: what its result and its table say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, tune
from qwen3vl_export.bench.shift import Shift
from qwen3vl_export.tune.answers import Deviation
from qwen3vl_export.tune.search import NO_GAIN, Choice, Outcome, Trial
from qwen3vl_export.tune.settings import Effect, Metric, Setting
from qwen3vl_export.tune.tuner import Report
from runtime.tuning import Tuning
from runtime.tuning_store import Key

PAGES = Setting("huge_pages", False, (True,), (Metric.STEP,), Effect.SAME)
CHUNK = Setting("prefill_chunk", 512, (256,), (Metric.LONG_PROMPT,), Effect.ROUNDING)
SAME = Deviation(True, 0.0, 0, 9)
THREADS = Setting("threads", 2, (1,), (Metric.STEP,), Effect.ROUNDING)


def made(tuning: Tuning) -> Report:
    choices = (
        Choice(
            PAGES, True, (Trial(True, {Metric.STEP: Shift(0.87, 0.85, 0.9)}, "chosen", Deviation(True, 0.0, 0, 9)),)
        ),
        Choice(CHUNK, None, (Trial(256, {Metric.LONG_PROMPT: Shift(1.01, None, None)}, NO_GAIN),)),
        Choice(THREADS, None, note="not measured: the time was over"),
    )
    rounds = {"ttft_s": [0.2] * 6, "tpot_s": [0.05] * 6}
    faster = {"ttft_s": [0.2] * 6, "tpot_s": [0.04] * 6}
    outcome = Outcome(tuning, choices, 0.012, rounds, faster, "faster than the defaults")
    return Report(Path("2b"), "ort-cpu-int4", Key("", {}, {}), outcome, None, "not kept", ("a note",), 150.0)


def test_a_result_is_written_with_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measure(*arguments: Any, **keywords: Any) -> Report:
        asked.append((arguments, keywords))
        return made(Tuning(huge_pages=True))

    monkeypatch.setattr(tune, "measure", measure)
    tune.tune([tmp_path / "2b"], 60, tmp_path)
    assert asked == [((tmp_path / "2b", 60), {"keeps": False})]
    result = json.loads((tmp_path / "tune-2b.json").read_text())
    assert result["engine"] == "2b" and str(tmp_path) not in json.dumps(result)
    text = (tmp_path / "tune-2b.md").read_text()
    assert text == report.render("tune-2b", result)
    assert (
        "`2b` (ort-cpu-int4) in 60 s: `huge_pages` on; faster than the defaults. Repeated times spread by 1.2 %."
        in text
    )
    assert "| TPOT | 50.0 ms | 40.0 ms | 0.80 (0.80 to 0.80) |\n" in text
    assert "| `huge_pages` | off | on | step 0.87 (0.85 to 0.90) | chosen, same bits |\n" in text
    assert f"| `prefill_chunk` | 512 | 256 | long prompt 1.01 | {NO_GAIN} |\n" in text
    assert "| `threads` | 2 |  |  | not measured: the time was over |\n" in text and "\nA note.\n" in text
