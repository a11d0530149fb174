"""Turn a video into segments."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.image_processor import ProcessedImage


@dataclass(frozen=True, eq=False)
class ProcessedVideo:
    """One video as the vision tower takes it."""

    segments: tuple[ProcessedImage, ...]
    timestamps: tuple[float, ...]

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the video takes in the prompt."""
        return sum(each.num_visual_tokens for each in self.segments)
