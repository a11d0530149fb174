"""Compare a sweep with an earlier one, each point beside its old one; or engines that took turns with one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen3vl_export.bench.points import Point
from qwen3vl_export.bench.results import METRICS, Earlier, Result
from qwen3vl_export.bench.shift import CONFIDENCE, Shift, Verdict, paired_shift, shift
from runtime.shown import shown

# Of the engine and of the environment, what makes figures other figures; by the name that people know it by.
_ENGINE = {
    "target": "target",
    "model": "model",
    "files_sha256": "files of the engine (SHA-256)",
    "device": "device",
    "threads": "threads",
    "decode_recorded": "decode steps as a CUDA graph",
    "decode_kernels": "kernels of decode steps",
}
_ENVIRONMENT = {
    "cpu": "processor",
    "cpu_features": "features of the processor",
    "isa": "instruction set of the own kernels",
    "cores": "cores",
    "memory_bytes": "memory",
    "gpus": "GPU",
    "system": "system",
}
# Processes that ran in the minute before: what an idle machine stays below.
_BUSY = 0.5


@dataclass(frozen=True)
class Compared:
    """One figure of one point, and that which it is compared with.

    Attributes:
        engine: Name of the engine.
        point: What was asked.
        metric: Which time, a name of `METRICS`.
        baseline_s: Median that it is compared with.
        median_s: Its own.
        shift: By what factor the time is longer.
    """

    engine: str
    point: Point
    metric: str
    baseline_s: float
    median_s: float
    shift: Shift

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "baseline_median": self.baseline_s,
            "median": self.median_s,
            **asdict(self.shift),
            "verdict": self.shift.verdict.value,
        }


@dataclass(frozen=True)
class Comparison:
    """Figures side by side.

    Attributes:
        baseline: What they are compared with, in words.
        rows: Each figure that both have.
        only_earlier: Points, by the name of their engine, that only the earlier one has.
        only_now: The same of the present one.
        changes: What of engine, machine and libraries is not as it was, a sentence each.
    """

    baseline: str
    rows: tuple[Compared, ...]
    only_earlier: tuple[tuple[str, Point], ...] = ()
    only_now: tuple[tuple[str, Point], ...] = ()
    changes: tuple[str, ...] = ()

    def of(self, engine: str, point: Point) -> dict[str, Any] | None:
        """Return the figures of a point as plain values, by metric; None if there is none to compare with."""
        found = {row.metric: row.to_dict() for row in self.rows if (row.engine, row.point) == (engine, point)}
        return found or None

    def slower_than(self, factor: float) -> list[Compared]:
        """Return the figures whose whole interval is above a factor."""
        return [row for row in self.rows if row.shift.low is not None and row.shift.low > factor]

    @property
    def summary(self) -> str:
        """A sentence with the counts of the verdicts, and of how many chance alone would call other than the same."""
        counts = {each: sum(row.shift.verdict is each for row in self.rows) for each in Verdict}
        said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing to compare"
        judged = len(self.rows) - counts[Verdict.TOO_FEW]
        by_chance = (
            f"; by chance up to about {(1 - CONFIDENCE) * judged:.2g} would be called faster or slower"
            if judged
            else ""
        )
        different = counts[Verdict.FASTER] + counts[Verdict.SLOWER]
        return f"Of {len(self.rows)} figures against {self.baseline}: {said}{by_chance if different else ''}."


def by_name_of_now(earlier: Sequence[Earlier], names: Sequence[str]) -> dict[tuple[str, Point], Earlier]:
    """Return earlier points by what they are compared with: the name of an engine now, and what is asked.

    Names have to be the same. Where each side has one engine, they are those that are compared, whatever their names.

    Args:
        earlier: Those of the file.
        names: Of the engines now.
    """
    then_names = {each.engine for each in earlier}
    renamed = dict.fromkeys(then_names, names[0]) if len(set(names)) == len(then_names) == 1 else {}
    return {(renamed.get(each.engine, each.engine), each.point): each for each in earlier}


def compare(results: Sequence[Result], earlier: Sequence[Earlier]) -> Comparison:
    """Compare results with those of an earlier file.

    Args:
        results: Those of now.
        earlier: Those of the file.
    """
    then = by_name_of_now(earlier, [each.engine.engine for each in results])
    now = {(each.engine.engine, each.point): each for each in results}
    both = [key for key in now if key in then]
    rows = tuple(row for key in both for row in _rows(now[key], then[key]))
    changes = dict.fromkeys(change for key in both for change in _changes(now[key], then[key]))
    return Comparison(
        "the earlier file",
        rows,
        tuple((each.engine, each.point) for key, each in then.items() if key not in now),
        tuple(key for key in now if key not in then),
        tuple(changes),
    )


def compare_engines(results: Sequence[Result], baseline: str) -> Comparison:
    """Compare engines that took turns with one of them, round by round.

    Args:
        results: Those of one run.
        baseline: Name of the engine that the others are compared with.
    """
    of_baseline = {each.point: each for each in results if each.engine.engine == baseline}
    rows = []
    for each in results:
        for metric in METRICS if each.engine.engine != baseline else ():
            times, base = getattr(each, metric), getattr(of_baseline[each.point], metric)
            change = paired_shift(base.samples, times.samples)
            rows.append(Compared(each.engine.engine, each.point, metric, base.median, times.median, change))
    return Comparison(f"{baseline} in the same rounds", tuple(rows))


def _rows(now: Result, then: Earlier) -> Iterator[Compared]:
    for metric in METRICS:
        times, before = getattr(now, metric), then.samples[metric]
        yield Compared(
            now.engine.engine,
            now.point,
            metric,
            type(times)(before).median,
            times.median,
            shift(before, times.samples),
        )


def _changes(now: Result, then: Earlier) -> Iterator[str]:
    values = now.to_dict()
    if then.engine != now.engine.engine:
        yield f"another engine: {shown(then.engine)} then, {shown(now.engine.engine)} now"
    yield from _differences(_ENGINE, values, then.values, f"{now.engine.engine}: ")
    old, new = then.values["environment"], values["environment"]
    yield from _differences(_ENVIRONMENT, new, old)
    versions = old.get("versions") if isinstance(old.get("versions"), dict) else {}
    names = {name: f"version of {name}" for name in {**versions, **new["versions"]}}
    yield from _differences(names, new["versions"], versions)
    loads = old.get("load_average"), new["load_average"]
    if any(isinstance(load, (int, float)) and load > _BUSY for load in loads):
        yield f"load in the minute before: {_short(loads[0])} then, {_short(loads[1])} now; others were at work"


def _differences(
    names: Mapping[str, str], now: Mapping[str, Any], then: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    for key, name in names.items():
        before, after = then.get(key), now.get(key)
        if isinstance(after, tuple):
            after = list(after)
        if before != after:
            yield f"{prefix}{name}: {_short(before)} then, {_short(after)} now"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.2f}"
    # Of a hash, enough to tell two apart.
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
