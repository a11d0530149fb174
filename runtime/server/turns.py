"""Turns at reading: pictures and videos of many requests are read a few at a time, and texts wait for none of them.

Reading is work of the processor's, in threads. Without turns, a few requests with the largest pictures that are allowed
would take all threads, and a question of one word would wait for all of them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.machine import default_threads
from runtime.messages import Messages
from runtime.still_wanted import StillWanted

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel
    from runtime.preparation import Prepared
    from runtime.stream import Stream

_T = TypeVar("_T")
THREADS = 32
"""Threads of the event loop's executor: texts are read, bodies decoded and URLs fetched there."""
_FETCHES = 8


class Turns:
    """The turns at one engine, for requests of one event loop."""

    def __init__(self) -> None:
        self._pictures = asyncio.Semaphore(default_threads())
        self._fetches = asyncio.Semaphore(_FETCHES)

    async def begin(self, stream: Stream, prompt: Any) -> None:
        """Let a stream read its prompt and submit its request, when its turn has come.

        Raises:
            Qwen3VLError: What is wrong with the request.
        """
        await self._turn(prompt, stream.begin())

    @asynccontextmanager
    async def fetching(self, *, may_fetch: bool) -> AsyncIterator[None]:
        """Wait until a body that may hold URLs may be decoded."""
        if not may_fetch:
            yield
            return
        async with self._fetches:
            yield

    async def prepare(
        self, model: Qwen3VLModel, prompt: Any, timeout_s: float | None = None, **keywords: Any
    ) -> Prepared:
        """Return what `Qwen3VLModel.prepare` does, in a thread, which stops when this task is cancelled.

        Raises:
            DeadlineError: The time was over.
            Qwen3VLError: As that method.
        """
        is_cancelled = threading.Event()
        deadline = None if timeout_s is None else time.perf_counter() + timeout_s
        check = StillWanted(is_cancelled.is_set, deadline)
        try:
            return await self._turn(prompt, asyncio.to_thread(model.prepare, prompt, check=check, **keywords))
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    async def _turn(self, prompt: Any, work: Coroutine[Any, Any, _T]) -> _T:
        """Run what reads a prompt; one without pictures waits for nobody.

        A thread goes on for a while after its task was cancelled, and keeps its turn until it ends.
        """
        if not (isinstance(prompt, Messages) and prompt.attachments):
            return await work
        try:
            await self._pictures.acquire()
        except BaseException:
            work.close()
            raise
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._end_turn)
        return await asyncio.shield(task)

    def _end_turn(self, task: asyncio.Future[Any]) -> None:
        self._pictures.release()
        if not task.cancelled():
            task.exception()  # nobody else asks for it where the task that waited was cancelled
