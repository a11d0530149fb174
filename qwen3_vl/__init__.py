"""The public names: `from qwen3_vl import Qwen3VLModel`.

They are imported when first asked for, so that importing this package loads no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qwen3_vl.names import check_names

if TYPE_CHECKING:
    from qwen3_vl import errors
    from runtime import __version__
    from runtime.answer import Generation, Stats, Stream
    from runtime.errors import (
        BundleError,
        CapacityError,
        CheckpointError,
        EngineError,
        ImageError,
        ParityError,
        Qwen3VLError,
        TargetError,
        UsageError,
    )
    from runtime.generation_config import GenerationOptions
    from runtime.model import Qwen3VLModel

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "EngineError",
    "Generation",
    "GenerationOptions",
    "ImageError",
    "ParityError",
    "Qwen3VLError",
    "Qwen3VLModel",
    "Stats",
    "Stream",
    "TargetError",
    "UsageError",
    "__version__",
    "errors",
]

_MODULES = {
    "Generation": "runtime.answer",
    "GenerationOptions": "runtime.generation_config",
    "Qwen3VLModel": "runtime.model",
    "Stats": "runtime.answer",
    "Stream": "runtime.answer",
    "__version__": "runtime",
}

check_names()
# Which turns ONNX Runtime's telemetry off, if the program imports that library next.
importlib.import_module("runtime")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if name == "errors":
        return importlib.import_module("qwen3_vl.errors")
    return getattr(importlib.import_module(_MODULES.get(name, "runtime.errors")), name)


def __dir__() -> list[str]:
    return __all__
