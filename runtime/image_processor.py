"""Turn an image into the patches that the vision tower takes, as transformers' `Qwen2VLImageProcessor` does.

The steps of transformers 5.23 (models/qwen2_vl/image_processing_qwen2_vl.py, torchvision backend) without torch:
RGB, `smart_resize`, antialiased bicubic resize in uint8, rescale and normalise folded into one subtraction and one
division in float32, patches in merge order. Measured against it (test_image_parity.py, torch 2.14.1): `grid_thw`
equal, resized pixels equal (0 of 255 grey levels), `pixel_values` equal to the bit.

Shapes: H, W pixels of an image, C channels, P patches, E = C · temporal_patch_size · patch_size² elements of a patch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from runtime.errors import CapacityError, UsageError
from runtime.image_bounds import MAX_IMAGE_PIXELS
from runtime.image_config import FILTERS, NUM_CHANNELS, ImageProcessorConfig
from runtime.images import load_image
from runtime.patches import PixelScale, grey_levels, normalised, patchify
from runtime.resize import resize
from runtime.still_wanted import Check, always

if TYPE_CHECKING:
    import numpy.typing as npt

    from runtime.images import ImageSource, RgbImage
    from runtime.patches import Patches


MAX_PIXEL_VALUES_BYTES = 2 * 1024**3
"""Largest `pixel_values` of one image; a 16.8-megapixel image, the usual `max_pixels`, takes 0.4 GB."""


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One segment as the vision tower takes it: an image, or a temporal patch of a video.

    Attributes:
        patches: [P, E]: normalised, float32, or grey levels, uint8, for an engine that normalises them. In merge order:
            the merge_size² patches of one visual token follow each other, tokens row by row. A patch is laid out
            channel, frame, row, column.
        grid_thw: Patches along time (1), height and width; P is their product.
        merge_size: Patches along a side of one visual token.
        digest: SHA-256 of the resized frames and their shape: what caches know the image by.
        scale: How grey levels are normalised.
        source_size: Width and height in pixels of the upright image before it was resized, which boxes in an answer
            are drawn on. Images of one digest may have different ones.
    """

    patches: Patches = field(repr=False)
    grid_thw: tuple[int, int, int]
    merge_size: int
    digest: bytes = field(repr=False)
    scale: PixelScale = field(repr=False)
    source_size: tuple[int, int]

    @property
    def pixel_values(self) -> npt.NDArray[np.float32]:
        """Normalised patches, float32 [P, E]; computed each time if grey levels are kept."""
        if self.patches.dtype == np.float32:
            return np.asarray(self.patches, np.float32)
        return normalised(np.asarray(self.patches, np.uint8), self.scale)

    @property
    def levels(self) -> npt.NDArray[np.uint8]:
        """Grey levels, uint8 [P, E]; computed each time if normalised patches are kept.

        Raises:
            UsageError: The patches are of no grey levels.
        """
        if self.patches.dtype == np.uint8:
            return np.asarray(self.patches, np.uint8)
        levels = grey_levels(np.asarray(self.patches, np.float32), self.scale)
        if levels is None:
            raise UsageError(
                "a processed image whose values are of no grey levels from 0 to 255, which this engine takes",
                remedy="pass the image itself, or one of model.prepare(messages).inputs as it is",
            )
        return levels

    @property
    def has_patches(self) -> bool:
        """Whether its pixels are here; they are not after `without_patches`."""
        return len(self.patches) > 0

    def without_patches(self) -> ProcessedImage:
        """Return what stands for the image in a prompt of which it is not run again, without its pixels."""
        return replace(self, patches=self.patches[:0].copy())

    @property
    def merged_grid_thw(self) -> tuple[int, int, int]:
        """Visual tokens along time, height and width."""
        frames, height, width = self.grid_thw
        return frames, height // self.merge_size, width // self.merge_size

    @property
    def num_visual_tokens(self) -> int:
        """Tokens that the image takes in the prompt."""
        return math.prod(self.merged_grid_thw)


OnImages: TypeAlias = Callable[[Sequence[ProcessedImage]], object]
"""Given segments before the input that they are of is complete."""


def process_image(
    source: ImageSource,
    config: ImageProcessorConfig,
    *,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    check: Check = always,
) -> ProcessedImage:
    """Load, resize, normalise and cut one image.

    Args:
        source: What `runtime.images.load_image` takes.
        config: The checkpoint's settings.
        max_image_pixels: Images of more pixels are refused before they are decoded.
        check: Asked before each step; raises where the image is not wanted any more.

    Raises:
        ImageError: The image cannot be read, or its aspect ratio is too large.
        CapacityError: The image, or its patches, would take too much memory.
        UsageError: `source` is not an image, or a URL that would have to be fetched.
    """
    check()
    image_HWC = load_image(source, max_image_pixels=max_image_pixels)
    height, width = config.target_size(*image_HWC.shape[:2])
    num_bytes = height * width * NUM_CHANNELS * config.temporal_patch_size * np.dtype(np.float32).itemsize
    if num_bytes > MAX_PIXEL_VALUES_BYTES:
        raise CapacityError(
            f"image of {image_HWC.shape[1]} x {image_HWC.shape[0]}: resized to {width} x {height} its patches take "
            f"{num_bytes} bytes; expected at most {MAX_PIXEL_VALUES_BYTES}",
            remedy="lower max_pixels or min_pixels, or make the image smaller",
        )
    source_size = image_HWC.shape[1], image_HWC.shape[0]
    try:
        check()
        if (height, width) != image_HWC.shape[:2]:
            image_HWC = resize(image_HWC, height, width, FILTERS[config.resample])
            check()
        return segment([image_HWC], config, source_size=source_size)
    except MemoryError as error:
        size = f"{image_HWC.shape[1]} x {image_HWC.shape[0]}"
        raise CapacityError(
            f"image of {size}: not enough memory to bring it to {width} x {height}",
            remedy="lower max_pixels, or make the image smaller",
        ) from error


def segment(
    frames: Sequence[RgbImage], config: ImageProcessorConfig, *, source_size: tuple[int, int] | None = None
) -> ProcessedImage:
    """Normalise and cut the frames of one temporal patch.

    Args:
        frames: At most `temporal_patch_size`, uint8 [H, W, 3] of one size, multiples of `config.factor`. The last one
            is repeated: a still image is one frame, and equal to the video that shows it all the time.
        config: The checkpoint's settings.
        source_size: Width and height that the frames had before they were resized; None if they were not.
    """
    while len(frames) > 1 and np.array_equal(frames[-1], frames[-2]):
        frames = frames[:-1]
    height, width = frames[0].shape[:2]
    grid_thw = (1, height // config.patch_size, width // config.patch_size)
    return ProcessedImage(
        patchify(frames, config),
        grid_thw,
        config.merge_size,
        _digest(frames, config),
        PixelScale.of(config),
        source_size or (width, height),
    )


def _digest(frames: Sequence[RgbImage], config: ImageProcessorConfig) -> bytes:
    """Return the SHA-256 of frames: of their bytes, an eighth of their patches', their shape and their scale."""
    scale = config.image_mean, config.image_std, config.rescale_factor, config.do_rescale, config.do_normalize
    whole = hashlib.sha256(repr((frames[0].shape, scale)).encode())
    for frame_HWC in frames:
        whole.update(np.ascontiguousarray(frame_HWC).data)
    return whole.digest()
