"""Measure how many held-out prompts of the further tasks of demo-long are answered exactly right.

    python -m demo_training.evaluate_long --engine out/demo-long-ort-cpu-fp32       # writes docs/demo_long_tasks_TARGET
    python -m demo_training.evaluate_long --engine DIR --limit 20 --task earlier    # 20 of each length; writes nothing

Without an engine PyTorch answers, as in `demo_training.evaluate`, which measures the four tasks of the demo.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.disk import replace_text
from qwen3vl_export.demo import CHECKPOINT_LONG
from qwen3vl_export.demo.long_tasks import CONVERSATION, LONG_TASKS, MAX_NEW_TOKENS, held_out_prompts

Answer = Callable[[list[dict[str, Any]]], str]
"""Takes messages, returns the answer to the last question."""

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPTS = 50
LENGTHS = (1024, 2048, 4096)


@dataclass(frozen=True)
class LongOutcome:
    """One prompt, its true answer and the answer given."""

    task: str
    max_tokens: int
    index: int
    num_tokens: int
    num_pictures: int
    truth: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the truth."""
        return self.answer.strip() == self.truth


def cases(tasks: Sequence[str] = LONG_TASKS) -> list[tuple[str, int]]:
    """Return the tasks, each with the limits of tokens that it is asked at."""
    return [(task, length) for task in tasks for length in (LENGTHS if task in CONVERSATION else LENGTHS[:1])]


def ask_prompts(answer: Answer, task: str, max_tokens: int, count: int) -> list[LongOutcome]:
    """Ask prompts 0 to count - 1 of a task."""
    return [
        LongOutcome(
            task,
            max_tokens,
            prompt.index,
            prompt.num_tokens,
            prompt.num_pictures,
            prompt.answer,
            answer(prompt.messages),
        )
        for prompt in held_out_prompts(task, count, max_tokens=max_tokens)
    ]


def summarise_long(outcomes: Sequence[LongOutcome]) -> dict[str, Any]:
    """Return `rows`, one for each task and limit, and `wrong`, the outcomes that are not right."""
    rows = []
    for task, max_tokens in dict.fromkeys((o.task, o.max_tokens) for o in outcomes):
        own = [o for o in outcomes if (o.task, o.max_tokens) == (task, max_tokens)]
        rows.append(
            {
                "task": task,
                "max_tokens": max_tokens,
                "prompts": len(own),
                "mean_tokens": round(sum(o.num_tokens for o in own) / len(own)),
                "mean_pictures": round(sum(o.num_pictures for o in own) / len(own), 1),
                "right": round(sum(o.is_right for o in own) / len(own), 4),
            }
        )
    return {"rows": rows, "wrong": [asdict(o) for o in outcomes if not o.is_right]}


def as_long_markdown(summary: dict[str, Any]) -> str:
    """Render the table of `summarise_long`."""
    lines = ["| task | limit | prompts | tokens | pictures | right |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['task']} | {row['max_tokens']} | {row['prompts']} | {row['mean_tokens']} | {row['mean_pictures']} "
        f"| {100 * row['right']:.1f} % |"
        for row in summary["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the options, evaluate, print and write the table."""
    parser = argparse.ArgumentParser(description="Evaluate demo-long on held-out long prompts.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT_LONG)
    parser.add_argument("--engine", type=Path, help="evaluate this engine instead of a checkpoint")
    parser.add_argument("--task", choices=LONG_TASKS, action="append", help="only this task; may be given again")
    parser.add_argument("--limit", type=int, help="only the first N prompts of each; nothing is written")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for the two files (default docs/)")
    options = parser.parse_args()

    if options.engine is None:
        import torch

        from qwen3vl_export.eager import open_eager

        torch.set_num_threads(options.threads)
        model, name, how = open_eager(str(options.checkpoint)), "demo_long_tasks", "PyTorch, float32, greedy"
    else:
        from qwen3_vl import Qwen3VLModel

        model = Qwen3VLModel.from_engine(options.engine, threads=options.threads)
        target = model.manifest.target
        name, how = f"demo_long_tasks_{target}", f"engine {target}, greedy"

    def answer(messages: list[dict[str, Any]]) -> str:
        return model.generate(messages, do_sample=False, max_new_tokens=MAX_NEW_TOKENS).text

    outcomes = []
    for task, max_tokens in cases(options.task or LONG_TASKS):
        outcomes += ask_prompts(answer, task, max_tokens, options.limit or PROMPTS)
        print(f"{task} {max_tokens}", file=sys.stderr, flush=True)
    summary = summarise_long(outcomes)
    table = as_long_markdown(summary)
    print(table, end="")
    if options.limit is None and options.task is None:
        head = (
            f"Exact matches on {PROMPTS} held-out prompts of each task and limit of tokens: {how}.\n"
            f"Written by `python -m demo_training.evaluate_long`; wrong answers are listed in `{name}.json`.\n\n"
        )
        replace_text(options.output / f"{name}.md", head + table)
        replace_text(options.output / f"{name}.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
