"""Engines beside other runtimes in NVIDIA Polygraphy: loaders, a runner, and inputs of a real prompt.

`polygraphy run ENGINE --qwen3vl` needs no code; see docs/polygraphy.md. The extra [polygraphy] installs it, and loaders
that trace or lower a checkpoint need [export].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.integrations.polygraphy.inputs import PromptInputs
    from qwen3vl_export.integrations.polygraphy.loaders import BundleGraph, EngineSession, LoweredGraph
    from qwen3vl_export.integrations.polygraphy.runner import EngineRunner

__all__ = ["BundleGraph", "EngineRunner", "EngineSession", "LoweredGraph", "PromptInputs"]

_SOURCES = {
    "qwen3vl_export.integrations.polygraphy.inputs": ["PromptInputs"],
    "qwen3vl_export.integrations.polygraphy.loaders": ["BundleGraph", "EngineSession", "LoweredGraph"],
    "qwen3vl_export.integrations.polygraphy.runner": ["EngineRunner"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
