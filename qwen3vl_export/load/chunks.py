"""The chunks of a streamed chat completion: when its texts came, and what its usage says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_export.load.client import Reply
from qwen3vl_export.load.connections import cut_off
from qwen3vl_export.load.events import MalformedEventError, read_events
from runtime.errors import RequestError
from runtime.shown import shorten

_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")
"""Fields of a delta that hold what the model wrote; servers name its thoughts differently."""
_MAX_CHARACTERS = 200


def read_reply(pieces: Iterable[bytes], start: float, clock: Callable[[], float] = time.perf_counter) -> Reply:
    """Read a streamed chat completion to its end.

    Without usage, each chunk with text counts as a token.

    Args:
        pieces: The body as it comes.
        start: When it was asked for.
        clock: By which `start` is.

    Raises:
        RequestError: It is none, ends with an error or before [DONE], or has no text.
    """
    answer = _Answer()
    try:
        for data in read_events(pieces):
            if data == b"[DONE]":
                return answer.reply(start)
            answer.add(data, clock())
    except MalformedEventError as error:
        raise malformed(str(error)) from error
    raise cut_off()


def malformed(text: str) -> RequestError:
    """Return the error of a response that is not what was asked for."""
    return RequestError(text, remedy="check that --url is a server of OpenAI's chat completions")


def message_of(error: object) -> str:
    """Return the message of an error object, shortened."""
    text = error.get("message") if isinstance(error, dict) else error
    return shorten(str(text), _MAX_CHARACTERS)


@dataclass
class _Answer:
    """What has come of an answer."""

    times: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)

    def add(self, data: bytes, now: float) -> None:
        """Take a chunk."""
        try:
            chunk = json.loads(data)
            choices, usage, error = (chunk.get(name) for name in ("choices", "usage", "error"))
            deltas = [choice.get("delta") or {} for choice in choices or ()]
            has_text = any(delta.get(name) for delta in deltas for name in _TEXTS)
        except (ValueError, AttributeError, TypeError, RecursionError) as broken:
            raise malformed("an event is no chunk of a chat completion") from broken
        if error is not None:
            raise RequestError(f"error within the answer: {message_of(error)}", remedy="look into the server's log")
        if has_text:
            self.times.append(now)
        if isinstance(usage, dict):
            self.usage = usage

    def reply(self, start: float) -> Reply:
        """Return what is known of it, complete as it is."""
        if not self.times:
            raise RequestError("the answer has no text", remedy="ask for more tokens, or of another model")
        new_tokens = self._count("completion_tokens") or len(self.times)
        details = self.usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return Reply(
            ttft_s=self.times[0] - start,
            tpot_s=(self.times[-1] - self.times[0]) / max(1, new_tokens - 1),
            new_tokens=new_tokens,
            prompt_tokens=self._count("prompt_tokens"),
            cached_tokens=cached if isinstance(cached, int) else None,
        )

    def _count(self, name: str) -> int | None:
        value = self.usage.get(name)
        return value if isinstance(value, int) else None
