"""Answers as OpenAI's API shows them: whole (`chat.completion`, `text_completion`) and as chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runtime.answer import Generation
from runtime.logprobs import Likelihood, TokenLogprob
from runtime.piece import REASONING, TEXT, Piece
from runtime.server.engines import Served

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "repetition": "stop"}


class Reply:
    """What all parts of one response say.

    Args:
        served: Who answers.
        kind: `object` of the response.
        prefix: What its id begins with.
    """

    def __init__(self, served: Served, kind: str, prefix: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._head = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def body(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the response, or a chunk of it."""
        return {**self._head, "choices": list(choices), **more}


def event(value: Any) -> bytes:
    """Return a server-sent event; JSON has no line breaks outside of strings, and escapes those inside."""
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chat_message(generation: Generation) -> dict[str, Any]:
    """Return an answer as a message of OpenAI's."""
    message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None}
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    if generation.tool_calls:
        message["content"] = generation.text.strip() or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_text}}
            for call in generation.tool_calls
        ]
    return message


def chat_delta(piece: Piece) -> dict[str, Any]:
    """Return a piece as the `delta` of a chunk."""
    if piece.kind == TEXT:
        return {"content": str(piece)}
    if piece.kind == REASONING:
        return {"reasoning_content": str(piece)}
    call = piece.call
    assert call is not None, "a piece of this kind is a call"
    function = {"name": call.name, "arguments": call.arguments_text}
    return {"tool_calls": [{"index": piece.call_index, "id": call.id, "type": "function", "function": function}]}


def finish_reason(generation: Generation) -> str:
    """Return why an answer ended, in OpenAI's words."""
    return "tool_calls" if generation.tool_calls else _REASONS[generation.finish_reason]


def usage(generations: Iterable[Generation], num_prompts: int = 1, *, counts_reasoning: Any = None) -> dict[str, Any]:
    """Return the numbers of tokens of a response.

    Args:
        generations: All answers of it, those to one prompt one after the other.
        num_prompts: Prompts that they answer, all with as many answers.
        counts_reasoning: The tokenizer, where thoughts are to be counted.
    """
    all_of_them = list(generations)
    firsts = all_of_them[:: max(1, len(all_of_them) // num_prompts)]
    prompt_tokens = sum(each.stats.prompt_tokens for each in firsts)
    completion_tokens = sum(each.stats.new_tokens for each in all_of_them)
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(each.stats.cached_tokens for each in firsts)},
    }
    if counts_reasoning is not None:
        thoughts = sum(len(counts_reasoning.encode(each.reasoning)) for each in all_of_them if each.reasoning)
        found["completion_tokens_details"] = {"reasoning_tokens": thoughts}
    return found


def chat_logprobs(generation: Generation, end_ids: Iterable[int]) -> dict[str, Any] | None:
    """Return the log probabilities of an answer in the form of chats; None if they were not asked for."""
    if generation.logprobs is None:
        return None
    content = [
        {**_likelihood(each), "top_logprobs": [_likelihood(other) for other in each.top]}
        for each in _without_end(generation.logprobs, end_ids)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(generation: Generation, end_ids: Iterable[int]) -> dict[str, Any] | None:
    """Return the log probabilities of an answer in the form of completions; None if they were not asked for."""
    if generation.logprobs is None:
        return None
    found = _without_end(generation.logprobs, end_ids)
    offset, offsets = 0, []
    for each in found:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in found],
        "token_logprobs": [_finite(each.logprob) for each in found],
        "top_logprobs": [{other.text: _finite(other.logprob) for other in each.top} for each in found],
        "text_offset": offsets,
    }


def found_places(generation: Generation) -> dict[str, Any]:
    """Return boxes and points of an answer, in pixels of the last picture of the prompt."""
    image = len(generation.image_sizes) - 1
    return {
        "boxes": [
            {"label": each.label or None, "box": [each.x1, each.y1, each.x2, each.y2], "image": image}
            for each in generation.boxes
        ],
        "points": [
            {"label": each.label or None, "point": [each.x, each.y], "image": image} for each in generation.points
        ],
    }


def _likelihood(token: Likelihood) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.token_bytes)}


def _finite(value: float) -> float:
    return max(value, -9999.0)  # OpenAI's, since JSON has no infinity


def _without_end(found: Sequence[TokenLogprob], end_ids: Iterable[int]) -> Sequence[TokenLogprob]:
    return found[:-1] if found and found[-1].token_id in set(end_ids) else found
