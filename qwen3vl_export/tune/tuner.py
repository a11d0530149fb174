"""`tune`: measure an engine, choose its settings, keep them; and what is said of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3vl_export.bench.shift import Shift
from qwen3vl_export.parity.limits import limits_of
from qwen3vl_export.tune.rig import Rig
from qwen3vl_export.tune.search import APART, NOISE_LIMIT, Choice, OnStep, Outcome, Search, Trial
from qwen3vl_export.tune.settings import settings_of
from qwen3vl_export.tune.store import store
from runtime.arguments import whole_number
from runtime.shown import columns
from runtime.tuning_store import Key, tuning_folder

DEFAULT_BUDGET_S = 180
_LEAST_BUDGET_S, _MOST_BUDGET_S = 10, 3600
# The rest is for the last contest, which repeats whole requests.
_SHARE_OF_CONTESTS = 0.65
_NAMES = {
    "ttft_s": "time to first token",
    "image_s": "image",
    "prefill_s": "prefill",
    "tpot_s": "time per token",
    **{name: metric.value for metric, name in APART.items()},
}


@dataclass(frozen=True)
class Report:
    """What a tuning found, and what became of it.

    Attributes:
        engine: The engine's folder.
        target: Its target.
        key: What the tuning is of.
        outcome: What was found.
        path: The file in which it is kept; None if it is not.
        reason: Why it is not kept; empty if it is.
        notes: What a reader of the figures should know.
        spent_s: Seconds that all took.
    """

    engine: Path
    target: str
    key: Key
    outcome: Outcome
    path: Path | None
    reason: str
    notes: tuple[str, ...]
    spent_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        outcome = self.outcome
        return {
            "engine": str(self.engine),
            "target": self.target,
            "machine": dict(self.key.machine),
            "versions": dict(self.key.versions),
            "noise": outcome.noise,
            "settings": outcome.tuning.values(),
            "verdict": outcome.verdict,
            "changes": changes_of(outcome),
            "tried": [_choice_dict(choice) for choice in outcome.choices],
            "stored": None if self.path is None else str(self.path),
            "reason": self.reason or None,
            "notes": list(self.notes),
            "spent_s": self.spent_s,
        }

    def render(self) -> str:
        """Return tables for people."""
        rows = [("SETTING", "DEFAULT", "CHOSEN", "TRIED")]
        for choice in self.outcome.choices:
            chosen = "default" if choice.chosen is None else _word(choice.chosen)
            first = (choice.setting.name, _word(choice.setting.default), chosen)
            tried = [_trial_text(trial) for trial in choice.trials] or [choice.note]
            rows += [(*(first if number == 0 else ("", "", "")), text) for number, text in enumerate(tried)]
        parts = [columns(rows)]
        if self.outcome.defaults:
            times = [("REQUEST", "DEFAULT", "TUNED", "FACTOR (95 % INTERVAL)")]
            for name, change in changes_of(self.outcome).items():
                pair = (f"{1e3 * change[side]:.1f} ms" for side in ("default_s", "tuned_s"))
                times.append((_NAMES[name], *pair, _shift_text(self.outcome.shifts[name])))
            parts.append(columns(times))
        end = [
            f"noise of repeated times: {100 * self.outcome.noise:.1f} %",
            f"verdict: {self.outcome.verdict}",
        ]
        end += [f"note: {note}" for note in self.notes]
        end.append(f"time: {self.spent_s:.0f} s")
        end.append(f"stored: {self.path}" if self.path is not None else f"nothing is stored: {self.reason}")
        return "\n\n".join("\n".join(part) for part in [*parts, end])


def tune(
    engine: Path,
    budget_s: int = DEFAULT_BUDGET_S,
    *,
    allow_approximate: bool = False,
    force: bool = False,
    keeps: bool = True,
    opening: Mapping[str, Any] | None = None,
    on_step: OnStep = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Measure which settings are faster for an engine on this machine, and keep them for later openings.

    Args:
        engine: Its folder.
        budget_s: About how many seconds it may take; what there is no time for is left as it is, and said.
        allow_approximate: Try settings that change what is computed, too, within the tolerance of the precision.
        force: Keep what was found on a busy machine as well.
        keeps: Keep anything at all.
        opening: Further arguments of `Qwen3VLModel.from_engine` for all measurements.
        on_step: Told what is being measured.
        clock: Returns seconds.

    Raises:
        UsageError: An argument is out of range, or the file cannot be written.
        EngineError, CapacityError: The engine does not open or run.
    """
    expected = f"{_LEAST_BUDGET_S} to {_MOST_BUDGET_S} seconds"
    whole_number("budget", budget_s, _LEAST_BUDGET_S, _MOST_BUDGET_S, expected, f"leave it out for {DEFAULT_BUDGET_S}")
    started = clock()
    on_step("opening the engine")
    with closing(Rig(engine, budget_s, opening, clock)) as rig:
        settings = settings_of(rig.manifest, rig.facts(), allow_approximate=allow_approximate)
        _, limits = limits_of(rig.manifest)
        search = Search(rig, limits, clock, started + _SHARE_OF_CONTESTS * budget_s, on_step)
        outcome = search.run(settings)
        notes = _notes(rig, outcome)
        manifest = rig.manifest
    key = Key.of(manifest)
    path, reason = None, _reason(outcome, force=force) if keeps else "it was not to be kept"
    if not reason:
        facts = {"noise": outcome.noise, "verdict": outcome.verdict, "changes": changes_of(outcome)}
        path = store(key, engine.resolve().name, manifest.target, outcome.tuning, facts)
    return Report(engine, manifest.target, key, outcome, path, reason, notes, clock() - started)


def changes_of(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Return the times of whole requests, medians of the rounds, and the factor between them; empty without any."""
    return {
        name: {
            "default_s": statistics.median(times),
            "tuned_s": statistics.median(outcome.tuned[name]),
            **asdict(outcome.shifts[name]),
        }
        for name, times in outcome.defaults.items()
    }


def _reason(outcome: Outcome, *, force: bool) -> str:
    """Return why a tuning is not to be kept; empty if it is."""
    if tuning_folder() is None:
        return "this user has no home folder; set XDG_CACHE_HOME"
    if outcome.is_noisy and not force:
        return (
            f"the same calls differ by {100 * outcome.noise:.0f} %, more than {100 * NOISE_LIMIT:.0f} %: this machine "
            "is busy; tune again when it is idle, or pass --force"
        )
    return ""


def _notes(rig: Rig, outcome: Outcome) -> tuple[str, ...]:
    notes = []
    if not rig.holds_two:
        notes.append("memory does not hold the engine twice, so it was opened anew for each turn")
    if any(choice.note for choice in outcome.choices):
        notes.append("a longer --budget measures what there was no time for")
    return tuple(notes)


def _choice_dict(choice: Choice) -> dict[str, Any]:
    setting = choice.setting
    return {
        "setting": setting.name,
        "effect": setting.effect.value,
        "default": setting.default,
        "chosen": choice.chosen,
        "note": choice.note or None,
        "candidates": [_trial_dict(trial) for trial in choice.trials],
    }


def _trial_dict(trial: Trial) -> dict[str, Any]:
    far = trial.deviation
    return {
        "value": trial.value,
        "verdict": trial.verdict,
        "factors": {metric.value: asdict(shift) for metric, shift in trial.shifts.items()},
        "same_bits": None if far is None else far.same_bits,
        "logits_scaled": None if far is None else far.logits_scaled,
    }


def _trial_text(trial: Trial) -> str:
    factors = ", ".join(f"{metric} {_shift_text(shift)}" for metric, shift in trial.shifts.items())
    answer = f", {trial.deviation}" if trial.deviation is not None else ""
    return f"{_word(trial.value)}: {trial.verdict}{answer}{f'; {factors}' if factors else ''}"


def _shift_text(shift: Shift) -> str:
    interval = "" if shift.low is None else f" ({shift.low:.2f} to {shift.high:.2f})"
    return f"{shift.ratio:.2f} ×{interval}"


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
