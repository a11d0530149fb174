"""What a load showed: counts, rates, percentiles and memory, as plain data and as lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen3vl_export.load.generator import Answered, Trace

if TYPE_CHECKING:
    import numpy as np

PERCENTILES = (50, 90, 95, 99)
_TIMES: Mapping[str, Callable[[Answered], float | None]] = {
    "ttft_s": lambda each: each.ttft_s,
    "tpot_s": lambda each: each.reply.tpot_s,
    "latency_s": lambda each: each.latency_s,
    "queue_s": lambda each: each.reply.queue_s,
}
_LABELS = {"ttft_s": "TTFT", "tpot_s": "TPOT", "latency_s": "latency", "queue_s": "queue"}


@dataclass(frozen=True)
class LoadReport:
    """A load in figures; None, and no percentiles, where the client cannot know.

    Attributes:
        wall_s: From the beginning to the last answer.
        offered, done, refused, failed: Requests; those that failed did so with an error other than of a full queue.
        errors: How often each such error came, by its message.
        requests_per_s: Answers a second.
        tokens_per_s: Tokens of answers a second.
        prompt_tokens, new_tokens: Of all answers together.
        ttft_s: From the arrival to the first token; percentiles by name, p50 to p99, as the next three.
        tpot_s: Mean time per later token of an answer.
        latency_s: From the arrival to the whole answer.
        queue_s: In the engine's queue.
        batch_size: Mean number of sequences of a decode step.
        scheduler_ms_per_step: Mean time of the scheduler's decisions.
        prefix_hits, cached_tokens, cached_images: Prompts, tokens and images that were found in the engine's caches.
        rss_start_bytes, rss_end_bytes, rss_peak_bytes: Resident memory of the process.
    """

    wall_s: float
    offered: int
    done: int
    refused: int
    failed: int
    errors: dict[str, int]
    requests_per_s: float
    tokens_per_s: float
    prompt_tokens: int | None
    new_tokens: int
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    latency_s: dict[str, float]
    queue_s: dict[str, float]
    batch_size: float | None
    scheduler_ms_per_step: float | None
    prefix_hits: int | None
    cached_tokens: int | None
    cached_images: int | None
    rss_start_bytes: int | None
    rss_end_bytes: int | None
    rss_peak_bytes: int | None


def summarise(trace: Trace) -> LoadReport:
    """Return the figures of a load."""
    replies = [each.reply for each in trace.answered]
    new_tokens = sum(each.new_tokens for each in replies)
    wall_s = trace.wall_s or 1.0
    rss = [num_bytes for _, num_bytes in trace.rss]
    times = {name: [value(each) for each in trace.answered] for name, value in _TIMES.items()}
    return LoadReport(
        wall_s=trace.wall_s,
        offered=trace.num_offered,
        done=len(replies),
        refused=len(trace.refused_s),
        failed=trace.num_failed,
        errors=dict(trace.failed),
        requests_per_s=len(replies) / wall_s,
        tokens_per_s=new_tokens / wall_s,
        prompt_tokens=_total([each.prompt_tokens for each in replies]),
        new_tokens=new_tokens,
        **{name: percentiles([each for each in values if each is not None]) for name, values in times.items()},
        cached_images=_total([each.cached_images for each in replies]),
        **_counters(trace),
        rss_start_bytes=rss[0] if rss else None,
        rss_end_bytes=rss[-1] if rss else None,
        rss_peak_bytes=max(rss) if rss else None,
    )


def _counters(trace: Trace) -> dict[str, Any]:
    """Return what the counters of an engine grew by; without them, what the answers tell."""
    if not trace.after:
        told = _total([each.reply.cached_tokens for each in trace.answered])
        return dict.fromkeys(("batch_size", "scheduler_ms_per_step", "prefix_hits")) | {"cached_tokens": told}
    batches = {name: _added(trace, "batch_size", name) for name in ("sum", "count")}
    return {
        "batch_size": batches["sum"] / batches["count"] if batches["count"] else 0.0,
        "scheduler_ms_per_step": 1e3 * _added(trace, "scheduler_s") / max(1, _added(trace, "steps")),
        "prefix_hits": int(_added(trace, "prefix_hits")),
        "cached_tokens": int(_added(trace, "cached_tokens")),
    }


def _total(values: Sequence[int | None]) -> int | None:
    """Return the sum, or None if one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the percentiles of some values by name, p50 to p99, interpolated; none of no values."""
    import numpy as np

    if not values:
        return {}
    return {f"p{q}": float(value) for q, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def report_rows(report: LoadReport) -> list[tuple[str, str]]:
    """Return the figures as rows of a name and a text."""
    counts = f"{report.done} of {report.offered} answered, {report.refused} refused, {report.failed} failed"
    rows = [
        ("requests", f"{counts}, in {report.wall_s:.1f} s"),
        *(("failed", f"{count} ×: {message}") for message, count in report.errors.items()),
        ("speed", f"{report.tokens_per_s:.1f} tokens/s, {report.requests_per_s:.3g} requests/s"),
    ]
    for name, label in _LABELS.items():
        values = getattr(report, name)
        if values or name != "queue_s":  # a server does not tell it
            rows.append(
                (label, ", ".join(f"{q} {1e3 * each:.1f}" for q, each in values.items()) + " ms" if values else "-")
            )
    if report.batch_size is not None:
        steps = f"{report.batch_size:.2f} sequences a step, scheduler {report.scheduler_ms_per_step:.3f} ms"
        rows.append(("batch", steps))
    counts = {"prompts": report.prefix_hits, "tokens": report.cached_tokens, "images": report.cached_images}
    if hits := [f"{count} {name}" for name, count in counts.items() if count is not None]:
        rows.append(("cache hits", ", ".join(hits)))
    if report.rss_start_bytes is not None and report.rss_end_bytes is not None and report.rss_peak_bytes is not None:
        rss = " → ".join(f"{each / 1e9:.3f}" for each in (report.rss_start_bytes, report.rss_end_bytes))
        rows.append(("memory", f"{rss} GB resident, peak {report.rss_peak_bytes / 1e9:.3f} GB"))
    return rows


def tokens_over_time(trace: Trace, num_bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds since the load began, and tokens of answers a second around them.

    The later tokens of an answer count as evenly spread between its first and its last.

    Args:
        trace: A load.
        num_bins: Number of points.
    """
    import numpy as np

    edges = np.linspace(0.0, max(trace.wall_s, 1e-9), num_bins + 1)
    counts = np.zeros(num_bins)
    for each in trace.answered:
        first = each.arrived_s + each.ttft_s
        counts += np.histogram(np.linspace(first, max(first, each.ended_s), each.reply.new_tokens), edges)[0]
    return (edges[:-1] + edges[1:]) / 2, counts / np.diff(edges)


def _added(trace: Trace, *names: str) -> float:
    """Return by how much a counter grew, given by its name and those inside it."""
    values: list[Any] = [trace.after, trace.before]
    for name in names:
        values = [value[name] for value in values]
    return float(values[0] - values[1])
