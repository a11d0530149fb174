"""Write the held-out pictures that the package ships.

They are canvases 0 to 7, fixed before any training, so nobody chose those that the checkpoint gets right; picture i
asks task i modulo four.

    python -m demo_training.pictures
"""

from __future__ import annotations

import json
from pathlib import Path

from qwen3vl_export.demo import IMAGES
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.demo.tasks import TASKS

NUM_PICTURES = 8


def write_pictures(folder: Path) -> None:
    """Write `held_out_<index>.png` and `truth.json` into `folder`."""
    folder.mkdir(exist_ok=True)
    entries = []
    for index in range(NUM_PICTURES):
        example = held_out(index)
        task = TASKS[index % len(TASKS)]
        question, answer = example.tasks[task]
        name = f"held_out_{index}.png"
        example.image.save(folder / name, optimize=True)
        entries.append({"file": name, "index": index, "task": task, "question": question, "answer": answer})
    (folder / "truth.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    write_pictures(IMAGES)
