"""Read the body of a request: within time and size, as UTF-8, as JSON without what JSON does not have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from runtime.server.errors import ApiError
from runtime.server.settings import ServerSettings
from runtime.shown import shown

# Longer ones are parsed in a thread, since streams of others would pause meanwhile: 1 MB takes about 5 ms.
_LONG_BYTES = 1 << 18
_MOST_VALUES = 300_000
_TYPES = ("application/json", "text/json")


class BodyBudget:
    """Counts the bytes of all bodies in progress."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count bytes.

        Raises:
            ApiError: There are too many.
        """
        if self._bytes + num_bytes > self._most:
            raise ApiError(
                429,
                f"the bodies of requests in progress have {self._bytes} bytes, the server holds {self._most} at once. "
                "Remedy: ask again when others have ended, or send smaller images",
                kind="rate_limit_error",
                code="overloaded",
                retry_after_s=2,
            )
        self._bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Count them no more."""
        self._bytes -= num_bytes


class JsonRequest(Request):
    """A request whose body is read within limits."""

    async def body(self) -> bytes:
        """Return the body.

        Raises:
            ApiError: It is too long or too slow, or too many requests are in progress.
        """
        if not hasattr(self, "_body"):
            settings: ServerSettings = self.app.state.settings
            try:
                async with asyncio.timeout(settings.body_timeout_s):
                    self._body = await self._read(settings.max_body_bytes, self.app.state.bodies)
            except TimeoutError as error:
                raise ApiError(
                    408,
                    f"the body was not complete after {settings.body_timeout_s:g} s. Remedy: send it again, faster",
                    code="timeout",
                ) from error
            if "take_place" in self.scope["state"]:
                self.scope["state"]["take_place"]()
        return self._body

    async def _read(self, most: int, budget: BodyBudget) -> bytes:
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise _too_long(most)
        chunks, total = [], 0
        async for chunk in self.stream():
            budget.take(len(chunk))
            self.scope["state"]["body_bytes"] = total = total + len(chunk)
            if total > most:
                raise _too_long(most)
            chunks.append(chunk)
        return b"".join(chunks)

    async def json(self) -> Any:
        """Return what the body holds.

        Raises:
            ApiError: It is no JSON.
        """
        body = await self.body()
        if len(body) < _LONG_BYTES:
            return parse_json(body)
        return await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> Any:
    """Return what a body of JSON holds.

    Raises:
        ApiError: It is no JSON (RFC 8259), or no UTF-8.
    """
    num_values = sum(map(body.count, (b",", b"[", b"{")))
    if num_values > _MOST_VALUES:
        # Each takes some 100 bytes and half a microsecond in which nobody else is served.
        raise ApiError(
            400,
            f"the body has about {num_values} values of JSON, at most {_MOST_VALUES} are taken. Remedy: send less",
            code="invalid_json",
        )
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = shown(str(error), 200)
    raise ApiError(400, f"the body is no JSON: {reason}. Remedy: send an object of JSON in UTF-8", code="invalid_json")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")


def _too_long(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {most} bytes. Remedy: send smaller images (JPEG instead of PNG, fewer pixels), or "
        "start the server with a larger --max-body",
        code="body_too_large",
    )


class JsonRoute(APIRoute):
    """A route that takes JSON alone, read by `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler; FastAPI's documented way to read bodies by other means."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                # Also because a browser sends other types to another site's server without asking it first.
                if kind not in _TYPES and not kind.endswith("+json"):
                    found = shown(kind, 60) if kind else "none"
                    raise ApiError(
                        415, f"the content type is {found}. Remedy: send application/json", code="wrong_content_type"
                    )
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
