"""`/v1/chat/completions` without HTTP: from a body to the response, or to the chunks or events of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from runtime.answer import Generation
from runtime.server.answers import answer_parts, whole_answers
from runtime.server.engines import Served
from runtime.server.fetch import Fetcher
from runtime.server.inputs import Fetch
from runtime.server.protocol.asked import Asked
from runtime.server.protocol.chat import ChatRequest
from runtime.server.replies import (
    DONE,
    Reply,
    chat_delta,
    chat_logprobs,
    chat_message,
    event,
    finish_reason,
    found_places,
    usage,
)


async def complete_chat(served: Served, body: ChatRequest, fetch: Fetch | None = None) -> dict[str, Any]:
    """Return the whole response to a chat.

    Args:
        served: The engine that answers.
        body: The request; `stream` is not looked at.
        fetch: Returns what is behind a URL, in place of the server's own way.

    Raises:
        Qwen3VLError, ApiError: What is wrong with the request, or ended the answer.
    """
    asked = await _asked(served, body, fetch)
    generations = await whole_answers(served, asked)
    end_ids = served.model.defaults.eos_token_ids
    choices = [
        {
            "index": index,
            "message": chat_message(each),
            "logprobs": chat_logprobs(each, end_ids),
            "finish_reason": finish_reason(each),
        }
        for index, each in enumerate(generations)
    ]
    return Reply(served, "chat.completion", "chatcmpl").body(choices, **_figures(served, body, generations))


async def chat_events(served: Served, body: ChatRequest, fetch: Fetch | None = None) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed response; arguments and errors are those of `complete_chat`."""
    async with aclosing(chat_chunks(served, body, fetch)) as chunks:
        async for chunk in chunks:
            yield event(chunk)
    yield DONE


async def chat_chunks(
    served: Served, body: ChatRequest, fetch: Fetch | None = None
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a streamed response; arguments and errors are those of `complete_chat`."""
    asked = await _asked(served, body, fetch)
    reply = Reply(served, "chat.completion.chunk", "chatcmpl")
    generations: dict[int, Generation] = {}
    begun: set[int] = set()
    more = {"usage": None} if body.wants_usage else {}
    async with aclosing(answer_parts(served, asked)) as parts:
        async for index, part in parts:
            delta: dict[str, Any] = {} if index in begun else {"role": "assistant"}
            begun.add(index)
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            if isinstance(part, Generation):
                generations[index] = part
                choice["logprobs"] = chat_logprobs(part, served.model.defaults.eos_token_ids)
                choice["finish_reason"] = finish_reason(part)
            else:
                delta |= chat_delta(part)
            yield reply.body([choice], **more)
    if body.wants_usage:
        yield reply.body([], **_figures(served, body, [each for _, each in sorted(generations.items())]))


async def _asked(served: Served, body: ChatRequest, fetch: Fetch | None) -> Asked:
    async with served.turns.fetching(may_fetch=bool(served.settings.allowed_url_hosts)):
        return await asyncio.to_thread(body.asked, served, fetch or Fetcher(served.settings))


def _figures(served: Served, body: ChatRequest, generations: list[Generation]) -> dict[str, Any]:
    """Return the figures that stand beside the choices."""
    figures: dict[str, Any] = {"usage": usage(generations, counts_reasoning=served.model.tokenizer)}
    if body.timings:
        figures["timings"] = generations[0].stats.to_dict()
    if body.boxes:
        figures |= found_places(generations[0])
    return figures
