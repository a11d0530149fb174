"""The settings of a checkpoint's video processor: which frames are taken, and the size that they are brought to.

`video_preprocessor_config.json`, and the arithmetic of transformers' `Qwen3VLVideoProcessor` (5.24,
models/qwen3_vl/video_processing_qwen3_vl.py; that of 4.57 chooses the same).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime.contract import IntArray
from runtime.errors import CapacityError, CheckpointError, ImageError, UsageError
from runtime.image_bounds import MAX_ASPECT_RATIO
from runtime.image_config import ImageProcessorConfig
from runtime.input_limits import InputLimits
from runtime.option_checks import between, integer, optional, true_or_false
from runtime.shown import shown

UNKNOWN_FPS = 24.0
"""Rate of frames whose rate nobody says, as transformers assumes it."""

MAX_TAKEN_FRAMES = 1 << 16
"""Most frames that are taken of one video, whatever its header and its options say."""

# Of transformers' class, where a checkpoint says nothing.
_MIN_PIXELS, _MAX_PIXELS = 128 * 32 * 32, 32 * 32 * 768
_FRAMES = ImageProcessorConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
_SHARED = (
    *("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "rescale_factor", "resample"),
    *("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"),
)
_CLASSES = ("Qwen3VLVideoProcessor",)
# Settings that say how transformers runs its processor, not what comes out, and steps that are switched off.
_IGNORED_KEYS = frozenset(
    {
        *("auto_map", "data_format", "default_to_square", "device", "input_data_format", "processor_class"),
        *("return_metadata", "return_tensors", "transformers_version", "video_metadata", "max_duration"),
        *("_processor_class", "_valid_processor_keys", "disable_grouping", "image_processor_type", "image_seq_length"),
        # The limits have no effect on transformers' class at this place, in 4.57 and in 5.24.
        *("feature_extractor_type", "max_image_size", "min_pixels", "max_pixels"),
    }
)
# Steps that Qwen3-VL checkpoints do not use; accepted while switched off.
_UNSUPPORTED_KEYS = frozenset({"do_pad", "do_center_crop", "crop_size", "pad_size"})
_REMEDY = "take the file from the original checkpoint"


@dataclass(frozen=True)
class VideoProcessorConfig:
    """How videos are read; defaults are those of transformers' class.

    Attributes:
        image: How a frame is normalised and cut; its limits on pixels are not used.
        min_pixels: Smallest number of pixels of all frames together, after resizing (`size.shortest_edge`).
        max_pixels: Largest number of pixels of all frames together (`size.longest_edge`).
        min_frame_pixels, max_frame_pixels: The same for one frame; None for no such limit.
        fps: Frames that are taken for each second.
        num_frames: Frames that are taken, in place of `fps`.
        min_frames, max_frames: Least and most frames that `fps` leads to.
        do_sample_frames: Choose frames; otherwise all are taken.
        cap_pixels_per_frame: Limit a frame to `max_video_tokens` or an even share of `max_pixels`, as qwen-vl-utils.
        max_video_tokens: Most visual tokens of a frame then.
        fixed_size: Height and width that every frame is brought to, multiples of `factor`; no checkpoint's setting.
    """

    image: ImageProcessorConfig
    min_pixels: int = _MIN_PIXELS
    max_pixels: int = _MAX_PIXELS
    min_frame_pixels: int | None = None
    max_frame_pixels: int | None = None
    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768
    fixed_size: tuple[int, int] | None = None

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.image.patch_size

    @property
    def temporal_patch_size(self) -> int:
        """Frames of a segment."""
        return self.image.temporal_patch_size

    @property
    def merge_size(self) -> int:
        """Patches along a side of one visual token."""
        return self.image.merge_size

    @property
    def factor(self) -> int:
        """Side of one visual token in pixels."""
        return self.image.factor

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], image: ImageProcessorConfig) -> VideoProcessorConfig:
        """Read the settings of a checkpoint.

        Args:
            settings: Content of `video_preprocessor_config.json`; empty if there is none.
            image: Those of its image processor. If there is no file, what both have is theirs; what a file leaves out
                is as in transformers' class.

        Raises:
            CheckpointError: A key is unknown, or a value is not one that this processor can honour.
        """
        nested = settings.get("video_processor", settings)
        if not isinstance(nested, Mapping):
            raise CheckpointError(
                f"video processor settings: expected an object, found {type(nested).__name__}", remedy=_REMEDY
            )
        given = {key: value for key, value in nested.items() if value is not None}
        kind = given.pop("video_processor_type", _CLASSES[0])
        if kind not in _CLASSES:
            raise CheckpointError(
                f"video processor settings: video_processor_type is {shown(kind)}, expected {_CLASSES[0]}",
                remedy=_REMEDY,
            )
        try:
            frames = _of_frames(nested, image if not nested else _FRAMES)
            return cls(frames, **_own_values({key: value for key, value in given.items() if key not in _SHARED}))
        except (CheckpointError, UsageError) as error:
            message = error.message.removeprefix("image processor settings: ")
            raise CheckpointError(f"video processor settings: {message}", remedy=error.remedy or _REMEDY) from error

    def with_limits(self, limits: InputLimits) -> VideoProcessorConfig:
        """Return a copy with a request's limits, of pixels those of a frame.

        Raises:
            UsageError: The lower limit of frames is above the upper.
        """
        changes = {
            "min_frame_pixels": limits.min_pixels,
            "max_frame_pixels": limits.max_pixels,
            "fps": limits.fps,
            "num_frames": limits.num_frames,
            "min_frames": limits.min_frames,
            "max_frames": limits.max_frames,
        }
        return self.changed({name: value for name, value in changes.items() if value is not None})

    def changed(self, values: Mapping[str, Any]) -> VideoProcessorConfig:
        """Return a copy with other values; a limit that stands alone moves the one that would contradict it.

        Raises:
            UsageError: Both limits of frames, or of pixels of a frame, are given and contradict each other.
        """
        changes = dict(values)
        for low, high in (("min_frames", "max_frames"), ("min_frame_pixels", "max_frame_pixels")):
            least, most = changes.get(low, getattr(self, low)), changes.get(high, getattr(self, high))
            if least is None or most is None or least <= most:
                continue
            if low in changes and high in changes:
                raise UsageError(f"{low} {least} is above {high} {most}", remedy="exchange them")
            changes |= {low: most} if high in changes else {high: least}
        if "fps" in changes:
            changes.setdefault("num_frames", None)
        return replace(self, **changes)

    def sample_indices(self, total_num_frames: int, source_fps: float, first: int = 0) -> IntArray:
        """Return the numbers of the frames that are taken, ascending: `Qwen3VLVideoProcessor.sample_frames`.

        Where `num_frames` asks for more frames than there are, some come several times, as in transformers.

        Args:
            total_num_frames: Frames of the video, or of the part of it that is taken, at least 1.
            source_fps: Frames in each of its seconds.
            first: Number of the first of them.

        Raises:
            CapacityError: More than `MAX_TAKEN_FRAMES` would be taken.
        """
        num_frames = self.num_frames
        if not self.do_sample_frames:
            num_frames = total_num_frames
        elif num_frames is None:
            wanted = min(total_num_frames / source_fps * self.fps, float(1 << 53))
            num_frames = min(max(int(wanted), self.min_frames), self.max_frames, total_num_frames)
        if num_frames > MAX_TAKEN_FRAMES:
            raise CapacityError(
                f"{num_frames} frames of a video would be taken, expected at most {MAX_TAKEN_FRAMES}",
                remedy="lower num_frames, max_frames or fps, or let frames be chosen (do_sample_frames)",
            )
        return np.linspace(first, first + total_num_frames - 1, num_frames).round().astype(np.int64)

    def target_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in pixels that frames of this size are brought to.

        Args:
            num_frames: Frames that are taken.
            height: Of a frame, in pixels.
            width: Likewise.

        Raises:
            ImageError: The sides' ratio is above `MAX_ASPECT_RATIO`; or `do_resize` is off and a side is not a multiple
                of `factor`.
        """
        if self.fixed_size is not None:
            return self.fixed_size
        if not self.image.do_resize:
            return self.image.target_size(height, width)
        least, most = self.limits(num_frames)
        return _smart_resize(
            max(num_frames, self.temporal_patch_size),
            height,
            width,
            temporal_factor=self.temporal_patch_size,
            factor=self.factor,
            min_pixels=least,
            max_pixels=most,
        )

    def limits(self, num_frames: int) -> tuple[int, int]:
        """Return least and most pixels of all frames together."""
        least, most = self.min_pixels, self.max_pixels
        if self.cap_pixels_per_frame:
            share = min(self.max_video_tokens * self.factor**2, most // num_frames)
            most = max(share, int(least * 1.05)) * num_frames
        if self.max_frame_pixels is not None:
            most = min(most, self.max_frame_pixels * num_frames)
        if self.min_frame_pixels is not None:
            least = self.min_frame_pixels * num_frames
            most = max(most, least)
        return min(least, most), most


def _of_frames(given: Mapping[str, Any], defaults: ImageProcessorConfig) -> ImageProcessorConfig:
    """Return how a frame is normalised and cut.

    Raises:
        CheckpointError: A value is not one that this processor can honour.
    """
    values = {key: given.get(key, getattr(defaults, key)) for key in _SHARED}
    return ImageProcessorConfig.from_dict({**values, "size": {"shortest_edge": 1, "longest_edge": 1}})


def _own_values(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that images do not have.

    Raises:
        UsageError: A key is unknown, or a value is of the wrong kind.
    """
    values = _limits(given.pop("size", {}))
    count = integer(1)
    checks = {
        **dict.fromkeys(("min_pixels", "max_pixels", "min_frames", "max_frames", "max_video_tokens"), count),
        "num_frames": optional(count),
        "fps": between(1e-6, 1000, "{name} is in frames per second"),
        "do_sample_frames": true_or_false,
        "cap_pixels_per_frame": true_or_false,
    }
    for key in sorted(_UNSUPPORTED_KEYS & given.keys()):
        if given.pop(key) and key.startswith("do_"):
            raise UsageError(
                f"{key}: expected false, found true", remedy=f"set {key} to false; this runtime cannot do it"
            )
    if unknown := sorted(given.keys() - checks.keys() - _IGNORED_KEYS):
        known = ", ".join(sorted(checks))
        raise UsageError(
            f"unknown keys {', '.join(map(shown, unknown[:5]))}; known are {known}",
            remedy="remove the keys if they do not change the frames",
        )
    values |= {key: given[key] for key in checks if key in given and key not in ("min_pixels", "max_pixels")}
    values = {key: checks[key](key, value) for key, value in values.items()}
    for low, high, least, most in (
        ("min_pixels", "max_pixels", _MIN_PIXELS, _MAX_PIXELS),
        ("min_frames", "max_frames", VideoProcessorConfig.min_frames, VideoProcessorConfig.max_frames),
    ):
        if values.get(low, least) > values.get(high, most):
            raise UsageError(f"{low} {values.get(low, least)} is above {high} {values.get(high, most)}", remedy=_REMEDY)
    return values


def _limits(size: Any) -> dict[str, Any]:
    """Return limits on the pixels of all frames together.

    Raises:
        UsageError: They are of another form, or one is missing.
    """
    edges = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    if not isinstance(size, Mapping) or (size and size.keys() != edges.keys()) or None in size.values():
        raise UsageError(
            f"size: expected shortest_edge and longest_edge in pixels, found {shown(size)}", remedy=_REMEDY
        )
    return {edges[key]: value for key, value in size.items()}


def _smart_resize(
    num_frames: int, height: int, width: int, *, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Choose the size of frames: transformers' `smart_resize` of Qwen3-VL's videos.

    As that of images (`runtime.image_config.smart_resize`), with limits on all frames together.
    """
    if height < 1 or width < 1:
        raise ImageError(f"frames of {width} x {height}: expected at least one pixel", remedy="leave the video out")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"frames of {width} x {height}: expected sides of a ratio of at most {MAX_ASPECT_RATIO}, "
            f"found {max(height, width) / min(height, width):.1f}",
            remedy="cut or pad the frames",
        )
    # Python rounds halves to even, and so does the reference.
    target_height = round(height / factor) * factor
    target_width = round(width / factor) * factor
    frames = round(num_frames / temporal_factor) * temporal_factor
    if frames * target_height * target_width > max_pixels:
        shrink = math.sqrt((num_frames * height * width) / max_pixels)
        target_height = max(factor, math.floor(height / shrink / factor) * factor)
        target_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * target_height * target_width < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        target_height = math.ceil(height * grow / factor) * factor
        target_width = math.ceil(width * grow / factor) * factor
    return target_height, target_width
