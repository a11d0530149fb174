"""What an engine has done since it was opened, as plain data: counters, gauges and histograms."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.answer import Stats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)

ENDS = ("eos", "stop", "length", "repetition", "logits", "cancelled", "expired", "failed")
"""How a request may end: an answer's finish reason, the logits that were asked for, or without either."""


@dataclass
class Histogram:
    """How often values fell between bounds, as Prometheus counts them.

    Attributes:
        bounds: Upper ends of the buckets, rising; values above the last are counted in `count` alone.
        counts: Values of each bucket that are in none before.
        count: All values.
        total: Their sum.
    """

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    count: int = 0
    total: float = 0.0

    def __post_init__(self) -> None:
        """Begin with empty buckets."""
        self.counts = [0] * len(self.bounds)

    def add(self, value: float) -> None:
        """Count a value."""
        place = bisect.bisect_left(self.bounds, value)
        if place < len(self.counts):
            self.counts[place] += 1
        self.count += 1
        self.total += value

    def to_dict(self) -> dict[str, Any]:
        """Return `buckets` (values up to each bound, those of lower bounds included), `count` and `sum`."""
        buckets, up_to = {}, 0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            up_to += count
            buckets[bound] = up_to
        return {"buckets": buckets, "count": self.count, "sum": self.total}


class Counters:
    """Written by the worker's thread alone; others may read them at any time.

    Attributes:
        requests: Requests that have ended, by `ENDS`.
        steps, decode_steps, prefill_chunks, vision_calls: Calls.
        prompt_tokens, generated_tokens, cached_tokens: Tokens that were read, answered, and found in the prefix cache.
        pruned_tokens: Visual tokens that did not stay in prompts.
        evicted_prompt_rows: Rows of prompts that were given up when these had run (`kv_budget`).
        prompts, prefix_hits: Prompts that were begun, and those of them that began with rows of another.
        scheduler_s: Time spent on decisions.
        queue_s, ttft_s, tpot_s, request_s: Of answers: wait, time to first token, per later token, all of it.
        step_s, batch_size: Of decode steps; chunk_tokens: of chunks of prompts.
    """

    def __init__(self) -> None:
        self.requests = dict.fromkeys(ENDS, 0)
        self.steps = self.decode_steps = self.prefill_chunks = self.vision_calls = 0
        self.prompt_tokens = self.generated_tokens = self.cached_tokens = self.prefix_hits = self.prompts = 0
        self.pruned_tokens = 0
        self.evicted_prompt_rows = 0
        self.scheduler_s = 0.0
        self.queue_s, self.ttft_s, self.tpot_s, self.request_s, self.step_s = (Histogram(_SECONDS) for _ in range(5))
        self.batch_size = Histogram(_BATCHES)
        self.chunk_tokens = Histogram(_TOKENS)

    def ended(self, reason: str, stats: Stats | None = None) -> None:
        """Count a request that has ended."""
        self.requests[reason] += 1
        if stats is None:
            return
        self.queue_s.add(stats.queue_s)
        self.ttft_s.add(stats.ttft_s)
        if stats.new_tokens > 1:
            self.tpot_s.add(stats.tpot_s)
        self.request_s.add(stats.ttft_s + stats.tpot_s * max(0, stats.new_tokens - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return all of them as plain data, histograms as `Histogram.to_dict`."""
        return {
            name: value.to_dict() if isinstance(value, Histogram) else dict(value) if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }
