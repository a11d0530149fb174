"""Steps of many sequences on the demo engine: what is around the call of the session."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from benchmarks.serving.workload import DECODE, PREFILL, Workload, opened
from qwen3vl_export.load.client import InProcess
from qwen3vl_export.load.generator import Load, offer
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.report import summarise

SEQUENCES = 32
_REQUESTS_PER_CLIENT = 3


def measure(work: Workload) -> dict[str, Any]:
    """Run as many sequences at once as there are clients, and time decisions and all else between two calls."""
    model, session = opened(work.demo, work.threads, max_context=512, max_sequences=SEQUENCES, kept_sequences=0)
    prompts = Prompts.of_tokens(model.tokenizer, work.prompt_tokens)
    num_requests = _REQUESTS_PER_CLIENT * SEQUENCES
    report = summarise(
        offer(InProcess(model), prompts, Load(SEQUENCES, num_requests=num_requests, new_tokens=4 * work.new_tokens))
    )
    model.close()
    gaps, taken = [], []
    for before, after in pairwise(session.calls):
        if before.kind == after.kind == DECODE and before.batch == after.batch == SEQUENCES:
            gaps.append(after.start_s - before.end_s)
            taken.append(after.taken_s)
    return {
        "sequences": SEQUENCES,
        "full_steps": len(gaps),
        "prefills": len(session.of(PREFILL)),
        "batch_size": report.batch_size,
        "scheduler_ms": report.scheduler_ms_per_step,
        "outside_ms": 1e3 * statistics.median(gaps) if gaps else None,
        "decode_ms": 1e3 * statistics.median(taken) if taken else None,
        "tokens_per_s": report.tokens_per_s,
    }
