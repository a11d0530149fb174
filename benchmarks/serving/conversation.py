"""Two turns of a conversation that begins with a long prompt and an image, and that image in a prompt of another."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.serving.workload import Workload, opened
from qwen3vl_export.load.prompts import Prompts

_ROUNDS = 3


def measure(work: Workload) -> dict[str, Any]:
    """Answer both turns and the other prompt, each time with another image.

    The other prompt has its text before the image, so that it shares no rows of the KV cache but the embeddings alone.
    """
    model, _ = opened(work.engine, work.threads, 4096, max_sequences=1, kept_sequences=1)
    side = work.image_side
    long = Prompts.of_tokens(model.tokenizer, work.long_tokens, (side, side))
    short = Prompts.of_tokens(model.tokenizer, work.prompt_tokens, seed=1)
    options: dict[str, Any] = {"max_new_tokens": work.new_tokens, "do_sample": False, "eos_token_id": []}
    model.generate(short.messages(0), **options)
    rounds = []
    for index in range(1, 1 + _ROUNDS):
        (question,) = long.messages(index)
        second, other = (short.messages(2 * index + i)[0]["content"] for i in range(2))
        chat = model.chat(**options)
        turns = [chat.ask(content).stats for content in (question["content"], second)]
        image, _ = question["content"]
        again = model.generate([{"role": "user", "content": [*other, image]}], **options).stats
        rounds.append({"first": turns[0].to_dict(), "second": turns[1].to_dict(), "again": again.to_dict()})
    model.close()
    return {
        "rounds": rounds,
        "ttft_share": statistics.median(each["second"]["ttft_s"] / each["first"]["ttft_s"] for each in rounds),
        "images_found": min(each["again"]["cached_images"] for each in rounds),
    }
