"""What the engines count, as Prometheus reads it.

Where the meaning is the same, the names and the label `model_name` are those of vLLM (its "Production Metrics"), so
that dashboards for it show this server, too. What it has no name for begins with `qwen3vl:`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from runtime.server.engines import Engines

_LABELS = ("model_name",)
_Value = Callable[[Mapping[str, Any]], float]

_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("vllm:num_requests_running", "Requests that run.", lambda of: of["running"]),
    ("vllm:num_requests_waiting", "Requests that wait.", lambda of: of["waiting"]),
    (
        "qwen3vl:kv_cache_filled_ratio",
        "Share of the KV cache's rows that hold something, those kept for later prompts included.",
        lambda of: of["cache_rows"] / max(1, of["max_cache_rows"]),
    ),
    ("qwen3vl:waiting_tokens", "Tokens of the prompts that wait.", lambda of: of["waiting_tokens"]),
    ("qwen3vl:vision_cache_bytes", "Bytes of kept embeddings of images.", lambda of: of["vision_cache"]["num_bytes"]),
)
_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("vllm:prompt_tokens", "Tokens of prompts, those found in the KV cache included.", lambda of: of["prompt_tokens"]),
    ("vllm:generation_tokens", "Tokens of answers.", lambda of: of["generated_tokens"]),
    (
        "vllm:prefix_cache_queries",
        "Tokens of prompts that were looked up in the KV cache.",
        lambda of: of["prompt_tokens"],
    ),
    ("vllm:prefix_cache_hits", "Tokens of prompts that were found in the KV cache.", lambda of: of["cached_tokens"]),
    ("qwen3vl:requests_refused", "Requests that found the queue full.", lambda of: of["refused"]),
    ("qwen3vl:vision_calls", "Calls of the vision tower.", lambda of: of["vision_calls"]),
    ("qwen3vl:vision_cache_hits", "Images whose embeddings were kept.", lambda of: of["vision_cache"]["hits"]),
    ("qwen3vl:vision_cache_misses", "Images that were encoded.", lambda of: of["vision_cache"]["misses"]),
    ("qwen3vl:decode_steps", "Steps of all sequences that decode.", lambda of: of["decode_steps"]),
)
_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "From the request to its first token.", "ttft_s"),
    ("vllm:request_time_per_output_token_seconds", "Mean time per later token of a request.", "tpot_s"),
    ("vllm:e2e_request_latency_seconds", "From the request to the end of its answer.", "request_s"),
    ("vllm:request_queue_time_seconds", "In the queue.", "queue_s"),
    ("qwen3vl:decode_batch_size", "Sequences of a decode step, each of which gets a token.", "batch_size"),
    ("qwen3vl:decode_step_seconds", "A decode step.", "step_s"),
)
_ENDS = {"eos": "stop", "stop": "stop", "length": "length", "repetition": "repetition"}
_FAILED = ("cancelled", "expired", "failed")


class EngineCollector(Collector):
    """Reads the engines' own counters whenever it is asked.

    Args:
        engines: The engines.
        responses: Responses by path and status.
        num_connections: Returns the number of open connections.
    """

    def __init__(
        self, engines: Engines, responses: Mapping[tuple[str, int], int], num_connections: Callable[[], int]
    ) -> None:
        self._engines = engines
        self._responses = responses
        self._num_connections = num_connections

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics."""
        now = {name: served.model.statistics() for name, served in self._engines.items()}
        for name, text, value in _GAUGES:
            yield _filled(GaugeMetricFamily(name, text, labels=_LABELS), now, value)
        for name, text, value in _COUNTERS:
            yield _filled(CounterMetricFamily(name, text, labels=_LABELS), now, value)
        for name, text, key in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=_LABELS)
            for model, of in now.items():
                buckets = [(f"{float(bound):g}", count) for bound, count in of[key]["buckets"].items()]
                family.add_metric([model], [*buckets, ("+Inf", of[key]["count"])], of[key]["sum"])
            yield family
        yield from self._requests(now)
        responses = CounterMetricFamily("qwen3vl:http_responses", "Responses.", labels=("path", "status"))
        for (path, status), count in sorted(self._responses.items()):
            responses.add_metric([path, str(status)], count)
        yield responses
        yield GaugeMetricFamily("qwen3vl:connections", "Open connections.", value=self._num_connections())

    def _requests(self, now: Mapping[str, Mapping[str, Any]]) -> Iterable[Metric]:
        done = CounterMetricFamily(
            "vllm:request_success", "Requests that were answered.", labels=(*_LABELS, "finished_reason")
        )
        failed = CounterMetricFamily(
            "qwen3vl:requests_failed", "Requests that ended without an answer.", labels=(*_LABELS, "reason")
        )
        for model, of in now.items():
            counts: dict[str, int] = {}
            for end, reason in _ENDS.items():
                counts[reason] = counts.get(reason, 0) + of["requests"][end]
            for reason, count in counts.items():
                done.add_metric([model, reason], count)
            for reason in _FAILED:
                failed.add_metric([model, reason], of["requests"][reason])
        yield done
        yield failed


def registry(collector: EngineCollector) -> CollectorRegistry:
    """Return what `/metrics` shows: the engines and the process."""
    found = CollectorRegistry()
    ProcessCollector(registry=found)
    PlatformCollector(registry=found)
    GCCollector(registry=found)
    found.register(collector)
    return found


def _filled(family: Any, now: Mapping[str, Mapping[str, Any]], value: _Value) -> Metric:
    for model, of in now.items():
        family.add_metric([model], value(of))
    filled: Metric = family
    return filled
