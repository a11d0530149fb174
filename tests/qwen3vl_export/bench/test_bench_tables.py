"""Sweeps as Markdown, CSV, JSON and JSON Lines."""

from __future__ import annotations

import csv
import io
import json

from helpers.bench_results import LONG, SAMPLES, SHORT, result
from qwen3vl_export.bench.compare import Comparison, compare
from qwen3vl_export.bench.results import Earlier
from qwen3vl_export.bench.tables import as_csv, as_json, as_json_lines, as_markdown

RESULTS = [result(SHORT, [2 * each for each in SAMPLES]), result(LONG)]


def comparison() -> Comparison:
    plain = json.loads(json.dumps(result(SHORT).to_dict()))
    other = {**plain, "batch": 2}
    return compare(RESULTS, [Earlier.parse(each, "file") for each in (plain, other)])


def test_markdown() -> None:
    text = as_markdown([*RESULTS, result(engine="a|b\x1b[31m")], None)
    lines = text.splitlines()
    assert lines[2] == ("| demo | ort-cpu-fp32 | none | 128 | 136 | 32 | 1 | 24 [22–26] | 2.4 [2.2–2.6] | 416.7 |")
    assert "| 2 × 448x448 | 512 | 520 | 32 | 4 | 12 [11–13] | 1.2 [1.1–1.3] | 3333 |" in lines[3]
    assert lines[4].startswith("| a\\|b\\x1b[31m |")
    assert {line.replace("\\|", "").count("|") for line in lines[:5]} == {11}
    assert "Medians of 5 repetitions after one of warm-up, in brackets the quartiles." in lines
    assert "- processor: Abacus (avx2)" in lines and "- load before: 0.10 processes in the minute before" in lines


def test_markdown_of_a_comparison() -> None:
    lines = as_markdown(RESULTS, comparison()).splitlines()
    assert "| demo | 128 tokens, 32 new | TTFT | 12 | 24 | 2.000 | 1.571–2.545 | slower |" in lines
    assert "- only in the earlier file: demo: 128 tokens, 32 new, batch 2" in lines
    assert "- not in the earlier file: demo: 2 × 448x448 + 512 tokens, 32 new, batch 4" in lines


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULTS, None))))
    assert [row["batch"] for row in rows] == ["1", "4"] and [row["image_size"] for row in rows] == ["", "448x448"]
    assert float(rows[0]["ttft_s"]) == RESULTS[0].ttft_s.median and float(rows[0]["q3_tpot_s"]) == 0.0026
    assert rows[0]["cpu"] == "Abacus" and rows[0]["version_onnxruntime"] == "1.32.0" and rows[0]["runs"] == "5"
    compared = list(csv.DictReader(io.StringIO(as_csv(RESULTS, comparison()))))
    assert [row["verdict_ttft_s"] for row in compared] == ["slower", ""]
    assert float(compared[0]["ratio_tpot_s"]) == 2.0


def test_json_and_json_lines_hold_the_same_points() -> None:
    found = json.loads(as_json(RESULTS, comparison()))
    assert [json.loads(line) for line in as_json_lines(RESULTS, comparison()).splitlines()] == found["points"]
    first, second = found["points"]
    assert first["ttft_s"]["samples"] == [2 * each for each in SAMPLES] and second["compared"] is None
    assert first["compared"]["tpot_s"]["verdict"] == "slower"
    assert found["comparison"]["only_earlier"] == ["demo: 128 tokens, 32 new, batch 2"]
    assert found["comparison"]["only_now"] == ["demo: 2 × 448x448 + 512 tokens, 32 new, batch 4"]
    plain = json.loads(as_json(RESULTS, None))
    assert list(plain) == ["points"] and "compared" not in plain["points"][0]
