"""Stop strings in streamed text: what may begin a stop string is held back until it is decided."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import UsageError

MAX_STOP_CHARACTERS = 1 << 16
"""Most characters of all stop strings together."""


class StopStringFilter:
    """Pass text on up to the first stop string.

    The stop string that is *complete* first wins; of several that are complete at the same character the longest
    does. So the result depends on the text alone, never on how it was cut into pieces. Text from the match on is
    discarded.

    The stop strings are the paths of a tree, in which each node knows the longest proper suffix of its path that is a
    path too (Aho and Corasick 1975, doi:10.1145/360825.360855): constant work for each character of the text, however
    many stop strings there are.

    Args:
        stops: The stop strings; none of them passes everything on at once.

    Raises:
        UsageError: A stop string is empty, or all of them together exceed `MAX_STOP_CHARACTERS`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        check_stops(stops)
        # For each node: what follows by character, its depth, the node of its suffix, the longest stop that ends there.
        self._next: list[dict[str, int]] = [{}]
        self._depth, self._suffix = [0], [0]
        self._stop: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()
        self._node = 0
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None so far."""
        return self._matched

    def skip(self, text: str) -> None:
        """Take text that stands before all that is fed: a stop string may begin in it, and none is found in it alone.

        `feed` and `flush` return the part of it that was held back.
        """
        for character in text:
            self._node = self._step(self._node, character)
        self._held = text[len(text) - self._depth[self._node] :]

    @property
    def held(self) -> str:
        """Text that may begin a stop string and is not decided."""
        return self._held

    def feed(self, text: str) -> str:
        """Take the next piece of text and return what can be emitted now; "" after a match."""
        if self._matched is not None:
            return ""
        pending = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            self._node = self._step(self._node, character)
            self._matched = self._stop[self._node]
            if self._matched is not None:
                self._held = ""
                return pending[: position - len(self._matched)]
        end = len(pending) - self._depth[self._node]
        self._held = pending[end:]
        return pending[:end]

    def flush(self) -> str:
        """Return the text still held back, at the end of the answer; "" after a match."""
        held, self._held = self._held, ""
        self._node = 0
        return held

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            following = self._next[node]
            if character not in following:
                following[character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._suffix.append(0)
                self._stop.append(None)
            node = following[character]
        self._stop[node] = stop

    def _link(self) -> None:
        """Fill in the suffixes, shorter paths first."""
        waiting = list(self._next[0].values())
        for node in waiting:  # grows on the way
            if self._stop[node] is None:
                self._stop[node] = self._stop[self._suffix[node]]
            for character, child in self._next[node].items():
                self._suffix[child] = self._step(self._suffix[node], character)
                waiting.append(child)

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._suffix[node]
        return self._next[node].get(character, 0)


def check_stops(stops: Sequence[str]) -> None:
    """Check stop strings.

    Raises:
        UsageError: One is empty, or all of them together exceed `MAX_STOP_CHARACTERS`.
    """
    if any(not stop for stop in stops):
        raise UsageError(
            "a stop string is empty, which would end every answer at once", remedy="leave the empty string out"
        )
    num_characters = sum(map(len, stops))
    if num_characters > MAX_STOP_CHARACTERS:
        raise UsageError(
            f"{len(stops)} stop strings hold {num_characters} characters together, expected at most "
            f"{MAX_STOP_CHARACTERS}",
            remedy="pass fewer or shorter ones",
        )
