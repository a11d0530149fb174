"""What stands around the two graphs: images, positions, threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from runtime.image_processor import (
        ProcessedImage,
        process_image,
        smart_resize,
    )
    from runtime.images import load_image
    from runtime.machine import default_threads
    from runtime.messages import user_message
    from runtime.positions import (
        PromptPositions,
        VisualSpan,
        mrope_positions,
    )
    from runtime.vision_inputs import position_interpolation, vision_rotary

__all__ = [
    "ProcessedImage",
    "PromptPositions",
    "VisualSpan",
    "default_threads",
    "load_image",
    "mrope_positions",
    "position_interpolation",
    "process_image",
    "smart_resize",
    "user_message",
    "vision_rotary",
]

__getattr__, __dir__ = lazy(
    __name__,
    __all__,
    {
        "runtime.image_processor": ["ProcessedImage", "process_image", "smart_resize"],
        "runtime.images": ["load_image"],
        "runtime.machine": ["default_threads"],
        "runtime.messages": ["user_message"],
        "runtime.positions": ["PromptPositions", "VisualSpan", "mrope_positions"],
        "runtime.vision_inputs": ["position_interpolation", "vision_rotary"],
    },
)
