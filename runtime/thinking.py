r"""Thoughts before an answer: told from it, and ended when they take too many tokens.

A checkpoint thinks if its tokenizer has the tokens `<think>` and `</think>`, and either its template has opened the
thought at the end of the prompt (Qwen3-VL-Thinking) or the model opens one itself before it has written anything else.
Only these tokens count: the same characters written with other tokens are text, and so is a mark at any other place.
The line feeds around the marks belong to them, as in Qwen's templates and in the examples of Qwen3's model cards, which
strip both parts of them.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from runtime.errors import UsageError
from runtime.piece import REASONING, TEXT, Piece
from runtime.stop_text import Run
from runtime.tokenizer import Tokenizer

OPENING, CLOSING = "<think>", "</think>"

_LAST_THOUGHT = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
)
_GAP = "\n\n"


class ThinkingMarks(NamedTuple):
    """Ids of the tokens around a thought."""

    opening: int
    closing: int


def thinking_marks(tokenizer: Tokenizer) -> ThinkingMarks | None:
    """Return the tokens around a thought; None if the tokenizer lacks one of them."""
    opening, closing = tokenizer.added_id(OPENING), tokenizer.added_id(CLOSING)
    return None if opening is None or closing is None else ThinkingMarks(opening, closing)


def opens_thought(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Return whether a prompt ends inside a thought: with `<think>`, and blanks at most behind it."""
    marks = thinking_marks(tokenizer)
    if marks is None:
        return False
    for token_id in reversed(prompt_ids):
        if token_id == marks.opening:
            return True
        if tokenizer.token_bytes(token_id).strip():
            return False
    return False


class _Place(Enum):
    START, THOUGHT, BEHIND, TEXT = range(4)  # before all text; in the thought; directly behind it; in the answer


class ThoughtReader:
    """Tell the thought of one answer from its text.

    Args:
        marks: The tokens around a thought; None if there are none, and all is text.
        is_open: The prompt has opened one.
    """

    def __init__(self, marks: ThinkingMarks | None, *, is_open: bool) -> None:
        self._marks = marks
        self._place = _Place.TEXT if marks is None else _Place.THOUGHT if is_open else _Place.START
        self._is_blank = True  # of the thought
        self._line_feeds = ""  # held back: they may stand before a mark

    def feed(self, runs: Iterable[Run]) -> list[Piece]:
        """Take the next text and return what is decided; no piece is empty."""
        pieces = [self._take(run) for run in runs]
        return [piece for piece in pieces if piece]

    def flush(self) -> list[Piece]:
        """Return what is left at the end of the answer."""
        held, self._line_feeds = self._line_feeds, ""
        return [Piece(held)] if held and self._place is _Place.START else []

    def _take(self, run: Run) -> Piece:
        place = self._place
        if self._marks is not None and run.mark == self._marks.opening and place is _Place.START:
            self._place, self._line_feeds = _Place.THOUGHT, ""
            return Piece("")
        if self._marks is not None and run.mark == self._marks.closing and place is _Place.THOUGHT:
            self._place, self._line_feeds = _Place.BEHIND, ""
            return Piece("")
        if place is _Place.THOUGHT:
            return self._thought(run.text)
        text = run.text
        if place is _Place.START:
            text, self._line_feeds = self._line_feeds + text, ""
            if not text.strip("\n"):
                self._line_feeds = text
                return Piece("")
        elif place is _Place.BEHIND:
            text = text.lstrip("\n")
            if not text:
                return Piece("")
        self._place = _Place.TEXT
        return Piece(text, TEXT)

    def _thought(self, text: str) -> Piece:
        text = self._line_feeds + text
        if self._is_blank:
            text = text.lstrip("\n")
        shown = text.rstrip("\n")
        self._line_feeds = text[len(shown) :]
        self._is_blank = self._is_blank and not shown
        return Piece(shown, REASONING)


class ThinkingBudget:
    r"""End the thought of one answer when it has taken too many tokens.

    The thought then ends as Qwen3's documentation ("Thinking budget", among its pages for getting started)
    ends it: with a sentence that says so and the closing mark. With no tokens at all, it is the empty thought that
    Qwen3's templates write for `enable_thinking=False`. The tokens of that are the answer's own, as if they had been
    chosen; they count in `max_new_tokens`, and not in the budget.

    Args:
        tokenizer: The model's.
        prompt_ids: Token ids before the answer.
        max_tokens: Most tokens of the thought, its marks aside. A character that is begun is completed first.

    Raises:
        UsageError: The tokenizer has no tokens around thoughts.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._marks = checked_marks(tokenizer)
        self._max_tokens = max_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_open = opens_thought(tokenizer, prompt_ids)
        self._is_over = False
        self._num_seen = self._num_thought = 0
        self._tail = "".join(map(_text, map(tokenizer.token_bytes, prompt_ids[-len(_GAP) :])))
        self._forced: deque[int] = deque()

    def forced(self, token_ids: Sequence[int]) -> int | None:
        """Return the token that has to come next, or None for one that is chosen freely.

        To be asked once before each token.

        Args:
            token_ids: The answer so far.
        """
        for token_id in token_ids[self._num_seen :]:
            self._see(token_id)
        self._num_seen = len(token_ids)
        if self._forced:
            return self._forced.popleft()
        is_inside = self._is_open and not self._is_over and not self._decoder.getstate()[0]
        if not is_inside or self._num_thought < self._max_tokens:
            return None
        self._is_over = True
        self._forced = deque(self._tokenizer.encode(self._ending()))
        return self._forced.popleft()

    def _see(self, token_id: int) -> None:
        if self._is_over:
            return
        value = self._tokenizer.token_bytes(token_id)
        if self._is_open:
            if token_id == self._marks.closing:
                self._is_over = True
                return
            self._num_thought += 1
            self._decoder.decode(value)
        elif token_id == self._marks.opening:
            self._is_open = True
        else:
            self._is_over = bool(value.strip(b"\n"))  # the answer has begun without a thought
        self._tail = (self._tail + _text(value))[-len(_GAP) :]

    def _ending(self) -> str:
        """Return how the thought ends, without the line feeds that it already ends with."""
        num_line_feeds = len(self._tail) - len(self._tail.rstrip("\n"))
        ending = f"\n{CLOSING}\n\n"
        if self._num_thought:
            return f"{_GAP}{_LAST_THOUGHT}"[min(num_line_feeds, len(_GAP)) :] + ending
        return ending if num_line_feeds else f"\n{ending}"


def checked_marks(tokenizer: Tokenizer) -> ThinkingMarks:
    """Return the tokens around a thought.

    Raises:
        UsageError: The tokenizer lacks one of them.
    """
    marks = thinking_marks(tokenizer)
    if marks is None:
        raise UsageError(
            f"max_thinking_tokens: this model does not think: its tokenizer has no tokens {OPENING} and {CLOSING}",
            remedy="leave max_thinking_tokens out, or use a Thinking checkpoint",
        )
    return marks


def _text(values: bytes) -> str:
    return values.decode("latin-1")
