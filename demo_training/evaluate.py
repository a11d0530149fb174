"""Measure how many held-out questions are answered exactly right, whoever answers: PyTorch or an engine.

    python -m demo_training.evaluate                       # the shipped checkpoint, all 2000 canvases
    python -m demo_training.evaluate --limit 100 CHECKPOINT
    python -m demo_training.evaluate --engine out/demo-ort-cpu-fp32
    python -m demo_training.evaluate --engine out/demo-moe-ort-cpu-fp32 --name demo_moe_accuracy

The further tasks of demo-long: `demo_training.evaluate_long`.

Writes docs/demo_accuracy.md and docs/demo_accuracy.json (of an engine: demo_accuracy_TARGET) unless --limit is given.
An answer counts only if it equals the truth, character by character, after stripping white space at its ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.disk import replace_text
from qwen3vl_export.demo import CHECKPOINT
from qwen3vl_export.demo.data import HELD_OUT_COUNT, Example, held_out
from qwen3vl_export.demo.tasks import MAX_NEW_TOKENS, TASKS
from runtime.messages import user_message

if TYPE_CHECKING:
    from PIL import Image

    from runtime.model import Qwen3VLModel

Predict = Callable[["Image.Image", Sequence[str]], Sequence[str]]
"""Takes a picture and independent questions about it, returns one answer to each."""

DOCS = Path(__file__).resolve().parent.parent / "docs"
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


def main() -> None:
    """Parse the options, evaluate, print and write the table."""
    from demo_training.evaluate import as_markdown, evaluate, predictor, summarise, torch_predictor

    parser = argparse.ArgumentParser(description="Evaluate the demo checkpoint on held-out canvases.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--engine", type=Path, help="evaluate this engine instead of a checkpoint")
    parser.add_argument("--limit", type=int, help="only the first N canvases; nothing is written")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--name", default="demo_accuracy", help="of the files, such as demo_moe_accuracy")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for the two files (default docs/)")
    options = parser.parse_args()

    if options.engine is None:
        import torch

        torch.set_num_threads(options.threads)
        name, how = options.name, "PyTorch, float32 arithmetic on the bfloat16 weights, greedy"
        predict = torch_predictor(options.checkpoint)
    else:
        from qwen3_vl import Qwen3VLModel

        model = Qwen3VLModel.from_engine(options.engine, threads=options.threads, tuned=False)
        target, predict = model.manifest.target, predictor(model)
        name, how = f"{options.name}_{target}", f"engine {target}, greedy"
    count = options.limit or HELD_OUT_COUNT
    started = time.monotonic()

    def progress(index: int) -> None:
        if (index + 1) % 100 == 0:
            print(f"{index + 1}/{count} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    outcomes = evaluate(predict, map(held_out, range(count)), on_example=progress)
    summary = summarise(outcomes)
    table = as_markdown(summary)
    print(table, end="")
    if options.limit is None:
        head = (
            f"Exact matches on the {count} held-out canvases: {how}.\n"
            f"Written by `python -m demo_training.evaluate`; wrong answers are listed in `{name}.json`.\n\n"
        )
        replace_text(options.output / f"{name}.md", head + table)
        replace_text(options.output / f"{name}.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
