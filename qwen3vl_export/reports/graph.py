"""An engine's graph as a drawing: the vision tower at the left, the decoder at the right, DeepStack between them.

The chain of either goes from top to bottom, so that no layout has to be searched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from engines.disk import replace_text
from qwen3vl_export.reports.elements import element
from qwen3vl_export.reports.page import Card, Page, Section, facts, figure, scrolling, table
from qwen3vl_export.reports.pieces import OTHER, EngineGraph, Part, Piece
from runtime.errors import UsageError

SUFFIXES = (".svg", ".html")

_WIDTH = 960
_LEFT, _RIGHT, _BOX = 40, 520, 400
"""Left edges of both columns, and the width of a box."""
_TOP, _HEAD, _ROW, _GAP = 70, 30, 22, 40
_BAR = 90

_COLOURS = {
    "float32": "#4f6d8f",
    "float16": "#2f7fd1",
    "bfloat16": "#1ba3b8",
    "float8": "#8a56c9",
    "int8": "#2e9e5b",
    "int4": "#d9822b",
    "float4": "#cf3f5b",
    OTHER: "#8c8c8c",
}
# Its own names of classes, since the styles of a page hold for a drawing in it, too.
_STYLE = """
.graph { --ink: #1b1b24; --soft: #565669; --sheet: #ffffff; --edge: #8a8a9c; }
@media (prefers-color-scheme: dark) {
  .graph { --ink: #ececf3; --soft: #b0b0c2; --sheet: #1e1e28; --edge: #85859a; }
}
.graph text { font: 13px/16px system-ui, sans-serif; fill: var(--ink); }
.graph text.soft { fill: var(--soft); }
.graph text.strong { font-weight: 600; }
.graph .box { fill: var(--sheet); stroke: var(--edge); }
.graph .edge { fill: none; stroke: var(--edge); stroke-width: 1.5; }
.graph .arrow { fill: var(--edge); }
"""


def check_suffix(file: Path) -> None:
    """Check the name of a drawing.

    Raises:
        UsageError: It is neither .svg nor .html.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--graph {file}: a graph is drawn into a .svg or a .html file",
            remedy="give the file one of these suffixes",
        )


def write_graph(graph: EngineGraph, file: Path) -> None:
    """Write a drawing, or a page with it and a table.

    Raises:
        UsageError: As `check_suffix`, or the folder cannot be written.
    """
    check_suffix(file)
    if file.suffix.lower() == ".html":
        graph_page(graph).write(file)
        return
    svg = graph_svg(graph)
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    replace_text(file, f"{ElementTree.tostring(svg, encoding='unicode')}\n")


def graph_page(graph: EngineGraph) -> Page:
    """Return a page with the drawing, and with its figures as a table."""
    manifest = graph.manifest
    rows = [
        [piece.title, part.name, ", ".join(part.formats), size(part.total), size(piece.count * part.total)]
        for piece in graph.pieces
        for part in piece.parts
    ]
    name = str(manifest.source.get("name"))
    total = sum(piece.total for piece in graph.pieces)
    notes = [("target", manifest.target), ("checkpoint", name)]
    notes += [("further graphs, not drawn", ", ".join(graph.others))] if graph.others else []
    drawn = scrolling(graph_svg(graph), "The graph")
    return Page(
        f"Graph of {name} for {manifest.target}",
        "Vision tower and decoder by pieces, with the formats and the sizes of their weights.",
        [
            Card("Weights of the pieces", size(total)),
            Card("KV cache of a token", size(graph.cache_bytes_per_token)),
            Card(
                "Layers", str(manifest.model.text.num_layers), f"and {manifest.model.vision.depth} of the vision tower"
            ),
        ],
        [
            Section("Graph", [figure(drawn, "Sizes are those of one of several like layers; hover over a bar.")]),
            Section(
                "Weights",
                [
                    table(
                        ["piece", "part", "formats", "of one", "together"],
                        rows,
                        caption="Formats, that of most bytes first",
                        numbers=["of one", "together"],
                    ),
                    facts(notes),
                ],
            ),
        ],
    )


@dataclass(frozen=True)
class _Box:
    """A piece in its place."""

    piece: Piece
    x: int
    y: int

    @property
    def height(self) -> int:
        """Of the box."""
        return _HEAD + _ROW * max(1, len(self.piece.parts)) + 6

    @property
    def end(self) -> int:
        """Its lower edge."""
        return self.y + self.height

    @property
    def middle(self) -> float:
        """Of its height."""
        return self.y + self.height / 2


def graph_svg(graph: EngineGraph) -> Element:
    """Return the drawing."""
    model = graph.manifest.model
    left = _stacked([graph.patches, *graph.blocks, graph.merger, *graph.deepstack], _LEFT)
    right = _stacked([graph.embedding, *graph.layers, graph.head], _RIGHT)
    patches, visual = f"[P, {model.vision.hidden_size}]", f"[{len(model.vision.deepstack_layers) + 1}, V, "
    hidden = f"[B, S, {model.text.hidden_size}]"
    num_chain = 2 + len(graph.blocks)
    parts = [element("style", _STYLE), *_headings(graph, left[0], right[0])]
    for above, below in itertools.pairwise(left[:num_chain]):
        parts += _down(above, below, patches)
    for above, below in itertools.pairwise(right):
        parts += _down(above, below, hidden)
    parts += _across(left[num_chain - 1], right[0], 470, f"{visual}{model.text.hidden_size}]")
    takes_levels = right[1]
    for number, box in enumerate(left[num_chain:]):
        parts += _across(box, takes_levels, 490 + 6 * number, "")
    taps = [box for box in left[1 : num_chain - 1] if _last(box.piece) in model.vision.deepstack_layers]
    for tap in taps:
        parts += _tapped(tap, left[num_chain:])
    for box in (*left, *right):
        parts.append(_drawn(box))
    bottom = max(left[-1].end, right[-1].end + 120)
    parts += _cache(graph, right[-1].end + 52)
    parts += _legend(graph, bottom + 40)
    return element(
        "svg",
        *parts,
        class_="graph",
        role="img",
        aria_label="The engine's graph by pieces",
        viewBox=f"0 0 {_WIDTH} {bottom + 70}",
        width=_WIDTH,
        height=bottom + 70,
        style=f"min-width: {_WIDTH}px",
    )


def size(num_bytes: int) -> str:
    """Return bytes in a unit that suits them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}"
    return f"{num_bytes} B"


def _last(piece: Piece) -> int:
    return (piece.first or 0) + piece.count - 1


def _stacked(pieces: Sequence[Piece], x: int) -> list[_Box]:
    boxes: list[_Box] = []
    for piece in pieces:
        boxes.append(_Box(piece, x, boxes[-1].end + _GAP if boxes else _TOP))
    return boxes


def _headings(graph: EngineGraph, left: _Box, right: _Box) -> Iterator[Element]:
    shapes = (f"pixel_values {graph.inputs['pixel_values']}", f"input_ids {graph.inputs['input_ids']}")
    for box, name, shape in zip((left, right), ("Vision tower", "Decoder"), shapes, strict=True):
        yield element("text", name, x=box.x, y=22, class_="strong")
        yield element("text", shape, x=box.x + _BOX / 2 + 10, y=48, class_="soft")
        yield from _line([(box.x + _BOX / 2, 34), (box.x + _BOX / 2, box.y)])


def _drawn(box: _Box) -> Element:
    """Return a box with a row for each part."""
    piece = box.piece
    parts = [element("rect", x=box.x, y=box.y, width=_BOX, height=box.height, rx=8, class_="box")]
    parts.append(element("text", piece.title, x=box.x + 12, y=box.y + 20, class_="strong"))
    said = f"x {piece.count}, {size(piece.total)} together" if piece.count > 1 else size(piece.total)
    parts.append(element("text", said, x=box.x + _BOX - 12, y=box.y + 20, text_anchor="end", class_="soft"))
    for number, part in enumerate(piece.parts):
        parts.append(_row(part, box.x, box.y + _HEAD + _ROW * number))
    if not piece.parts:
        parts.append(element("text", "no weights of its own", x=box.x + 12, y=box.y + _HEAD + 15, class_="soft"))
    return element("g", *parts)


def _row(part: Part, x: int, y: int) -> Element:
    said = ", ".join(f"{name} {size(part.num_bytes[name])}" for name in part.formats)
    parts = [element("title", f"{part.name}: {said}"), element("text", part.name, x=x + 12, y=y + 15)]
    start = float(x + 130)
    for name in part.formats:
        width = _BAR * part.num_bytes[name] / max(1, part.total)
        parts.append(element("rect", x=start, y=y + 5, width=width, height=12, fill=_COLOURS[name]))
        start += width
    parts.append(element("text", part.formats[0], x=x + 130 + _BAR + 10, y=y + 15, class_="soft"))
    parts.append(element("text", size(part.total), x=x + _BOX - 12, y=y + 15, text_anchor="end"))
    return element("g", *parts)


def _down(above: _Box, below: _Box, shape: str) -> Iterator[Element]:
    middle = above.x + _BOX / 2
    yield from _line([(middle, above.end), (middle, below.y)])
    yield element("text", shape, x=middle + 10, y=above.end + _GAP / 2 + 3, class_="soft")


def _across(box: _Box, target: _Box, x: float, shape: str) -> Iterator[Element]:
    """Draw from the right of a box through the middle to the left of another."""
    start, end = box.x + _BOX, target.x
    # Lines that arrive at one box arrive beside each other.
    arrival = target.middle + (x - 490) / 2
    yield from _line([(start, box.middle), (x, box.middle), (x, arrival), (end, arrival)])
    if shape:
        yield element("text", shape, x=start, y=box.end + 18, text_anchor="end", class_="soft")


def _tapped(tap: _Box, mergers: Sequence[_Box]) -> Iterator[Element]:
    """Draw from the end of a run of blocks along the left edge to the DeepStack mergers."""
    for merger in mergers:
        x = 22
        points = [(tap.x, tap.end - 10), (x, tap.end - 10), (x, merger.middle), (merger.x, merger.middle)]
        yield from _line(points)


def _line(points: Sequence[tuple[float, float]]) -> Iterator[Element]:
    """Draw a line with an arrow at its end."""
    yield element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_="edge")
    (x0, y0), (x, y) = points[-2:]
    side = ((x - 8, y - 4), (x - 8, y + 4)) if y == y0 and x > x0 else ((x - 4, y - 8), (x + 4, y - 8))
    corners = [(x, y), *side]
    yield element("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), class_="arrow")


def _cache(graph: EngineGraph, y: int) -> Iterator[Element]:
    """Draw what leaves the head, and the KV cache below it."""
    text, key = graph.manifest.model.text, graph.inputs.get("past_key_values.0.key", "")
    middle = _RIGHT + _BOX / 2
    yield from _line([(middle, y - 52), (middle, y - 14)])
    yield element("text", f"logits [B, L, {text.vocab_size}]", x=middle + 10, y=y - 24, class_="soft")
    yield element("rect", x=_RIGHT, y=y, width=_BOX, height=56, rx=8, class_="box", stroke_dasharray="5 4")
    yield element("text", "KV cache", x=_RIGHT + 12, y=y + 20, class_="strong")
    said = f"{size(graph.cache_bytes_per_token)} a token"
    yield element("text", said, x=_RIGHT + _BOX - 12, y=y + 20, text_anchor="end", class_="soft")
    shape = f"keys and values of {text.num_layers} layers, {key} each"
    yield element("text", shape, x=_RIGHT + 12, y=y + 42)


def _legend(graph: EngineGraph, y: int) -> Iterator[Element]:
    present = {name for piece in graph.pieces for part in piece.parts for name in part.num_bytes}
    x = _LEFT
    for name in (name for name in _COLOURS if name in present):
        yield element("rect", x=x, y=y - 11, width=12, height=12, fill=_COLOURS[name])
        yield element("text", name, x=x + 18, y=y)
        x += 90
    if graph.others:
        yield element("text", f"Further graphs, not drawn: {', '.join(graph.others)}", x=x + 18, y=y, class_="soft")
