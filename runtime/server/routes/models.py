"""`/v1/models`: the engines by name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Any:
    """List the engines."""
    return {"object": "list", "data": [each.description() for each in request.app.state.engines.values()]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Any:
    """Describe one engine."""
    return request.app.state.engines.asked_for(name).description()
