"""What transformers' processor of a checkpoint returns for prompts of its images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from helpers import judge
from helpers.clips import moving


def open_processor(checkpoint: Path) -> Any:
    """Open the processor; it pads on the left, as for generation."""
    processor = judge.processor(checkpoint)
    processor.tokenizer.padding_side = "left"
    return processor


def picture(seed: int, height: int = 96, width: int = 64) -> Any:
    """Return a picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def text_of(processor: Any, question: str, images: int = 0, videos: int = 0) -> str:
    """Return a rendered chat with so many images and videos."""
    parts = [{"type": "image"}] * images + [{"type": "video"}] * videos
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def inputs_of(processor: Any, *prompts: tuple[str, int], seed: int = 0) -> Any:
    """Return the tensors of prompts, each a question and how many images stand before it."""
    texts = [text_of(processor, question, images) for question, images in prompts]
    number = sum(images for _, images in prompts)
    images = [picture(seed + index, 64 + 32 * (index % 2)) for index in range(number)] or None
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def video_inputs_of(processor: Any, question: str) -> Any:
    """Return the tensors of a prompt with a video and an image."""
    text = text_of(processor, question, images=1, videos=1)
    return judge.processed(processor, [text], [picture(5)], [moving(6)])
