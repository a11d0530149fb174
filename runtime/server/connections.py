"""Connections: how many there are, and how long one may be open without a request."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.server.errors import ApiError
from runtime.server.settings import ServerSettings

_LOGGER = logging.getLogger(__name__)
MAX_HEADER_BYTES = 1 << 16
"""Most bytes of the headers of a request."""
# Who has sent too much goes on sending: what comes is dropped for a while, since a client that is cut off while it
# sends does not read the answer.
_LINGER_S = 2.0


class Connections:
    """All connections of a server.

    Args:
        settings: The server's.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._most = settings.max_connections
        self._idle_s = settings.idle_timeout_s
        self._idle: dict[GuardedProtocol, asyncio.TimerHandle] = {}  # the longest idle one first
        self._open: dict[Any, GuardedProtocol] = {}

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self) -> type[H11Protocol]:
        """Return the class that uvicorn makes connections of."""
        return type("Protocol", (GuardedProtocol,), {"guard": self})

    def opened(self, protocol: GuardedProtocol) -> None:
        """Count a connection; if there are too many, the longest idle one is closed."""
        if len(self._open) >= self._most and self._idle:
            oldest = next(iter(self._idle))
            self.closed(oldest)  # which the event loop would tell later
            oldest.abort()
        self._open[protocol.client] = protocol
        self._rest(protocol)

    def closed(self, protocol: GuardedProtocol) -> None:
        """Count it no more."""
        if self._open.get(protocol.client) is protocol:
            del self._open[protocol.client]
        self._wake(protocol)

    def is_full(self) -> bool:
        """Whether there are more connections than may be."""
        return len(self._open) > self._most

    def began(self, client: Any) -> GuardedProtocol | None:
        """Note that a request has arrived, headers complete, and return its connection."""
        protocol = self._open.get(tuple(client or ()))
        if protocol is not None:
            self._wake(protocol)
        return protocol

    def ended(self, protocol: GuardedProtocol) -> None:
        """Note that it was answered."""
        if self._open.get(protocol.client) is protocol:
            self._rest(protocol)

    def _rest(self, protocol: GuardedProtocol) -> None:
        self._wake(protocol)
        self._idle[protocol] = asyncio.get_running_loop().call_later(self._idle_s, protocol.time_out)

    def _wake(self, protocol: GuardedProtocol) -> None:
        timer = self._idle.pop(protocol, None)
        if timer is not None:
            timer.cancel()


class GuardedProtocol(H11Protocol):
    """uvicorn's connection, with a limit on idle time, and errors of HTTP in the form of all others."""

    guard: ClassVar[Connections]
    _is_refused = False
    _has_sent = False
    _unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self.guard.opened(self)
        if self.guard.is_full():
            self._refuse(
                503,
                "too many connections are open. Remedy: ask again later, or close connections that are not used",
                "Service Unavailable",
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self.guard.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has arrived."""
        self._has_sent = True
        if not self._is_refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(
            400,
            f"{msg.rstrip('.')}. Remedy: send HTTP/1.1, with at most {MAX_HEADER_BYTES} bytes of headers",
            "Bad Request",
        )

    def time_out(self) -> None:
        """Close after too long without a request; one that had begun is told so.

        Not while the client reads the last response, which is in the buffer: then it has as long again.
        """
        unread, self._unread_bytes = self._unread_bytes, self.transport.get_write_buffer_size()
        if self._unread_bytes and (not unread or self._unread_bytes < unread):
            self.guard.ended(self)
            return
        if self._has_sent and not self.cycle:
            self._refuse(408, "the headers were not complete in time. Remedy: send them faster", "Request Timeout")
        self.abort()

    def abort(self) -> None:
        """Close now, without what was not sent yet."""
        self.transport.abort()

    def _refuse(self, status: int, message: str, phrase: str) -> None:
        """Send an error past all that is in progress, and close."""
        self._is_refused = True
        body = json.dumps(ApiError(status, message).body()).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(_LINGER_S, _close(self.transport))


def _close(transport: asyncio.Transport) -> Callable[[], None]:
    return lambda: None if transport.is_closing() else transport.abort()
