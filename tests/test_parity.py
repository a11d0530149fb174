"""Measures on known arrays, and the whole comparison on a random and on the trained checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from qwen3vl_export.parity.cases import make_cases, picture
from qwen3vl_export.parity.metrics import agreement, difference, kl_divergence, top2_gap
from qwen3vl_export.parity.verify import Check, Report, verify


def floats(*rows: object) -> np.ndarray:
    return np.array(rows, np.float32)


def test_difference_of_known_arrays() -> None:
    found = difference(floats(3, 4.5), floats(3, 4))
    assert found.max_abs == 0.5
    assert found.relative == pytest.approx(0.1)
    assert found.cosine == pytest.approx(27 / (5 * math.sqrt(29.25)))
    assert found.scaled == 0.5
    assert difference(floats(100, -100), floats(90, -90)).scaled == pytest.approx(10 / 90)


def test_difference_of_zeros_and_not_finite() -> None:
    assert difference(floats(0, 0), floats(0, 0)).cosine == 1
    assert difference(floats(1, 0), floats(0, 0)).relative == math.inf
    assert difference(floats(math.nan, 0), floats(0, 0)).scaled == math.inf


def test_kl_of_known_distributions() -> None:
    expected = np.log(floats([0.5, 0.5], [0.9, 0.1]))
    found = np.log(floats([0.25, 0.75], [0.9, 0.1])) + 7
    want = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    np.testing.assert_allclose(kl_divergence(found, expected), [want, 0], atol=1e-6)


def test_near_ties_are_set_aside_and_reported() -> None:
    expected = floats([1, 1.0005, 0], [3, 1, 0], [0, 5, 1])
    np.testing.assert_allclose(top2_gap(expected), [0.0005, 2, 4], atol=1e-6)
    same = agreement(floats([1.1, 1, 0], [1, 3, 0], [0, 5, 1]), expected, 1e-3)
    assert (same.near_ties, same.differing) == ((0,), (1,))
    assert same.share == pytest.approx(2 / 3)


def test_pictures_are_the_same_each_time_and_differ_in_size(tmp_path: Path) -> None:
    np.testing.assert_array_equal(picture(40, 30, 1), picture(40, 30, 1))
    assert picture(40, 30, 1).shape == (30, 40, 3)
    cases = make_cases(tmp_path)
    assert [len(case.images) for case in cases] == [0, 1, 3]


def test_report_fails_on_nan_and_on_nothing() -> None:
    assert not Report("t", "c", "fp32", ()).passed
    assert not Report("t", "c", "fp32", (Check("text", "logits", math.nan, 1.0),)).passed
    report = Report("t", "c", "fp32", (Check("text", "logits", 0.5, 1.0), Check("text", "agree", 0.5, 1.0, True)))
    assert [check.passed for check in report.checks] == [True, False]
    assert "FAILED" in report.render()
    assert json.loads(json.dumps(report.to_dict()))["passed"] is False


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_engine_agrees_with_transformers(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(f"{name}_engine")
    checkpoint = "demo" if name == "demo" else str(request.getfixturevalue("tiny_checkpoint"))
    report = verify(engine, checkpoint)
    assert report.passed, report.render()
    names = {(check.case, check.name) for check in report.checks}
    for case in ("text", "one image", "three images"):
        assert {(case, "prompt logits"), (case, "greedy tokens agree"), (case, "layer 0 keys")} <= names
    assert ("three images", "pixels, grey levels") in names
