"""An engine as a transformers user expects a model: `from_pretrained`, `generate(**processor(...))`, `pipeline`.

It needs the extras [optimum] and the engine's; see docs/optimum.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.integrations.optimum.model import QwenVLForImageTextToText

__all__ = ["QwenVLForImageTextToText"]

_SOURCES = {"qwen3vl_export.integrations.optimum.model": ["QwenVLForImageTextToText"]}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
