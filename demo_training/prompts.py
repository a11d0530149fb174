"""Training canvases as prompts to calibrate with."""

from __future__ import annotations

from engines.quantize.calibration_data import CalibrationPrompt
from qwen3vl_export.demo.data import canvas_at, example_of
from runtime.messages import user_message

_SEED = 7


def training_prompts(num_canvases: int) -> list[CalibrationPrompt]:
    """Ask one task, in turn, of each training canvas, and answer it."""
    prompts = []
    for index in range(num_canvases):
        example = example_of(index, canvas_at(_SEED, index, "train"))
        question, answer = list(example.tasks.values())[index % len(example.tasks)]
        messages = [*user_message(question, [example.image]), {"role": "assistant", "content": answer}]
        prompts.append(CalibrationPrompt(f"training canvas {index}", messages))
    return prompts
