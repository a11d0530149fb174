"""Make pages: canvases that are covered with lines of digits, so that nearly every visual token matters.

Lines stand below each other, in reading order and at least `GAP` pixels apart, as the digits of a line are. A page is a
function of its generator alone, and holds up to `MAX_LINES` lines of up to `MAX_COLUMNS` digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwen3vl_export.demo.data import GAP, MAX_SIDE, MIN_DIGIT, MIN_SIDE, Digits, PlacedDigit, paint

if TYPE_CHECKING:
    from PIL import Image

MIN_LINES, MAX_LINES = 2, 6
MIN_COLUMNS, MAX_COLUMNS = 2, 6
MAX_PITCH = 56
"""Most pixels from a digit to the next, and from a line to the next; the least is `MIN_DIGIT + GAP`."""
LINE_JITTER = 2
"""A digit is up to this many pixels above or below the middle of its line."""


@dataclass(frozen=True)
class Page:
    """A picture with its truth: the digits of each line, in reading order."""

    image: Image.Image
    lines: tuple[tuple[PlacedDigit, ...], ...]

    @property
    def digits(self) -> tuple[PlacedDigit, ...]:
        """All digits in reading order."""
        return tuple(digit for line in self.lines for digit in line)

    @property
    def labels(self) -> list[int]:
        """What the digits are."""
        return [digit.label for digit in self.digits]

    def line(self, number: int) -> str:
        """Return the text of a line; the first is number 1."""
        return "".join(str(digit.label) for digit in self.lines[number - 1])


def make_page(rng: np.random.Generator, pool: Digits, *, augment: bool = False, max_side: int = MAX_SIDE) -> Page:
    """Make one page of 2 to 6 lines of 2 to 6 digits.

    Args:
        rng: The only source of chance.
        pool: The digits to draw from.
        augment: Distort the bitmaps a little (training only).
        max_side: Longest side in pixels; at least `MAX_LINES * (MIN_DIGIT + GAP)`.
    """
    counts = rng.integers(MIN_COLUMNS, MAX_COLUMNS + 1, int(rng.integers(MIN_LINES, MAX_LINES + 1))).tolist()
    pitch_x, pitch_y = (
        int(rng.integers(MIN_DIGIT + GAP, min(MAX_PITCH, max_side // count) + 1))
        for count in (max(counts), len(counts))
    )
    least = max(counts) * pitch_x, len(counts) * pitch_y
    width, height = (int(rng.integers(max(MIN_SIDE, a), min(max_side, max(MIN_SIDE, a) * 5 // 4) + 1)) for a in least)
    largest = min(pitch_x - GAP, pitch_y - GAP)
    tops = np.sort(rng.integers(0, height - least[1] + 1, len(counts)))
    boxes, lengths = [], []
    for i, count in enumerate(counts):
        left = int(rng.integers(0, width - count * pitch_x + 1))
        lengths.append(count)
        for j in range(count):
            size = int(rng.integers(MIN_DIGIT, largest + 1))
            room = (pitch_y - GAP - size) // 2
            jitter = int(rng.integers(-min(room, LINE_JITTER), min(room, LINE_JITTER) + 1))
            x0 = left + j * pitch_x + (pitch_x - size) // 2
            y0 = int(tops[i]) + i * pitch_y + (pitch_y - size) // 2 + jitter
            boxes.append((x0, y0, x0 + size, y0 + size))
    picks = rng.integers(0, len(pool.labels), len(boxes))
    image, digits, _ = paint(
        rng, pool, width, height, picks, boxes, augment=augment, min_distractors=0, max_distractors=0
    )
    ends = np.cumsum(lengths).tolist()
    return Page(image, tuple(digits[end - length : end] for end, length in zip(ends, lengths, strict=True)))
