"""Make the position inputs of the vision tower: resampling of the learned grid, and 2-D rotary angles.

Both depend on an image's grid only. Formulas and float32 arithmetic are those of transformers 5.23 (vision_utils.py,
models/qwen3_vl/modeling_qwen3_vl.py). Patches are in merge order: the merge_size² patches of one visual token
follow each other, tokens row by row.

Shapes: I segments of one grid, P = h · w patches of one segment, H head dim of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import ByteArray, FloatArray, IntArray, LevelInputs, VisionInputs
from runtime.model_config import VisionConfig

if TYPE_CHECKING:
    from runtime.image_processor import ProcessedImage
    from runtime.patches import PixelScale

PIXELS, GREY_LEVELS = "pixels", "uint8"
"""The capability of an engine that normalises pixels itself, and its value: it takes grey levels of 8 bits."""
VISION_PATCHES = 4096
"""Images of one grid go through the vision tower in one call while they have no more patches than this together."""


def vision_inputs(
    patches: FloatArray | ByteArray,
    grid_thw: tuple[int, int, int],
    vision: VisionConfig,
    scale: PixelScale | None = None,
) -> VisionInputs:
    """Return what the vision tower takes of one image or video.

    Args:
        patches: Patches in merge order, in any shape whose elements are those of [t, h · w, C·Tp·p·p].
        grid_thw: Patches along time, height and width; each along time is a segment.
        vision: The shape of the tower.
        scale: Given with grey levels: how the engine normalises them.
    """
    t, h, w = grid_thw
    patches, tables = patches.reshape(t, h * w, vision.patch_elements), position_tables(h, w, vision)
    if scale is None:
        return VisionInputs(patches, *tables)
    assert patches.dtype == np.uint8, "a scale is of grey levels"
    return LevelInputs(patches.astype(np.uint8, copy=False), *tables, scale.rows(vision.patch_elements))


def inputs_of_segments(
    images: Sequence[ProcessedImage], vision: VisionConfig, *, takes_levels: bool = False
) -> VisionInputs:
    """Return what the vision tower takes of segments of one grid, and one scale where it takes grey levels.

    Raises:
        UsageError: It takes grey levels, and an image has none.
    """
    first = images[0]
    (t, h, w), scale = first.grid_thw, first.scale if takes_levels else None
    assert t == 1, "a segment is one image or one temporal patch"
    assert scale is None or all(image.scale == scale for image in images), "segments of several scales"
    patches: Sequence[NDArray[Any]] = [image.levels if takes_levels else image.pixel_values for image in images]
    joined = patches[0][None] if len(patches) == 1 else np.stack(patches)
    return vision_inputs(joined, (len(images), h, w), vision, scale)


def position_tables(h: int, w: int, vision: VisionConfig) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
    """Return the inputs of the vision tower that depend on the grid alone: all but `pixel_values`, in their order."""
    merge_size = vision.spatial_merge_size
    return (
        *position_interpolation(h, w, vision.num_grid_per_side, merge_size),
        *vision_rotary(h, w, vision.head_dim, merge_size, vision.rope_theta),
    )


def blank_inputs(h: int, w: int, vision: VisionConfig, *, takes_levels: bool = False) -> VisionInputs:
    """Return what the vision tower takes of one segment of h × w patches of zeros."""
    patches = np.zeros((h * w, vision.patch_elements), np.uint8 if takes_levels else np.float32)
    scale = np.repeat(np.array([[0], [1], [1]], np.float32), vision.patch_elements, axis=1)
    tables = position_tables(h, w, vision)
    return LevelInputs(patches[None], *tables, scale) if takes_levels else VisionInputs(patches[None], *tables)


def takes_grey_levels(capabilities: Mapping[str, Any]) -> bool:
    """Return whether an engine normalises pixels itself."""
    return bool(capabilities.get(PIXELS) == GREY_LEVELS)


def patch_coordinates(h: int, w: int, merge_size: int) -> tuple[IntArray, IntArray]:
    """Return the row and the column of every patch in merge order, int64 [P] each.

    Args:
        h: Patches along the height, a multiple of `merge_size`.
        w: Patches along the width, a multiple of `merge_size`.
        merge_size: Patches along a side of one visual token.
    """
    assert h > 0 and w > 0 and h % merge_size == 0 and w % merge_size == 0
    patches = np.arange(h * w, dtype=np.int64).reshape(h // merge_size, merge_size, w // merge_size, merge_size)
    raster_P = patches.transpose(0, 2, 1, 3).reshape(-1)
    return raster_P // w, raster_P % w


def position_interpolation(h: int, w: int, num_grid_per_side: int, merge_size: int) -> tuple[IntArray, FloatArray]:
    """Return which learned position embeddings a patch mixes, and in what parts.

    Bilinear with aligned corners: the first and the last patch of a side take the first and the last learned row.
    Equal to `get_vision_interpolation_indices_and_weights(mode="bilinear", align_corners=True)`.

    Args:
        h: Patches along the height, a multiple of `merge_size`.
        w: Patches along the width, a multiple of `merge_size`.
        num_grid_per_side: Side of the square learned grid.
        merge_size: Patches along a side of one visual token.

    Returns:
        Indices into the flattened grid, int64 [P, 4], and weights, float32 [P, 4], each row summing to 1.
    """
    row_P, column_P = patch_coordinates(h, w, merge_size)
    row_taps, row_weights = _axis_taps(h, num_grid_per_side)
    column_taps, column_weights = _axis_taps(w, num_grid_per_side)
    indices = row_taps[row_P][:, :, None] * num_grid_per_side + column_taps[column_P][:, None, :]
    weights = row_weights[row_P][:, :, None] * column_weights[column_P][:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


def _axis_taps(size: int, side: int) -> tuple[IntArray, FloatArray]:
    """Return the two taps of every position of an axis and their weights, [size, 2] each."""
    # The reference's float32 operations in its order: equal to the bit.
    source = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    taps = floor.astype(np.int64)[:, None] + np.arange(2)
    weights = 1 - np.abs((source - floor)[:, None] - np.arange(2, dtype=np.float32))
    return np.minimum(taps, side - 1), weights


def vision_rotary(h: int, w: int, head_dim: int, merge_size: int, theta: float) -> tuple[FloatArray, FloatArray]:
    """Return the cosines and sines of the 2-D rotary embedding.

    The first quarter of a head turns by the row, the second by the column; the other half repeats them, so it is
    left out. That is the first half of `Qwen3VLVisionRotaryEmbedding`, but for the last bit of torch's cosine and sine.

    Args:
        h: Patches along the height, a multiple of `merge_size`.
        w: Patches along the width, a multiple of `merge_size`.
        head_dim: Elements of a head of the vision tower, a multiple of 4.
        merge_size: Patches along a side of one visual token.
        theta: Base of the frequencies.

    Returns:
        cos and sin, float32 [P, head_dim / 2].
    """
    assert head_dim % 4 == 0
    row_P, column_P = patch_coordinates(h, w, merge_size)
    spatial = head_dim // 2
    exponents = np.arange(0, spatial, 2, dtype=np.float32) / np.float32(spatial)
    # A float32 power is off by one bit from torch's for some head dims (72, 24), which at position 3620 moves an angle
    # by 1e-4; a float64 power, rounded, has torch's bits. Angles are float32, as torch's.
    powers = (float(theta) ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(max(h, w), dtype=np.float32)[:, None] * (np.float32(1.0) / powers)
    cos = np.cos(angles.astype(np.float64)).astype(np.float32)
    sin = np.sin(angles.astype(np.float64)).astype(np.float32)
    return (
        np.concatenate([cos[row_P], cos[column_P]], axis=1),
        np.concatenate([sin[row_P], sin[column_P]], axis=1),
    )
