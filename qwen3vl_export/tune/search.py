"""Choose settings one after the other, by contests in rounds, and judge the choice in a last one against the defaults.

A contest times the incumbent and all candidates of a setting in turns, every second round backwards, so that a busy
minute falls on all of them. Only the ratios within a round count (`qwen3vl_export.bench.shift.paired_shift`). A
candidate that is slower in every one of the first rounds, or faster in none of its times, leaves early. One wins if the
whole interval of a time lies below 1, by `LEAST_GAIN` at least, none of its times is longer, and its answer is that of
the defaults. What was chosen then meets the defaults in whole requests, and is given up if any of their times is
longer, or none is shorter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qwen3vl_export.bench.shift import Shift, Verdict, paired_shift
from qwen3vl_export.tune.answers import Answer, Deviation, deviation
from qwen3vl_export.tune.settings import Metric, Setting
from runtime.errors import CapacityError, EngineError
from runtime.tuning import Tuning

LEAST_GAIN = 0.02
"""A gain below this is not worth a setting, and a loss below it is not told from none."""
NOISE_LIMIT = 0.10
"""Spread of an incumbent's own times above which nothing is stored."""
EARLY_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 3, 6, 9
"""After so many a candidate may leave; so many an interval needs; so many are made where it does not tell."""
_CLEARLY_SLOWER = 1.03
NO_GAIN = "no gain beyond the noise"
BASE_METRICS = (Metric.IMAGE, Metric.PROMPT, Metric.STEP)
TTFT, IMAGE, PREFILL, TPOT = "ttft_s", "image_s", "prefill_s", "tpot_s"
"""Times of a whole request."""
APART = {Metric.IMAGES: "images_s", Metric.STEPS: "steps_s", Metric.DRAFTS: "drafts_s"}
"""What a request of one image, alone and without drafts, does not show, with its name beside those times."""

OnStep = Callable[[str], object]


class Measures(Protocol):
    """What the search asks of an engine; `qwen3vl_export.tune.rig.Rig` in earnest."""

    def time(self, tuning: Tuning, metric: Metric) -> float:
        """Return the seconds that something takes."""

    def answer(self, tuning: Tuning, tokens: Sequence[int] = ()) -> Answer:
        """Answer the reference prompt, greedily or with tokens that are given."""

    def request(self, tuning: Tuning, index: int) -> Mapping[str, float]:
        """Return the times of a whole request, by name; another index has another prompt."""


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it.

    Attributes:
        value: Of the setting.
        shifts: By what factor each time is longer than the incumbent's.
        verdict: In words.
        deviation: From the answer of the defaults; None if that was not looked at, since it was not faster.
    """

    value: Any
    shifts: Mapping[Metric, Shift]
    verdict: str
    deviation: Deviation | None = None


@dataclass(frozen=True)
class Choice:
    """What became of a setting.

    Attributes:
        setting: The setting.
        chosen: Its value; None is the default.
        trials: Of its candidates.
        note: Why there are none; empty otherwise.
    """

    setting: Setting
    chosen: Any
    trials: tuple[Trial, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the search found.

    Attributes:
        tuning: What is worth storing: nothing if the defaults are the best.
        choices: Of each setting.
        noise: Median spread of incumbents' own times; of the contests, or of the last one if that is larger.
        defaults: Times of whole requests with the defaults, and of calls that these do not show, by name, in rounds;
            empty where nothing was chosen.
        tuned: Those with what was chosen.
        verdict: Of the last contest, in words.
    """

    tuning: Tuning
    choices: tuple[Choice, ...]
    noise: float
    defaults: Mapping[str, Sequence[float]]
    tuned: Mapping[str, Sequence[float]]
    verdict: str

    @property
    def is_noisy(self) -> bool:
        """Whether the machine was too busy for the times to mean anything."""
        return self.noise > NOISE_LIMIT

    @property
    def shifts(self) -> dict[str, Shift]:
        """By what factor each time changed."""
        return {name: paired_shift(times, self.tuned[name]) for name, times in self.defaults.items()}


@dataclass
class Search:
    """A search, with a time by which it has to end.

    Attributes:
        measures: The engine.
        limits: Those of its precision, by name.
        clock: Returns seconds.
        deadline: When the contests have to be over, by the clock; the last one takes what it takes.
        on_step: Told what is being done.
    """

    measures: Measures
    limits: Mapping[str, float]
    clock: Callable[[], float]
    deadline: float
    on_step: OnStep = field(default=lambda text: None)

    def __post_init__(self) -> None:
        """Begin without any times."""
        self._spreads: list[float] = []

    def run(self, settings: Sequence[Setting]) -> Outcome:
        """Try all settings.

        Raises:
            EngineError, CapacityError: The engine does not run with its defaults.
        """
        tuning, choices = Tuning(), []
        for setting in settings:
            choice = self._choose(setting, tuning)
            choices.append(choice)
            if choice.chosen is not None:
                tuning = setting.of(tuning, choice.chosen)
        noise = statistics.median(self._spreads) if self._spreads else self._reference_noise()
        if tuning == Tuning():
            return Outcome(tuning, tuple(choices), noise, {}, {}, "the defaults are the best that was found")
        taken = [choice.setting for choice in choices if choice.chosen is not None]
        apart = {name: each for each, name in APART.items() if any(each in setting.metrics for setting in taken)}
        defaults, tuned = self._head_to_head(tuning, apart)
        noise = max(noise, statistics.median(map(spread, defaults.values())))
        problem = problem_of({name: paired_shift(times, tuned[name]) for name, times in defaults.items()})
        verdict = problem or "faster than the defaults"
        return Outcome(Tuning() if problem else tuning, tuple(choices), noise, defaults, tuned, verdict)

    def _reference_noise(self) -> float:
        """Return the spread of the defaults' own times, where no contest has told it."""
        taken: dict[Metric, list[float]] = {metric: [] for metric in BASE_METRICS}
        for number in range(LEAST_ROUNDS):
            self.on_step(f"noise of this machine, {number + 1} of {LEAST_ROUNDS}")
            for metric, times in taken.items():
                times.append(self.measures.time(Tuning(), metric))
        return statistics.median(map(spread, taken.values()))

    def _choose(self, setting: Setting, incumbent: Tuning) -> Choice:
        if self.clock() >= self.deadline:
            return Choice(setting, None, note="not measured: the time was over")
        contest = _Contest(setting, incumbent, self.measures)
        while contest.goes_on and self.clock() < self.deadline:
            self.on_step(f"{setting.name}: {contest.standing}")
            contest.play()
        self._spreads += contest.spreads()
        trials = contest.trials()
        won = [trial for trial in trials if not trial.verdict]
        taken: Trial | None = None
        for trial in sorted(won, key=_score):
            self.on_step(f"{setting.name} {trial.value}: comparing answers")
            judged = self._judged(setting, incumbent, trial)
            trials[trials.index(trial)] = judged
            if judged.verdict == "chosen":
                taken = judged
                break
        trials = [trial if trial.verdict else _said(trial, "faster, but another was faster still") for trial in trials]
        return Choice(setting, None if taken is None else taken.value, tuple(trials))

    def _judged(self, setting: Setting, incumbent: Tuning, trial: Trial) -> Trial:
        """Compare the answer of a winner with that of the defaults."""
        expected = self.measures.answer(Tuning())
        found = self.measures.answer(setting.of(incumbent, trial.value), expected.tokens)
        far = deviation(found, expected, self.limits)
        refusal = far.refusal(setting.effect, self.limits)
        return Trial(trial.value, trial.shifts, f"refused: {refusal}" if refusal else "chosen", far)

    def _head_to_head(
        self, tuning: Tuning, apart: Mapping[str, Metric]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return times by name and round, of the defaults and of a tuning in turns: whole requests, and calls apart."""
        sides: list[tuple[Tuning, dict[str, list[float]]]] = [(Tuning(), {}), (tuning, {})]
        for number in range(-1, LEAST_ROUNDS):  # the first one warms up
            self.on_step(f"tuned against the defaults, {number + 1} of {LEAST_ROUNDS}")
            for side, times in sides if number % 2 == 0 else sides[::-1]:
                found = dict(self.measures.request(side, number + 1))
                found |= {name: self.measures.time(side, metric) for name, metric in apart.items()}
                if number >= 0:
                    for name, seconds in found.items():
                        times.setdefault(name, []).append(seconds)
        return sides[0][1], sides[1][1]


class _Contest:
    """Rounds between an incumbent and the candidates of a setting."""

    def __init__(self, setting: Setting, incumbent: Tuning, measures: Measures) -> None:
        self._setting, self._measures, self._incumbent = setting, measures, incumbent
        self._times: dict[Any, dict[Metric, list[float]]] = {
            value: {metric: [] for metric in setting.metrics} for value in (None, *setting.candidates)
        }
        self._alive = list(setting.candidates)
        self._left: dict[Any, str] = {}
        self._num_rounds = 0

    @property
    def goes_on(self) -> bool:
        """Whether another round may tell something."""
        if not self._alive or self._num_rounds >= MOST_ROUNDS:
            return False
        return self._num_rounds < LEAST_ROUNDS or any(map(self._is_promising, self._alive))

    def spreads(self) -> list[float]:
        """Return how far the incumbent's own times lie apart, of those that were repeated."""
        return [spread(times) for times in self._times[None].values() if len(times) >= EARLY_ROUNDS]

    def _is_promising(self, value: Any) -> bool:
        """Whether a candidate seems faster, and the interval does not tell yet."""
        fastest = min(shift.ratio for shift in self._shifts(value).values())
        return self._verdict(value) == NO_GAIN and fastest <= 1 - LEAST_GAIN

    @property
    def standing(self) -> str:
        """Which round is next, of whom."""
        return f"{', '.join(map(str, self._alive))} against the default, round {self._num_rounds + 1}"

    def play(self) -> None:
        """Time everyone once."""
        order = [None, *self._alive]
        for value in order if self._num_rounds % 2 == 0 else order[::-1]:
            tuning = self._incumbent if value is None else self._setting.of(self._incumbent, value)
            try:
                for metric, times in self._times[value].items():
                    times.append(self._measures.time(tuning, metric))
            except (EngineError, CapacityError) as error:
                if value is None:
                    raise
                self._leave(value, f"does not run: {error.message}")
        self._num_rounds += 1
        if self._num_rounds >= EARLY_ROUNDS:
            for value in list(self._alive):
                if slow := self._slower_in_all_rounds(value):
                    self._leave(value, f"slower: {slow}")
                elif min(map(statistics.median, self._ratios(value).values())) >= 1:
                    self._leave(value, NO_GAIN)

    def trials(self) -> list[Trial]:
        """Return how the candidates did; the verdict of winners is empty."""
        return [
            Trial(value, self._shifts(value), self._left.get(value) or self._verdict(value))
            for value in self._setting.candidates
        ]

    def _leave(self, value: Any, reason: str) -> None:
        self._alive.remove(value)
        self._left[value] = reason

    def _slower_in_all_rounds(self, value: Any) -> Metric | None:
        """Return the first time that was longer in every round, and clearly so in most; None if there is none."""
        for metric, ratios in self._ratios(value).items():
            if min(ratios) > 1 and statistics.median(ratios) > _CLEARLY_SLOWER:
                return metric
        return None

    def _ratios(self, value: Any) -> dict[Metric, list[float]]:
        """Return the factor of each round, of a candidate that played all."""
        return {
            metric: [own / other for own, other in zip(times, self._times[None][metric], strict=True)]
            for metric, times in self._times[value].items()
        }

    def _shifts(self, value: Any) -> dict[Metric, Shift]:
        """Return the factors of those rounds that a candidate played; none if it played none."""
        found = {}
        for metric, times in self._times[value].items():
            if times:
                found[metric] = paired_shift(self._times[None][metric][: len(times)], times)
        return found

    def _verdict(self, value: Any) -> str:
        if self._num_rounds < LEAST_ROUNDS:
            return "not decided: the time was over"
        return problem_of(self._shifts(value))


def problem_of(shifts: Mapping[Any, Shift]) -> str:
    """Return why times are not those of a winner; empty if they are."""
    for name, shift in shifts.items():
        if shift.verdict is Verdict.SLOWER or shift.ratio > 1 + LEAST_GAIN:
            return f"slower: {name}"
    faster = [each for each in shifts.values() if each.verdict is Verdict.FASTER and each.ratio <= 1 - LEAST_GAIN]
    return "" if faster else NO_GAIN


def spread(times: Sequence[float]) -> float:
    """Return how far times of one thing lie apart: (third - first quartile) / median."""
    first, middle, third = np.quantile(times, (0.25, 0.5, 0.75))
    return float((third - first) / middle)


def _score(trial: Trial) -> float:
    """Return the geometric mean of the factors; less is better."""
    return math.exp(statistics.fmean(math.log(shift.ratio) for shift in trial.shifts.values()))


def _said(trial: Trial, verdict: str) -> Trial:
    return Trial(trial.value, trial.shifts, verdict, trial.deviation)
