"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from runtime.errors import UsageError
from runtime.server.bodies import JsonRoute
from runtime.server.clients import while_connected
from runtime.server.engines import Served
from runtime.server.fetch import Fetcher
from runtime.server.inputs import client_messages
from runtime.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Any:
    """Return the token ids of a text, or of a chat with its images, and their number."""
    served = request.app.state.engines.asked_for(body.model)
    return await while_connected(request.receive, _tokenized(served, body))


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Any:
    """Return the text of token ids."""
    served = request.app.state.engines.asked_for(body.model)
    tokenizer = served.model.tokenizer
    if any(not 0 <= each <= tokenizer.largest_id for each in body.tokens):
        raise UsageError(f"a token is not in 0 … {tokenizer.largest_id}", remedy="pass ids that /tokenize returned")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)}


async def _tokenized(served: Served, body: TokenizeRequest) -> dict[str, Any]:
    model, tokenizer = served.model, served.model.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise UsageError("prompt and messages exclude each other", remedy="pass one of them")
    if body.prompt is not None:
        ids = await asyncio.to_thread(tokenizer.encode, body.prompt, max_tokens=model.max_context)
    else:
        async with served.turns.fetching(may_fetch=bool(served.settings.allowed_url_hosts)):
            fetch = Fetcher(served.settings)
            messages = await asyncio.to_thread(client_messages, body.messages, served.settings, fetch)
        variables = {"tools": body.tools, "chat_template_kwargs": body.chat_template_kwargs}
        prepared = await served.turns.prepare(model, messages, served.settings.request_timeout_s, **variables)
        ids = prepared.prompt.input_ids
    found: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_context, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [tokenizer.decode([each], skip_special_tokens=False) for each in ids]
    return found
