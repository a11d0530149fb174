"""The greedy choice of rows, against the same choice without blocks in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.contract import FloatArray
from runtime.visual_pruning.diversity import diverse_rows

pytestmark = pytest.mark.portable


def volume_order(features: FloatArray, num_chosen: int) -> list[int]:
    """Choose the row with the longest part that is orthogonal to the chosen ones, by subtracting projections."""
    left = features.astype(np.float64)
    chosen: list[int] = []
    for _ in range(num_chosen):
        lengths = np.linalg.norm(left, axis=1)
        lengths[chosen] = -1
        chosen.append(int(lengths.argmax()))
        unit = left[chosen[-1]] / np.linalg.norm(left[chosen[-1]])
        left -= np.outer(left @ unit, unit)
    return chosen


def features_of(num_rows: int, num_elements: int, seed: int) -> FloatArray:
    """Return rows of different lengths that have directions in common, as embeddings do."""
    rng = np.random.default_rng(seed)
    spread = rng.lognormal(0, 0.5, (num_rows, 1)) * (1 + np.arange(num_elements)) ** -0.5
    mixed = (rng.normal(size=(num_rows, num_elements)) * spread) @ rng.normal(size=(num_elements, num_elements))
    return np.asarray(mixed, np.float32)


@pytest.mark.parametrize(("num_rows", "num_chosen"), [(1, 1), (7, 3), (100, 100), (128, 60), (129, 64), (700, 350)])
def test_the_choice_is_the_greedy_one(num_rows: int, num_chosen: int) -> None:
    features = features_of(num_rows, 768, num_rows)
    found = diverse_rows(features, num_chosen)
    assert found.dtype == np.int64 and found.tolist() == volume_order(features, num_chosen)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 50), st.data())
def test_any_rows_are_chosen_once(num_rows: int, num_elements: int, seed: int, data: st.DataObject) -> None:
    """Also more rows than directions, rows of zeros, and equal ones."""
    rng = np.random.default_rng(seed)
    features = rng.integers(-1, 2, (num_rows, num_elements)).astype(np.float32)
    num_chosen = data.draw(st.integers(0, num_rows))
    found = diverse_rows(features, num_chosen)
    assert len(set(found.tolist())) == num_chosen and set(found.tolist()) <= set(range(num_rows))


def test_a_copy_comes_last_before_what_is_shorter_than_rounding() -> None:
    features = np.array([[3, 0], [3, 0], [0, 2], [0, 0]], np.float32)
    assert diverse_rows(features, 4).tolist() == [0, 2, 1, 3]


def test_equal_rows_are_taken_in_their_order() -> None:
    assert diverse_rows(np.zeros((300, 4), np.float32), 140).tolist() == list(range(140))
