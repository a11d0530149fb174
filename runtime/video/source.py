"""A video as a message holds it: its frames or its file, and what the part says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VideoOptions:
    """What a part says of its video; None where it says nothing.

    Attributes:
        settings: Values of `VideoProcessorConfig` in place of those of the request.
        total_pixels: Most pixels of all segments together, as qwen-vl-utils counts: a visual token is `factor`².
        size: Height and width to bring frames to, but for rounding.
        source_fps: Rate of the frames that are given.
        indices: Numbers of the frames that are given, in the video that they were taken from.
        timestamps: Times of the frames that are given, in seconds.
        start_s, end_s: Part of the video that frames are taken from.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    total_pixels: int | None = None
    size: tuple[int, int] | None = None
    source_fps: float | None = None
    indices: tuple[int, ...] | None = None
    timestamps: tuple[float, ...] | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class VideoSource:
    """A video and what its part says of it.

    Attributes:
        video: What `runtime.video.opening.open_video` takes.
        options: What the part says.
    """

    video: Any
    options: VideoOptions = field(default_factory=VideoOptions)
