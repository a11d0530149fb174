"""Gaps between tokens of streams while a long prompt arrives, as SVG text like `benchmarks.plot`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.plot import drawing, text

_LEFT, _WIDTH, _RIGHT = 60, 620, 20
_TOP, _HEIGHT, _BOTTOM = 50, 220, 60
_COLOURS = {"vision": "#d9e6f2", "prefill": "#fbe3c8"}
_LABELS = {"vision": "image", "prefill": "chunks of the prompt"}
_DOT, _LIMIT, _AXIS = "#4c78a8", "#e45756", "#333333"


def draw(result: Mapping[str, Any]) -> str:
    """Return each gap as a dot at the time of its end, over what the long prompt does then."""
    part = result["fairness"]
    points, phases = part["gaps"], part["phases"]
    first = min([0.0, *(each["at_s"] for each in points)])
    last = max([0.1, *(each["at_s"] for each in points), *(each["end_s"] for each in phases)])
    highest = max([1.1 * part["max_delay_ms"], *(1.1 * each["gap_ms"] for each in points)])
    base = _TOP + _HEIGHT

    def x(seconds: float) -> float:
        return _LEFT + _WIDTH * (seconds - first) / (last - first)

    def y(milliseconds: float) -> float:
        return base - _HEIGHT * milliseconds / highest

    title = (
        f"milliseconds between tokens of {part['streams']} streams; a prompt of {part['prompt_tokens']} tokens comes"
    )
    parts = [text(12, 20, title, weight="bold")]
    for each in phases:
        left, right = x(each["start_s"]), x(each["end_s"])
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_HEIGHT}" '
            f'fill="{_COLOURS[each["kind"]]}"/>'
        )
    parts.append(f'<path d="M {_LEFT} {_TOP} V {base} H {_LEFT + _WIDTH}" stroke="{_AXIS}" fill="none"/>')
    limit = f"{y(part['max_delay_ms']):.1f}"
    parts.append(f'<path d="M {_LEFT} {limit} H {_LEFT + _WIDTH}" stroke="{_LIMIT}" stroke-dasharray="4 3"/>')
    parts.append(text(_LEFT - 6, y(part["max_delay_ms"]) + 4, f"{part['max_delay_ms']:.0f}", anchor="end"))
    parts.append(text(_LEFT - 6, y(highest) + 4, f"{highest:.0f}", anchor="end"))
    parts += [
        f'<circle cx="{x(each["at_s"]):.1f}" cy="{y(each["gap_ms"]):.1f}" r="2" fill="{_DOT}"/>' for each in points
    ]
    for seconds in (first, 0.0, last):
        parts.append(text(x(seconds), base + 16, f"{seconds:.1f} s", anchor="middle"))
    legend = [(_COLOURS[kind], _LABELS[kind]) for kind in _COLOURS] + [(_LIMIT, "max_delay_ms")]
    for index, (colour, label) in enumerate(legend):
        left = _LEFT + 190 * index
        parts.append(f'<rect x="{left}" y="{base + 30}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(left + 18, base + 41, label))
    return drawing(_LEFT + _WIDTH + _RIGHT, base + _BOTTOM, 12, parts)
