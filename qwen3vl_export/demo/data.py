"""Make the canvases of the demo: handwritten digits of scikit-learn on a background with distractors.

A canvas is a function of (seed, index) alone. Its reading order is well defined by construction:

- digits stand in rows; inside a row the vertical centres differ by at most 2 · `ROW_JITTER` pixels, and the boxes are
  at least `GAP` pixels apart from left to right;
- the bands of two rows are at least `GAP` pixels apart.

Reading order is rows from top to bottom, and inside a row from left to right. "Where" asks for a digit that occurs once
on its canvas and whose centre keeps `place_margin` from the lines that divide the canvas into thirds.

The split of the 1797 digits is 80/20, stratified by class, and committed in `split.json`; a test makes it again. The
data set names no writers, so both halves hold digits of the same people: this measures reading, not transfer to unseen
writers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen3vl_export.demo.distractors import Box, Colour, draw_distractor, place_distractor
from qwen3vl_export.demo.tasks import TASKS, answer, place_of, question

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE, MAX_SIDE = 64, 512
MIN_DIGIT, MAX_DIGIT = 24, 64
MAX_DIGITS = 4
GAP = 8
ROW_JITTER = 4
MIN_CONTRAST = 0.3
"""Least difference of luminance (0 to 1, Rec. 601 weights) between a digit and its background."""
HELD_OUT_SEED = 20261123
HELD_OUT_COUNT = 2000
SPLIT_FILE = Path(__file__).with_name("split.json")


@dataclass(frozen=True)
class Digits:
    """Half of the data set: `bitmaps` [n, 8, 8] uint8 in 0..255, `labels` [n], `sources` [n] rows of load_digits."""

    bitmaps: np.ndarray
    labels: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True)
class PlacedDigit:
    """One digit on a canvas: its class, its row in load_digits, and its square box in pixels of the canvas."""

    label: int
    source: int
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the box in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Canvas:
    """A picture with its truth; `digits` are in reading order, `asked` indexes the digit that "where" asks for."""

    image: Image.Image
    digits: tuple[PlacedDigit, ...]
    asked: int
    distractors: tuple[tuple[str, Box], ...]

    @property
    def labels(self) -> list[int]:
        """The digits in reading order."""
        return [d.label for d in self.digits]

    @property
    def place(self) -> int:
        """Index in `PLACES` of the asked digit."""
        return place_of(*self.digits[self.asked].centre, *self.image.size)


@dataclass(frozen=True)
class Example:
    """A held-out canvas: the picture, and question and true answer of each task."""

    index: int
    image: Image.Image
    tasks: dict[str, tuple[str, str]]
    num_digits: int


@lru_cache(maxsize=2)
def load_half(half: str) -> Digits:
    """Load the `"train"` or `"held_out"` half; needs scikit-learn (extra `dev`)."""
    from sklearn.datasets import load_digits

    sources = np.asarray(json.loads(SPLIT_FILE.read_text())[half], dtype=np.int64)
    data = load_digits()
    bitmaps = np.rint(data.images[sources] * (255 / 16)).astype(np.uint8)
    return Digits(bitmaps, data.target[sources].astype(np.int64), sources)


def place_margin(side: int) -> float:
    """Return how far, in pixels, the asked digit's centre stays from a dividing line of a side."""
    return max(2.0, 0.03 * side)


def _spread(slack: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` non-decreasing offsets in 0..slack."""
    return np.sort(rng.integers(0, slack + 1, count))


def _try_layout(width: int, height: int, count: int, limit: int, rng: np.random.Generator) -> list[Box] | None:
    """Draw sizes and rows once; return the boxes in reading order, or None where they do not fit."""
    cuts = rng.random(count - 1) < 0.5
    rows: list[list[int]] = [[]]
    sizes = rng.integers(MIN_DIGIT, limit + 1, count).tolist()
    for i, size in enumerate(sizes):
        if i and cuts[i - 1]:
            rows.append([])
        rows[-1].append(size)
    drawn = iter(rng.integers(-ROW_JITTER, ROW_JITTER + 1, count).tolist())
    jitters = [[next(drawn) if len(row) > 1 else 0 for _ in row] for row in rows]
    bands = [max(s + 2 * abs(j) for s, j in zip(row, js, strict=True)) for row, js in zip(rows, jitters, strict=True)]
    slack_y = height - sum(bands) - GAP * (len(rows) - 1)
    slacks_x = [width - sum(row) - GAP * (len(row) - 1) for row in rows]
    if slack_y < 0 or min(slacks_x) < 0:
        return None
    boxes: list[Box] = []
    top = 0
    for row, js, band, slack_x, offset_y in zip(
        rows, jitters, bands, slacks_x, _spread(slack_y, len(rows), rng), strict=True
    ):
        left = 0
        for size, jitter, offset_x in zip(row, js, _spread(slack_x, len(row), rng), strict=True):
            x0 = left + int(offset_x)
            y0 = top + int(offset_y) + (band - size) // 2 + jitter
            boxes.append((x0, y0, x0 + size, y0 + size))
            left += size + GAP
        top += band + GAP
    return boxes


def layout(width: int, height: int, count: int, rng: np.random.Generator) -> list[Box]:
    """Return `count` digit boxes in reading order; sizes shrink towards `MIN_DIGIT` until they fit."""
    widest = min(MAX_DIGIT, int(0.75 * min(width, height)))
    for attempt in range(2000):
        limit = max(MIN_DIGIT, widest - 2 * attempt)
        boxes = _try_layout(width, height, count, limit, rng)
        if boxes is not None:
            return boxes
    raise AssertionError(f"{count} digits do not fit on {width} by {height} pixels")


def _luminance(colour: Colour) -> float:
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def _contrasting(background: Colour, rng: np.random.Generator) -> Colour:
    while True:
        r, g, b = rng.integers(0, 256, 3).tolist()
        if abs(_luminance((r, g, b)) - _luminance(background)) >= MIN_CONTRAST:
            return r, g, b


def _digit_mask(bitmap: np.ndarray, size: int, rng: np.random.Generator | None) -> Image.Image:
    """Scale a bitmap to a square mask by bicubic interpolation; with `rng`, distort it a little (training only)."""
    from PIL import Image

    if rng is None:
        return Image.fromarray(bitmap).resize((size, size), Image.Resampling.BICUBIC)
    padded = Image.fromarray(np.pad(bitmap, 2))
    angle = math.radians(rng.uniform(-12, 12))
    scale_x, scale_y = (rng.uniform(0.92, 1.15, 2) * 8 / size).tolist()
    shear = rng.uniform(-0.15, 0.15)
    cos, sin = math.cos(angle), math.sin(angle)
    # Rotation · shear · scale, about the centre of the box.
    xx, xy = cos * scale_x, (cos * shear - sin) * scale_y
    yx, yy = sin * scale_x, (sin * shear + cos) * scale_y
    shift_x, shift_y = rng.uniform(-0.4, 0.4, 2).tolist()
    half = size / 2
    coefficients = (xx, xy, 6 + shift_x - (xx + xy) * half, yx, yy, 6 + shift_y - (yx + yy) * half)
    return padded.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _background(width: int, height: int, colour: Colour, rng: np.random.Generator) -> Image.Image:
    """Paint a plain background, a faint gradient, or faint noise; none moves a pixel by more than 16 levels."""
    from PIL import Image

    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGB", (width, height), colour)
    if kind < 0.7:
        ends = np.clip(np.asarray(colour) + rng.integers(-16, 17, (2, 2, 3)), 0, 255).astype(np.uint8)
        return Image.fromarray(ends).resize((width, height), Image.Resampling.BILINEAR)
    tile = rng.integers(-12, 13, (64, 64, 1))
    noise = np.tile(tile, (height // 64 + 1, width // 64 + 1, 1))[:height, :width]
    return Image.fromarray(np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8))


def _draw_labels(count: int, pool: Digits, rng: np.random.Generator) -> np.ndarray:
    """Draw rows of `pool` so that at least one class occurs once."""
    while True:
        picks = rng.integers(0, len(pool.labels), count)
        if (np.bincount(pool.labels[picks], minlength=10) == 1).any():
            return picks


def _askable(labels: list[int], boxes: list[Box], width: int, height: int) -> list[int]:
    """Return the positions whose class occurs once and whose centre is clear of the dividing lines."""
    keep = []
    for i, (label, box) in enumerate(zip(labels, boxes, strict=True)):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        clear = all(
            abs(at - side * third / 3) >= place_margin(side)
            for at, side in ((x, width), (y, height))
            for third in (1, 2)
        )
        if labels.count(label) == 1 and clear:
            keep.append(i)
    return keep


def draw_side(rng: np.random.Generator) -> int:
    """Draw a side in pixels, log-uniform on `MIN_SIDE`..`MAX_SIDE`."""
    return int(np.clip(np.rint(np.exp(rng.uniform(np.log(MIN_SIDE), np.log(MAX_SIDE)))), MIN_SIDE, MAX_SIDE))


def make_canvas(
    rng: np.random.Generator,
    pool: Digits,
    width: int,
    height: int,
    *,
    count: int | None = None,
    augment: bool = False,
    min_distractors: int = 2,
    max_distractors: int = 5,
) -> Canvas:
    """Make one canvas.

    Args:
        rng: The only source of chance.
        pool: The digits to draw from.
        width: Width in pixels.
        height: Height in pixels.
        count: Number of digits; drawn from 1..`MAX_DIGITS` by default.
        augment: Distort the bitmaps a little (training only).
        min_distractors: Least number of distractors; fewer than two only in early training.
        max_distractors: Largest number of distractors.
    """
    count = int(rng.integers(1, MAX_DIGITS + 1)) if count is None else count
    while True:
        picks = _draw_labels(count, pool, rng)
        labels = [int(v) for v in pool.labels[picks]]
        boxes = layout(width, height, count, rng)
        askable = _askable(labels, boxes, width, height)
        if askable:
            break
    asked = askable[int(rng.integers(len(askable)))]
    image, placed, distractors = paint(
        rng,
        pool,
        width,
        height,
        picks,
        boxes,
        augment=augment,
        min_distractors=min_distractors,
        max_distractors=max_distractors,
    )
    return Canvas(image, placed, asked, distractors)


def paint(
    rng: np.random.Generator,
    pool: Digits,
    width: int,
    height: int,
    picks: np.ndarray,
    boxes: list[Box],
    *,
    augment: bool,
    min_distractors: int = 2,
    max_distractors: int = 5,
) -> tuple[Image.Image, tuple[PlacedDigit, ...], tuple[tuple[str, Box], ...]]:
    """Paint a background, distractors beside the boxes, and rows `picks` of `pool` into them.

    Returns:
        The picture, its digits, and kind and box of each distractor.
    """
    from PIL import ImageDraw

    background: Colour = tuple(rng.integers(0, 256, 3).tolist())
    image = _background(width, height, background, rng)
    draw = ImageDraw.Draw(image)
    taken = list(boxes)
    distractors = []
    for _ in range(int(rng.integers(min_distractors, max_distractors + 1))):
        kind, box = place_distractor(width, height, taken, rng)
        r, g, b = rng.integers(0, 256, 3).tolist()
        draw_distractor(draw, kind, box, (r, g, b), background, rng)
        distractors.append((kind, box))
    one_colour = _contrasting(background, rng) if rng.random() < 0.5 else None
    placed = []
    for pick, box in zip(picks, boxes, strict=True):
        colour = one_colour or _contrasting(background, rng)
        mask = _digit_mask(pool.bitmaps[pick], box[2] - box[0], rng if augment else None)
        image.paste(colour, box, mask)
        placed.append(PlacedDigit(int(pool.labels[pick]), int(pool.sources[pick]), box))
    return image, tuple(placed), tuple(distractors)


def canvas_at(seed: int, index: int, half: str) -> Canvas:
    """Make canvas `index` of `seed`, undistorted, from one half of the digits."""
    rng = np.random.default_rng([seed, index])
    width, height = draw_side(rng), draw_side(rng)
    return make_canvas(rng, load_half(half), width, height)


def held_out_canvas(index: int) -> Canvas:
    """Make held-out canvas `index` (0 to `HELD_OUT_COUNT` - 1), from held-out digits only."""
    if not 0 <= index < HELD_OUT_COUNT:
        raise IndexError(f"held-out canvas {index}: expected 0 to {HELD_OUT_COUNT - 1}")
    return canvas_at(HELD_OUT_SEED, index, "held_out")


def example_of(index: int, canvas: Canvas) -> Example:
    """Attach the canonical question and the true answer of each task to a canvas."""
    asked = canvas.digits[canvas.asked].label
    tasks = {t: (question(t, asked), answer(t, canvas.labels, canvas.place)) for t in TASKS}
    return Example(index, canvas.image, tasks, len(canvas.digits))


def held_out(index: int) -> Example:
    """Return held-out canvas `index` with its four questions and answers."""
    return example_of(index, held_out_canvas(index))
