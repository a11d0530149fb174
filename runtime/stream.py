"""`Stream`: the pieces of an answer for whoever asked, in threads or in asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from runtime.answer import Generation
from runtime.guard import Owner
from runtime.piece import Piece
from runtime.scheduling.pieces import Pieces


class Stream(Iterator[Piece], AsyncIterator[Piece]):
    """Pieces of an answer as they come, cut at UTF-8 boundaries; for `for` and for `async for`.

    A piece is a string whose `kind` says whether it is of the answer, of thoughts before it, or a call of a function.

    The prompt is prepared, and the request put into the queue, when the first piece is asked for, in that thread. Then
    the answer goes on by itself: a reader that is slow, or never comes back, holds up nobody. Any thread may read or
    close; each piece goes to one reader. As a context manager, sync or async, a stream is closed at the end of its
    block; one that is dropped is closed as well. Closing frees the sequence's place at the engine's next step.

        with model.stream(messages) as pieces:
            for piece in pieces:
                ...

    Args:
        begin: Prepares and submits the request, whose answer is to go to the pieces that it is given.
        keeps: What must live as long as the stream, such as the model.
        on_end: Called with the whole answer in the thread of a reader that finds its end, before that reader is told.
    """

    def __init__(
        self,
        begin: Callable[[Pieces], object],
        keeps: object = None,
        on_end: Callable[[Generation], object] | None = None,
    ) -> None:
        self._begin: Callable[[Pieces], object] | None = begin
        self._keeps = keeps
        self._on_end = on_end
        self._owner = Owner()
        self._lock = threading.Lock()
        # Made here, so that an interrupt while the request is submitted leaves none that nobody can stop.
        self._pieces = Pieces()
        self._is_begun = self._is_closed = self._is_over = False

    @property
    def is_open(self) -> bool:
        """Whether a reader may still get something: it was not read to its end, and neither failed nor was closed."""
        return not (self._is_closed or self._is_over)

    @property
    def result(self) -> Generation | None:
        """The whole answer, once it is complete; None before, after an error, and if `close` came first."""
        return self._pieces.result

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer so far, those that no piece shows yet included."""
        return self._pieces.token_ids

    def __next__(self) -> Piece:
        """Return the next piece, which is never empty.

        Raises:
            Qwen3VLError: What ended the answer.
            UsageError: This process was forked from the one that made the stream.
        """
        with self._failing():
            pieces = self._started()
            piece = None if pieces is None else pieces.take()
        if piece is None:
            self._end()
            raise StopIteration
        return piece

    async def __anext__(self) -> Piece:
        """Return the next piece, as `__next__`; the prompt is prepared in a thread of the loop's executor."""
        with self._failing():
            pieces = await self._started_async()
            piece = None if pieces is None else await pieces.take_async()
        if piece is None:
            self._end()
            raise StopAsyncIteration
        return piece

    def wait(self) -> Generation | None:
        """Wait for the whole answer and return it, whatever was read; None if the stream was closed.

        Raises:
            Qwen3VLError: What ended the answer.
        """
        with self._failing():
            pieces = self._started()
            generation = None if pieces is None else pieces.wait()
        self._end()
        return generation

    async def wait_async(self) -> Generation | None:
        """As `wait`, in an asyncio loop."""
        with self._failing():
            pieces = await self._started_async()
            generation = None if pieces is None else await pieces.wait_async()
        self._end()
        return generation

    async def begin(self) -> None:
        """Prepare the prompt and submit the request now, as the first piece that is asked for would, and return then.

        Raises:
            Qwen3VLError: What is wrong with the request.
        """
        with self._failing():
            await self._started_async()

    def close(self) -> None:
        """Stop the answer, from any thread. What was not read is dropped; a reader that waits finds the end."""
        self._is_closed = True
        if self._owner.is_here:  # in a fork of the process, a lock may stay taken for ever
            self._pieces.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Of a stream that nobody holds, nobody waits for a piece: the flag alone, since no lock may be taken here.
        pieces = getattr(self, "_pieces", None)
        if pieces is not None:
            pieces.is_cancelled = True

    def _started(self) -> Pieces | None:
        """Submit the request, unless that was done; None if the stream was closed."""
        self._owner.check()
        if not (self._is_begun or self._is_closed):
            with self._lock:
                begin, self._begin = self._begin, None
                if begin is not None:
                    self._submit(begin)
                self._is_begun = True
        return None if self._is_closed else self._pieces

    def _submit(self, begin: Callable[[Pieces], object]) -> None:
        try:
            begin(self._pieces)
        except BaseException:
            self._pieces.cancel()  # it may have been submitted before the interrupt
            raise

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Note that an error ends the stream; a reader that is interrupted or cancelled may come back."""
        try:
            yield
        except Exception:
            self._is_over = True
            raise

    def _end(self) -> None:
        """Tell of the answer, once a reader has found its end."""
        result = self.result
        if result is not None and self._on_end is not None and self.is_open:
            self._on_end(result)
        self._is_over = True

    async def _started_async(self) -> Pieces | None:
        if self._is_begun or self._is_closed:
            return self._started()
        return await asyncio.get_running_loop().run_in_executor(None, self._started)
