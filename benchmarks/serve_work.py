"""What is asked of a server and of the same engine in this process, and what is noted of the answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from qwen3vl_export.load.client import Client, InProcess, Reply
from qwen3vl_export.load.generator import Load, Trace, offer
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.wire import png
from runtime.errors import EngineError


@dataclass(frozen=True)
class Work:
    """Requests of one kind.

    Attributes:
        clients: How many ask at once, each again when it has its answer.
        num_requests: How many answers they get together.
        num_words: Words of each text.
        new_tokens: Tokens of each answer.
        image_side: Width and height of the image, other pixels in each; None for none.
        seed: Another seed makes other words and pixels.
    """

    clients: int
    num_requests: int
    num_words: int
    new_tokens: int
    image_side: int | None = None
    seed: int = 0


class FromFiles(InProcess):
    """An engine in this process that gets images as files, as a server does, so that both decode them."""

    def prepare(self, messages: list[dict[str, Any]], new_tokens: int) -> Any:
        """Return both, with images as bytes of PNG files."""
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["data"] = png(part.pop("image"))
        return super().prepare(messages, new_tokens)

    def ask(self, request: Any) -> Reply:
        """Answer greedily; the first token is there when its text is, as for a client, which sees nothing before.

        A token may be a part of a character, whose text comes with a later one.
        """
        messages, new_tokens = request
        start, first = time.perf_counter(), None
        with self.model.stream(messages, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[]) as pieces:
            for _ in pieces:
                first = first or time.perf_counter()
            generation = pieces.wait()
        assert generation is not None, "nobody stops it"
        ended, stats = time.perf_counter(), generation.stats
        return Reply((first or ended) - start, stats.tpot_s, stats.new_tokens, stats.prompt_tokens)


def do(client: Client, work: Work) -> dict[str, Any]:
    """Ask, one kind of request alone.

    Returns:
        `tokens_per_s` and `requests_per_s` from the first request to the last answer, `ttft_s` of each request,
        `new_tokens` of all, and `prompt_tokens` of each.

    Raises:
        EngineError: A request was refused or failed.
    """
    size = None if work.image_side is None else (work.image_side, work.image_side)
    prompts = Prompts(work.num_words, size, seed=work.seed)
    load = Load(work.clients, num_requests=work.num_requests, new_tokens=work.new_tokens, warms_up=False)
    trace = offer(client, prompts, load)
    _check(trace, work)
    new_tokens = sum(each.reply.new_tokens for each in trace.answered)
    return {
        "tokens_per_s": new_tokens / trace.wall_s,
        "requests_per_s": len(trace.answered) / trace.wall_s,
        "wall_s": trace.wall_s,
        "ttft_s": [each.ttft_s for each in trace.answered],
        "tpot_s": [each.reply.tpot_s for each in trace.answered],
        "new_tokens": new_tokens,
        "prompt_tokens": [each.reply.prompt_tokens for each in trace.answered],
    }


def _check(trace: Trace, work: Work) -> None:
    if len(trace.answered) < work.num_requests:
        failed = "; ".join(trace.failed) or f"{len(trace.refused_s)} were refused"
        raise EngineError(f"of {work.num_requests} requests not all were answered: {failed}", remedy="ask for less")
    if any(each.reply.new_tokens != work.new_tokens for each in trace.answered):
        counts = sorted({each.reply.new_tokens for each in trace.answered})
        raise EngineError(
            f"answers have {counts} tokens instead of {work.new_tokens}", remedy="see that the server takes ignore_eos"
        )
