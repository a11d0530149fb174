"""Held-out pictures of the demo as the frames of a video: the engine answers as PyTorch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import PICTURES
from runtime.model import Qwen3VLModel

QUESTIONS = ("Read the digits.", "How many digits are there?", "Answer as JSON.")


@pytest.mark.judge
def test_the_demo_reads_frames_as_pytorch_does(demo_engine: Path) -> None:
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.parity.transformers_reference import TransformersReference

    reference = TransformersReference(Checkpoint.open("demo"))
    model = Qwen3VLModel.from_engine(demo_engine, legacy_video_prompt=not reference.keeps_markers)
    pictures = [Image.open(PICTURES / f"held_out_{number}.png").convert("RGB") for number in (0, 0, 1, 1, 1)]
    frames = np.stack([np.asarray(picture.resize((128, 128))) for picture in pictures])
    answers = set()
    for question in QUESTIONS:
        parts = [{"type": "video", "video": frames, "sample_fps": 2.0}, {"type": "text", "text": question}]
        prepared = model.prepare([{"role": "user", "content": parts}])
        assert [each.grid_thw[0] for each in prepared.inputs] == [3]
        answer = model.generate([{"role": "user", "content": parts}], max_new_tokens=16, do_sample=False)
        expected = reference.run(prepared, 16).tokens
        assert answer.token_ids == expected[: len(answer.token_ids)] and answer.finish_reason in ("eos", "length")
        answers.add(answer.text)
    assert len(answers) > 1
