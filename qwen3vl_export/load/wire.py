"""Messages as OpenAI's API has them: images are files in data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_COMPRESSION = 1
"""Of zlib: random pixels do not shrink, and at its default Pillow takes several times as long to find that out."""


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of `Prompts` as the body of a request holds them."""
    return [{**message, "content": _content(message["content"])} for message in messages]


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}


def data_url(pixels: np.ndarray) -> str:
    """Return an image as a PNG file in a data URL.

    Args:
        pixels: uint8, (height, width, 3).
    """
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")


def png(pixels: np.ndarray) -> bytes:
    """Return an image as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=_COMPRESSION)
    return file.getvalue()
