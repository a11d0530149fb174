"""Tokens sampled from the largest logits of a row are those sampled from the whole row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import EngineError
from runtime.generation_config import GenerationOptions
from runtime.sampling import Sampler
from runtime.session import TopLogits

K = 8


def top_of(row_V: np.ndarray, fetched: list[int], k: int = K) -> TopLogits:
    """Return the largest k of a row, sorted as the device sorts them; `fetched` grows when the row is asked for."""
    order = np.lexsort((np.arange(len(row_V)), -row_V))[:k]

    def fetch() -> np.ndarray:
        fetched.append(1)
        return row_V

    return TopLogits(order, row_V[order], len(row_V), fetch)


def sampler(**options: Any) -> Sampler:
    made = Sampler(GenerationOptions(**options))
    made.start([1, 2, 3])
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k": {"do_sample": True, "top_k": 5, "seed": 0},
    "temperature": {"do_sample": True, "top_k": 7, "temperature": 0.3, "seed": 1},
    "hot": {"do_sample": True, "top_k": 7, "temperature": 50.0, "seed": 2},
    "top_p": {"do_sample": True, "top_k": 6, "top_p": 0.5, "seed": 3},
    "top_k 1": {"do_sample": True, "top_k": 1, "seed": 4},
}


@pytest.mark.portable
@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    # Few distinct values make ties, at the edge of the list and within it.
    num_values=st.sampled_from([2, 5, 40, 100_000]),
    size=st.sampled_from([K, K + 1, 300]),
)
def test_the_token_is_that_of_the_whole_row(name: str, seed: int, num_values: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    few, whole = sampler(**OPTIONS[name]), sampler(**OPTIONS[name])
    assert few.can_use_top(K)
    for _ in range(5):
        row_V = (rng.integers(0, num_values, size) / np.float32(num_values / 8)).astype(np.float32)
        assert few.next(top_of(row_V, [])) == whole.next(row_V)


@pytest.mark.portable
def test_the_whole_row_is_asked_for_only_where_a_tie_reaches_beyond() -> None:
    distinct = np.arange(100, dtype=np.float32)[::-1].copy()
    tied = distinct.copy()
    tied[4:20] = tied[4]
    for options in OPTIONS.values():
        fetched: list[int] = []
        sampler(**options).next(top_of(distinct, fetched))
        assert not fetched
    fetched = []
    sampler(do_sample=True, top_k=5, seed=0).next(top_of(tied, fetched))
    assert fetched == [1]
    sampler(do_sample=True, top_k=4, seed=0).next(top_of(tied, fetched))
    assert fetched == [1]


@pytest.mark.portable
def test_logits_that_the_temperature_makes_equal_count_as_ties() -> None:
    # Just below 2 float32 is as fine as just above 1, so that division by 1.9 can make neighbours one number.
    row_V = np.full(20, np.float32(1.99))
    row_V[11] = np.nextafter(row_V[0], np.float32(2))
    found = next(t for t in np.linspace(1.8, 1.95, 100) if row_V[11] / np.float32(t) == row_V[0] / np.float32(t))
    fetched: list[int] = []
    options = {"do_sample": True, "top_k": 1, "temperature": float(found)}
    tokens = {sampler(seed=seed, **options).next(top_of(row_V, fetched)) for seed in range(20)}
    assert len(fetched) == 20
    assert tokens == {sampler(seed=seed, **options).next(row_V) for seed in range(20)}
    assert len(tokens) > 1


@pytest.mark.portable
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": K},
        {"do_sample": True, "top_k": 4, "min_p": 0.1},
    ],
)
def test_what_other_tokens_can_change_needs_the_whole_row(options: dict[str, Any]) -> None:
    assert not sampler(**options).can_use_top(K)


@pytest.mark.portable
def test_an_engine_without_candidates_uses_the_whole_row() -> None:
    assert not sampler().can_use_top(0)
    assert not sampler().can_use_top(1), "a tie with the second could not be seen"


@pytest.mark.portable
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    row_V = np.arange(20, dtype=np.float32)
    row_V[3] = bad
    top = TopLogits(np.array([3, 19, 18]), row_V[[3, 19, 18]], 20, lambda: row_V)
    with pytest.raises(EngineError, match="not finite: 1 of 20, the first at token 3"):
        sampler().next(top)
