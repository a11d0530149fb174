"""Bar charts as SVG text: the same results give the same bytes, and no library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.run import PHASES, speed

_LEFT, _WIDTH, _RIGHT = 330, 400, 60
_BAR, _ROW, _GROUP_GAP, _TOP, _BOTTOM = 16, 22, 16, 46, 24
_COLOURS = ("#4c78a8", "#f58518", "#54a24b")
_INK, _PAPER = "#333333", "#ffffff"


def speeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return bars of PyTorch's time over the engine's, one group for each run, and a line at PyTorch's speed.

    Args:
        runs: Results of `python -m benchmarks run`.
    """
    scale = _WIDTH / max([1.0, *(speed(run, phase) for run in runs for phase in PHASES)])
    parts = [text(12, 20, "speed, PyTorch fp32 on the same machine = 1 (longer is faster)", weight="bold")]
    y = _TOP
    for run in runs:
        parts.append(text(12, y + _ROW + 10, f"{run['model']}, {run['target']}"))
        for phase, colour in zip(PHASES, _COLOURS, strict=True):
            value = speed(run, phase)
            parts += bar(_LEFT, y, value * scale, _BAR, colour, phase, f"{value:.2f}")
            y += _ROW
        y += _GROUP_GAP
    line = f"{_LEFT + scale:.1f}"
    parts.append(f'<path d="M {line} {_TOP - 12} V {y}" stroke="{_INK}" stroke-dasharray="4 3"/>')
    parts.append(text(_LEFT + scale, y + 14, "PyTorch", anchor="middle"))
    height = _TOP + len(runs) * (len(PHASES) * _ROW + _GROUP_GAP) + _BOTTOM
    return drawing(_LEFT + _WIDTH + _RIGHT, height, 13, parts)


def drawing(width: int, height: int, font_size: int, parts: Sequence[str]) -> str:
    """Return a drawing of some parts on white paper; all sizes in pixels."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{font_size}">'
    )
    paper = f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>'
    return "\n".join([head, paper, *parts, "</svg>"]) + "\n"


def bar(left: int, y: int, length: float, thickness: int, colour: str, label: str, value: str) -> list[str]:
    """Return a horizontal bar with its label before and its value after it."""
    base = y + thickness - 3
    return [
        f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{thickness}" fill="{colour}"/>',
        text(left - 6, base, label, anchor="end"),
        text(left + length + 5, base, value),
    ]


def text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )
