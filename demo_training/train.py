"""Train the demo checkpoint.

    python -m demo_training.train --work DIR             # a new run; DIR gets state.pt, train.log and checkpoint/
    python -m demo_training.train --work DIR --resume    # go on after a stop
    python -m demo_training.train --work DIR --init-from qwen3vl_export/demo/checkpoint   # the last stage once more
    python -m demo_training.train --work DIR --experts   # demo-moe: a mixture of experts, started from the dense demo
    python -m demo_training.train --work DIR --long      # demo-long: several pictures, pages, long conversations
    python -m demo_training.train --work DIR --smoke     # every stage for two steps

The state and `checkpoint/`, a Hugging Face folder with the averaged weights in bfloat16, are rewritten at every report;
stopping the script loses at most the steps since. Nothing is written into the repository: copy `checkpoint/` over
`qwen3vl_export/demo/checkpoint/` to ship it. docs/demo.md has the measured time of each stage.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch

from demo_training.long import LONG, SMOKE_LONG, LongTrainer
from demo_training.model import save_checkpoint
from demo_training.training import CURRICULUM, EXPERTS, SMOKE, SMOKE_EXPERTS, Trainer
from demo_training.upcycle import upcycled
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import load
from qwen3vl_export.sources import DEMO

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state, the log and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from WORK/state.pt")
    parser.add_argument("--init-from", type=Path, help="start the last stage from a checkpoint folder")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--experts", action="store_true", help="upcycle the dense demo and train the experts")
    kind.add_argument("--long", action="store_true", help="teach the dense demo several pictures and long prompts")
    parser.add_argument("--smoke", action="store_true", help="two steps of every stage")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--report-every", type=int, default=250, help="steps between reports (default 250)")
    parser.add_argument("--validation", type=int, default=100, help="canvases per half in a report (default 100)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        stamped = f"{datetime.now(UTC):%H:%M:%S} {line}"
        print(stamped, flush=True)
        with (options.work / "train.log").open("a") as file:
            file.write(stamped + "\n")

    if options.long:
        demo = load(Checkpoint.open(DEMO)).float()
        trainer: Trainer = LongTrainer(SMOKE_LONG if options.smoke else LONG, options.work, log, model=demo)
    elif options.experts:
        dense = load(Checkpoint.open(DEMO))
        trainer = Trainer(SMOKE_EXPERTS if options.smoke else EXPERTS, options.work, log, model=upcycled(dense))
    else:
        trainer = Trainer(SMOKE if options.smoke else CURRICULUM, options.work, log)
    if options.resume:
        trainer.resume()
        log(f"resume at stage {trainer.stage}, step {trainer.step}")
    elif options.init_from:
        trainer.start_from(options.init_from)
    name = "demo_long" if options.long else "demo_moe" if options.experts else "demo"
    card = (ROOT / "docs" / f"{name}.md").read_text()
    every, count = (2, 2) if options.smoke else (options.report_every, options.validation)
    trainer.run(
        lambda: save_checkpoint(trainer.trainee.model, options.work / "checkpoint", card),
        report_every=every,
        validation_count=count,
    )


if __name__ == "__main__":
    main()
