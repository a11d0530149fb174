"""Who may ask, how many at once, and what is logged of it: the outermost layer of the application."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.bodies import BodyBudget
from runtime.server.connections import Connections
from runtime.server.errors import ApiError, stopped
from runtime.server.responses import ErrorResponse
from runtime.server.settings import ServerSettings
from runtime.shown import one_line, shown

LOGGER = logging.getLogger("runtime.server.access")
# Without a key: whether the server is there, and the page, which asks for the key.
_OPEN_PATHS = ("/health", "/ready", "/", "/favicon.ico")
_OPEN_FOLDER = "/page/"


class Gate:
    """Lets requests in, counts them, and logs what became of them.

    Args:
        app: The application.
        settings: The server's.
        connections: Its connections, which are told of requests; None without uvicorn.
        max_requests: Most requests in progress.
        bodies: Gets back what the body of a request took.
        is_local: Only this machine can reach the server: then it answers to its own names alone.
        paths: Those that are counted by name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        connections: Connections | None,
        max_requests: int,
        bodies: BodyBudget,
        is_local: bool,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._connections = connections
        self._most = max_requests
        self._bodies = bodies
        self._is_local = is_local
        self._paths = paths
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._hosts = {"localhost", "127.0.0.1", "::1", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        self._origins = {each.rstrip("/").lower() for each in settings.allowed_origins}
        self._num_running = 0
        self.responses: dict[tuple[str, int], int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        if scope["path"].startswith(("http://", "https://")):  # the form for proxies, which servers take, too
            scope["path"] = urlsplit(scope["path"]).path or "/"
        state = scope.setdefault("state", {})
        state["request_id"] = f"req_{uuid.uuid4().hex}"
        connection = None if self._connections is None else self._connections.began(scope.get("client"))
        state["connection"] = connection
        origin = Headers(scope=scope).get("origin")
        started = finished = False

        async def answer(message: Message) -> None:
            nonlocal started, finished
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                started = True
                state.setdefault("status", message["status"])
                headers = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
                message = {**message, "headers": [*headers, *self._origin_headers(origin)]}
            await send(message)

        try:
            await self._admit(scope, receive, answer)
        except ApiError as error:
            if not started:
                await ErrorResponse(error)(scope, receive, answer)
        except asyncio.CancelledError:
            # The time to answer what was in progress is over; uvicorn would log this as an error.
            if not started:
                await ErrorResponse(stopped())(scope, receive, answer)
        except Exception:
            LOGGER.exception("internal error, %s", state["request_id"])
            if not finished:
                raise  # uvicorn closes the connection, so that the client does not take it for the end
        finally:
            self._bodies.give_back(state.get("body_bytes", 0))
            self._note(scope, state, time.perf_counter() - began)
            if connection is not None and self._connections is not None:
                self._connections.ended(connection)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_site(headers)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            wanted = headers.get("access-control-request-headers", "")
            await _allow(wanted, scope, receive, send)  # a browser's question, which has no key
            return
        path = scope["path"]
        if self._keys and path not in _OPEN_PATHS and not path.startswith(_OPEN_FOLDER):
            self._check_key(headers)
        state = scope["state"]
        state["take_place"] = lambda: self._take_place(state)
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_running -= state.get("has_place", False)

    def _take_place(self, state: dict[str, Any]) -> None:
        """Count a request as running, once its body is there: one whose body does not come takes nobody's place."""
        if self._num_running >= self._most:
            raise ApiError(
                429,
                f"{self._num_running} requests are in progress, the server takes {self._most}. Remedy: ask again "
                "later, or start the server with a larger --max-requests",
                kind="rate_limit_error",
                code="overloaded",
                retry_after_s=1,
            )
        self._num_running += 1
        state["has_place"] = True

    def _check_site(self, headers: Headers) -> None:
        """Refuse pages of other sites: a browser sends their requests to a server on its own machine, too."""
        asked = headers.get("host", "")
        host = (urlsplit(f"//{asked}").hostname or "") if _is_host(asked) else ""
        if self._is_local and host not in self._hosts:
            raise ApiError(
                403,
                f"the server was asked for as {shown(asked, 60)}. Remedy: ask for it as {self._settings.host}, or "
                "start it with --allow-host",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is None or origin.rstrip("/").lower() in self._origins or "*" in self._origins:
            return
        # The scheme is that of a proxy, if there is one.
        if origin.lower().partition("://")[2] != asked.lower():
            raise ApiError(
                403,
                f"pages of {shown(origin, 80)} may not ask this server. Remedy: start it with --allow-origin ORIGIN",
                code="wrong_origin",
            )

    def _origin_headers(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if origin is None or not (origin.rstrip("/").lower() in self._origins or "*" in self._origins):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"retry-after, x-request-id"),
            (b"vary", b"origin"),
        ]

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        # All are compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong. Remedy: send the header Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def _note(self, scope: Scope, state: Mapping[str, Any], seconds: float) -> None:
        status = state.get("status", 0)
        path = scope["path"] if scope["path"] in self._paths else "other"  # a client may ask for any number of others
        self.responses[path, status] = self.responses.get((path, status), 0) + 1
        method = one_line(scope["method"], 20)
        words = [method, one_line(scope["path"], 100), str(status), f"{seconds:.3f} s", state["request_id"]]
        LOGGER.info(" ".join([*words, *state.get("notes", ())]))


def _is_host(text: str) -> bool:
    try:
        urlsplit(f"//{text}")
    except ValueError:
        return False
    return "@" not in text


async def _allow(wanted: str, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {
        "access-control-allow-methods": "GET, POST",
        # Clients send headers of their own, which nothing here looks at.
        "access-control-allow-headers": wanted or "authorization, content-type",
        "access-control-max-age": "600",
    }
    await JSONResponse({}, headers=headers)(scope, receive, send)
