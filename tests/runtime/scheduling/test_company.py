"""What a request answers does not depend on those beside it: random schedules against each request alone."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from engines.bundle import Bundle
from helpers.engines import build
from helpers.serving import alone, asked, serving, watched_logits
from runtime.contract import FloatArray
from runtime.errors import DeadlineError
from runtime.model import Qwen3VLModel

MAX_CONTEXT = 512
NUM_REQUESTS = 24
NUM_THREADS = 3
QUESTIONS = ("Read the digits.", "How many digits are there?", "Answer as JSON.", "Where is the 4?")
SYSTEM = {"role": "system", "content": "You look at pictures of digits and answer with as few words as you can. " * 2}


@dataclass
class Ask:
    """One request of a schedule, and what became of it.

    Attributes:
        cancel_after: Pieces after which the reader leaves; None to stay.
        timeout_s: Its deadline.
        pause_s: How long its caller waits before it asks.
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any]
    priority: int = 0
    cancel_after: int | None = None
    timeout_s: float | None = None
    pause_s: float = 0.0
    text: str = ""
    token_ids: list[int] | None = None
    error: Exception | None = None
    expected_ids: list[int] = field(default_factory=list)
    expected_text: str = ""
    expected_logits: list[FloatArray] = field(default_factory=list)

    @property
    def call(self) -> dict[str, Any]:
        return {**self.options, "priority": self.priority, "timeout_s": self.timeout_s}


def random_messages(draw: random.Random) -> list[dict[str, Any]]:
    """Return a text, pictures, or both, long or short, many with a beginning that others have as well."""
    kind = draw.randrange(6)
    if kind == 0:
        messages = asked(draw.choice(("Tell me. ", "Count. ")) * draw.choice((1, 4, 20, 30)))
    elif kind == 1:
        pixels = np.random.default_rng(draw.randrange(3)).integers(0, 256, (64, 96, 3), np.uint8)
        messages = asked(draw.choice(QUESTIONS), pixels)
    elif kind == 2:
        first = draw.randrange(3)
        messages = asked(draw.choice(QUESTIONS[:2]), first)
        messages += [{"role": "assistant", "content": draw.choice(("1654", "2"))}]
        messages += asked(draw.choice(QUESTIONS), *draw.choice(((), (first,), (5,))))
    else:
        messages = asked(draw.choice(QUESTIONS), *draw.choices(range(8), k=draw.choice((1, 1, 2, 3))))
    return [SYSTEM, *messages] if draw.random() < 0.5 else messages


def random_options(draw: random.Random, *, is_greedy: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": draw.choice((1, 2, 8, 24, 200))}
    if draw.random() < 0.5:
        options["eos_token_ids"] = (2,)
    if draw.random() < 0.3:
        options["stop"] = ["4", "e d"]
    if draw.random() < 0.4:
        options["prompt_lookup_num_tokens"] = draw.choice((1, 5))
    if is_greedy:
        return options
    if draw.random() < 0.4:
        options |= {"do_sample": True, "temperature": draw.choice((0.7, 3.0)), "seed": draw.randrange(100)}
    if draw.random() < 0.4:
        options |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    return options


def random_schedule(seed: int, *, is_greedy: bool = False) -> list[Ask]:
    draw = random.Random(seed)
    asks = []
    for _ in range(NUM_REQUESTS):
        ask = Ask(random_messages(draw), random_options(draw, is_greedy=is_greedy))
        ask.priority = draw.choice((0, 0, 0, 1, -1))
        ask.pause_s = draw.choice((0.0, 0.0, 0.002, 0.01))
        fate = draw.random()
        if fate < 0.2:
            ask.cancel_after = draw.choice((0, 1, 3))
        elif fate < 0.3:
            ask.timeout_s = draw.choice((-1.0, 0.005, 0.05))
        asks.append(ask)
    return asks


def run_here(model: Qwen3VLModel, ask: Ask) -> None:
    time.sleep(ask.pause_s)
    try:
        with model.stream(ask.messages, **ask.call) as stream:
            for number, piece in enumerate(stream):
                if number == ask.cancel_after:
                    return
                ask.text += piece
            assert stream.result is not None
            ask.token_ids = stream.result.token_ids
    except DeadlineError as error:
        ask.error = error


async def run_in_loop(model: Qwen3VLModel, ask: Ask) -> None:
    await asyncio.sleep(ask.pause_s)
    try:
        async with model.astream(ask.messages, **ask.call) as stream:
            number = 0
            async for piece in stream:
                if number == ask.cancel_after:
                    return
                ask.text, number = ask.text + piece, number + 1
            assert stream.result is not None
            ask.token_ids = stream.result.token_ids
    except DeadlineError as error:
        ask.error = error


def in_a_batch(model: Qwen3VLModel, asks: list[Ask]) -> None:
    """Run those of a schedule that are to be answered, in one call."""
    options = [model.defaults.replace(**ask.options) for ask in asks]
    for ask, outcome in zip(asks, model.generate_batch([ask.messages for ask in asks], options), strict=True):
        assert not isinstance(outcome, Exception)
        ask.text, ask.token_ids = outcome.text, outcome.token_ids


def run_schedule(model: Qwen3VLModel, asks: list[Ask]) -> None:
    """Run a schedule from threads, from an asyncio loop, and a part of it as a batch."""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    async def in_loop(part: list[Ask]) -> None:
        await asyncio.gather(*(run_in_loop(model, ask) for ask in part))

    stay = [ask for ask in asks if ask.cancel_after is None and ask.timeout_s is None]
    batch = stay[:5]
    rest = [ask for ask in asks if not any(ask is each for each in batch)]
    parts = [rest[number :: NUM_THREADS + 1] for number in range(NUM_THREADS + 1)]
    threads = [guarded(lambda part=part: [run_here(model, ask) for ask in part]) for part in parts[1:]]  # type: ignore[misc]
    threads.append(guarded(lambda: asyncio.run(in_loop(parts[0]))))
    threads.append(guarded(lambda: in_a_batch(model, batch)))
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    assert raised == []


def answer_alone(opened: Qwen3VLModel, ask: Ask) -> None:
    model = alone(opened, max_context=MAX_CONTEXT)
    with watched_logits() as watched:
        result = model.generate(ask.messages, **ask.options)
    ask.expected_ids, ask.expected_text = result.token_ids, result.text
    (ask.expected_logits,) = watched.values()
    model.close()


def run_both(opened: Qwen3VLModel, asks: list[Ask], **limits: Any) -> dict[str, Any]:
    """Run a schedule in company and each request alone; return the statistics of the company."""
    model = serving(opened, max_context=MAX_CONTEXT, **limits)
    run_schedule(model, asks)
    model.close()
    statistics = model.statistics()
    for ask in asks:
        answer_alone(opened, ask)
    return statistics


def check_ends(asks: list[Ask], statistics: dict[str, Any]) -> None:
    """Check that each request ended as it was to, and that nothing of it is left."""
    for ask in asks:
        if ask.error is None and ask.cancel_after is None:
            assert ask.token_ids is not None
        assert ask.error is None or ask.timeout_s is not None
    left = {name: statistics[name] for name in ("waiting", "waiting_tokens", "running", "decoding")}
    assert left == dict.fromkeys(left, 0)
    assert statistics["requests"]["failed"] == 0
    # Otherwise the schedule shows nothing.
    assert statistics["batch_size"]["sum"] > statistics["batch_size"]["count"] and statistics["prefix_hits"] > 0


def check_equal(asks: list[Ask]) -> None:
    for number, ask in enumerate(asks):
        if ask.token_ids is not None:
            assert ask.token_ids == ask.expected_ids, number
            assert ask.text == ask.expected_text, number
        else:
            assert ask.expected_text.startswith(ask.text), number


@pytest.fixture(scope="module")
def opened(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, threads=1)


def compare_in_float32(opened: Qwen3VLModel, seed: int) -> None:
    asks = random_schedule(seed)
    limits = [{}, {"max_sequences": 3, "kept_sequences": 0, "prefill_chunk": 7}, {"max_sequences": 8}]
    statistics = run_both(opened, asks, **limits[seed % 3])
    check_equal(asks)
    check_ends(asks, statistics)


@pytest.mark.portable
@pytest.mark.parametrize("seed", range(3))
def test_answers_in_company_are_those_alone(opened: Qwen3VLModel, seed: int) -> None:
    compare_in_float32(opened, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 40))
def test_answers_in_company_are_those_alone_in_more_schedules(opened: Qwen3VLModel, seed: int) -> None:
    compare_in_float32(opened, seed)


@pytest.fixture(scope="module", params=["int8", "int4"])
def few_bits(request: pytest.FixtureRequest, demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model in few bits, and how far below the largest logit another token's may be."""
    folder = tmp_path_factory.mktemp(request.param)
    engine = build(demo_bundle, f"ort-cpu-{request.param}", folder / "engine")
    gap = configs.load("tolerances")[request.param]["near_tie_gap"]
    return Qwen3VLModel.from_engine(engine, threads=1), gap


def check_nearly_equal(asks: list[Ask], near_tie_gap: float) -> int:
    """Check that answers differ at near-ties only, and return the number of those that do."""
    num_differing = 0
    for number, ask in enumerate(asks):
        if ask.token_ids is None or ask.token_ids == ask.expected_ids:
            continue
        num_differing += 1
        both = zip(ask.token_ids, ask.expected_ids, ask.expected_logits, strict=False)
        found, logits_V = next((ours, logits_V) for ours, theirs, logits_V in both if ours != theirs)
        assert logits_V.max() - logits_V[found] <= near_tie_gap, number
    return num_differing


def compare_in_few_bits(few_bits: tuple[Qwen3VLModel, float], seed: int) -> None:
    opened, near_tie_gap = few_bits
    asks = random_schedule(seed, is_greedy=True)
    statistics = run_both(opened, asks)
    check_ends(asks, statistics)
    num_differing = check_nearly_equal(asks, near_tie_gap)
    print(f"{num_differing} of {len(asks)} answers differ at a near-tie")  # pytest -rP shows it


@pytest.mark.portable
@pytest.mark.parametrize("seed", range(1))
def test_answers_in_few_bits_differ_at_near_ties_only(few_bits: tuple[Qwen3VLModel, float], seed: int) -> None:
    compare_in_few_bits(few_bits, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 14))
def test_answers_in_few_bits_differ_at_near_ties_only_in_more_schedules(
    few_bits: tuple[Qwen3VLModel, float], seed: int
) -> None:
    compare_in_few_bits(few_bits, seed)


class HalfAStep:
    """Hands a cache on that exchanges one row too few."""

    def __init__(self, swap_rows: Callable[[int, int, int], None]) -> None:
        self._swap_rows = swap_rows

    def __call__(self, slot: int, other: int, num_rows: int) -> None:
        self._swap_rows(slot, other, num_rows - 1)


@pytest.mark.portable
def test_a_row_that_stays_behind_is_noticed(opened: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch) -> None:
    new_cache = opened.session.new_cache

    def with_short_moves(capacity: int, batch: int = 1) -> Any:
        cache = new_cache(capacity, batch)
        monkeypatch.setattr(cache, "swap_rows", HalfAStep(cache.swap_rows))
        monkeypatch.setattr(cache, "copy_rows", HalfAStep(cache.copy_rows))
        return cache

    monkeypatch.setattr(opened.session, "new_cache", with_short_moves)
    asks = random_schedule(0)
    run_both(opened, asks)
    with pytest.raises(AssertionError):
        check_equal(asks)
