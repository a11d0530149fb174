"""A long prompt with a large image arrives while others decode: how long they wait, and how long it does."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

from benchmarks.serving.workload import DECODE, PREFILL, VISION, TimedSession, Workload, opened
from qwen3vl_export.load.prompts import Prompts
from runtime.model import Qwen3VLModel

STREAMS = 4
_STEPS_BEFORE = 8
_LONGEST_ANSWER = 3000
_MAX_DELAY_MS = 200.0


def measure(work: Workload) -> dict[str, Any]:
    """Time the long prompt alone, then beside streams that decode, and the gaps between their tokens."""
    model, session = opened(
        work.engine, work.threads, 4096, max_sequences=STREAMS + 1, kept_sequences=0, max_delay_ms=_MAX_DELAY_MS
    )
    side = work.image_side
    long = Prompts.of_tokens(model.tokenizer, work.long_tokens, (side, side), seed=1)
    short = Prompts.of_tokens(model.tokenizer, work.prompt_tokens)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": []}
    model.generate(short.messages(0), max_new_tokens=2, **options)
    alone = model.generate(long.messages(1), max_new_tokens=2, **options).stats
    session.calls.clear()
    streams = [model.stream(short.messages(2 + i), max_new_tokens=_LONGEST_ANSWER, **options) for i in range(STREAMS)]
    for stream in streams:
        next(stream)
    _wait_for_steps(model, session, _STEPS_BEFORE)
    arrived = time.perf_counter()
    beside = model.generate(long.messages(2), max_new_tokens=2, **options).stats
    ended = time.perf_counter()
    for stream in streams:
        stream.close()
    model.close()
    return {
        "streams": STREAMS,
        "max_delay_ms": _MAX_DELAY_MS,
        "prompt_tokens": beside.prompt_tokens,
        "visual_tokens": beside.visual_tokens,
        "alone": alone.to_dict(),
        "beside": beside.to_dict(),
        **gaps(session, arrived, ended),
    }


def gaps(session: TimedSession, arrived: float, ended: float) -> dict[str, Any]:
    """Return the gaps between tokens of the others, before and while the long prompt runs; milliseconds.

    All of them get their tokens at the ends of the same steps, so a gap is that from one step's end to the next.
    """
    steps = [call for call in session.of(DECODE) if call.batch >= STREAMS and call.end_s <= ended]
    found = [
        ((after.end_s - arrived), 1e3 * (after.end_s - before.end_s), 1e3 * after.taken_s)
        for before, after in pairwise(steps)
    ]
    before = [gap for at, gap, _ in found if at < 0]
    during = [gap for at, gap, _ in found if at >= 0]
    chunks = [call for call in session.of(PREFILL) if arrived <= call.start_s <= ended]
    images = [call for call in session.of(VISION) if arrived <= call.start_s <= ended]
    return {
        "gap_before_ms": statistics.median(before) if before else None,
        "gap_during_ms": statistics.median(during) if during else None,
        "longest_gap_ms": max(during, default=None),
        "longest_step_ms": max((taken for at, _, taken in found if at >= 0), default=None),
        "chunks": [{"tokens": call.num_tokens, "ms": 1e3 * call.taken_s} for call in chunks],
        "phases": [
            {"kind": call.kind, "start_s": call.start_s - arrived, "end_s": call.end_s - arrived}
            for call in sorted([*images, *chunks], key=lambda call: call.start_s)
        ],
        "gaps": [{"at_s": at, "gap_ms": gap} for at, gap, _ in found],
    }


def _wait_for_steps(model: Qwen3VLModel, session: TimedSession, num_steps: int) -> None:
    """Wait until all streams have decoded so many tokens side by side."""
    while sum(call.batch == STREAMS for call in session.of(DECODE)) < num_steps:
        assert model.statistics()["running"] == STREAMS, "a stream has ended"
        time.sleep(0.01)
