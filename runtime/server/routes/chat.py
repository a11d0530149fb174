"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from runtime.server.bodies import JsonRoute
from runtime.server.chat import chat_events, complete_chat
from runtime.server.clients import event_stream, while_connected
from runtime.server.logs import note_chat
from runtime.server.protocol.chat import ChatRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Any:
    """Continue a chat."""
    served = request.app.state.engines.asked_for(body.model)
    note_chat(request, served, body)
    if body.stream:
        return await event_stream(
            request.receive,
            chat_events(served, body),
            served.settings.write_timeout_s,
        )
    response: Response = JSONResponse(await while_connected(request.receive, complete_chat(served, body)))
    return response
