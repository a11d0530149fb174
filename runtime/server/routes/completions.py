"""`/v1/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from runtime.server.bodies import JsonRoute
from runtime.server.clients import event_stream, while_connected
from runtime.server.completions import complete_text, completion_events
from runtime.server.logs import note_text
from runtime.server.protocol.completions import CompletionRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Any:
    """Continue a text, without a chat template."""
    served = request.app.state.engines.asked_for(body.model)
    note_text(request, served, body.prompt)
    if body.stream:
        return await event_stream(
            request.receive,
            completion_events(served, body),
            served.settings.write_timeout_s,
        )
    response: Response = JSONResponse(await while_connected(request.receive, complete_text(served, body)))
    return response
