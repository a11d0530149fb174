"""Calibration prompts of the demo's own canvases, none of them held out."""

from __future__ import annotations

import json
from pathlib import Path

from qwen3vl_export.demo.data import canvas_at, example_of
from runtime.messages import user_message


def write_canvases(folder: Path, num_prompts: int) -> Path:
    """Fill a folder with conversations about canvases, their answers included."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num_prompts):
        example = example_of(i, canvas_at(4321, i, "train"))
        question, answer = list(example.tasks.values())[i % 4]
        example.image.save(folder / f"{i}.png")
        lines.append(json.dumps([*user_message(question, [f"{i}.png"]), {"role": "assistant", "content": answer}]))
    (folder / "canvases.jsonl").write_text("\n".join(lines))
    return folder
