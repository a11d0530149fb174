"""The public names: `from qwen3_vl import Qwen3VLModel`.

They are imported when first asked for, so that importing this package loads no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.errors import Qwen3VLError
    from runtime.generation_config import GenerationOptions
    from runtime.model import Qwen3VLModel

__all__ = ["GenerationOptions", "Qwen3VLError", "Qwen3VLModel"]


def __getattr__(name: str) -> Any:
    modules = {
        "GenerationOptions": "runtime.generation_config",
        "Qwen3VLError": "runtime.errors",
        "Qwen3VLModel": "runtime.model",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(modules[name]), name)


def __dir__() -> list[str]:
    return __all__
