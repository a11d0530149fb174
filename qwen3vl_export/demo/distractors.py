"""Draw the things on a canvas that are not digits.

Every kind is chosen so that it cannot be mistaken for a digit of the data set (thick soft strokes in a square box):
strokes here are thin and sharp, discs and blobs are filled, and the letters are those without a digit's shape
(no B, I, L, O, S, Z).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

# Polylines in the unit square.
_LETTERS: dict[str, list[list[tuple[float, float]]]] = {
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "F": [[(1, 0), (0, 0), (0, 1)], [(0, 0.5), (0.8, 0.5)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.5), (1, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)]],
    "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "V": [[(0, 0), (0.5, 1), (1, 0)]],
    "W": [[(0, 0), (0.25, 1), (0.5, 0.3), (0.75, 1), (1, 0)]],
    "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
}


def _line(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = box
    ends = [(x0, y0, x1, y1), (x0, y1, x1, y0)][int(rng.integers(2))]
    draw.line(ends, fill=colour, width=int(rng.integers(1, 3)))


def _box(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        draw.rectangle(box, fill=colour)
    else:
        draw.rectangle(box, outline=colour, width=1)


def _disc(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    draw.ellipse(box, fill=colour)


def _blob(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = box
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    radii = rng.uniform(0.6, 1.0, 7)
    xs = (x0 + x1) / 2 + (x1 - x0) / 2 * radii * np.cos(angles)
    ys = (y0 + y1) / 2 + (y1 - y0) / 2 * radii * np.sin(angles)
    draw.polygon([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)], fill=colour)


def _stripes(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = box
    step = int(rng.integers(3, 7))
    if rng.random() < 0.5:
        for x in range(x0, x1 + 1, step):
            draw.line((x, y0, x, y1), fill=colour, width=1)
    else:
        for y in range(y0, y1 + 1, step):
            draw.line((x0, y, x1, y), fill=colour, width=1)


def _dots(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = box
    step = int(rng.integers(4, 8))
    for y in range(y0, y1, step):
        for x in range(x0, x1, step):
            draw.rectangle((x, y, x + 1, y + 1), fill=colour)


def _letter(draw: ImageDraw, box: Box, colour: Colour, rng: np.random.Generator) -> None:
    x0, y0, x1, y1 = box
    width = int(rng.integers(1, 3))
    for stroke in _LETTERS[sorted(_LETTERS)[int(rng.integers(len(_LETTERS)))]]:
        points = [(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in stroke]
        draw.line(points, fill=colour, width=width)


KINDS: dict[str, Callable[[ImageDraw, Box, Colour, np.random.Generator], None]] = {
    "line": _line,
    "box": _box,
    "disc": _disc,
    "blob": _blob,
    "stripes": _stripes,
    "dots": _dots,
    "letter": _letter,
}


def _is_free(box: Box, taken: list[Box], margin: int) -> bool:
    return all(
        box[2] + margin <= t[0] or t[2] + margin <= box[0] or box[3] + margin <= t[1] or t[3] + margin <= box[1]
        for t in taken
    )


def place_distractor(
    width: int, height: int, taken: list[Box], rng: np.random.Generator, margin: int = 3
) -> tuple[str, Box]:
    """Choose a kind and a box that keeps `margin` pixels from every box in `taken`.

    The box shrinks with each failed draw. Where nothing fits in 40 draws the kind is `"under"`: a faint texture over
    the whole canvas that is to be drawn below the digits.

    Returns:
        The kind and its box (left, top, right, bottom) in pixels.
    """
    kind = list(KINDS)[int(rng.integers(len(KINDS)))]
    for attempt in range(40):
        shrink = 1.0 - attempt / 45
        u_w, u_h, u_x, u_y = rng.random(4).tolist()
        w = max(4, int((0.1 + 0.4 * u_w) * width * shrink))
        h = max(4, int((0.1 + 0.4 * u_h) * height * shrink))
        if kind in ("disc", "blob", "letter"):
            w = h = min(w, h, 96)
        x0, y0 = int(u_x * max(1, width - w)), int(u_y * max(1, height - h))
        box = (x0, y0, x0 + w, y0 + h)
        if _is_free(box, taken, margin):
            return kind, box
    return "under", (0, 0, width - 1, height - 1)


def draw_distractor(
    draw: ImageDraw, kind: str, box: Box, colour: Colour, background: Colour, rng: np.random.Generator
) -> None:
    """Draw one distractor; `"under"` draws stripes that differ from the background by at most 24 levels."""
    if kind == "under":
        shift = int(rng.choice([-24, 24]))
        faint = tuple(int(np.clip(c + shift, 0, 255)) for c in background)
        _stripes(draw, box, (faint[0], faint[1], faint[2]), rng)
        return
    KINDS[kind](draw, box, colour, rng)
