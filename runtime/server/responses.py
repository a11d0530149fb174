"""Responses that are errors."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from runtime.server.errors import ApiError

_DISCARD_S, _DISCARD_BYTES = 2.0, 256 << 20


class ErrorResponse(JSONResponse):
    """An error in OpenAI's form.

    Where a body is too long, what is left of it is read and dropped for a while: a client that is cut off while it
    sends does not read the answer.
    """

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), error.status, headers=dict(error.headers()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if self.status_code != 413:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                await _discard(receive)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    total = 0
    while total < _DISCARD_BYTES:
        message = await receive()
        total += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
