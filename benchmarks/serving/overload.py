"""Many times more requests than the demo engine can answer, for minutes: memory, losses, latency."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.serving.workload import Workload, opened
from qwen3vl_export.load.client import InProcess
from qwen3vl_export.load.generator import MAX_IN_FLIGHT, Load, Trace, offer
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.report import summarise

_SETTLED = 0.1
"""Share of the time after which memory is counted as that of the start: by then caches, arena and queue are full."""
_MAX_POINTS = 120


def measure(work: Workload) -> dict[str, Any]:
    """Find out what the engine can answer, then offer a multiple of it."""
    model, session = opened(work.demo, work.threads, max_context=512, max_sequences=work.clients)
    prompts = Prompts.of_tokens(model.tokenizer, work.prompt_tokens)
    load = Load(2 * work.clients, duration_s=work.capacity_s, new_tokens=work.new_tokens)
    capacity = summarise(offer(InProcess(model), prompts, load)).requests_per_s
    rate, seconds = work.overload * capacity, 60 * work.minutes

    def forget_calls(trace: Trace) -> None:
        session.calls.clear()  # else the notes would grow, and the memory with them

    trace = offer(
        InProcess(model),
        prompts,
        Load(MAX_IN_FLIGHT, rate, duration_s=seconds, new_tokens=work.new_tokens),
        forget_calls,
    )
    statistics = model.statistics()
    model.close()
    report = summarise(trace)
    return {
        "capacity_per_s": capacity,
        "offered_per_s": report.offered / seconds,
        "seconds": seconds,
        "lost": report.offered - report.done - report.refused - report.failed,
        "left_running": statistics["running"] + statistics["waiting"],
        "latency_ratio": report.latency_s["p95"] / report.latency_s["p50"],
        "rss": memory(trace),
        "report": asdict(report),
    }


def memory(trace: Trace) -> dict[str, Any]:
    """Return resident bytes once all is warm, in the middle and at the end, and some points between."""
    last = trace.rss[-1][0]
    settled = [each for each in trace.rss if each[0] >= _SETTLED * last]
    step = -(-len(trace.rss) // _MAX_POINTS)
    return {
        "start_bytes": settled[0][1],
        "middle_bytes": settled[len(settled) // 2][1],
        "end_bytes": settled[-1][1],
        "largest_bytes": max(num_bytes for _, num_bytes in settled),
        "points": trace.rss[::step],
    }
