"""Work for a client for as long as it is there: streams of events, and answers that nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.errors import Qwen3VLError
from runtime.server.errors import ApiError, api_error, stopped
from runtime.server.replies import event

_T = TypeVar("_T")
CLIENT_CLOSED = 499
"""Status in the log of a request whose client has gone (nginx's)."""


class ClientGone(Exception):
    """The client has closed its connection: nobody will read the response."""


class _NotRead(Exception):
    """The client takes nothing of what is sent."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Return what work gives; it is cancelled when the client goes.

    Args:
        receive: Of the request, whose body has been read.
        work: To be done.

    Raises:
        ClientGone: The client has gone.
        Exception: What the work raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})
        if not task.cancelled():
            task.exception()  # nobody else asks for it, and asyncio would complain


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    Args:
        first: The first event, which is there already.
        events: The others.
        write_timeout_s: A client that takes nothing for this long is dropped.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], write_timeout_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._first = first
        self._events = events
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, for as long as the client reads them."""
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            scope["state"]["status"] = CLIENT_CLOSED
        except asyncio.CancelledError:  # the server has to end
            with suppress(Exception):
                await send({"type": "http.response.body", "body": event(stopped().body()), "more_body": False})
        except _NotRead:
            scope["state"]["status"] = CLIENT_CLOSED
            if scope["state"]["connection"] is not None:
                scope["state"]["connection"].abort()
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._write_timeout_s):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError as error:
                raise _NotRead from error

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await write(self._first)
        try:
            async for each in self._events:
                await write(each)
        except ApiError as error:
            await write(event(error.body()))
        except Qwen3VLError as error:
            await write(event(api_error(error).body()))
        await write(b"", more=False)


async def event_stream(receive: Receive, events: AsyncGenerator[bytes, None], write_timeout_s: float) -> EventStream:
    """Return a response of events, once the first is there: until then, an error is a response of its own.

    Raises:
        ClientGone: The client has gone.
        Qwen3VLError, ApiError: What ended the stream before it began.
    """
    try:
        first = await while_connected(receive, anext(events))
    except BaseException:
        with suppress(Exception):
            await events.aclose()
        raise
    return EventStream(first, events, write_timeout_s)
