"""Cut frames into the normalised patches that the vision tower takes, and put patches together again.

The arithmetic is that of transformers' `TorchvisionBackend.rescale_and_normalize`: mean and standard deviation are
divided by the rescale factor in float32, so that a pixel meets one subtraction and one division.

Shapes: H, W pixels of a frame, C channels, F frames of a temporal patch, P patches, E = C · F · patch_size² elements of
a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.image_config import NUM_CHANNELS, ImageProcessorConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from runtime.images import RgbImage

_BLOCK_VALUES = 1 << 17  # float32 values normalised at a time: with their uint8 forms they stay in a 1 MB L2 cache


class _Scale(NamedTuple):
    """What turns a grey level into a normalised value, each float32 [C, 1]: (level - mean) / std."""

    mean_C1: npt.NDArray[np.float32]
    std_C1: npt.NDArray[np.float32]


def patchify(frames: Sequence[RgbImage], config: ImageProcessorConfig) -> npt.NDArray[np.float32]:
    """Cut the frames of one temporal patch into normalised patches.

    Args:
        frames: At most `temporal_patch_size`, uint8 [H, W, 3] of one size, multiples of `config.factor`. The last one
            is repeated.
        config: The checkpoint's settings.

    Returns:
        float32 [P, E] in merge order: the patches of one visual token follow each other, tokens row by row. A patch is
        laid out channel, frame, row, column. Beside it, half a megabyte and one row of tokens are held.
    """
    height, width = frames[0].shape[:2]
    patch, num_frames = config.patch_size, config.temporal_patch_size
    row_patches = config.merge_size * width // patch  # of one row of tokens
    values_PCFN = np.empty((height * width // patch**2, NUM_CHANNELS, num_frames, patch**2), np.float32)
    rows = max(1, _BLOCK_VALUES // (config.factor * width * NUM_CHANNELS))
    block_PCN = np.empty((rows * row_patches, NUM_CHANNELS, patch**2), np.float32)
    for index, frame_HWC in enumerate(frames):
        last = num_frames if index == len(frames) - 1 else index + 1
        for top in range(0, height // config.factor, rows):
            strip_HWC = frame_HWC[top * config.factor : (top + rows) * config.factor]
            part_PCN = block_PCN[: len(strip_HWC) // config.factor * row_patches]
            _take_levels(strip_HWC, config, part_PCN)
            _normalise(part_PCN, config)
            start = top * row_patches
            values_PCFN[start : start + len(part_PCN), :, index:last] = part_PCN[:, :, None]
    return values_PCFN.reshape(len(values_PCFN), -1)


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
    levels_PCFN = pixel_values.reshape(-1, NUM_CHANNELS, num_frames, patch**2).copy()
    scale = _scale(config)
    if scale is None:
        levels_PCFN /= np.float32(config.rescale_factor if config.do_rescale else 1)
    else:
        levels_PCFN *= scale.std_C1[:, None]
        levels_PCFN += scale.mean_C1[:, None]
    levels = np.rint(levels_PCFN, out=levels_PCFN).clip(0, 255, out=levels_PCFN).astype(np.uint8)
    split = levels.reshape(high, wide, merge, merge, NUM_CHANNELS, num_frames, patch, patch)
    frames_FHWC = split.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(
        num_frames, high * merge * patch, wide * merge * patch, NUM_CHANNELS
    )
    return list(frames_FHWC)


def _take_levels(strip_HWC: RgbImage, config: ImageProcessorConfig, part_PCN: npt.NDArray[np.float32]) -> None:
    """Write the grey levels of whole rows of tokens, patch by patch, into `part_PCN` [P, C, patch²]."""
    patch, merge = config.patch_size, config.merge_size
    # Row of tokens, row in token, row in patch, column of tokens, column in token, the bytes of a patch's row together:
    # copies of so many bytes are faster than of one.
    split = strip_HWC.reshape(len(strip_HWC) // config.factor, merge, patch, -1, merge, patch * NUM_CHANNELS)
    levels_PNC = np.ascontiguousarray(split.transpose(0, 3, 1, 4, 2, 5)).reshape(len(part_PCN), -1, NUM_CHANNELS)
    for channel in range(NUM_CHANNELS):
        part_PCN[:, channel] = levels_PNC[..., channel]


def _normalise(part_PCN: npt.NDArray[np.float32], config: ImageProcessorConfig) -> None:
    """Rescale and normalise grey levels in place."""
    scale = _scale(config)
    if scale is not None:
        part_PCN -= scale.mean_C1
        part_PCN /= scale.std_C1
    elif config.do_rescale:
        part_PCN *= np.float32(config.rescale_factor)


def _scale(config: ImageProcessorConfig) -> _Scale | None:
    """Return mean and standard deviation of grey levels; None if they are not normalised."""
    if not config.do_normalize:
        return None
    mean, std = (np.array(values, np.float32)[:, None] for values in (config.image_mean, config.image_std))
    if config.do_rescale:
        mean *= np.float32(1.0 / config.rescale_factor)
        std *= np.float32(1.0 / config.rescale_factor)
    return _Scale(mean, std)
