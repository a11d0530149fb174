"""Whether a prompt that is being read is still wanted.

Reading takes long: a video is decoded, an iterator waits for its next frame. It is done in a thread of the caller's,
which nothing can interrupt. So whoever reads asks in between: before each image, frame and block of a file, before each
piece of a long text, and before each further step of work. A call of the caller's own, such as the `__next__` of an
iterator that waits, or of a library, such as the decoding of one image, goes on until it returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from runtime.errors import DeadlineError

Check: TypeAlias = Callable[[], object]
"""Raises where the work that is about to be done is not wanted any more."""


class NotWanted(DeadlineError):
    """The time for an answer is over because nobody waits for it; never leaves the call that reads the prompt."""


def always() -> None:
    """Be the `Check` of what nobody can stop."""


class StillWanted:
    """The `Check` of one prompt.

    Args:
        is_cancelled: Says whether its stream was closed.
        deadline: When the answer has to be complete, by `clock`; None for no such time.
        also: Asked as well; raises where the engine takes the prompt no more.
        clock: In seconds.
    """

    def __init__(
        self,
        is_cancelled: Callable[[], bool],
        deadline: float | None = None,
        *,
        also: Check = always,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._is_cancelled = is_cancelled
        self._deadline = deadline
        self._also = also
        self._clock = clock

    def __call__(self) -> None:
        """Return if the prompt is wanted.

        Raises:
            DeadlineError: Its time is over; a `NotWanted` if its stream was closed.
        """
        if self._is_cancelled():
            raise NotWanted("nobody waits for this answer any more")
        if self._deadline is not None and self._clock() >= self._deadline:
            raise DeadlineError(
                "the time for this answer was over before it was queued",
                remedy="pass a larger timeout_s, or fewer or smaller images and videos, or a shorter text",
            )
        self._also()
