"""One request through the model against the same calls straight on the session, in turns."""

from __future__ import annotations

import statistics
import time
from itertools import islice, pairwise
from typing import Any

from benchmarks.serving.workload import DECODE, PREFILL, TimedSession, Workload, opened
from qwen3vl_export.load.prompts import Prompts
from runtime.contract import no_visual_embeds
from runtime.generation import decode_steps, prefill_chunks
from runtime.model import Qwen3VLModel
from runtime.sampling import greedy

_PAIRS_PER_REPEAT = 4


def measure(work: Workload) -> dict[str, Any]:
    """Answer prompts both ways with both engines, and return what the model adds."""
    return {"engine": compare(work.engine, work), "demo": compare(work.demo, work)}


def compare(folder: str, work: Workload) -> dict[str, Any]:
    """Return medians of both ways on one engine, in milliseconds.

    A step is counted from the end of one call of the session to the end of the next, which includes the choice of the
    token. What is outside of the call is given alone too, since the call itself takes not always the same time.
    """
    model, session = opened(folder, work.threads, max_sequences=work.clients)
    prompts = Prompts.of_tokens(model.tokenizer, work.prompt_tokens)
    cache = session.new_cache(2048)
    ways: dict[str, list[dict[str, float]]] = {"direct": [], "model": []}
    for index in range(1 + _PAIRS_PER_REPEAT * work.repeats):
        for way in ("direct", "model") if index % 2 else ("model", "direct"):
            messages = prompts.messages(2 * index + (way == "model"))
            session.calls.clear()
            if way == "direct":
                first_s, total_s = answer_directly(model, session, cache, messages, work.new_tokens)
            else:
                stats = model.generate(messages, max_new_tokens=work.new_tokens, do_sample=False, eos_token_id=[]).stats
                first_s, total_s = stats.ttft_s, stats.ttft_s + stats.tpot_s * (stats.new_tokens - 1)
            if index:  # the first pair warms up
                ways[way].append(figures(session, first_s, total_s, work.new_tokens))
    model.close()
    medians = {
        way: {name: statistics.median(each[name] for each in answers) for name in answers[0]}
        for way, answers in ways.items()
    }
    added = {name: medians["model"][name] - medians["direct"][name] for name in medians["direct"]}
    return {"direct": medians["direct"], "model": medians["model"], "added": added, "answers": len(ways["model"])}


def answer_directly(
    model: Qwen3VLModel, session: TimedSession, cache: Any, messages: Any, new_tokens: int
) -> tuple[float, float]:
    """Answer greedily in a loop over calls of the session; return the seconds to the first and to the last token."""
    start = time.perf_counter()
    prepared = model.prepare(messages)
    embeds = no_visual_embeds(model.config)
    (*_, logits) = prefill_chunks(session, cache, prepared.decoder_inputs(embeds))
    num_tokens = len(prepared.prompt.input_ids)
    tokens = decode_steps(session, cache, logits[-1], num_tokens, prepared.positions.delta, embeds, greedy)
    next(tokens)
    first = time.perf_counter()
    model.tokenizer.decode(list(islice(tokens, new_tokens - 1)))
    return first - start, time.perf_counter() - start


def figures(session: TimedSession, first_s: float, total_s: float, new_tokens: int) -> dict[str, float]:
    """Return the times of one answer, in milliseconds."""
    steps, prefills = session.of(DECODE), session.of(PREFILL)
    gaps = [after.start_s - before.end_s for before, after in pairwise(steps)]
    periods = [after.end_s - before.end_s for before, after in pairwise(steps)]
    return {
        "ttft_ms": 1e3 * first_s,
        "ttft_outside_ms": 1e3 * (first_s - sum(call.taken_s for call in prefills)),
        "tpot_ms": 1e3 * (total_s - first_s) / (new_tokens - 1),
        "step_ms": 1e3 * statistics.median(periods),
        "step_outside_ms": 1e3 * statistics.median(gaps),
        "first_step_outside_ms": 1e3 * (steps[0].start_s - prefills[-1].end_s),
    }
