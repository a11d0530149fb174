"""The benchmark of preprocessing: its cases, and its table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.preprocess import measured, photograph, table


def test_a_case_is_measured_and_shown(tmp_path: Path) -> None:
    case = measured(128, 96, 80_000, tmp_path, 2, judge=False)
    assert (case["num_patches"], len(case["ours"]["all_s"])) == (280, 2)
    beside = case | {"transformers": {"median_s": 2 * case["ours"]["median_s"]}, "is_equal": True}
    lines = table({"cases": [beside, case | {"max_pixels": None}]}).splitlines()
    assert lines[-2].startswith("| 128 x 96 | 80000 | 280 |") and lines[-2].endswith("| 0.50 | yes |")
    assert lines[-1].startswith("| 128 x 96 | checkpoint's | 280 |") and lines[-1].endswith("|  |  |  |")


def test_photographs_are_the_same_each_time() -> None:
    assert photograph(32, 16).shape == (16, 32, 3)
    assert (photograph(32, 16) == photograph(32, 16)).all()
