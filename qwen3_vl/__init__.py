"""The public names: `from qwen3_vl import Qwen3VLModel`.

They are imported when first asked for, so that importing this package loads no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy
from qwen3_vl.names import check_names

if TYPE_CHECKING:
    from qwen3_vl import errors
    from runtime import __version__
    from runtime.answer import Generation, Stats
    from runtime.conversation import Conversation
    from runtime.errors import (
        BundleError,
        CapacityError,
        CheckpointError,
        DeadlineError,
        EngineError,
        ImageError,
        OverloadError,
        ParityError,
        Qwen3VLError,
        RegressionError,
        RequestError,
        TargetError,
        UsageError,
    )
    from runtime.generation_config import GenerationOptions
    from runtime.grounding import Box, Point
    from runtime.model import Qwen3VLModel
    from runtime.piece import Piece
    from runtime.raw_prompt import RawPrompt
    from runtime.stream import Stream
    from runtime.tools.call import ToolCall

__all__ = [
    "Box",
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "Conversation",
    "DeadlineError",
    "EngineError",
    "Generation",
    "GenerationOptions",
    "ImageError",
    "OverloadError",
    "ParityError",
    "Piece",
    "Point",
    "Qwen3VLError",
    "Qwen3VLModel",
    "RawPrompt",
    "RegressionError",
    "RequestError",
    "Stats",
    "Stream",
    "TargetError",
    "ToolCall",
    "UsageError",
    "__version__",
    "errors",
]

check_names()
# Which imports `runtime`, and so turns ONNX Runtime's telemetry off, if the program imports that library next.
importlib.import_module("qwen3_vl.errors")

_SOURCES = {
    "runtime": ["__version__"],
    "runtime.answer": ["Generation", "Stats"],
    "runtime.conversation": ["Conversation"],
    "runtime.errors": [name for name in __all__ if name.endswith("Error")],
    "runtime.generation_config": ["GenerationOptions"],
    "runtime.grounding": ["Box", "Point"],
    "runtime.model": ["Qwen3VLModel"],
    "runtime.piece": ["Piece"],
    "runtime.raw_prompt": ["RawPrompt"],
    "runtime.stream": ["Stream"],
    "runtime.tools.call": ["ToolCall"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
