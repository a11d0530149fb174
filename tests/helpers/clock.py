"""A clock that goes on only faster than the real one: what waits for a time need not be waited for."""

from __future__ import annotations

import time

import pytest


class Clock:
    """`time.perf_counter`, by which deadlines are kept, with all the seconds that were skipped.

    A deadline that lies minutes ahead passes when a test says so, on a machine of any speed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._skipped_s = 0.0
        real = time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: real() + self._skipped_s)

    def skip(self, seconds: float) -> None:
        """Make it so much later."""
        self._skipped_s += seconds
