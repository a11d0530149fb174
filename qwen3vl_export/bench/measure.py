"""Time answers of opened engines, in rounds: each engine has its turn at each point before any has its next."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen3vl_export.bench.points import Point
from runtime.errors import CapacityError

if TYPE_CHECKING:
    from runtime.answer import Stats
    from runtime.model import Qwen3VLModel

PHASES = ("preprocess", "queue", "vision", "prefill")
"""What the time to the first token consists of, in order; `Stats` has each with `_s`."""

_WARMUP = 0
"""Number of the prompts of the repetition that is not counted."""


@dataclass(frozen=True)
class Repetition:
    """A batch of answers that were asked for at once; times in seconds, means over its answers unless it says more.

    Attributes:
        ttft_s: From the call to the first token.
        tpot_s: For each later token.
        latency_s: From the call to the end of the last answer.
        phases_s: What the time to the first token consists of, by the names of `PHASES`.
        prompt_tokens: Of a prompt, visual ones included.
        visual_tokens: How many of them come from images.
        cached_tokens: Tokens of prompts that were found in a cache: those of the chat template alone, since no two
            prompts have the same text or pixels.
    """

    ttft_s: float
    tpot_s: float
    latency_s: float
    phases_s: Mapping[str, float]
    prompt_tokens: int
    visual_tokens: int
    cached_tokens: int


@dataclass
class Measured:
    """A point on one engine.

    Attributes:
        warmup: The repetition that is not counted.
        repetitions: The others, in order.
    """

    warmup: Repetition
    repetitions: list[Repetition] = field(default_factory=list)


def measure(
    models: Mapping[str, Qwen3VLModel],
    points: Sequence[Point],
    repeats: int,
    on_step: Callable[[int, int, str], object] = lambda done, total, name: None,
) -> dict[tuple[str, Point], Measured]:
    """Time greedy answers of engines that take turns.

    A round asks each engine once at each point, so a busy minute of the machine falls on all of them. Every second
    round goes through the engines backwards: what one leaves behind in caches and clocks meets all others.

    Args:
        models: Opened engines by name.
        points: What is asked.
        repeats: Repetitions of each point, after one of warm-up.
        on_step: Called with the number of repetitions that are done, that of all, and the present point.

    Raises:
        CapacityError: As `repeat`, in the round of warm-up.
    """
    total, done = len(points) * len(models) * (repeats + 1), 0
    found: dict[tuple[str, Point], Measured] = {}
    for index in range(repeats + 1):
        names = list(models) if index % 2 == 0 else list(models)[::-1]
        for point in points:
            for name in names:
                on_step(done, total, f"{name}: {point.name}")
                repetition = repeat(models[name], point, index)
                if index == _WARMUP:
                    found[name, point] = Measured(repetition)
                else:
                    found[name, point].repetitions.append(repetition)
                done += 1
    return found


def repeat(model: Qwen3VLModel, point: Point, index: int) -> Repetition:
    """Ask once for a batch of answers.

    Args:
        model: An opened engine that runs as many sequences at once.
        point: What is asked.
        index: Number of the repetition; another one has other prompts.

    Raises:
        CapacityError: The context has no room for so many tokens.
    """
    prompts = [messages(point, index, seat) for seat in range(point.batch)]
    if point.batch == 1:
        started = time.perf_counter()
        answered = [_answer(model, prompts[0], point.new_tokens)]
    else:
        starts: list[float] = []
        together = threading.Barrier(point.batch, action=lambda: starts.append(time.perf_counter()))

        def ask(prompt: list[dict[str, Any]]) -> tuple[Stats, float]:
            together.wait()
            return _answer(model, prompt, point.new_tokens)

        with ThreadPoolExecutor(point.batch) as pool:
            answered = list(pool.map(ask, prompts))
        started = starts[0]
    return summarise([stats for stats, _ in answered], max(ended for _, ended in answered) - started)


def summarise(stats: Sequence[Stats], latency_s: float) -> Repetition:
    """Return the means of the answers of a batch."""
    return Repetition(
        ttft_s=statistics.fmean(each.ttft_s for each in stats),
        tpot_s=statistics.fmean(each.tpot_s for each in stats),
        latency_s=latency_s,
        phases_s={name: statistics.fmean(getattr(each, f"{name}_s") for each in stats) for name in PHASES},
        prompt_tokens=round(statistics.fmean(each.prompt_tokens for each in stats)),
        visual_tokens=stats[0].visual_tokens,
        cached_tokens=sum(each.cached_tokens for each in stats),
    )


def messages(point: Point, index: int, seat: int = 0) -> list[dict[str, Any]]:
    """Return a prompt with a text and pixels that no other point, repetition or seat has, so that no cache knows it.

    It is the same on every call.

    The text is of digits: the tokenizers that an engine may have make a token of each (Qwen's split numbers into
    digits), so it has as many tokens as were asked for, and prompts of one point are equally long.

    Args:
        point: What is asked.
        index: Number of the repetition.
        seat: Number of the prompt in its batch.
    """
    import numpy as np

    asked = (point.text_tokens, point.new_tokens, point.batch, point.images, *(point.image_size or ()))
    rng = np.random.default_rng([index, seat, *asked])
    content: list[dict[str, Any]] = []
    for _ in range(point.images):
        assert point.image_size is not None
        width, height = point.image_size
        content.append({"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8)})
    digits = "".join(map(str, rng.integers(0, 10, point.text_tokens)))
    return [{"role": "user", "content": [*content, {"type": "text", "text": digits}]}]


@dataclass(frozen=True)
class Streamed:
    """One answer as a client sees it.

    Attributes:
        stats: Its timings.
        pieces_s: When each piece of text arrived, in seconds since the call; a token whose text is not complete by
            itself comes with a later one.
    """

    stats: Stats
    pieces_s: tuple[float, ...]


def stream_once(model: Qwen3VLModel, point: Point, index: int) -> Streamed:
    """Ask for one answer, whatever the batch of the point, and note when its pieces arrive.

    Special tokens, which have no text, are kept out of it: a model that has nothing to say to digits repeats them.
    """
    prompt, arrived = messages(point, index), list[float]()
    bias = dict.fromkeys(sorted(model.tokenizer.special_ids), -100.0)
    started = time.perf_counter()
    answer = model.generate(
        prompt,
        on_piece=lambda piece: arrived.append(time.perf_counter() - started),
        logit_bias=bias,
        **_options(point.new_tokens),
    )
    return Streamed(answer.stats, tuple(arrived))


def _answer(model: Qwen3VLModel, prompt: list[dict[str, Any]], new_tokens: int) -> tuple[Stats, float]:
    stats = model.generate(prompt, **_options(new_tokens)).stats
    ended = time.perf_counter()
    if stats.new_tokens != new_tokens:  # an answer ends where the context is full
        raise CapacityError(
            f"after {stats.prompt_tokens} tokens of the prompt the context has room for {stats.new_tokens} of the "
            f"{new_tokens} new ones",
            remedy="raise --max-context, or ask for fewer tokens",
        )
    return stats, ended


def _options(new_tokens: int) -> dict[str, Any]:
    """Return options of a greedy answer that no end token ends."""
    return {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": []}
