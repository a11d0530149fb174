"""The end of an answer that goes round in circles."""

from __future__ import annotations

import numpy as np

LONGEST_PERIOD = 64
"""Most tokens of what is repeated."""

SHORTEST_LOOP = 64
"""Fewest tokens of a loop, all its rounds together: shorter ones are rulers, dots and rows of a table."""


class LoopGuard:
    """Notice that the last tokens of an answer are the same run of tokens over and over.

    For each period there is a count of how many tokens in a row were the same as the one so many tokens before, so that
    a token costs the same however long the answer is.

    Args:
        max_repetitions: So many rounds of up to `LONGEST_PERIOD` tokens, of `SHORTEST_LOOP` tokens together at least,
            are a loop; at least 2.
    """

    def __init__(self, max_repetitions: int) -> None:
        self._periods = np.arange(1, LONGEST_PERIOD + 1)
        # A loop of n tokens with period p has n - p tokens that equal the one p before.
        self._needed = np.maximum(self._periods * max_repetitions, SHORTEST_LOOP) - self._periods
        self._counts = np.zeros(LONGEST_PERIOD, np.int64)
        self._last = np.full(LONGEST_PERIOD, -1, np.int64)  # the newest first

    def push(self, token_id: int) -> bool:
        """Take the next token and return whether the answer loops."""
        self._counts += 1
        self._counts *= self._last == token_id
        self._last[1:] = self._last[:-1].copy()
        self._last[0] = token_id
        return bool((self._counts >= self._needed).any())
