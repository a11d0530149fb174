"""Frozen records: the shape of a model, how it reads images, how it generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from runtime.generation_config import GenerationOptions
    from runtime.image_config import ImageProcessorConfig
    from runtime.model_config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig

__all__ = ["ExpertsConfig", "GenerationOptions", "ImageProcessorConfig", "ModelConfig", "TextConfig", "VisionConfig"]

_SOURCES = {
    "runtime.generation_config": ["GenerationOptions"],
    "runtime.image_config": ["ImageProcessorConfig"],
    "runtime.model_config": ["ExpertsConfig", "ModelConfig", "TextConfig", "VisionConfig"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)
