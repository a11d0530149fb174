#!/usr/bin/env python
"""Evaluate a checkpoint on the held-out canvases with PyTorch, and write the table.

    python scripts/evaluate_demo.py                       # the shipped checkpoint, all 2000 canvases
    python scripts/evaluate_demo.py --limit 100 CHECKPOINT
    python scripts/evaluate_demo.py --engine out/demo-ort-cpu-fp32
    python scripts/evaluate_demo.py --engine out/demo-moe-ort-cpu-fp32 --name demo_moe_accuracy

Writes docs/demo_accuracy.md and docs/demo_accuracy.json (of an engine: demo_accuracy_TARGET) unless --limit is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Parse the options, evaluate, print and write the table."""
    from engines.disk import replace_text
    from qwen3vl_export.demo import CHECKPOINT
    from qwen3vl_export.demo.data import HELD_OUT_COUNT, held_out
    from qwen3vl_export.demo.evaluate import as_markdown, evaluate, predictor, summarise, torch_predictor

    parser = argparse.ArgumentParser(description="Evaluate the demo checkpoint on held-out canvases.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--engine", type=Path, help="evaluate this engine instead of a checkpoint")
    parser.add_argument("--limit", type=int, help="only the first N canvases; nothing is written")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--name", default="demo_accuracy", help="of the files, such as demo_moe_accuracy")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for the two files (default docs/)")
    options = parser.parse_args()

    if options.engine is None:
        import torch

        torch.set_num_threads(options.threads)
        name, how = options.name, "PyTorch, float32 arithmetic on the bfloat16 weights, greedy"
        predict = torch_predictor(options.checkpoint)
    else:
        from qwen3_vl import Qwen3VLModel

        model = Qwen3VLModel.from_engine(options.engine, threads=options.threads)
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
            f"Written by `scripts/evaluate_demo.py`; wrong answers are listed in `{name}.json`.\n\n"
        )
        replace_text(options.output / f"{name}.md", head + table)
        replace_text(options.output / f"{name}.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
