"""Which rows of a KV cache stay: scores, pooling and choice, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cache_eviction import IMAGE_POOL, TEXT_POOL, choose_rows, pool_scores, window_scores
from runtime.positions import VisualSpan

RNG = np.random.default_rng(0)
SPANS = (VisualSpan(3, (1, 4, 5)), VisualSpan(23, (2, 3, 2)), VisualSpan(40, (1, 2, 2)))
NUM_ROWS = 50


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_window", "num_rows"), [(6, 2, 5, 17), (3, 3, 1, 1), (4, 1, 4, 4)]
)
def test_scores_are_the_attention_of_the_window(
    num_heads: int, num_kv_heads: int, num_window: int, num_rows: int
) -> None:
    queries = RNG.standard_normal((num_window, num_heads, 8)).astype(np.float32)
    keys = RNG.standard_normal((num_kv_heads, num_rows, 8)).astype(np.float32)
    wanted = np.zeros((num_kv_heads, num_rows))
    for w, n in itertools.product(range(num_window), range(num_heads)):
        seen = num_rows - num_window + w + 1
        group = num_heads // num_kv_heads
        weights = np.exp(0.3 * keys[n // group, :seen].astype(np.float64) @ queries[w, n])
        wanted[n // group, :seen] += weights / weights.sum() / group
    found = window_scores(queries, keys, 0.3)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), num_window, rtol=1e-5)


def neighbours(row: int) -> list[int]:
    """The rows whose scores count for a row of `SPANS`' prompt."""
    for span in SPANS:
        if span.start <= row < span.end:
            _, height, width = span.merged_grid_thw
            frame, place = divmod(row - span.start, height * width)
            reach = IMAGE_POOL // 2
            return [
                span.start + frame * height * width + y * width + x
                for y, x in itertools.product(range(height), range(width))
                if abs(y - place // width) <= reach and abs(x - place % width) <= reach
            ]
    first = max(each for each in (0, *(span.end for span in SPANS)) if each <= row)
    last = min(each for each in (*(span.start for span in SPANS), NUM_ROWS) if each > row)
    return [each for each in range(first, last) if abs(each - row) <= TEXT_POOL // 2]


def test_a_row_counts_for_its_neighbours_in_text_and_in_its_picture() -> None:
    scores = RNG.random((2, NUM_ROWS)).astype(np.float32)
    found = pool_scores(scores, SPANS)
    for row in range(NUM_ROWS):
        np.testing.assert_array_equal(found[:, row], scores[:, neighbours(row)].max(1))
    # A line of the picture is not joined to the next: rows 7 and 8 are its right and left end.
    assert 8 not in neighbours(7) and 12 in neighbours(7)


@given(
    budget=st.integers(6, NUM_ROWS),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
    share=st.none() | st.floats(0, 1),
    spans=st.sampled_from([(), SPANS]),
)
def test_each_head_keeps_as_many_rows_and_the_window(
    budget: int, window: int, seed: int, share: float | None, spans: tuple[VisualSpan, ...]
) -> None:
    scores = np.random.default_rng(seed).random((3, NUM_ROWS)).astype(np.float32)
    rows = choose_rows(scores, budget, window, spans, visual_share=share)
    assert rows.shape == (3, budget)
    assert (np.diff(rows, axis=1) > 0).all() and rows.min() >= 0 and rows.max() < NUM_ROWS
    assert (rows[:, -window:] == np.arange(NUM_ROWS - window, NUM_ROWS)).all()
    is_visual = np.zeros(NUM_ROWS, bool)
    for span in spans:
        is_visual[span.start : span.end] = True
    counts = is_visual[rows[:, :-window]].sum(1)
    first = NUM_ROWS - window
    wanted = round((is_visual[:first].sum() / first if share is None else share) * (budget - window))
    least, most = budget - window - (~is_visual[:first]).sum(), is_visual[:first].sum()
    assert (counts == min(max(wanted, least), most)).all()


def test_the_rows_of_most_votes_stay() -> None:
    scores = np.full((1, 30), 0.1, np.float32)
    scores[0, [4, 20]] = 1.0
    reach = TEXT_POOL // 2
    kept = [*range(4 - reach, 4 + reach + 1), *range(20 - reach, 20 + reach + 1), 28, 29]
    np.testing.assert_array_equal(choose_rows(scores, len(kept), 2), [kept])


def test_rows_of_a_pruned_picture_count_for_themselves() -> None:
    """Beside a kept token there may be none of its neighbours: its number in the prompt says nothing of its place."""
    scores = RNG.random((2, 30)).astype(np.float32)
    for kept in (9, (0, 3, 4, 7, 8, 11, 12, 15, 19)):
        found = pool_scores(scores, [VisualSpan(6, (1, 4, 5), kept)])
        np.testing.assert_array_equal(found[:, 6:15], scores[:, 6:15])
        assert found[0, 5] == scores[0, 3:6].max() and found[0, 15] == scores[0, 15:18].max()


def test_a_share_of_the_budget_is_at_most_all_of_it() -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(AssertionError):
            choose_rows(np.ones((1, NUM_ROWS), np.float32), 20, 4, SPANS, visual_share=share)


def test_heads_choose_for_themselves() -> None:
    scores = np.zeros((2, 40), np.float32)
    scores[0, 5], scores[1, 25] = 1.0, 1.0
    rows = choose_rows(scores, TEXT_POOL + 1, 1)
    assert 5 in rows[0] and 5 not in rows[1] and 25 in rows[1] and 25 not in rows[0]
