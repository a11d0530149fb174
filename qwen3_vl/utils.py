"""What stands around the two graphs: images, positions, threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from runtime.image_processor import ProcessedImage, process_image
    from runtime.images import load_image
    from runtime.machine import default_threads
    from runtime.messages import user_message
    from runtime.positions import VisualSpan, mrope_positions

__all__ = [
    "ProcessedImage",
    "VisualSpan",
    "default_threads",
    "load_image",
    "mrope_positions",
    "process_image",
    "user_message",
]

_SOURCES = {
    "runtime.image_processor": ["ProcessedImage", "process_image"],
    "runtime.images": ["load_image"],
    "runtime.machine": ["default_threads"],
    "runtime.messages": ["user_message"],
    "runtime.positions": ["VisualSpan", "mrope_positions"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
