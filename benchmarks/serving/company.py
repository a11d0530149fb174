"""Requests at once against one after the other, through the model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from benchmarks.serving.workload import DECODE, TimedCall, Workload, opened
from qwen3vl_export.load.client import InProcess
from qwen3vl_export.load.generator import Load, offer
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.report import summarise

_REQUESTS_PER_CLIENT = 2
_SPEEDS = ("tokens_per_s", "decode_tokens_per_s")
_NOTHING_BETWEEN_S = 0.02


def measure(work: Workload) -> dict[str, Any]:
    """Answer the same kind of prompts one at a time and side by side, in turns."""
    model, session = opened(work.engine, work.threads, max_sequences=work.clients)
    sides: dict[str, list[dict[str, Any]]] = {"alone": [], "together": []}
    for round_ in range(max(1, work.repeats // 2)):
        for side, clients in (("alone", 1), ("together", work.clients)):
            prompts = Prompts.of_tokens(model.tokenizer, work.prompt_tokens, seed=2 * round_ + (clients > 1))
            session.calls.clear()
            load = Load(clients, num_requests=_REQUESTS_PER_CLIENT * clients, new_tokens=work.new_tokens)
            report = summarise(offer(InProcess(model), prompts, load))
            sides[side].append(asdict(report) | {"decode_tokens_per_s": decode_speed(session.of(DECODE), clients)})
    model.close()
    speeds = {
        side: {name: statistics.median(each[name] for each in rounds) for name in _SPEEDS}
        for side, rounds in sides.items()
    }
    ratios = {name: speeds["together"][name] / speeds["alone"][name] for name in _SPEEDS}
    return {"clients": work.clients, "rounds": sides, "speeds": speeds, "ratios": ratios}


def decode_speed(calls: Sequence[TimedCall], batch: int) -> float:
    """Return tokens a second of decode steps of so many sequences, from the end of one to the end of the next.

    Steps with a piece of a prompt between them are left out.
    """
    gaps = [
        after.end_s - before.end_s
        for before, after in pairwise(calls)
        if before.batch == after.batch == batch and after.start_s - before.end_s < _NOTHING_BETWEEN_S
    ]
    return batch / statistics.median(gaps) if gaps else 0.0
