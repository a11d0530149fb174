"""Loads: what is asked, when requests arrive, what becomes of each, and the figures made of that."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from qwen3vl_export.load.client import InProcess, Reply
from qwen3vl_export.load.generator import Answered, Load, Trace, offer
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.report import percentiles, report_rows, summarise, tokens_over_time
from runtime.answer import Generation, Stats
from runtime.errors import EngineError, OverloadError

COUNTERS = {"steps": 0, "scheduler_s": 0.0, "batch_size": {"sum": 0, "count": 0}, "prefix_hits": 0, "cached_tokens": 0}


def stats(ttft_s: float = 0.1, tpot_s: float = 0.01, new_tokens: int = 5) -> Stats:
    times = (0.0, 0.0, 0.02, 0.02, ttft_s, ttft_s + tpot_s * (new_tokens - 1))
    return Stats.of(times, prompt_tokens=30, visual_tokens=0, new_tokens=new_tokens, peak_cache_bytes=1)


class Engine:
    """Stands for a model: some requests, by their number since it was made, are refused or fail."""

    def __init__(self, refused: tuple[int, ...] = (), failing: dict[int, Exception] | None = None) -> None:
        self.refused, self.failing = refused, failing or {}
        self.asked: list[Any] = []
        self.most_at_once = self.at_once = 0
        self.is_closed = False
        self.lock = threading.Lock()

    def generate(self, messages: Any, **options: Any) -> Generation:
        with self.lock:
            number = len(self.asked)
            self.asked.append((messages, options))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        threading.Event().wait(0.002)
        with self.lock:
            self.at_once -= 1
        if number in self.refused:
            raise OverloadError("full", remedy="later", retry_after_s=0.001)
        if number in self.failing:
            raise self.failing[number]
        return Generation("", [0] * 5, "length", stats())

    def statistics(self) -> dict[str, Any]:
        return {**COUNTERS, "steps": len(self.asked), "scheduler_s": 0.002 * len(self.asked)}

    def close(self, *, drain: bool = True) -> None:
        self.is_closed = True


def test_prompts_are_their_own_and_the_same_each_time() -> None:
    prompts = Prompts(12, (8, 6), seed=3)
    (first,), (second,) = prompts.messages(1), prompts.messages(2)
    assert first["content"][0]["image"].shape == (6, 8, 3)
    assert (first["content"][0]["image"] != second["content"][0]["image"]).any()
    assert first["content"][1]["text"] != second["content"][1]["text"]
    assert len(first["content"][1]["text"].split()) == 12
    again = Prompts(12, (8, 6), seed=3).messages(1)[0]["content"]
    assert again[1] == first["content"][1] and (again[0]["image"] == first["content"][0]["image"]).all()
    assert Prompts(12, seed=4).messages(1) != Prompts(12, seed=3).messages(1)


def test_prompts_may_share_what_they_begin_with() -> None:
    (system, first), (same, second) = (Prompts(5, shared_words=7).messages(index) for index in (1, 2))
    assert system == same and system["role"] == "system" and len(system["content"].split()) == 7
    assert first != second


def test_prompts_have_about_the_tokens_that_are_asked_for() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [0] * len(text)

    (message,) = Prompts.of_tokens(Letters(), 400).messages(1)  # type: ignore[arg-type]
    assert 320 < len(message["content"][0]["text"]) < 480


def test_clients_ask_until_all_is_asked() -> None:
    engine = Engine()
    trace = offer(InProcess(engine), Prompts(3), Load(4, num_requests=20, new_tokens=7))  # type: ignore[arg-type]
    assert len(trace.answered) == 20 and len(engine.asked) == 21, "one warms up"
    assert 1 < engine.most_at_once <= 4
    assert len({str(messages) for messages, _ in engine.asked}) == 21
    assert {options["max_new_tokens"] for _, options in engine.asked} == {7}
    assert not engine.is_closed


def test_each_request_is_answered_refused_or_failed() -> None:
    engine = Engine(refused=(2, 5), failing={3: EngineError("broken"), 4: EngineError("broken")})
    trace = offer(InProcess(engine), Prompts(3), Load(1, num_requests=8))  # type: ignore[arg-type]
    assert (len(trace.answered), len(trace.refused_s), trace.failed) == (4, 2, {"broken": 2})
    report = summarise(trace)
    assert (report.offered, report.done, report.refused, report.failed) == (8, 4, 2, 2)
    assert report.new_tokens == 20 and report.errors == {"broken": 2}
    assert report.scheduler_ms_per_step == pytest.approx(2.0), "of what was added since the load began"
    assert "4 of 8 answered, 2 refused, 2 failed" in dict(report_rows(report))["requests"]


def test_a_request_that_is_lost_was_offered_all_the_same() -> None:
    trace = offer(InProcess(Engine()), Prompts(3), Load(1, num_requests=3))  # type: ignore[arg-type]
    trace.answered.pop()
    report = summarise(trace)
    assert (report.offered, report.done, report.refused, report.failed) == (3, 2, 0, 0)


def test_a_bug_ends_the_load() -> None:
    engine = Engine(failing={3: RuntimeError("bug")})
    with pytest.raises(RuntimeError, match="bug"):
        offer(InProcess(engine), Prompts(3), Load(2, num_requests=1000))  # type: ignore[arg-type]
    assert len(engine.asked) < 1000


def test_requests_arrive_at_random_times_that_a_seed_fixes() -> None:
    load = Load(64, rate=2000.0, num_requests=30, seed=5)
    trace = offer(InProcess(Engine()), Prompts(3), load)  # type: ignore[arg-type]
    gaps = np.random.default_rng(5)
    expected = np.concatenate([[0.0], np.cumsum([gaps.exponential(1 / 2000.0) for _ in range(29)])])
    np.testing.assert_allclose(sorted(each.arrived_s for each in trace.answered), expected)
    assert all(each.asked_s >= each.arrived_s for each in trace.answered)


def test_arrivals_end_with_their_time() -> None:
    trace = offer(InProcess(Engine()), Prompts(3), Load(64, rate=1000.0, duration_s=0.05))  # type: ignore[arg-type]
    assert 0 < len(trace.answered) < 200
    assert max(each.arrived_s for each in trace.answered) < 0.05


def test_a_bound_on_those_in_flight_makes_arrivals_wait() -> None:
    engine = Engine()
    trace = offer(InProcess(engine), Prompts(3), Load(2, rate=1e5, num_requests=12))  # type: ignore[arg-type]
    assert engine.most_at_once <= 2 and len(trace.answered) == 12
    last = max(trace.answered, key=lambda each: each.arrived_s)
    assert last.ttft_s > last.reply.ttft_s and last.latency_s == pytest.approx(last.ended_s - last.arrived_s)


def test_percentiles_have_names() -> None:
    assert percentiles([]) == {}
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


def test_tokens_over_time_are_all_tokens() -> None:
    trace = Trace(
        answered=[Answered(0.0, 0.5, 1.0, Reply(0.2, 0.05, 8)), Answered(1.0, 1.0, 2.0, Reply(0.4, 0.05, 12))]
    )
    trace.wall_s = 2.0
    seconds, rates = tokens_over_time(trace, num_bins=10)
    assert (rates * 0.2).sum() == pytest.approx(20) and len(seconds) == 10
    assert rates[:3].sum() == 0, "the first one's first token comes after 0.7 s"
