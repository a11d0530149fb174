"""Engines in NVIDIA Triton Inference Server: the class that a model of its Python backend has.

`qwen3vl package ENGINE --for triton` writes a model repository that imports it; see docs/triton.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from runtime.integrations.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]

_SOURCES = {"runtime.integrations.triton.model": ["TritonPythonModel"]}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
