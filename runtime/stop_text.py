"""The text of an answer as it grows, up to the first stop string.

A stop string is looked for where transformers' `StopStringCriteria` (5.24) looks: in the bytes of all tokens, special
ones included, and with the prompt before them. So `<|box_end|>` ends an answer, and a line feed completes a stop of two
after a prompt that ends with one. What is returned is the answer's own text, without prompt and special tokens.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from runtime.stopping import StopStringFilter
from runtime.tokenizer import Tokenizer

_PROMPT = -1  # in place of a token


class Run(NamedTuple):
    """Text of an answer.

    Attributes:
        text: Whole characters; may be empty for a mark that is a special token.
        mark: The token that it is, if it is one of those that were to be told apart; else None.
    """

    text: str
    mark: int | None = None


class AnswerText:
    """Turn the tokens of one answer into text that ends before a stop string; whole characters only.

    Args:
        tokenizer: The model's.
        stops: The stop strings.
        prompt_ids: Token ids before the answer.
        marks: Tokens that make a run of their own, so that they are told from the same characters in other tokens. One
            that a stop string cuts into is text.

    Raises:
        UsageError: A stop string is empty, or they are too long together.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], prompt_ids: Sequence[int], marks: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = frozenset(marks)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The filter's characters are bytes here, so that a character may begin in one token and end in the next.
        encoded = [_as_text(stop.encode(errors="surrogatepass")) for stop in stops]
        self._stops = StopStringFilter(encoded)
        self._has_stops = bool(encoded)
        # Parts of what the filter still holds: how many bytes, and of which token.
        self._parts: deque[tuple[int, int]] = deque()
        self._begun_mark = ""  # bytes of a mark whose other bytes the filter holds
        longest = max(map(len, encoded), default=0)
        before = b"".join(map(tokenizer.token_bytes, prompt_ids[max(0, len(prompt_ids) - longest) :]))
        self._stops.skip(_as_text(before))
        self._parts.append((len(self._stops.held), _PROMPT))

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.matched is not None

    def push(self, token_id: int) -> list[Run]:
        """Take the next token and return the text that can be shown now; nothing after a stop string."""
        found = _as_text(self._tokenizer.token_bytes(token_id))
        if self._has_stops:
            self._parts.append((len(found), token_id))
            return self._runs(self._stops.feed(found))
        if token_id in self._marks:
            return self._mark(token_id)
        return self._decoded(found if self._is_own(token_id) else "")

    def flush(self) -> list[Run]:
        """Return what is left at the end of the answer; after a stop string no more than was begun before it."""
        runs = [] if self.is_stopped else self._runs(self._stops.flush())
        begun, self._begun_mark = self._begun_mark, ""
        return [*runs, *self._decoded(begun, final=True)]

    def _runs(self, passed: str) -> list[Run]:
        """Return the answer's own text among the bytes that the filter has passed on."""
        runs: list[Run] = []
        kept: list[str] = []
        while passed:
            length, token_id = self._parts.popleft()
            part, passed = passed[:length], passed[length:]
            is_whole = length == len(part)
            if not is_whole:
                self._parts.appendleft((length - len(part), token_id))
            if token_id not in self._marks:
                kept.append(part if self._is_own(token_id) else "")
            elif is_whole:
                runs += self._decoded("".join(kept))
                runs += self._mark(token_id)
                kept, self._begun_mark = [], ""
            else:
                self._begun_mark += part
        return runs + self._decoded("".join(kept))

    def _mark(self, token_id: int) -> list[Run]:
        """Return a mark, after what it leaves of a character before it."""
        text = self._tokenizer.token_bytes(token_id).decode() if self._is_own(token_id) else ""
        return [*self._decoded("", final=True), Run(text, token_id)]

    def _decoded(self, values: str, *, final: bool = False) -> list[Run]:
        text = self._decoder.decode(values.encode("latin-1"), final)
        return [Run(text)] if text else []

    def _is_own(self, token_id: int) -> bool:
        return token_id != _PROMPT and token_id not in self._tokenizer.special_ids


def _as_text(values: bytes) -> str:
    """Return one character for each byte."""
    return values.decode("latin-1")
