"""The questions of the parity section, about the pictures that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qwen3vl_export

NUM_POSITIONS = 8
"""Positions at the end of a prompt whose logits are compared."""
NUM_TOKENS = 24
"""Most tokens of an answer."""


def questions() -> dict[str, list[dict[str, Any]]]:
    """Return messages by name: digits of eight pictures, their number, JSON, text alone, two pictures."""
    pictures = Path(qwen3vl_export.__file__).parent / "demo" / "images"

    def image(index: int) -> dict[str, Any]:
        return {"type": "image", "image": str(pictures / f"held_out_{index}.png")}

    def ask(text: str, *images: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]

    read = "Read the digits."
    return {
        **{f"read{index}": ask(read, image(index)) for index in range(8)},
        "count": ask("How many digits are there?", image(1)),
        "json": ask("Answer as JSON.", image(2)),
        "text": ask(read),
        "two": ask(read, image(3), image(4)),
    }
