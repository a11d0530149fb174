"""What one call gives back: the pieces of an answer as they come, the whole of it, and its timings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from runtime.errors import UsageError
from runtime.guard import Owner, as_engine_error
from runtime.stop_text import AnswerText

_T = TypeVar("_T")


@dataclass(frozen=True)
class Stats:
    """Timings of one answer: seconds, tokens, bytes. `ttft_s` runs from the call to the first token.

    `drafted_tokens` and `accepted_tokens` are those of prompt lookup; 0 without it.
    """

    preprocess_s: float
    vision_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    peak_cache_bytes: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, times: Sequence[float], **counts: int) -> Stats:
        """Return the statistics of an answer.

        Args:
            times: On one clock, in seconds: start; prompt ready; images encoded; first token; end.
            **counts: All other fields.
        """
        started, prepared, encoded, first, ended = times
        later = counts["new_tokens"] - 1
        tpot = (ended - first) / later if later else 0.0
        return cls(
            preprocess_s=prepared - started,
            vision_s=encoded - prepared,
            prefill_s=first - encoded,
            ttft_s=first - started,
            tpot_s=tpot,
            tokens_per_s=1 / tpot if tpot else 0.0,
            **counts,
        )

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` are the new tokens, the end token included; `finish_reason` is eos, stop or length."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats


class Answer:
    """An answer as it grows, token by token.

    Args:
        text: Turns its tokens into text.
        eos_token_ids: Each of them ends it.
        max_new_tokens: As many end it.

    Attributes:
        token_ids: The tokens, the end token included.
        finish_reason: Why it has ended: eos, stop or length; "" while it has not.
    """

    def __init__(self, text: AnswerText, eos_token_ids: Sequence[int], max_new_tokens: int) -> None:
        self._text = text
        self._eos_token_ids = eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.finish_reason = ""

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that can be shown now."""
        self.token_ids.append(token_id)
        piece = self._text.push(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._text.is_stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self._text.flush()
        self._pieces.append(piece)
        return piece

    def finished(self, stats: Stats) -> Generation:
        """Return the whole answer."""
        return Generation("".join(self._pieces), self.token_ids, self.finish_reason, stats)


class Stream(Iterator[str]):
    """Pieces of an answer as they come.

    The model is busy from the first piece until the stream is exhausted, closed or garbage-collected. As a context
    manager, a stream is closed at the end of its block:

        with model.stream(messages) as pieces:
            for piece in pieces:
                ...

    Args:
        steps: Yields the text of each step, often none, and returns the whole answer.

    Attributes:
        result: The whole answer, once the stream is exhausted.
    """

    def __init__(self, steps: Generator[str, None, Generation]) -> None:
        self._steps = steps
        self._owner = Owner()
        self._is_closed = False
        self.result: Generation | None = None

    def __next__(self) -> str:
        """Return the next piece, which is never empty.

        Raises:
            UsageError: This process was forked from the one that began the stream.
        """
        self._owner.check()
        while True:
            try:
                piece = next(self._steps)
            except StopIteration as end:
                self.result = end.value or self.result
                raise StopIteration from None
            if self._is_closed:
                self._steps.close()
                raise StopIteration
            if piece:
                return piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating, from any thread: at once, or after the step that another thread is in."""
        self._is_closed = True
        # "generator already executing": the thread inside it sees the flag when the step ends.
        with contextlib.suppress(ValueError):
            self._steps.close()


class Call:
    """One call's place in the queue for an engine, and the thread that goes on with it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.gate = threading.Lock()


class Turn:
    """The right to use an engine: one call at a time. Threads wait for each other; a thread never waits for itself.

    A call takes its turn inside the `try` whose `finally` leaves it, so that Ctrl-C, at whichever instruction, leaves
    no turn behind. A lock would be left behind: an interrupt can come between `acquire` and the block that
    releases it. The queue changes in single steps of the interpreter (`list.append`, `list.remove`), so it needs none.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []  # the first has the turn

    def take(self, call: Call) -> None:
        """Wait for the turn.

        Raises:
            UsageError: This thread has it already, in a stream that it left open.
        """
        if any(other.thread == threading.get_ident() for other in self._calls.copy()):
            raise UsageError(
                "a stream of this model is still open in this thread, so another call would wait forever",
                remedy="read the stream to its end, or close() it, before the next call",
            )
        self._calls.append(call)
        call.gate.acquire()
        while self._calls[0] is not call:
            call.gate.acquire()  # until a call that leaves opens it

    def leave(self, call: Call) -> None:
        """End the turn of a call, in whichever thread, or its wait for one."""
        if call in self._calls:
            self._calls.remove(call)
        for first in self._calls[:1]:
            # RuntimeError: it is open, so its call is about to look, or has been let through.
            with contextlib.suppress(RuntimeError):
                first.gate.release()


def in_turn(turn: Turn, work: Callable[[Call], Generator[str, None, _T]]) -> Generator[str, None, _T]:
    """Do the work of a call while no other is at work, and name the errors of the engine's library."""
    call = Call()
    try:
        turn.take(call)
        return (yield from work(call))
    except Exception as error:
        known = as_engine_error(error)
        if known is None:
            raise
        raise known from error
    finally:
        try:
            turn.leave(call)
        except BaseException:  # Ctrl-C during the last step is raised at the first instruction of this
            turn.leave(call)
            raise
