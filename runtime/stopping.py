"""Stop strings in streamed text: what may begin a stop string is held back until it is decided."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import UsageError


class StopStringFilter:
    """Pass text on up to the first stop string.

    The stop string that is *complete* first wins; of several that are complete at the same character the longest
    does. So the result depends on the text alone, never on how it was cut into pieces. Text from the match on is
    discarded.

    Args:
        stops: The stop strings; none of them passes everything on at once.

    Raises:
        UsageError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty, which would end every answer at once")
        self._stops = tuple(stops)
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None so far."""
        return self._matched

    def feed(self, text: str) -> str:
        """Take the next piece of text and return what can be emitted now; "" after a match."""
        if self._matched is not None:
            return ""
        pending = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := pending.find(stop)) >= 0]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return pending[:start]
        num_held = next(
            (
                length
                for length in range(min(self._max_held, len(pending)), 0, -1)
                if any(stop.startswith(pending[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = pending[len(pending) - num_held :]
        return pending[: len(pending) - num_held]

    def flush(self) -> str:
        """Return the text still held back, at the end of the answer; "" after a match."""
        held, self._held = self._held, ""
        return held
