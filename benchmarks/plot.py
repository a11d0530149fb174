"""A bar chart of the engines' speed, as SVG text: the same results give the same bytes, and no library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.report import PHASES, speed

_LEFT, _WIDTH, _RIGHT = 330, 400, 60
_BAR, _ROW, _GROUP_GAP, _TOP, _BOTTOM = 16, 22, 16, 46, 24
_COLOURS = ("#4c78a8", "#f58518", "#54a24b")
_INK, PAPER = "#333333", "#ffffff"


def speeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return bars of PyTorch's time over the engine's, one group for each run, and a line at PyTorch's speed.

    Args:
        runs: Results of `python -m benchmarks run`.
    """
    longest = max([1.0, *(speed(run, phase) for run in runs for phase in PHASES)])
    scale = _WIDTH / longest
    height = _TOP + len(runs) * (len(PHASES) * _ROW + _GROUP_GAP) + _BOTTOM
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        text(12, 20, "speed, PyTorch fp32 on the same machine = 1 (longer is faster)", weight="bold"),
    ]
    y = _TOP
    for run in runs:
        parts.append(text(12, y + _ROW + 10, f"{run['model']}, {run['target']}"))
        for phase, colour in zip(PHASES, _COLOURS, strict=True):
            value = speed(run, phase)
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{value * scale:.1f}" height="{_BAR}" fill="{colour}"/>')
            parts.append(text(_LEFT - 6, y + 13, phase, anchor="end"))
            parts.append(text(_LEFT + value * scale + 5, y + 13, f"{value:.2f}"))
            y += _ROW
        y += _GROUP_GAP
    line = f"{_LEFT + scale:.1f}"
    parts.append(f'<path d="M {line} {_TOP - 12} V {y}" stroke="{_INK}" stroke-dasharray="4 3"/>')
    parts.append(text(_LEFT + scale, y + 14, "PyTorch", anchor="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )
