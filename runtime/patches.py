"""Cut frames into the normalised patches that the vision tower takes, and put patches together again.

The arithmetic is that of transformers' `TorchvisionBackend.rescale_and_normalize`: mean and standard deviation are
divided by the rescale factor in float32, so that a pixel meets one subtraction and one division.

Shapes: H, W pixels of a frame, C channels, F frames of a temporal patch, P patches, E = C · F · patch_size² elements of
a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from runtime.image_config import NUM_CHANNELS, ImageProcessorConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from runtime.images import RgbImage

    Patches: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.uint8]

_BLOCK_VALUES = 1 << 17  # float32 values normalised at a time: with their uint8 forms they stay in a 1 MB L2 cache


@dataclass(frozen=True)
class PixelScale:
    """What turns a grey level into a value: `(level - mean) / std * factor`, each step in float32.

    Attributes:
        mean: Of each channel, a float32; 0 where none is subtracted.
        std: Likewise; 1 where nothing is divided.
        factor: 1 where nothing is multiplied. A step by 0 or 1 changes no bit, so it may be left out.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: float

    @classmethod
    def of(cls, config: ImageProcessorConfig) -> PixelScale:
        """Return the scale of a checkpoint's settings."""
        if not config.do_normalize:
            factor = float(np.float32(config.rescale_factor)) if config.do_rescale else 1.0
            return cls((0.0,) * NUM_CHANNELS, (1.0,) * NUM_CHANNELS, factor)
        mean, std = (np.array(values, np.float32) for values in (config.image_mean, config.image_std))
        if config.do_rescale:
            mean *= np.float32(1.0 / config.rescale_factor)
            std *= np.float32(1.0 / config.rescale_factor)
        return cls(tuple(mean.tolist()), tuple(std.tolist()), 1.0)

    def normalise(self, levels_PCN: npt.NDArray[np.float32]) -> None:
        """Turn grey levels [P, C, N] into values, in place."""
        mean_C1, std_C1 = self._columns()
        if any(self.mean):
            levels_PCN -= mean_C1
        if any(each != 1 for each in self.std):
            levels_PCN /= std_C1
        if self.factor != 1:
            levels_PCN *= np.float32(self.factor)

    def restore(self, values_PCN: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Return the grey levels nearest to values [P, C, N], which are overwritten."""
        mean_C1, std_C1 = self._columns()
        values_PCN /= np.float32(self.factor)
        values_PCN *= std_C1
        values_PCN += mean_C1
        return np.rint(values_PCN, out=values_PCN).clip(0, 255, out=values_PCN).astype(np.uint8)

    def rows(self, num_elements: int) -> npt.NDArray[np.float32]:
        """Return mean, standard deviation and factor of each element of a patch, [3, E]: channel by channel."""
        steps_3C = np.array([self.mean, self.std, (self.factor,) * NUM_CHANNELS], np.float32)
        return np.repeat(steps_3C, num_elements // NUM_CHANNELS, axis=1)

    def _columns(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return np.array(self.mean, np.float32)[:, None], np.array(self.std, np.float32)[:, None]


def patchify(frames: Sequence[RgbImage], config: ImageProcessorConfig) -> Patches:
    """Cut the frames of one temporal patch into patches, normalised unless the settings keep grey levels.

    Args:
        frames: At most `temporal_patch_size`, uint8 [H, W, 3] of one size, multiples of `config.factor`. The last one
            is repeated.
        config: The checkpoint's settings.

    Returns:
        float32, or uint8 grey levels, [P, E] in merge order: the patches of one visual token follow each other, tokens
        row by row. A patch is laid out channel, frame, row, column. Beside it, half a megabyte and one row of tokens
        are held.
    """
    height, width = frames[0].shape[:2]
    patch, num_frames = config.patch_size, config.temporal_patch_size
    row_patches = config.merge_size * width // patch  # of one row of tokens
    dtype = np.uint8 if config.keeps_levels else np.float32
    values_PCFN = np.empty((height * width // patch**2, NUM_CHANNELS, num_frames, patch**2), dtype)
    rows = max(1, _BLOCK_VALUES // (config.factor * width * NUM_CHANNELS))
    block_PCN = np.empty((rows * row_patches, NUM_CHANNELS, patch**2), dtype)
    scale = PixelScale.of(config)
    for index, frame_HWC in enumerate(frames):
        last = num_frames if index == len(frames) - 1 else index + 1
        for top in range(0, height // config.factor, rows):
            strip_HWC = frame_HWC[top * config.factor : (top + rows) * config.factor]
            part_PCN = block_PCN[: len(strip_HWC) // config.factor * row_patches]
            _take_levels(strip_HWC, config, part_PCN)
            if not config.keeps_levels:
                scale.normalise(part_PCN)
            start = top * row_patches
            values_PCFN[start : start + len(part_PCN), :, index:last] = part_PCN[:, :, None]
    return values_PCFN.reshape(len(values_PCFN), -1)


def normalised(levels: npt.NDArray[np.uint8], scale: PixelScale) -> npt.NDArray[np.float32]:
    """Return the values of patches [P, E] of grey levels: to the bit what `patchify` gives without `keeps_levels`."""
    values_PCN = levels.reshape(len(levels), NUM_CHANNELS, -1).astype(np.float32)
    scale.normalise(values_PCN)
    return values_PCN.reshape(levels.shape)


def grey_levels(values: npt.NDArray[np.float32], scale: PixelScale) -> npt.NDArray[np.uint8] | None:
    """Return the grey levels that patches [P, E] were normalised from; None if these values are of no levels."""
    levels = scale.restore(values.reshape(len(values), NUM_CHANNELS, -1).copy()).reshape(values.shape)
    return levels if np.array_equal(normalised(levels, scale), values) else None


def assemble_frames(
    pixel_values: npt.NDArray[np.float32], grid_thw: tuple[int, int, int], config: ImageProcessorConfig
) -> list[RgbImage]:
    """Put the patches of one segment together: what `patchify` was given, as its vision tower sees it.

    Args:
        pixel_values: float32 [P, E].
        grid_thw: Patches along time (1), height and width.
        config: The settings that they were cut with.

    Returns:
        `temporal_patch_size` frames, uint8 [H, W, 3], with the grey levels that were normalised: values are rounded
        to the nearest.
    """
    patch, merge, num_frames = config.patch_size, config.merge_size, config.temporal_patch_size
    high, wide = (side // merge for side in grid_thw[1:])
    values_PCN = pixel_values.reshape(-1, NUM_CHANNELS, num_frames * patch**2).copy()
    levels = PixelScale.of(config).restore(values_PCN)
    split = levels.reshape(high, wide, merge, merge, NUM_CHANNELS, num_frames, patch, patch)
    frames_FHWC = split.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(
        num_frames, high * merge * patch, wide * merge * patch, NUM_CHANNELS
    )
    return list(frames_FHWC)


def _take_levels(strip_HWC: RgbImage, config: ImageProcessorConfig, part_PCN: Patches) -> None:
    """Write the grey levels of whole rows of tokens, patch by patch, into `part_PCN` [P, C, patch²]."""
    patch, merge = config.patch_size, config.merge_size
    # Row of tokens, row in token, row in patch, column of tokens, column in token, the bytes of a patch's row together:
    # copies of so many bytes are faster than of one.
    split = strip_HWC.reshape(len(strip_HWC) // config.factor, merge, patch, -1, merge, patch * NUM_CHANNELS)
    levels_PNC = np.ascontiguousarray(split.transpose(0, 3, 1, 4, 2, 5)).reshape(len(part_PCN), -1, NUM_CHANNELS)
    for channel in range(NUM_CHANNELS):
        part_PCN[:, channel] = levels_PNC[..., channel]
