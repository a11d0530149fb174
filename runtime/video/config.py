"""The settings of a checkpoint's video processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.image_config import ImageProcessorConfig
from runtime.input_limits import InputLimits


@dataclass(frozen=True)
class VideoProcessorConfig:
    """Settings of `video_preprocessor_config.json`."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], image: ImageProcessorConfig) -> VideoProcessorConfig:
        """Read the settings of a checkpoint; what they leave out, and belongs to the model, is that of images."""
        return cls(image.patch_size, image.temporal_patch_size, image.merge_size)

    def with_limits(self, limits: InputLimits) -> VideoProcessorConfig:
        """Return a copy with other limits."""
        return self
