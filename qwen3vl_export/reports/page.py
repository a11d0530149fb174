"""The page that a report is: one HTML file without script and without network, in light and dark, wide and narrow.

A report is a `Page` of cards and sections; a section holds elements: those of this module, and drawings. Widths of
drawings are percentages (`qwen3vl_export/reports/drawing.py`), so that their words keep their size on a narrow screen.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from engines.disk import check_file, replace_text
from qwen3vl_export.reports.elements import Child, element
from runtime.errors import UsageError
from runtime.shown import shown

MAX_BYTES = 3_000_000
"""What a report keeps below: one that is mailed and opened at once."""

# Whatever a report quotes, nothing of it is fetched or run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Tone(StrEnum):
    """What a value means, beside the words that say it: colour alone tells nothing to those who do not see it."""

    PLAIN = ""
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Card:
    """A figure that is seen first.

    Attributes:
        label: What it is.
        value: It, with its unit.
        detail: A line below.
        tone: Whether it is good.
    """

    label: str
    value: str
    detail: str = ""
    tone: Tone = Tone.PLAIN


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than a text.

    Attributes:
        content: What it shows.
        tone: Whether that is good.
        heat: Of a heat map: how much of the darkest ground it gets, from 0 to 1.
    """

    content: Child
    tone: Tone = Tone.PLAIN
    heat: float | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own.

    Attributes:
        title: The heading.
        parts: What it holds, in order.
    """

    title: str
    parts: Sequence[Element]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Of the file, and the heading.
        lead: A sentence that says what it comes to.
        cards: The figures that are seen first.
        sections: The rest.
        tone: Whether what the lead says is good.
    """

    title: str
    lead: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    tone: Tone = Tone.PLAIN

    def render(self) -> str:
        """Return the file."""
        html = element("html", self._head(), self._body(), lang="en")
        return f"<!doctype html>\n{to_html(html)}\n"

    def write(self, file: Path) -> None:
        """Write it; an older file stays until the new one is whole.

        Raises:
            UsageError: The folder cannot be written.
            CapacityError: The disk is full.
        """
        replace_text(file, self.render())

    def _head(self) -> Element:
        style = resources.files("qwen3vl_export.reports").joinpath("page.css").read_text(encoding="utf-8")
        return element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", self.title),
            element("link", rel="icon", href="data:,"),
            element("style", style),
        )

    def _body(self) -> Element:
        header = element(
            "header", element("h1", self.title), element("p", self.lead, class_=f"lead {self.tone}".rstrip())
        )
        cards = element("dl", *map(_card, self.cards), class_="cards") if self.cards else None
        sections = (element("section", element("h2", each.title), *each.parts) for each in self.sections)
        return element("body", header, element("main", cards, *sections))


def check_page(file: Path) -> None:
    """Check, before the work, that a page can be written.

    Raises:
        UsageError: The name does not end in .html, which browsers open as a page; or it is no place for a file.
        CapacityError: The disk is full.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {shown(str(file))}: a page is an .html file", remedy="give the file that suffix")
    check_file(file)


def to_html(part: Element) -> str:
    """Return a part of a page as text, such as for a notebook."""
    return ElementTree.tostring(part, encoding="unicode", method="html")


def paragraph(*children: Child) -> Element:
    """Return a paragraph."""
    return element("p", *children)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Cell | Child]], *, caption: str, numbers: Sequence[str] = ()
) -> Element:
    """Return a table, which scrolls in its place where it is too wide. The first cell of a row names it.

    Args:
        headers: Those of the columns.
        rows: Cells, as many as headers.
        caption: What it shows.
        numbers: Headers of the columns that hold numbers, which are aligned to the right.
    """
    classes = ["number" if header in numbers else None for header in headers]
    head = element(
        "tr", *(element("th", each, scope="col", class_=kind) for each, kind in zip(headers, classes, strict=True))
    )
    body = (
        element("tr", *(_cell(each, kind, i == 0) for i, (each, kind) in enumerate(zip(row, classes, strict=True))))
        for row in rows
    )
    made = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return scrolling(made, caption)


def facts(rows: Mapping[str, Child] | Sequence[tuple[str, Child]]) -> Element:
    """Return names and what they are: the environment, for instance."""
    pairs = rows.items() if isinstance(rows, Mapping) else rows
    parts = (element("div", element("dt", name), element("dd", value)) for name, value in pairs)
    return element("dl", *parts, class_="facts")


def figure(content: Element, caption: str) -> Element:
    """Return a drawing, or an image, with the words above it."""
    return element("figure", element("figcaption", caption), content)


def grid(*parts: Element) -> Element:
    """Return parts side by side, as many as the screen is wide for."""
    return element("div", *parts, class_="grid")


def picture(data: bytes, media_type: str, alt: str, **attributes: Any) -> Element:
    """Return an image that is part of the page.

    Args:
        data: The bytes of its file.
        media_type: Such as image/png.
        alt: What it shows, in words.
        **attributes: More of the element, such as `width`.
    """
    source = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return element("img", src=source, alt=alt, **attributes)


def folded(summary: str, *parts: Element) -> Element:
    """Return what is shown once its summary is chosen; needs no script."""
    return element("details", element("summary", summary), *parts)


def _card(card: Card) -> Element:
    detail = element("dd", card.detail, class_="detail") if card.detail else None
    return element(
        "div",
        element("dt", card.label),
        element("dd", card.value, class_="value"),
        detail,
        class_=f"card {card.tone}".rstrip(),
    )


def _cell(cell: Cell | Child, kind: str | None, is_first: bool) -> Element:
    found = cell if isinstance(cell, Cell) else Cell(cell)
    heat = None if found.heat is None else f"--heat: {min(1.0, max(0.0, found.heat)):.3f}"
    classes = " ".join(filter(None, (kind, found.tone, heat and "heat"))) or None
    tag, scope = ("th", "row") if is_first else ("td", None)
    return element(tag, found.content, scope=scope, class_=classes, style=heat)


def scrolling(content: Element, label: str) -> Element:
    """Return what is wider than a narrow screen, and scrolls in its place."""
    # What scrolls is reached by the keyboard, and then has to have a name.
    return element("div", content, class_="scrolling", tabindex="0", role="region", aria_label=label)
