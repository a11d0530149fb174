"""`/v1/completions` without HTTP: from a body to the response, or to the events of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from runtime.answer import Generation
from runtime.server.answers import answer_parts, whole_answers
from runtime.server.engines import Served
from runtime.server.protocol.asked import Asked
from runtime.server.protocol.completions import CompletionRequest
from runtime.server.replies import DONE, Reply, completion_logprobs, event, finish_reason, usage


async def complete_text(served: Served, body: CompletionRequest) -> dict[str, Any]:
    """Return the whole response to a request for completions.

    Args:
        served: The engine that answers.
        body: The request; `stream` is not looked at.

    Raises:
        Qwen3VLError: What is wrong with the request, or ended the answer.
    """
    asked = await asyncio.to_thread(body.asked, served)
    echoes = await asyncio.to_thread(_echoes, served, body, asked)
    generations = await whole_answers(served, asked)
    choices = [_choice(served, index, echoes[index] + each.raw_text, each) for index, each in enumerate(generations)]
    return Reply(served, "text_completion", "cmpl").body(choices, **_figures(body, asked, generations))


async def completion_events(served: Served, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed response; arguments and errors are those of `complete_text`."""
    asked = await asyncio.to_thread(body.asked, served)
    echoes = await asyncio.to_thread(_echoes, served, body, asked)
    reply = Reply(served, "text_completion", "cmpl")
    generations: dict[int, Generation] = {}
    more = {"usage": None} if body.wants_usage else {}
    async with aclosing(answer_parts(served, asked)) as parts:
        async for index, part in parts:
            echo, echoes[index] = echoes[index], ""
            if isinstance(part, Generation):
                generations[index] = part
                choice = _choice(served, index, echo, part)
            else:
                choice = {"index": index, "text": echo + str(part), "logprobs": None, "finish_reason": None}
            yield event(reply.body([choice], **more))
    if body.wants_usage:
        found = [each for _, each in sorted(generations.items())]
        yield event(reply.body([], **_figures(body, asked, found)))
    yield DONE


def _choice(served: Served, index: int, text: str, generation: Generation) -> dict[str, Any]:
    logprobs = completion_logprobs(generation, served.model.defaults.eos_token_ids)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(generation)}


def _echoes(served: Served, body: CompletionRequest, asked: Asked) -> list[str]:
    """Return what stands before each answer: its prompt, if that is asked for."""
    if not body.echo:
        return [""] * asked.num_choices
    texts = [each if isinstance(each, str) else served.model.tokenizer.decode(each) for each in body.prompts()]
    return [text for text in texts for _ in range(asked.num_choices // len(texts))]


def _figures(body: CompletionRequest, asked: Asked, generations: Sequence[Generation]) -> dict[str, Any]:
    figures: dict[str, Any] = {"usage": usage(generations, len(asked.prompts))}
    if body.timings:
        figures["timings"] = generations[0].stats.to_dict()
    return figures
