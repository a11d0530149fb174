"""Find boxes and points in an answer, in pixels of the original image.

Qwen3-VL writes coordinates of 0 to 1000 across the width and the height of an image, whatever its size. Three forms are
read, wherever they stand in the text, in Markdown fences or not:

- JSON objects with `bbox_2d` (x1, y1, x2, y2) or `point_2d` (x, y) and a `label`, as Qwen's cookbooks ask for, alone or
  in lists, without objects inside. They are read one by one, so of a list that was cut off the whole ones are found.
- `<ref>label</ref><box>(x1,y1),(x2,y2)</box>`; one pair of numbers is a point, also in `<point>`.
- the same with Qwen2-VL's tokens, `<|object_ref_start|>` and `<|box_start|>`, in text that keeps special tokens, unlike
  that of an answer.

Numbers outside 0 to 1000 are brought to the edge. Corners in the wrong order are exchanged. What is no box is passed
over: an answer is text that a model made up, and nothing in it is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.arguments import whole_number

COORDINATE_RANGE = 1000
"""Number that the right and the lower edge of an image have in answers."""

_COUNTS = {"bbox_2d": 4, "point_2d": 2}  # numbers under a key
_LABEL_KEYS = ("label", "text_content")  # the second where text is to be read and located
_NUMBER = r"\s*+(-?\d{1,9}(?:\.\d{1,9})?)\s*+"
_PAIR = rf"[(\[]{_NUMBER},{_NUMBER}[)\]]"
_LONGEST_LABEL = 1000
_TAGS = re.compile(
    rf"(?:(?:<\|object_ref_start\|>|<ref>)(?P<label>[^<]{{0,{_LONGEST_LABEL}}})(?:<\|object_ref_end\|>|</ref>)\s*)?"
    rf"(?:<\|box_start\|>|<box>|<point>)\s*+{_PAIR}(?:\s*+,?+\s*+{_PAIR})?\s*+(?:<\|box_end\|>|</box>|</point>)"
)
# An object without objects inside; a string in it may hold braces. Nothing is tried twice and strings are bounded, so
# that no text takes time that grows with the square of its length.
_OBJECT = re.compile(r'\{(?:[^{}"]{1,4096}+|"(?:[^"\\]|\\.){0,1024}+"){0,1024}+\}', re.DOTALL)


@dataclass(frozen=True)
class Box:
    """A box in pixels of an image: x1 ≤ x2 from the left, y1 ≤ y2 from the top; `label` may be empty."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Point:
    """A point in pixels of an image, from the left and from the top; `label` may be empty."""

    label: str
    x: float
    y: float


def find_boxes(text: str, size: tuple[int, int]) -> tuple[Box, ...]:
    """Find the boxes in an answer, in their order.

    Args:
        text: The answer.
        size: Width and height in pixels of the image that it speaks of: `ProcessedImage.source_size`.

    Raises:
        UsageError: `size` is not a pair of positive whole numbers.
    """
    width, height = _checked(size)
    found = []
    for label, numbers in _shapes(text):
        if len(numbers) == 4:
            (x1, x2), (y1, y2) = sorted(numbers[::2]), sorted(numbers[1::2])
            found.append(Box(label, _pixels(x1, width), _pixels(y1, height), _pixels(x2, width), _pixels(y2, height)))
    return tuple(found)


def find_points(text: str, size: tuple[int, int]) -> tuple[Point, ...]:
    """Find the points in an answer, in their order.

    Args:
        text: The answer.
        size: As for `find_boxes`.

    Raises:
        UsageError: `size` is not a pair of positive whole numbers.
    """
    width, height = _checked(size)
    return tuple(
        Point(label, _pixels(numbers[0], width), _pixels(numbers[1], height))
        for label, numbers in _shapes(text)
        if len(numbers) == 2
    )


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    remedy = "pass the width and height of the original image: model.prepare(messages).images[0].source_size"
    width, height = (
        whole_number("size", side, 1, 1 << 31, "width and height in pixels", remedy)
        for side in (size if isinstance(size, Sequence) and len(size) == 2 else (None, None))
    )
    return width, height


def _pixels(coordinate: float, side: int) -> float:
    return min(max(coordinate, 0.0), float(COORDINATE_RANGE)) * side / COORDINATE_RANGE


def _shapes(text: str) -> Iterator[tuple[str, list[float]]]:
    """Yield label and numbers, four of a box and two of a point, in the order of the text."""
    found = [*_tagged(text), *_written_as_json(text)]
    for _, label, numbers in sorted(found, key=lambda shape: shape[0]):
        yield label, numbers


def _tagged(text: str) -> Iterator[tuple[int, str, list[float]]]:
    label, label_end = "", -1
    for match in _TAGS.finditer(text):
        if match["label"] is not None:
            label = match["label"].strip()
        elif match.start() != label_end:  # several boxes may follow one name
            label = ""
        label_end = match.end()
        yield match.start(), label, [float(number) for number in match.groups()[1:] if number is not None]


def _written_as_json(text: str) -> Iterator[tuple[int, str, list[float]]]:
    for start, values in _objects(text):
        label = next((values[key] for key in _LABEL_KEYS if isinstance(values.get(key), str)), "")
        for key, count in _COUNTS.items():
            for numbers in _lists_of(values.get(key), count):
                yield start, label, numbers


def _objects(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the innermost JSON objects of a text and where they begin."""
    for match in _OBJECT.finditer(text):
        try:
            values = json.loads(match[0], strict=False)
        except (ValueError, RecursionError):  # not JSON, or thousands of brackets
            continue
        yield match.start(), values


def _lists_of(given: Any, count: int) -> Iterable[list[float]]:
    """Return the lists of `count` numbers that a value is or holds; corners may be pairs of their own."""
    if not isinstance(given, list) or not given:
        return []
    if count == 4 and len(given) == 2 and all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        given = [*given[0], *given[1]]
    if all(isinstance(each, list) for each in given):
        return [numbers for each in given if (numbers := _numbers(each, count))]
    numbers = _numbers(given, count)
    return [numbers] if numbers else []


def _numbers(given: list[Any], count: int) -> list[float]:
    """Return `count` finite numbers; nothing if the list is of others."""
    if len(given) != count or not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in given):
        return []
    try:
        numbers = [float(each) for each in given]
    except OverflowError:  # an integer of hundreds of digits
        return []
    return numbers if all(map(math.isfinite, numbers)) else []
