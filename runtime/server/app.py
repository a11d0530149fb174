"""`create_app`: the routes around engines, with errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from runtime import __version__
from runtime.errors import Qwen3VLError
from runtime.server.access import Gate
from runtime.server.bodies import BodyBudget
from runtime.server.clients import CLIENT_CLOSED, ClientGone
from runtime.server.connections import Connections
from runtime.server.engines import Engines
from runtime.server.errors import SERVER, ApiError, api_error
from runtime.server.metrics import EngineCollector, registry
from runtime.server.responses import ErrorResponse
from runtime.server.routes import chat, completions, health, models, page, tokens
from runtime.server.settings import ServerSettings
from runtime.server.validation import validation_error
from runtime.shown import one_line


def create_app(
    engines: Engines, settings: ServerSettings, connections: Connections | None = None, *, is_local: bool = True
) -> Gate:
    """Return the ASGI application.

    Args:
        engines: Who answers.
        settings: What is taken, and from whom.
        connections: Those of the server that will run it; without, nothing limits idle ones.
        is_local: Only this machine can reach it.
    """
    api = FastAPI(title="qwen3vl serve", version=__version__, docs_url=None, redoc_url=None)
    for group in (chat, completions, models, tokens, health, page):
        api.include_router(group.router)
    for kind, handler in (
        (ApiError, _of_api),
        (Qwen3VLError, _of_runtime),
        (RequestValidationError, _of_validation),
        (HTTPException, _of_http),
        (ClientGone, _of_client),
        (Exception, _of_bug),
    ):
        api.add_exception_handler(kind, handler)
    bodies = BodyBudget(settings.max_bodies_bytes)
    gate = Gate(
        api,
        settings=settings,
        connections=connections,
        max_requests=settings.max_requests or engines.max_requests,
        bodies=bodies,
        is_local=is_local,
        paths=frozenset(api.openapi()["paths"]) | {"/"},
    )
    api.state.engines = engines
    api.state.settings = settings
    api.state.bodies = bodies
    api.state.registry = registry(EngineCollector(engines, gate.responses, lambda: len(connections or ())))
    return gate


async def _of_api(request: Request, error: Any) -> Response:
    return ErrorResponse(error)


async def _of_runtime(request: Request, error: Any) -> Response:
    return ErrorResponse(api_error(error))


async def _of_validation(request: Request, error: Any) -> Response:
    return ErrorResponse(validation_error(error))


async def _of_http(request: Request, error: Any) -> Response:
    # FastAPI puts one of its own around what reading a body raises.
    if isinstance(error.__cause__, ApiError):
        return ErrorResponse(error.__cause__)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _of_client(request, error)
    if error.status_code == 404:
        message = "there is no such path. Remedy: the base URL of OpenAI's clients is http://HOST:PORT/v1"
    elif error.status_code == 405:
        message = f"{one_line(request.method, 20)} is not taken here. Remedy: see /openapi.json"
    else:
        message = f"{error.detail}. Remedy: see /openapi.json"
    return ErrorResponse(ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None))


async def _of_client(request: Request, error: Any) -> Response:
    request.scope["state"]["status"] = CLIENT_CLOSED
    return Response(status_code=CLIENT_CLOSED)


async def _of_bug(request: Request, error: Any) -> Response:
    name = request.scope["state"]["request_id"]
    message = f"internal error. Remedy: report it with what the server logged for {name}"
    return ErrorResponse(ApiError(500, message, kind=SERVER))
