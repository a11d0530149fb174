"""Figures that were asked for (`goals.toml`), beside those reached; from the result files alone."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import export, imports, run
from benchmarks.compare.tables import bytes_per_s
from benchmarks.compare.workloads import DECODE, Point
from benchmarks.result_files import Results, markdown

Result = Mapping[str, Any]
_IMPORT = "from qwen3_vl import Qwen3VLModel"  # more than the lazy `import qwen3_vl`


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for.

    Attributes:
        what: What is measured.
        unit: The unit, with its space.
        figure: Name of the function of `FIGURES` that finds it; KeyError where a result or a side is not there.
        at_most: The largest value that is good, or None if more is better.
        at_least: The smallest.
        results: Names of the results that it is in.
        side: Our side of a comparison.
        peers: Those that it is compared with.
        point: What both did.
        depends_on_pages: The same figure on huge pages is also given, but not judged.
    """

    what: str
    unit: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None
    results: tuple[str, ...] = ()
    side: str = ""
    peers: tuple[str, ...] = ()
    point: str = ""
    depends_on_pages: bool = True

    def row(self, results: Results, comparisons: tuple[str, ...]) -> tuple[str, str, str, str]:
        """Return the cells what, asked, reached, verdict."""
        limit, sign = (self.at_most, "≤") if self.at_most is not None else (self.at_least, "≥")
        assert limit is not None

        def text(value: float) -> str:
            is_near = abs(value - limit) < 0.02 * limit  # where two decimals could hide the verdict
            return f"{value:.{4 if is_near else 3}g}{self.unit}"

        value = self._value(results, comparisons, self.side)
        reached = "not measured" if value is None else text(value)
        if self.side and self.depends_on_pages:
            other = self._value(results, comparisons, f"{self.side}-huge-pages")
            reached += "" if other is None else f"; huge pages {text(other)}"
        verdict = "" if value is None else "yes" if (value <= limit if sign == "≤" else value >= limit) else "**no**"
        return self.what, f"{sign} {limit:g}{self.unit}", reached, verdict

    def _value(self, results: Results, comparisons: tuple[str, ...], side: str) -> float | None:
        function = FIGURES[self.figure]
        if not side:
            taken = [results.get(name) for name in self.results]
            return None if None in taken else function(*taken)
        for name in self.results or comparisons:
            try:
                return function(results[name], results[name]["sides"][side], self)
            except KeyError:
                continue
        return None


def _speed(phase: str) -> Callable[[Result], float]:
    return lambda result: run.speed(result, phase)


def _times_as_fast(result: Result, side: Result, goal: Goal) -> float:
    """Return how many times as fast as the fastest of the peers one of our sides is."""
    measured = [result["sides"][peer] for peer in goal.peers if peer in result["sides"]]
    if not measured:
        raise KeyError(f"none of {goal.peers} was measured")
    ours, *theirs = (float(each["points"][goal.point]["median_s"]) for each in (side, *measured))
    return min(theirs) / ours


def _memory_share(result: Result, side: Result, goal: Goal) -> float:
    num_cached = int(goal.point.split("-")[1])
    return 100 * bytes_per_s(Point(DECODE, num_cached), side) / float(result["ceilings"]["memory_bytes_per_s"])


def _first_token_over(result: Result, side: Result, goal: Goal) -> float:
    """Return our time from an image to the first token over that of the fastest peer that sees the same image.

    Raises:
        KeyError: No such peer was measured, or not PyTorch in bfloat16, which was the fastest wherever it took part.
    """
    result["sides"]["pytorch-bf16"]
    peers = [each for each in result["sides"].values() if not each["is_ours"] and each["has_vision"]]
    # The image has 3072 patches: a side that is done before its own vision tower could be has shrunk it.
    same = [each for each in peers if each["image"]["median_s"] > each["points"]["vision-3072-b1"]["median_s"]]
    if not same:
        raise KeyError("no peer sees the same image")
    return float(side["image"]["median_s"]) / min(float(each["image"]["median_s"]) for each in same)


def _rss_without_cache_gb(_: Result, side: Result, goal: Goal) -> float:
    return float(side["peak_rss_bytes"] - side["cache_bytes"]) / 1e9


FIGURES: Mapping[str, Callable[..., float]] = {
    "wall_s": lambda result: export.median(result, "wall_s"),
    "wall_s_beyond": lambda result, other: export.median(result, "wall_s") - export.median(other, "wall_s"),
    "cpu_s": lambda result: export.median(result, "cpu_s"),
    "peak_gb": lambda result: export.peak_bytes(result) / 1e9,
    "prefill_speed": _speed("prefill"),
    "decode_speed": _speed("decode"),
    "import_s": lambda result: imports.added_s(result, _IMPORT),
    "num_heavy_modules": lambda result: len(result["imports"][_IMPORT]["heavy_modules"]),
    "times_as_fast": _times_as_fast,
    "time_over": lambda *arguments: 1 / _times_as_fast(*arguments),
    "memory_share": _memory_share,
    "divergence_ratio": lambda result, side, goal: (
        side["divergence"]["mean_kl"] / result["sides"][goal.peers[0]]["divergence"]["mean_kl"]
    ),
    "first_token_over": _first_token_over,
    "load_s": lambda _, side, goal: float(side["load_s"]),
    "rss_without_cache_gb": _rss_without_cache_gb,
    "rss_beyond_weights_gb": lambda result, side, goal: (
        _rss_without_cache_gb(result, side, goal) - side["export"]["size_bytes"] / 1e9
    ),
    "export_wall_s": lambda _, side, goal: float(side["export"]["wall_s"]),
    "export_peak_gb": lambda _, side, goal: float(side["export"]["peak_rss_bytes"]) / 1e9,
}


def table(results: Results) -> str:
    """Return figure asked against figure reached."""
    settings = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    goals = [Goal(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()}) for each in settings["goals"]]
    rows = [goal.row(results, tuple(settings["comparisons"])) for goal in goals]
    return markdown([("figure", "asked", "reached", "met"), *rows])
