"""The settings of a checkpoint's image processor, and the size that an image is brought to.

`preprocessor_config.json` in the forms that releases of transformers have written; `smart_resize` is that of
transformers 5.23 (models/qwen2_vl/image_processing_qwen2_vl.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from runtime.errors import CheckpointError, ImageError, UsageError
from runtime.image_bounds import MAX_ASPECT_RATIO
from runtime.resize import BICUBIC, BILINEAR, Kernel
from runtime.shown import shown

FILTERS: Mapping[int, Kernel] = {2: BILINEAR, 3: BICUBIC}
"""Filters by Pillow's numbers, as checkpoints write them; every published Qwen3-VL has 3."""

NUM_CHANNELS = 3

_LARGEST = (1 << 63) - 1

# Settings that say how transformers runs its processor, not which pixels come out.
_IGNORED_KEYS = frozenset(
    {
        "_processor_class",
        "_valid_processor_keys",
        "auto_map",
        "data_format",
        "default_to_square",
        "device",
        "disable_grouping",
        "feature_extractor_type",
        "image_processor_type",
        "image_seq_length",
        "input_data_format",
        "processor_class",
        "return_tensors",
        "transformers_version",
    }
)
# Settings of videos, which older releases wrote into this file, too.
_VIDEO_KEYS = frozenset(
    {
        *("do_sample_frames", "fps", "max_frames", "max_video_tokens", "min_frames", "num_frames", "return_metadata"),
        *("video_metadata", "video_processor_type"),
    }
)
# Under which names releases have had the one image processor that is reproduced here.
_CLASSES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
# Steps that Qwen3-VL checkpoints do not use; accepted while switched off.
# Null is the default of the class to some releases, and "no" or a crash to others.
_NOT_NULL = frozenset(
    {
        "do_normalize",
        "do_rescale",
        "do_resize",
        "image_mean",
        "image_std",
        "merge_size",
        "patch_size",
        "resample",
        "rescale_factor",
        "temporal_patch_size",
    }
)
# What no checkpoint says.
_OWN_SETTINGS = frozenset({"fixed_size", "keeps_levels"})
_UNSUPPORTED_KEYS = frozenset({"do_pad", "do_center_crop", "crop_size", "pad_size"})


@dataclass(frozen=True)
class ImageProcessorConfig:
    """Settings of a checkpoint's `preprocessor_config.json`; defaults are those of transformers' class.

    Attributes:
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Frames in a patch; a still image is repeated that often.
        merge_size: Patches along a side of one visual token.
        min_pixels: Smallest number of pixels after resizing (`size.shortest_edge`).
        max_pixels: Largest number of pixels after resizing (`size.longest_edge`).
        image_mean: Mean of each channel, on the scale after rescaling.
        image_std: Standard deviation of each channel, likewise.
        rescale_factor: Factor on the 0..255 values.
        do_resize: Resize; otherwise sides must already be multiples of patch_size · merge_size.
        do_rescale: Multiply by `rescale_factor`.
        do_normalize: Subtract the mean and divide by the standard deviation.
        do_convert_rgb: Always true: the vision tower has three input channels.
        resample: Pillow's number of the filter, 2 or 3: see `FILTERS`.
        keeps_levels: Leave patches as grey levels, for an engine that normalises them; no checkpoint's setting.
        fixed_size: Height and width that every image is brought to, multiples of `factor`; no checkpoint's setting.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True
    resample: int = 3
    fixed_size: tuple[int, int] | None = None
    keeps_levels: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: A value is of the wrong type, out of range, or contradicts another.
        """
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            is_size = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST
            _expect(is_size, name, "a whole number of at least 1", value)
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            _expect(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            are_numbers = len(values) == NUM_CHANNELS and all(map(_is_finite_number, values))
            _expect(are_numbers, name, f"{NUM_CHANNELS} finite numbers", values)
        _expect(all(value > 0 for value in self.image_std), "image_std", "numbers above 0", self.image_std)
        is_positive = _is_finite_number(self.rescale_factor) and self.rescale_factor > 0
        _expect(is_positive, "rescale_factor", "a number above 0", self.rescale_factor)
        if self.min_pixels > self.max_pixels:
            raise UsageError(
                f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}",
                remedy="lower min_pixels or raise max_pixels",
            )
        if not self.do_convert_rgb:
            raise UsageError(
                "do_convert_rgb: expected true, found false; the vision tower takes three channels",
                remedy="set do_convert_rgb to true: an image that is RGB already stays as it is",
            )
        is_known = type(self.resample) is int and self.resample in FILTERS
        _expect(is_known, "resample", "3 (bicubic, as every published Qwen3-VL) or 2 (bilinear)", self.resample)

    @property
    def factor(self) -> int:
        """Number that both sides of a resized image are multiples of: the side of one visual token in pixels."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ImageProcessorConfig:
        """Read the settings of a checkpoint.

        Args:
            settings: Content of `preprocessor_config.json`, or of the newer `processor_config.json` with the same
                under "image_processor". `min_pixels` and `max_pixels`, the older form, win over `size`, as in
                transformers.

        Raises:
            CheckpointError: A key is unknown, or a value is not one this processor can honour.
        """
        try:
            return cls(**_values_of(settings, frozenset(field.name for field in fields(cls)) - _OWN_SETTINGS))
        except UsageError as error:
            raise CheckpointError(f"image processor settings: {error.message}", remedy=error.remedy) from error

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageProcessorConfig:
        """Return a copy with other limits on the number of pixels after resizing; None keeps a limit.

        Raises:
            UsageError: A limit is not a positive whole number, or the lower is above the upper.
        """
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )

    def both_limits(self, low: int | None, high: int | None) -> tuple[int, int]:
        """Return both limits on pixels where one may be left out: this one's, the lower no higher than a new upper.

        They are not checked; `with_limits` does that.
        """
        if low is None:
            low = self.min_pixels if high is None else max(1, min(self.min_pixels, high))
        return low, self.max_pixels if high is None else high

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in pixels that an image of this size is brought to.

        Raises:
            ImageError: The sides' ratio is above `MAX_ASPECT_RATIO`; or `do_resize` is off and a side is not a
                multiple of `factor`.
        """
        if self.fixed_size is not None:
            return self.fixed_size
        if self.do_resize:
            return self.smart_size(height, width)
        if height % self.factor or width % self.factor:
            raise ImageError(
                f"image of {width} x {height}: this checkpoint does not resize; expected multiples of {self.factor}",
                remedy="resize the image",
            )
        return height, width

    def smart_size(self, height: int, width: int) -> tuple[int, int]:
        """Return `smart_resize` with these settings.

        Raises:
            ImageError: As it.
        """
        return smart_resize(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(np.float32(value))  # what it is computed in
    except OverflowError:  # an integer of hundreds of digits
        return False


def _expect(is_right: bool, name: str, expected: str, found: object) -> None:
    if not is_right:
        raise UsageError(f"{name}: expected {expected}, found {shown(found)}", remedy=_take(name))


def _take(name: str) -> str:
    return f"take {name} from the original checkpoint's preprocessor_config.json"


def _values_of(settings: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Return the values of the `known` settings.

    Raises:
        UsageError: A key is unknown, or a value asks for what this processor does not do.
    """
    nested = settings.get("image_processor", settings)
    if not isinstance(nested, Mapping):
        raise UsageError(f"expected an object, found {type(nested).__name__}", remedy=_take("image_processor"))
    _check_class(nested)
    unclear = sorted(key for key, value in nested.items() if value is None and key in _NOT_NULL)
    if unclear:
        raise UsageError(
            f"{', '.join(unclear)}: null, which releases of transformers read differently",
            remedy="write the value, as in the original checkpoint",
        )
    ignored = _IGNORED_KEYS | _VIDEO_KEYS
    values = {key: value for key, value in nested.items() if key not in ignored and value is not None}
    values |= _pixel_limits(values.pop("size", None), values)
    for key in sorted(_UNSUPPORTED_KEYS & values.keys()):
        if values.pop(key) and key.startswith("do_"):
            raise UsageError(
                f"{key}: expected false, found true",
                remedy=f"set {key} to false, as every published Qwen3-VL has it; this runtime cannot do it",
            )
    if unknown := sorted(values.keys() - known):
        raise UsageError(
            f"unknown keys {', '.join(map(shown, unknown[:5]))}; known are {', '.join(sorted(known))}",
            remedy="remove the keys if they do not change the pixels",
        )
    for key in {"image_mean", "image_std"} & values.keys():
        value = values[key]
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        values[key] = tuple(value) if is_list else (value,) * NUM_CHANNELS
    return values


def _check_class(settings: Mapping[str, Any]) -> None:
    """Raise if the settings are of another image processor: transformers goes by the name.

    Raises:
        UsageError: It is none of `_CLASSES`.
    """
    for key in ("image_processor_type", "feature_extractor_type"):
        name = settings.get(key)
        if name is not None:
            if name not in _CLASSES:
                raise UsageError(
                    f"{key} is {shown(name)}, expected {_CLASSES[0]}: another one makes other pixels",
                    remedy="take the file from the original checkpoint",
                )
            return


def _pixel_limits(size: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `min_pixels` and `max_pixels`, in all the forms that releases have written.

    Without `size`, transformers lays them over its default; with it, over what it holds, and wants both in the end. In
    `size` under these names they only stand beside themselves, and are dropped.

    Raises:
        UsageError: `size` is of another form, or a limit is missing.
    """
    given = {name: values[name] for name in ("min_pixels", "max_pixels") if name in values}
    if size is None:
        return given
    spare = {name for name in given if isinstance(size, Mapping) and name in size}
    edges = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    if not isinstance(size, Mapping) or not size.keys() <= edges.keys() | spare:
        raise UsageError(
            f"size: expected shortest_edge and longest_edge in pixels, found {shown(size)}", remedy=_take("size")
        )
    limits = {name: size[edge] for edge, name in edges.items() if size.get(edge) is not None} | given
    if len(limits) < 2:
        missing = next(edge for edge, name in edges.items() if name not in limits)
        raise UsageError(
            f"size: {missing} is missing, and transformers wants both",
            remedy="write shortest_edge and longest_edge of the original checkpoint",
        )
    return limits


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Choose the size that an image is resized to: transformers' `smart_resize`.

    Both sides become multiples of `factor`, their product lies within the limits where the sides allow it (no side
    is below `factor`), and the aspect ratio is kept as near as that permits.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        factor: Side of a visual token in pixels.
        min_pixels: Smallest product of the sides, at least 1.
        max_pixels: Largest product of the sides.

    Returns:
        Height and width in pixels.

    Raises:
        ImageError: A side is below 1, or the sides' ratio is above `MAX_ASPECT_RATIO`.
    """
    if height < 1 or width < 1:
        raise ImageError(f"image of {width} x {height}: expected at least one pixel", remedy="leave the image out")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"image of {width} x {height}: expected sides of a ratio of at most {MAX_ASPECT_RATIO}, "
            f"found {max(height, width) / min(height, width):.1f}",
            remedy="cut the image into pieces or pad it",
        )
    # Python rounds halves to even, and so does the reference.
    target_height = round(height / factor) * factor
    target_width = round(width / factor) * factor
    if target_height * target_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        target_height = max(factor, math.floor(height / shrink / factor) * factor)
        target_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif target_height * target_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        target_height = math.ceil(height * grow / factor) * factor
        target_width = math.ceil(width * grow / factor) * factor
    return target_height, target_width
