"""Measure how many held-out questions are answered exactly right, whoever answers: PyTorch or an engine.

An answer counts only if it equals the truth, character by character, after stripping white space at its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_export.demo.data import Example
from qwen3vl_export.demo.tasks import TASKS
from runtime.messages import user_message

if TYPE_CHECKING:
    from PIL import Image

    from runtime.model import Qwen3VLModel

Predict = Callable[["Image.Image", Sequence[str]], Sequence[str]]
"""Takes a picture and independent questions about it, returns one answer to each."""

MAX_NEW_TOKENS = 24
"""The longest answer, JSON with four digits, has 19 tokens and the end token."""
SIDES = ((64, 128), (129, 256), (257, 384), (385, 512))


@dataclass(frozen=True)
class Outcome:
    """One question, its true answer and the answer given."""

    index: int
    task: str
    question: str
    truth: str
    answer: str
    num_digits: int
    longer_side: int

    @property
    def is_right(self) -> bool:
        """Whether the answer is the truth."""
        return self.answer.strip() == self.truth


def evaluate(
    predict: Predict, examples: Iterable[Example], *, on_example: Callable[[int], None] | None = None
) -> list[Outcome]:
    """Ask all four tasks of every example.

    Args:
        predict: Who answers.
        examples: For instance `(held_out(i) for i in range(HELD_OUT_COUNT))`.
        on_example: Called with each example's index when it is done.
    """
    outcomes = []
    for example in examples:
        answers = predict(example.image, [question for question, _ in example.tasks.values()])
        for (task, (question, truth)), answer in zip(example.tasks.items(), answers, strict=True):
            outcomes.append(
                Outcome(example.index, task, question, truth, answer, example.num_digits, max(example.image.size))
            )
        if on_example:
            on_example(example.index)
    return outcomes


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return shares of right answers: `all`, `by_count` (digits on the canvas), `by_side` (longer side in pixels).

    Each row also holds `canvases`, the number of canvases behind it.
    """

    def row(chosen: Sequence[Outcome]) -> dict[str, float]:
        shares: dict[str, float] = {"canvases": len({o.index for o in chosen})}
        for task in TASKS:
            right = [o.is_right for o in chosen if o.task == task]
            shares[task] = round(sum(right) / len(right), 4) if right else float("nan")
        return shares

    counts = sorted({o.num_digits for o in outcomes})
    sides = {f"{a} to {b}": [o for o in outcomes if a <= o.longer_side <= b] for a, b in SIDES}
    return {
        "all": row(outcomes),
        "by_count": {str(n): row([o for o in outcomes if o.num_digits == n]) for n in counts},
        "by_side": {name: row(chosen) for name, chosen in sides.items() if chosen},
        "wrong": [asdict(o) for o in outcomes if not o.is_right],
    }


def as_markdown(summary: dict[str, Any]) -> str:
    """Render the table of `summarise`."""
    header = ["canvases", *TASKS]
    lines = ["| | " + " | ".join(header) + " |", "|---|" + "---:|" * len(header)]

    def add(name: str, row: dict[str, float]) -> None:
        shares = " | ".join(f"{100 * row[t]:.1f} %" for t in TASKS)
        lines.append(f"| {name} | {row['canvases']} | {shares} |")

    add("all", summary["all"])
    for count, row in summary["by_count"].items():
        add(f"{count} digit{'s' if count != '1' else ''}", row)
    for side, row in summary["by_side"].items():
        add(f"longer side {side} px", row)
    return "\n".join(lines) + "\n"


def predictor(model: Qwen3VLModel) -> Predict:
    """Return a `predict` that asks a model each question in a prompt of its own, greedy."""
    return lambda image, questions: [
        model.generate(user_message(question, [image]), do_sample=False, max_new_tokens=MAX_NEW_TOKENS).text
        for question in questions
    ]


def torch_predictor(checkpoint: Path) -> Predict:
    """Return a `predict` that asks PyTorch: float32 arithmetic on the folder's weights, greedy."""
    from qwen3vl_export.eager import open_eager

    return predictor(open_eager(str(checkpoint)))
