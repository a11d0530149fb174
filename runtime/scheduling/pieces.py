"""The way of an answer from the thread that makes it to whoever reads it, in any thread or asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from runtime.scheduling.wakeup import Wakeup

if TYPE_CHECKING:
    from runtime.answer import Generation
    from runtime.piece import Piece

_Waker = Callable[[], object]


class Pieces:
    """Pieces of text in order, then the whole answer or an error.

    The writer never waits: what nobody reads is kept, at most the text of one answer. Readers may be many; each piece
    goes to one of them.

    Attributes:
        is_ended: There will be no more.
        is_cancelled: Nobody wants the answer any more; the worker looks at its next step. Set without a lock, by any
            thread.
        result: The whole answer, once it is complete.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: deque[Piece] = deque()
        self._token_ids: list[int] = []
        self._wakers: list[_Waker] = []
        self._end_wakers: list[_Waker] = []
        self._error: Exception | None = None
        self.is_ended = self.is_cancelled = False
        self.result: Generation | None = None

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer so far; those of the pieces that were taken are among them."""
        with self._lock:
            return self._token_ids.copy()

    def put(self, *pieces: Piece, token_ids: Iterable[int] = ()) -> None:
        """Add tokens, and pieces that can be shown with them; empty pieces, and all after the end, are dropped."""
        kept = [piece for piece in pieces if piece]
        with self._lock:
            if self.is_ended:
                return
            self._token_ids += token_ids
            if not kept:
                return
            self._pieces += kept
            wakers, self._wakers = self._wakers, []
        _wake(wakers)

    def finish(self, result: Generation | None) -> None:
        """End with the whole answer; None if it was stopped. Only the first end counts."""
        self._end(result, None)

    def fail(self, error: Exception) -> None:
        """End with an error, which each reader that finds no piece raises."""
        self._end(None, error)

    def cancel(self) -> None:
        """Ask for no more, and end now without what was not read; nothing if the answer is complete."""
        if self.is_ended:
            return
        self.is_cancelled = True
        with self._lock:
            self._pieces.clear()
        self._end(None, None)

    def take(self) -> Piece | None:
        """Wait for the next piece and return it; None at the end.

        Raises:
            Exception: The error that the answer ended with.
        """
        while True:
            with self._lock:
                if self._pieces or self.is_ended:
                    return self._next()
                wakeup = Wakeup()
                self._wakers.append(wakeup.wake)
            wakeup.wait()

    async def take_async(self) -> Piece | None:
        """As `take`, in an asyncio loop."""
        while True:
            with self._lock:
                if self._pieces or self.is_ended:
                    return self._next()
                waiter = _new_waiter(self._wakers)
            await waiter

    def wait(self) -> Generation | None:
        """Wait for the end and return the whole answer; None if it was stopped.

        Raises:
            Exception: The error that the answer ended with.
        """
        with self._lock:
            wakeup = None if self.is_ended else Wakeup()
            if wakeup is not None:
                self._end_wakers.append(wakeup.wake)
        if wakeup is not None:
            wakeup.wait()
        return self._outcome()

    async def wait_async(self) -> Generation | None:
        """As `wait`, in an asyncio loop."""
        with self._lock:
            waiter = None if self.is_ended else _new_waiter(self._end_wakers)
        if waiter is not None:
            await waiter
        return self._outcome()

    def _outcome(self) -> Generation | None:
        if self._error is not None:
            raise _own(self._error)
        return self.result

    def _next(self) -> Piece | None:
        """Return the next piece, or None at the end; under the lock."""
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise _own(self._error)
        return None

    def _end(self, result: Generation | None, error: Exception | None) -> None:
        with self._lock:
            if self.is_ended:
                return
            self.is_ended, self.result, self._error = True, result, error
            wakers = self._wakers + self._end_wakers
            self._wakers, self._end_wakers = [], []
        _wake(wakers)


def _own(error: Exception) -> Exception:
    """Return an error for one reader, whose traceback holds what the reader holds, and no longer than the reader."""
    own = copy.copy(error).with_traceback(None)
    own.__cause__ = error.__cause__
    return own


def _new_waiter(wakers: list[_Waker]) -> asyncio.Future[None]:
    """Return a future of the running loop that is done once it was woken from any thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    wakers.append(partial(loop.call_soon_threadsafe, _resolve, future))
    return future


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _wake(wakers: list[_Waker]) -> None:
    for waker in wakers:
        with contextlib.suppress(RuntimeError):  # the loop of that reader was closed
            waker()
