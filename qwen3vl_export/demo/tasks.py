"""State the four tasks of the demo: their questions, and the answers to a canvas.

The first phrasing of each task is the canonical one; the evaluation and the README use only that. The others are used
in training so that the checkpoint does not hang on one spelling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

TASKS = ("read", "count", "where", "json")
MAX_NEW_TOKENS = 24
"""The longest answer, JSON with four digits, has 19 tokens and the end token."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "read": ("Read the digits.", "Which digits are there?", "What does it say?"),
    "count": ("How many digits are there?", "Count the digits.", "How many digits do you see?"),
    "where": ("Where is the {digit}?", "Where do you see the {digit}?", "In which part is the {digit}?"),
    "json": ("Answer as JSON.", "Give the digits as JSON.", "Reply in JSON."),
}

PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)


def place_of(x: float, y: float, width: int, height: int) -> int:
    """Return the index in `PLACES` of the third by third of the canvas that holds the point (x, y)."""
    return 3 * min(2, int(3 * y / height)) + min(2, int(3 * x / width))


def question(task: str, asked: int, phrasing: int = 0) -> str:
    """Return the question of `task`; `asked` is the digit that "where" asks for."""
    return QUESTIONS[task][phrasing].format(digit=asked)


def answer(task: str, digits: Sequence[int], place: int) -> str:
    """Return the one right answer.

    Args:
        task: One of `TASKS`.
        digits: The digits in reading order.
        place: Index in `PLACES` of the digit that "where" asks for.
    """
    if task == "read":
        return "".join(str(d) for d in digits)
    if task == "count":
        return str(len(digits))
    if task == "where":
        return PLACES[place]
    return json.dumps({"digits": list(digits), "count": len(digits)}, separators=(",", ":"))
