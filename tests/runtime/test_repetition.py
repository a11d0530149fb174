"""Answers that go round in circles end; those that only look like it go on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.answers import PLAIN, TOKENIZER, read_answer
from runtime.errors import UsageError
from runtime.generation_config import GenerationOptions
from runtime.repetition import LONGEST_PERIOD, SHORTEST_LOOP, LoopGuard

pytestmark = pytest.mark.portable


def end_of(ids: list[int], rounds: int) -> int | None:
    """Return after how many tokens a loop is found."""
    guard = LoopGuard(rounds)
    return next((number for number, token in enumerate(ids, 1) if guard.push(token)), None)


def expected_end(ids: list[int], rounds: int) -> int | None:
    """The definition: the last tokens are so many rounds of up to 64, and 64 tokens at least."""
    for end in range(len(ids) + 1):
        for period in range(1, LONGEST_PERIOD + 1):
            length = max(period * rounds, SHORTEST_LOOP)
            last = ids[max(0, end - length) : end]
            if len(last) == length and all(a == b for a, b in zip(last, last[period:], strict=False)):
                return end
    return None


@pytest.mark.parametrize("period", range(1, LONGEST_PERIOD + 1))
def test_loops_of_every_period_end(period: int) -> None:
    before = [1000, 1001, 1002]
    ids = before + list(range(period)) * (4 + SHORTEST_LOOP // period)
    assert end_of(ids, 4) == len(before) + max(4 * period, SHORTEST_LOOP)
    assert end_of(ids[: len(before) + max(4 * period, SHORTEST_LOOP) - 1], 4) is None


def test_a_longer_period_is_no_loop() -> None:
    assert end_of(list(range(LONGEST_PERIOD + 1)) * 10, 4) is None


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{number}. The digit in the picture.\n" for number in range(100, 160)),
        "| 0 | 0 | 0 | 0 |\n" * 3,
        "=" * 40 + "\n",
        "0, " * 20,
        "Which digit?\n" * 3 + "The digit is one.\n" + "Which digit?\n" * 3,
    ],
)
def test_lists_tables_and_rulers_are_no_loops(text: str) -> None:
    generation, _ = read_answer(TOKENIZER.encode(text), max_new_tokens=100_000, max_repetitions=8)
    assert generation.finish_reason == ""


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 12)), min_size=1, max_size=5
    ),
    rounds=st.integers(2, 6),
)
def test_the_counts_find_what_the_definition_does(parts: list[tuple[list[int], int]], rounds: int) -> None:
    ids = [token for run, times in parts for token in run * times][:300]
    assert end_of(ids, rounds) == expected_end(ids, rounds)


def test_an_answer_that_loops_ends_and_keeps_its_text() -> None:
    one = TOKENIZER.encode("again and again ")
    generation, _ = read_answer(one * 50, PLAIN, max_repetitions=10)
    assert generation.finish_reason == "repetition"
    assert generation.token_ids == (one * 50)[: max(10 * len(one), SHORTEST_LOOP)]
    assert generation.text == TOKENIZER.decode(generation.token_ids)
    assert read_answer(one * 50, PLAIN)[0].finish_reason == ""


def test_one_round_is_no_repetition() -> None:
    with pytest.raises(UsageError, match=r"max_repetitions must be 0 or at least 2, got 1"):
        GenerationOptions(max_repetitions=1)
    assert GenerationOptions().max_repetitions == 0
