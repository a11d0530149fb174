"""The search of the tuner on scripted measurements: what it takes, refuses, gives up, and leaves for want of time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from qwen3vl_export.bench.shift import Shift
from qwen3vl_export.tune.answers import Answer, deviation
from qwen3vl_export.tune.search import (
    EARLY_ROUNDS,
    LEAST_GAIN,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    NO_GAIN,
    NOISE_LIMIT,
    Outcome,
    Search,
    problem_of,
    spread,
)
from qwen3vl_export.tune.settings import Effect, Metric, Setting
from runtime.errors import CapacityError, EngineError
from runtime.tuning import Tuning

pytestmark = pytest.mark.portable

LIMITS = {"logits_scaled": 0.1, "near_tie_gap": 0.01}
LOGITS = np.eye(4, 6, dtype=np.float32)
ANSWER = Answer((0, 1, 2, 3), LOGITS)
CHUNK = Setting("prefill_chunk", 512, (256, 1024), (Metric.LONG_PROMPT,), Effect.ROUNDING)
PAGES = Setting("huge_pages", False, (True,), (Metric.PROMPT, Metric.STEP), Effect.SAME)
THREADS = Setting("threads", 2, (1,), (Metric.PROMPT, Metric.STEP), Effect.ROUNDING)


def one(tuning: Tuning, metric: Metric) -> float:
    return 1.0


@dataclass
class Script:
    """Measurements that follow a function of the tuning, with a clock that they move on.

    Attributes:
        seconds: What a call takes.
        answers: What is answered, where it is not `ANSWER`.
        noise: Factors that the calls take longer by, one after the other, for ever.
        request_s: What a request takes; by default the sum of all metrics.
    """

    seconds: Callable[[Tuning, Metric], float] = one
    answers: Callable[[Tuning], Answer] = lambda tuning: ANSWER
    noise: Sequence[float] = (1.0, 1.004, 0.997)
    request_s: Callable[[Tuning], float] | None = None
    now: float = 0.0
    calls: list[tuple[Tuning, Metric]] = field(default_factory=list)
    requests: list[Tuning] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._noise = itertools.cycle(self.noise)

    def clock(self) -> float:
        return self.now

    def time(self, tuning: Tuning, metric: Metric) -> float:
        self.calls.append((tuning, metric))
        taken = self.seconds(tuning, metric) * next(self._noise)
        self.now += taken
        return taken

    def answer(self, tuning: Tuning, tokens: Sequence[int] = ()) -> Answer:
        assert tuple(tokens) == (ANSWER.tokens if tuning != Tuning() else ()), "the defaults' tokens are given"
        return self.answers(tuning)

    def request(self, tuning: Tuning, index: int) -> Mapping[str, float]:
        self.requests.append(tuning)
        parts = [self.seconds(tuning, metric) for metric in Metric]
        taken = (self.request_s(tuning) if self.request_s else math.fsum(parts)) * next(self._noise)
        self.now += taken
        return {"ttft_s": taken, "tpot_s": taken / 10}


def search(script: Script, *settings: Setting, deadline: float = 1e9) -> Outcome:
    return Search(script, LIMITS, script.clock, deadline).run(settings)


def test_the_fastest_of_the_candidates_is_taken_and_the_others_are_judged() -> None:
    factors = {None: 1.0, 256: 0.9, 1024: 0.7}
    outcome = search(Script(lambda tuning, metric: factors[tuning.prefill_chunk]), CHUNK)
    (choice,) = outcome.choices
    assert choice.chosen == 1024 and outcome.tuning == Tuning(prefill_chunk=1024)
    first, second = choice.trials
    assert first.verdict == "faster, but another was faster still" and first.deviation is None
    assert second.verdict == "chosen" and second.deviation is not None and second.deviation.same_bits
    assert second.shifts[Metric.LONG_PROMPT].ratio == pytest.approx(0.7, rel=0.01)
    assert outcome.verdict == "faster than the defaults" and not outcome.is_noisy
    assert outcome.shifts["ttft_s"].ratio == pytest.approx(0.7, rel=0.01)


def test_a_later_setting_meets_what_was_chosen_before() -> None:
    def seconds(tuning: Tuning, metric: Metric) -> float:
        return (0.8 if tuning.huge_pages else 1.0) * (0.9 if tuning.threads == 1 else 1.0)

    script = Script(seconds)
    outcome = search(script, PAGES, THREADS)
    assert outcome.tuning == Tuning(huge_pages=True, threads=1)
    assert (Tuning(huge_pages=True, threads=1), Metric.STEP) in script.calls
    assert (Tuning(threads=1), Metric.STEP) not in script.calls
    # In turns, with another side first in every second round.
    defaults, both = Tuning(), Tuning(huge_pages=True, threads=1)
    assert script.requests[:4] == [both, defaults, defaults, both]
    assert len(script.requests) == 2 * (LEAST_ROUNDS + 1)


def test_an_answer_is_judged_with_all_that_was_chosen_before() -> None:
    def answers(tuning: Tuning) -> Answer:
        together = bool(tuning.huge_pages) and tuning.threads == 1
        return Answer(ANSWER.tokens, np.roll(LOGITS, int(together), axis=-1))

    def seconds(tuning: Tuning, metric: Metric) -> float:
        return (0.8 if tuning.huge_pages else 1.0) * (0.9 if tuning.threads == 1 else 1.0)

    outcome = search(Script(seconds, answers), PAGES, THREADS)
    assert outcome.tuning == Tuning(huge_pages=True)
    assert outcome.choices[1].trials[0].verdict == "refused: 4 of 4 tokens differ"


def test_the_first_requests_warm_up() -> None:
    times = {side: itertools.chain([100.0], itertools.repeat(usual)) for side, usual in ((False, 1.0), (True, 0.8))}
    script = Script(
        lambda tuning, metric: 0.8 if tuning.huge_pages else 1.0,
        request_s=lambda tuning: next(times[tuning != Tuning()]),
    )
    outcome = search(script, PAGES)
    assert [len(each["ttft_s"]) for each in (outcome.defaults, outcome.tuned)] == [LEAST_ROUNDS] * 2
    assert max(outcome.defaults["ttft_s"]) < 2


def test_what_is_slower_by_more_than_a_gain_is_not_taken_where_nothing_is_certain() -> None:
    # The one time is surely shorter; the other is longer on average, in an interval that 1 lies in.
    shifts = {Metric.PROMPT: Shift(0.5, 0.4, 0.6), Metric.STEP: Shift(1.05, 0.9, 1.2)}
    assert problem_of(shifts) == "slower: step"
    assert problem_of({**shifts, Metric.STEP: Shift(1 + LEAST_GAIN / 2, 0.9, 1.2)}) == ""
    assert problem_of({Metric.STEP: Shift(0.985, 0.98, 0.99)}) == NO_GAIN


def test_candidates_take_turns_and_who_is_slower_in_all_of_the_first_rounds_leaves() -> None:
    script = Script(lambda tuning, metric: {None: 1.0, 256: 1.5, 1024: 0.9}[tuning.prefill_chunk])
    outcome = search(script, CHUNK)
    of_chunks = [tuning.prefill_chunk for tuning, metric in script.calls if metric is Metric.LONG_PROMPT]
    assert of_chunks[:6] == [None, 256, 1024, 1024, 256, None]
    assert of_chunks.count(256) == EARLY_ROUNDS and of_chunks.count(1024) == of_chunks.count(None) == LEAST_ROUNDS
    assert outcome.choices[0].trials[0].verdict == "slower: long prompt"


@pytest.mark.parametrize("gain", [0.0, LEAST_GAIN / 2])
def test_what_gains_nothing_beyond_the_noise_is_not_taken(gain: float) -> None:
    outcome = search(Script(lambda tuning, metric: 1 - gain * (tuning != Tuning()), noise=(1, 1.03, 0.98, 1.01)), PAGES)
    assert outcome.tuning == Tuning() and outcome.choices[0].chosen is None
    assert outcome.choices[0].trials[0].verdict == NO_GAIN
    assert outcome.verdict == "the defaults are the best that was found" and outcome.defaults == {}


def test_an_undecided_contest_goes_on_while_it_is_promising() -> None:
    def rounds(factor: float) -> int:
        # Of two rounds, one in which the candidate loses.
        noise = itertools.cycle((1.0, 1.0, 1.1, 1.1, 1.0, 1.0, 0.9, 0.9))

        def seconds(tuning: Tuning, metric: Metric) -> float:
            return factor * next(noise) if tuning.huge_pages else 1.0

        script = Script(seconds, noise=(1.0,))
        outcome = search(script, PAGES)
        assert outcome.choices[0].chosen is None
        return script.calls.count((Tuning(huge_pages=True), Metric.STEP))

    assert rounds(0.97) == MOST_ROUNDS
    assert rounds(1.01) == EARLY_ROUNDS


def test_what_is_faster_here_and_slower_there_is_not_taken() -> None:
    def seconds(tuning: Tuning, metric: Metric) -> float:
        return {Metric.STEP: 0.5, Metric.PROMPT: 1.2}.get(metric, 1.0) if tuning.threads == 1 else 1.0

    outcome = search(Script(seconds), THREADS)
    assert outcome.tuning == Tuning()
    assert outcome.choices[0].trials[0].verdict == "slower: prompt"


def wrong_token(tuning: Tuning) -> Answer:
    logits = LOGITS.copy()
    logits[2] = np.roll(logits[2], int(tuning.prefill_chunk == 1024))
    return Answer(ANSWER.tokens, logits)


def other_logits(tuning: Tuning) -> Answer:
    return Answer(ANSWER.tokens, LOGITS + np.float32(0.2 * (tuning.prefill_chunk == 1024)))


def not_finite(tuning: Tuning) -> Answer:
    return Answer(ANSWER.tokens, LOGITS * np.float32(np.nan if tuning.prefill_chunk == 1024 else 1))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (wrong_token, "refused: 1 of 4 tokens differ"),
        (other_logits, "refused: logits differ by 0.2, at most 0.1"),
        (not_finite, "refused: 4 of 4 tokens differ"),
    ],
)
def test_a_candidate_that_answers_otherwise_is_refused_and_the_next_one_taken(
    answers: Callable[[Tuning], Answer], said: str
) -> None:
    script = Script(lambda tuning, metric: {None: 1.0, 256: 0.9, 1024: 0.5}[tuning.prefill_chunk], answers)
    outcome = search(script, CHUNK)
    assert outcome.tuning == Tuning(prefill_chunk=256)
    assert outcome.choices[0].trials[1].verdict == said


def test_bits_that_have_to_be_the_same_are() -> None:
    def answers(tuning: Tuning) -> Answer:
        return Answer(ANSWER.tokens, LOGITS * np.float32(1 + 1e-6 * bool(tuning.huge_pages)))

    outcome = search(Script(lambda tuning, metric: 0.5 if tuning.huge_pages else 1.0, answers), PAGES)
    assert outcome.tuning == Tuning()
    assert outcome.choices[0].trials[0].verdict.startswith("refused: logits differ by ")


def test_a_near_tie_may_change_places() -> None:
    expected = Answer((0, 1), np.array([[1, 0.995, 0], [0, 1, 0]], np.float32))
    found = Answer((0, 1), np.array([[0.994, 1, 0], [0, 1, 0]], np.float32))
    assert deviation(found, expected, LIMITS).refusal(Effect.ROUNDING, LIMITS) == ""
    assert deviation(found, expected, LIMITS | {"near_tie_gap": 0.001}).differing == 1


def test_a_choice_that_loses_against_the_defaults_is_given_up() -> None:
    script = Script(
        lambda tuning, metric: 0.8 if tuning.huge_pages else 1.0, request_s=lambda t: 1.1 if t.huge_pages else 1.0
    )
    outcome = search(script, PAGES)
    assert outcome.choices[0].chosen is True
    assert outcome.tuning == Tuning() and outcome.verdict == "slower: ttft_s"


def test_a_choice_that_gains_nothing_in_whole_requests_is_given_up() -> None:
    script = Script(lambda tuning, metric: 0.8 if tuning.huge_pages else 1.0, request_s=lambda t: 1.0)
    outcome = search(script, PAGES)
    assert outcome.tuning == Tuning() and outcome.verdict == NO_GAIN


def test_what_a_plain_request_does_not_show_is_timed_beside_it() -> None:
    images = Setting("vision_patches", 4096, (1,), (Metric.IMAGES,), Effect.ROUNDING)
    script = Script(
        lambda tuning, metric: 0.8 if tuning.vision_patches and metric is Metric.IMAGES else 1.0,
        request_s=lambda t: 1.0,
    )
    outcome = search(script, images)
    assert outcome.tuning == Tuning(vision_patches=1) and set(outcome.shifts) == {"ttft_s", "tpot_s", "images_s"}
    assert outcome.shifts["images_s"].ratio == pytest.approx(0.8, rel=0.01)
    # What it costs elsewhere counts.
    dear = Script(script.seconds, request_s=lambda t: 1.1 if t.vision_patches else 1.0)
    assert search(dear, images).verdict == "slower: ttft_s"


def test_what_there_is_no_time_for_keeps_its_default() -> None:
    script = Script(lambda tuning, metric: 0.5 if tuning != Tuning() else 1.0)
    outcome = search(script, PAGES, CHUNK, deadline=5.0)
    first, second = outcome.choices
    assert first.chosen is None and first.trials[0].verdict == "not decided: the time was over"
    assert second.note == "not measured: the time was over" and second.trials == ()
    assert outcome.tuning == Tuning()


def test_a_candidate_that_does_not_run_is_told_and_the_engine_itself_has_to() -> None:
    def seconds(tuning: Tuning, metric: Metric) -> float:
        if tuning.prefill_chunk == 1024:
            raise CapacityError("too little memory", remedy="less")
        return 0.9 if tuning.prefill_chunk else 1.0

    outcome = search(Script(seconds), CHUNK)
    assert outcome.tuning == Tuning(prefill_chunk=256)
    assert outcome.choices[0].trials[1].verdict == "does not run: too little memory"

    def fails(tuning: Tuning, metric: Metric) -> float:
        raise EngineError("broken", remedy="build it again")

    with pytest.raises(EngineError, match="broken"):
        search(Script(fails), CHUNK)


def test_noise_is_the_spread_of_the_defaults_own_times() -> None:
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0
    assert spread([0.8, 0.9, 1.0, 1.1, 1.2]) == pytest.approx(0.2)
    steady = search(Script(noise=(1.0, 1.01, 0.99)), PAGES)
    busy = search(Script(noise=(1.0, 1.5, 2.2, 1.1, 3.0)), PAGES)
    assert steady.noise <= 0.02 < NOISE_LIMIT < busy.noise
    assert busy.is_noisy and not steady.is_noisy


def test_what_becomes_noisy_at_the_end_counts() -> None:
    restless = itertools.cycle((1.0, 2.0))

    def request_s(tuning: Tuning) -> float:
        return (0.5 if tuning.huge_pages else 1.0) * next(restless)

    outcome = search(Script(lambda tuning, _: 0.8 if tuning.huge_pages else 1.0, request_s=request_s), PAGES)
    assert outcome.is_noisy
