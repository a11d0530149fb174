"""Turn a video into the segments that the vision tower takes, as transformers' `Qwen3VLVideoProcessor` does.

Frames are chosen by number, resized one by one while the file is decoded, and cut two by two: a segment is a temporal
patch, with a time of its own. Shapes: H, W pixels of a frame, T frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from runtime.contract import IntArray
from runtime.errors import CapacityError, ImageError, UsageError
from runtime.image_config import FILTERS, NUM_CHANNELS
from runtime.image_processor import MAX_PIXEL_VALUES_BYTES, OnImages, ProcessedImage, segment
from runtime.resize import resize
from runtime.still_wanted import Check, always
from runtime.video.config import UNKNOWN_FPS, VideoProcessorConfig
from runtime.video.opening import open_video
from runtime.video.reader import VideoReader
from runtime.video.source import VideoOptions, VideoSource
from runtime.vision_inputs import VISION_PATCHES
from runtime.visual_pruning.choice import num_kept_tokens

if TYPE_CHECKING:
    from runtime.images import RgbImage

_TEXT_TOKENS = 3  # beside each segment: two markers and at least one of its time
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ProcessedVideo:
    """One video as the vision tower takes it.

    Attributes:
        segments: Its temporal patches, in order, all of one grid.
        timestamps: Their times in seconds: the mean of their first and last frame's.
        num_frames: Frames that were taken.
    """

    segments: tuple[ProcessedImage, ...]
    timestamps: tuple[float, ...]
    num_frames: int

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patches along time, height and width."""
        return (len(self.segments), *self.segments[0].grid_thw[1:])

    @property
    def source_size(self) -> tuple[int, int]:
        """Width and height of its frames before they were resized, which boxes in an answer are mapped to."""
        return self.segments[0].source_size

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the video takes in the prompt, its times not counted."""
        return sum(each.num_visual_tokens for each in self.segments)


@dataclass(frozen=True)
class _Room:
    """Most visual tokens of a video, those of a whole prompt, and how many of the video's stay in it."""

    max_tokens: int | None
    context: int | None
    visual_token_share: float


def process_video(
    source: VideoSource,
    config: VideoProcessorConfig,
    *,
    max_image_pixels: int,
    max_tokens: int | None = None,
    context: int | None = None,
    on_images: OnImages | None = None,
    check: Check = always,
    visual_token_share: float = 1.0,
) -> ProcessedVideo:
    """Open a video, choose frames, resize, normalise and cut them.

    Args:
        source: The video, and what its part says.
        config: The settings of the checkpoint and of the request.
        max_image_pixels: Frames of more pixels are refused before they are decoded.
        max_tokens: Most visual tokens of it, whatever `source` says.
        context: Tokens of a whole prompt: a video that alone has more is refused at its first frame.
        on_images: Given segments in groups that fill a call of the vision tower, as soon as they are there.
        check: Asked before each frame, also of those that are not taken; raises where the video is not wanted any more.
        visual_token_share: Of its visual tokens, how many stay in the prompt.

    Raises:
        ImageError: The video cannot be read, or holds no frames.
        CapacityError: It would take too much memory, or cannot be brought to so few tokens.
        UsageError: Its options contradict it.
    """
    options = source.options
    config = config.changed(options.settings)
    check()
    reader = open_video(source.video, max_image_pixels, check)
    try:
        indices, times = _chosen(reader, options, config)
        room = _Room(max_tokens, context, visual_token_share)
        frames = _checked(reader.frames(indices), check)
        segments = _segments(frames, len(indices), options, config, room, reader.name)
        taken = list(_told(segments, on_images))
    finally:
        reader.close()
    step = config.temporal_patch_size
    times += [times[-1]] * (-len(times) % step)
    stamps = tuple((times[at] + times[at + step - 1]) / 2 for at in range(0, len(times), step))
    return ProcessedVideo(tuple(taken), stamps, len(indices))


def _chosen(reader: VideoReader, options: VideoOptions, config: VideoProcessorConfig) -> tuple[IntArray, list[float]]:
    """Return the numbers of the frames that are taken, and their times in seconds."""
    name, total = reader.name, reader.num_frames
    given = options.timestamps if options.timestamps is not None else options.indices
    if given is not None and len(given) != total:
        what = "timestamps" if options.timestamps is not None else "video_metadata.frames_indices"
        raise UsageError(f"{name}: {total} frames, but {len(given)} {what}", remedy="pass one for each frame")
    fps = options.source_fps or reader.fps
    is_timed = given is not None or (reader.is_sampled and "do_sample_frames" not in options.settings)
    if fps is None:
        fps = UNKNOWN_FPS
        if options.timestamps is None and total > 1:
            _LOGGER.warning(
                "note: nobody says how many frames of %s make a second: %g is assumed, as transformers does; pass "
                "sample_fps for frames that are all to be taken, raw_fps for those to choose from, or timestamps",
                *(name, fps),
            )
    first, last = _range(options, total, fps, name)
    if is_timed:
        config = replace(config, do_sample_frames=False)
    indices = config.sample_indices(last - first + 1, fps, first)
    if options.timestamps is not None:
        return indices, [options.timestamps[index] for index in indices]
    numbers = np.array(options.indices)[indices] if options.indices is not None else indices
    return indices, [float(number) / fps for number in numbers]


def _range(options: VideoOptions, total: int, fps: float, name: str) -> tuple[int, int]:
    """Return first and last frame of the part that is taken: `calculate_video_frame_range` of qwen-vl-utils."""
    start, end = options.start_s or 0.0, options.end_s
    first = int(np.ceil(min(start, total / fps) * fps))
    last = total - 1 if end is None else min(int(np.floor(min(end, total / fps) * fps)), total - 1)
    if first > last:
        raise UsageError(
            f"{name}: {total / fps:.2f} s long, and no frame lies from {start:g} s to "
            f"{total / fps if end is None else end:.4g} s",
            remedy="pass video_start below video_end, both within the video",
        )
    return first, last


def _checked(frames: Iterator[RgbImage], check: Check) -> Iterator[RgbImage]:
    for frame_HWC in frames:
        check()
        yield frame_HWC


def _segments(
    frames: Iterator[RgbImage],
    num_frames: int,
    options: VideoOptions,
    config: VideoProcessorConfig,
    room: _Room,
    name: str,
) -> Iterator[ProcessedImage]:
    """Resize frames as they come and cut them, a temporal patch at a time."""
    waiting: list[RgbImage] = []
    size: tuple[int, int] | None = None
    source_size: tuple[int, int] | None = None
    for frame_HWC in frames:
        if size is None:
            config = _limited(config, options, num_frames, room.max_tokens)
            size = config.target_size(num_frames, *frame_HWC.shape[:2])
            _check_size(size, num_frames, config, room, name)
        if source_size not in (None, (frame_HWC.shape[1], frame_HWC.shape[0])):
            raise ImageError(
                f"{name}: a frame of {frame_HWC.shape[1]} x {frame_HWC.shape[0]} pixels, where the first has "
                f"{source_size[0]} x {source_size[1]}",
                remedy="bring all frames to one size: ffmpeg -i input -vf scale=1280:720 output.mp4",
            )
        source_size = frame_HWC.shape[1], frame_HWC.shape[0]
        if size != frame_HWC.shape[:2]:
            frame_HWC = resize(frame_HWC, *size, FILTERS[config.image.resample])
        waiting.append(frame_HWC)
        if len(waiting) == config.temporal_patch_size:
            yield segment(waiting, config.image, source_size=source_size)
            waiting = []
    if waiting:
        yield segment(waiting, config.image, source_size=source_size)


def _limited(
    config: VideoProcessorConfig, options: VideoOptions, num_frames: int, max_tokens: int | None
) -> VideoProcessorConfig:
    """Return the settings with limits that depend on the number of frames."""
    area, step = config.factor**2, config.temporal_patch_size
    # A visual token covers its area in each frame of its segment.
    bounds = [options.total_pixels * step] if options.total_pixels is not None else []
    bounds += [max_tokens * area * num_frames // -(-num_frames // step)] if max_tokens is not None else []
    for bound in bounds:
        most = max(1, min(config.max_pixels, bound))
        frame = max(1, most // num_frames)
        config = replace(
            config,
            min_pixels=min(config.min_pixels, most),
            max_pixels=most,
            min_frame_pixels=None if config.min_frame_pixels is None else min(config.min_frame_pixels, frame),
        )
    if options.size is None:
        return config
    least, most = config.limits(num_frames)
    exact = replace(config.image, min_pixels=max(1, least // num_frames), max_pixels=max(1, most // num_frames))
    return replace(config, fixed_size=exact.smart_size(*options.size))


def _check_size(size: tuple[int, int], num_frames: int, config: VideoProcessorConfig, room: _Room, name: str) -> None:
    height, width = size
    num_segments = -(-num_frames // config.temporal_patch_size)
    num_tokens = num_segments * height * width // config.factor**2
    fewer = "take fewer frames (fps, max_frames), or a part of the video (video_start, video_end)"
    if room.max_tokens is not None and num_tokens > room.max_tokens:
        raise CapacityError(
            f"{name}: {num_frames} frames are at least {num_tokens} visual tokens, {room.max_tokens} are left for them",
            remedy=f"{fewer}, or raise max_visual_tokens",
        )
    num_kept = num_kept_tokens(num_tokens, room.visual_token_share)
    if room.context is not None and num_kept + _TEXT_TOKENS * num_segments >= room.context:
        raise CapacityError(
            f"{name}: {num_frames} frames are {num_kept} visual tokens, which with their times leave no room for an "
            f"answer: max_context is {room.context}",
            remedy=f"pass max_visual_tokens={max(1, room.context // 2)}, {fewer}, or raise max_context",
        )
    elements = num_segments * height * width * NUM_CHANNELS * config.temporal_patch_size
    num_bytes = elements * np.dtype(np.float32).itemsize
    if num_bytes > MAX_PIXEL_VALUES_BYTES:
        raise CapacityError(
            f"{name}: {num_frames} frames of {width} x {height} take {num_bytes} bytes as patches; expected at most "
            f"{MAX_PIXEL_VALUES_BYTES}",
            remedy=f"lower max_pixels, or {fewer}",
        )


def _told(segments: Iterator[ProcessedImage], on_images: OnImages | None) -> Iterator[ProcessedImage]:
    """Yield segments, and tell of them in groups that fill a call of the vision tower."""
    group: list[ProcessedImage] = []
    for each in segments:
        yield each
        group.append(each)
        if on_images is not None and _fills(group):
            on_images(group)
            group = []


def _fills(group: Sequence[ProcessedImage]) -> bool:
    """Return whether one more segment would not go through the vision tower with these."""
    return (len(group) + 1) * len(group[0].patches) > VISION_PATCHES
