"""`/health`, `/ready` and `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from runtime.errors import Qwen3VLError
from runtime.server.errors import SERVER, ApiError

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Any:
    """Say that the process is there."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Any:
    """Say whether requests are taken: all engines are open, and none has failed."""
    for name, served in request.app.state.engines.items():
        try:
            served.model.check_open()
        except Qwen3VLError as error:
            raise ApiError(503, f"{name}: {error.message}", kind=SERVER, code="not_ready", retry_after_s=5) from error
    return {"status": "ready", "models": list(request.app.state.engines)}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return counters, gauges and histograms for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
