"""Drawings of rows on one axis, as SVG: dots and boxes, bars of segments, intervals.

Positions along the axis are percentages of the width and text has one size, so a drawing fits each screen and stays
readable. Each row has its words above it, and each mark says on hovering what it is. No script is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np

from qwen3vl_export.reports.elements import element

Format = Callable[[float], str]

_ROW, _WORDS, _TICKS = 46, 16, 24
"""Heights in pixels: of a row, of the words at its top, and of the axis."""
_MIDDLE = _WORDS + (_ROW - _WORDS) / 2
_SERIES = 6


@dataclass(frozen=True)
class Axis:
    """A range of values along the width.

    Attributes:
        low: The left end.
        high: The right one, above it.
        show: Writes a value.
    """

    low: float
    high: float
    show: Format

    @classmethod
    def of(cls, values: Sequence[float], show: Format, *, from_zero: bool = False) -> Axis:
        """Return one with room for some values, from zero on or with a margin of a twentieth on both sides."""
        low, high = (0.0 if from_zero else min(values)), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low if from_zero else low - margin, high + (0.0 if from_zero and high > low else margin), show)

    def at(self, value: float) -> str:
        """Return where a value is."""
        return f"{self._share(value):.3f}%"

    def width(self, low: float, high: float) -> str:
        """Return how far apart two values are."""
        return f"{max(0.0, self._share(high) - self._share(low)):.3f}%"

    @property
    def ticks(self) -> list[float]:
        """Round values, three to five or so."""
        rough = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _share(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Samples:
    """A row of dots, one for each value, with a box of the quartiles, a line at the median and one to both extremes.

    Attributes:
        label: The words above it.
        values: In order.
        series: Number of its colour.
        most_dots: Of more values, only as many are dots, evenly chosen; box and lines are those of all.
    """

    label: str
    values: Sequence[float]
    series: int = 0
    most_dots: int = 200

    def marks(self, axis: Axis) -> list[Element]:
        """Return what is drawn."""
        low, first, median, third, high = np.percentile(self.values, [0, 25, 50, 75, 100])
        said = f"median {axis.show(median)}, quartiles {axis.show(first)} to {axis.show(third)}"
        box = element("rect", element("title", said), x=axis.at(first), width=axis.width(first, third))
        _place(box, class_="mark", y=_MIDDLE - 9, height=18, fill_opacity=0.18, rx=2)
        whisker = _line(axis.at(low), axis.at(high), _MIDDLE, _MIDDLE)
        middle = _line(axis.at(median), axis.at(median), _MIDDLE - 9, _MIDDLE + 9, stroke_width=3)
        return [whisker, box, *self._dots(axis), middle]

    def _dots(self, axis: Axis) -> list[Element]:
        """Return dots in four lanes, so that equal values lie beside each other."""
        step = math.ceil(len(self.values) / self.most_dots)
        dots = []
        for index in range(0, len(self.values), step):
            value = self.values[index]
            dot = element("circle", element("title", f"repetition {index + 1}: {axis.show(value)}"), cx=axis.at(value))
            _place(dot, class_="mark", cy=_MIDDLE - 6 + 4 * (index // step % 4), r=3, fill_opacity=0.65, stroke="none")
            dots.append(dot)
        return dots


@dataclass(frozen=True)
class Segment:
    """A part of a bar, from one value to another."""

    name: str
    start: float
    end: float
    series: int


@dataclass(frozen=True)
class Bar:
    """A row of segments; with ticks, thin lines at values within them."""

    label: str
    segments: Sequence[Segment]
    ticks: Sequence[float] = ()

    def marks(self, axis: Axis) -> list[Element]:
        """Return what is drawn."""
        found = []
        for each in self.segments:
            said = f"{each.name}: {axis.show(each.end - each.start)}"
            bar = element("rect", element("title", said), x=axis.at(each.start), width=axis.width(each.start, each.end))
            found.append(_place(bar, class_=f"mark {series(each.series)}", y=_WORDS + 7, height=20, stroke="none"))
        for value in self.ticks:
            line = element("line", x1=axis.at(value), x2=axis.at(value))
            found.append(_place(line, class_="tick", y1=_WORDS + 7, y2=_WORDS + 27))
        return found


@dataclass(frozen=True)
class Interval:
    """A row with an estimate and its interval; without ends, the estimate alone."""

    label: str
    value: float
    low: float | None
    high: float | None
    series: int = 0

    def marks(self, axis: Axis) -> list[Element]:
        """Return what is drawn."""
        dot = element("circle", element("title", f"{axis.show(self.value)}"), cx=axis.at(self.value))
        marks = [_place(dot, class_="mark", cy=_MIDDLE, r=5, stroke="none")]
        if self.low is None or self.high is None:
            return marks
        ends = (_line(axis.at(each), axis.at(each), _MIDDLE - 7, _MIDDLE + 7, stroke_width=2) for each in self.ends)
        return [_line(axis.at(self.low), axis.at(self.high), _MIDDLE, _MIDDLE, stroke_width=2), *ends, *marks]

    @property
    def ends(self) -> tuple[float, ...]:
        """Both ends, or none."""
        return () if self.low is None or self.high is None else (self.low, self.high)


Row = Samples | Bar | Interval


def drawing(rows: Sequence[Row], axis: Axis, label: str, *, mark: float | None = None) -> Element:
    """Return rows above their axis.

    Args:
        rows: From top to bottom.
        axis: That of all.
        label: What the drawing shows, for those who do not see it.
        mark: A value at which a line goes through all rows.
    """
    height = _ROW * len(rows)
    parts: list[Element] = []
    for value in axis.ticks:
        parts.append(element("line", class_="axis", x1=axis.at(value), x2=axis.at(value), y1=0, y2=height + 4))
        text = element("text", axis.show(value), x=axis.at(value), y=height + 18, text_anchor="middle")
        parts.append(_place(text, class_="quiet"))
    if mark is not None:
        line = element("line", x1=axis.at(mark), x2=axis.at(mark), y1=0, y2=height, stroke_dasharray="4 3")
        parts.append(_place(line, class_="reference"))
    for index, row in enumerate(rows):
        # Of HTML, since text of SVG cannot be cut where the drawing ends.
        words = element("div", row.label, class_="words", title=row.label)
        words = element("foreignObject", words, x=0, y=0, width="100%", height=_WORDS + 2)
        colour = "" if isinstance(row, Bar) else series(row.series)
        parts.append(element("g", words, *row.marks(axis), class_=colour, transform=f"translate(0 {_ROW * index})"))
    svg = element("svg", *parts, role="img", aria_label=label, height=height + _TICKS)
    return element("div", svg, class_="drawing")


def legend(names: Sequence[str]) -> Element:
    """Return what the colours of series 0, 1, … stand for."""
    items = (element("li", element("span"), element("b", name), class_=series(i)) for i, name in enumerate(names))
    return element("ul", *items, class_="legend")


def series(number: int) -> str:
    """Return the class of a series; colours repeat after the sixth."""
    return f"series-{number % _SERIES}"


def _line(x1: str, x2: str, y1: float, y2: float, **attributes: object) -> Element:
    return element("line", class_="mark", x1=x1, x2=x2, y1=y1, y2=y2, **attributes)


def _place(made: Element, **attributes: object) -> Element:
    """Add attributes to an element, and return it."""
    made.attrib.update(element(made.tag, **attributes).attrib)
    return made
