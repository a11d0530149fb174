"""Bars of the speeds of all sides, as SVG text like `benchmarks.plot`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.compare.tables import title, tokens_per_s
from benchmarks.compare.workloads import VISION, Point
from benchmarks.plot import bar, drawing, text

_SHOWN = ("vision-784-b1", "vision-3072-b1", "prefill-512-b1", "decode-512-b1", "decode-512-b4")
_LEFT, _WIDTH, _RIGHT = 190, 420, 90
_BAR, _ROW, _TITLE, _GAP = 14, 19, 24, 14
_OURS, _THEIRS = "#4c78a8", "#bab0ac"


def draw(result: Mapping[str, Any]) -> str:
    """Return a panel for each of a few points: images or tokens a second; our sides have a colour of their own."""
    points = [point for point in (Point(**values) for values in result["points"]) if point.name in _SHOWN]
    panel = _TITLE + len(result["sides"]) * _ROW + _GAP
    parts = []
    for index, point in enumerate(points):
        top = _GAP + index * panel
        unit = "images/s" if point.phase == VISION else "tokens/s"
        parts.append(text(12, top + 10, f"{title(point)}, {unit} (longer is faster)", weight="bold"))
        rates = {name: _rate(point, side) for name, side in result["sides"].items()}
        longest = max((rate for rate in rates.values() if rate), default=1.0)
        for row, (name, rate) in enumerate(rates.items()):
            y = top + _TITLE - 6 + row * _ROW
            length = _WIDTH * (rate or 0.0) / longest
            colour = _OURS if result["sides"][name]["is_ours"] else _THEIRS
            parts += bar(_LEFT, y, length, _BAR, colour, name, f"{rate:.3g}" if rate else "not measured")
    return drawing(_LEFT + _WIDTH + _RIGHT, len(points) * panel + _GAP, 12, parts)


def _rate(point: Point, side: Mapping[str, Any]) -> float | None:
    if point.name not in side["points"]:
        return None
    if point.phase == VISION:
        return 1 / float(side["points"][point.name]["median_s"])
    return tokens_per_s(point, side)
