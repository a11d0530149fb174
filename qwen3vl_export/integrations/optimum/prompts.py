"""Read what transformers' processor returns as prompts of an engine: token ids, and images that are cut already.

The processor's `pixel_values` are what the vision tower takes; nothing is resized or normalised again. An engine that
normalises by itself is given the grey levels that these values come of, and only if they come of some exactly.

Shapes: B prompts, L tokens of a row, P patches of all images, E elements of a patch, N images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.arguments import reading
from runtime.errors import UsageError
from runtime.image_config import NUM_CHANNELS
from runtime.image_processor import ProcessedImage
from runtime.patches import PixelScale, grey_levels
from runtime.raw_prompt import RawPrompt
from runtime.shown import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from runtime.image_config import ImageProcessorConfig
    from runtime.input_kinds.kind import InputSettings
    from runtime.model_config import ModelConfig, VisionConfig

    Ids = NDArray[np.int64]

TENSORS = (
    *("input_ids", "attention_mask", "mm_token_type_ids"),
    *("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"),
)
"""What the processor of Qwen3-VL returns."""

OF_OTHERS: Mapping[str, str] = {
    "second_per_grid_ts": "Qwen2.5-VL's; Qwen3-VL's processor writes times into the prompt",
    "token_type_ids": "a tokenizer's of another family",
    "pixel_attention_mask": "another family's",
    "image_sizes": "another family's",
    "aspect_ratio_ids": "another family's",
    "input_features": "sound, which Qwen3-VL does not take",
}
"""What other processors return, and whose it is."""

_NAMES = {"image": "images", "video": "temporal patches of videos"}
_PIXELS_AND_GRIDS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
_AS_IT_IS = "pass all that the processor of this checkpoint returns, as it is: model.generate(**inputs)"
_SLACK = 0.01  # of the range of values: bfloat16 keeps 8 bits


@dataclass(frozen=True)
class Batch:
    """Prompts of one call.

    Attributes:
        input_ids: Token ids with their padding, [B, L].
        prompts: The same without.
    """

    input_ids: Ids
    prompts: tuple[RawPrompt, ...]


def take_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the tensors out of the arguments of a call; None for what is missing.

    Raises:
        UsageError: Another processor's are among them.
    """
    for name, owner in OF_OTHERS.items():
        if arguments.pop(name, None) is not None:
            raise UsageError(
                f"{name} is {owner}: these are inputs of another processor",
                remedy="open the processor of the checkpoint that the engine was exported from",
            )
    return {name: arguments.pop(name, None) for name in TENSORS}


def read_ids(tensors: Mapping[str, Any]) -> Ids:
    """Return the token ids of a call, [B, L].

    Raises:
        UsageError: They are missing, or no whole numbers with two axes.
    """
    ids_BL = _integers("input_ids", tensors["input_ids"], 2)
    if not ids_BL.size:
        raise UsageError(f"input_ids has the shape {list(ids_BL.shape)}: there is no token", remedy=_AS_IT_IS)
    return ids_BL


def read_batch(
    tensors: Mapping[str, Any], config: ModelConfig, inputs: InputSettings, padding: int | None = None
) -> Batch:
    """Read the tensors of a call, padded on either side.

    Args:
        tensors: Values of `TENSORS`: torch tensors, arrays or nested lists; None for what is missing.
        config: The shape of the engine's model.
        inputs: How the engine's own processor reads images and videos.
        padding: The token that pads rows where no mask says so; None for a call without padding.

    Raises:
        UsageError: They are not what this checkpoint's processor returns.
    """
    ids_BL = read_ids(tensors)
    mask_BL = _mask(tensors.get("attention_mask"), ids_BL, padding)
    _check_ids(ids_BL, mask_BL, config)
    _check_kinds(tensors.get("mm_token_type_ids"), ids_BL, mask_BL, config)
    waiting = {
        config.image_token_id: _Waiting("image", _segments("image", tensors, config, inputs.image)),
        config.video_token_id: _Waiting("video", _segments("video", tensors, config, inputs.video.image)),
    }
    prompts = []
    for row, (ids_L, mask_L) in enumerate(zip(ids_BL, mask_BL, strict=True)):
        tokens_S = ids_L[mask_L]
        prompts.append(RawPrompt(tokens_S.tolist(), tuple(_placed(tokens_S, row, waiting))))
    for each in waiting.values():
        each.check_end()
    return Batch(ids_BL, tuple(prompts))


class _Waiting:
    """Segments of one kind that stand in the prompts in their order."""

    def __init__(self, name: str, segments: list[ProcessedImage]) -> None:
        self._name = name
        self._segments = segments
        self._next = 0

    def take(self, tokens_S: Ids, row: int) -> ProcessedImage:
        """Return the next segment, whose tokens are the first of these.

        Raises:
            UsageError: There is none, or they are not its tokens.
        """
        if not self._segments:
            missing = " and ".join(_PIXELS_AND_GRIDS[self._name])
            raise UsageError(
                f"row {row} of input_ids holds {self._name} tokens, and {missing} are missing", remedy=_AS_IT_IS
            )
        if self._next == len(self._segments):
            raise UsageError(
                f"row {row} of input_ids holds more {self._name} tokens than the {self._next} "
                f"{_NAMES[self._name]} account for",
                remedy=_AS_IT_IS,
            )
        segment = self._segments[self._next]
        own = tokens_S[: segment.num_visual_tokens]
        if len(own) < segment.num_visual_tokens or (own != own[0]).any():
            found = int((own == own[0]).argmin()) or len(own)
            raise UsageError(
                f"row {row} of input_ids holds {found} {self._name} tokens in a place where the grid "
                f"{list(segment.grid_thw)} takes {segment.num_visual_tokens}",
                remedy=f"{_AS_IT_IS}; truncation cuts images apart",
            )
        self._next += 1
        return segment

    def check_end(self) -> None:
        """Raise if segments are left."""
        if self._next < len(self._segments):
            raise UsageError(
                f"the grids are of {len(self._segments)} {_NAMES[self._name]}, and input_ids hold the tokens of "
                f"{self._next} only",
                remedy=_AS_IT_IS,
            )


def _placed(tokens_S: Ids, row: int, waiting: Mapping[int, _Waiting]) -> Iterator[tuple[int, ProcessedImage]]:
    """Give each run of image or video tokens its segments."""
    places = np.flatnonzero(np.isin(tokens_S, list(waiting)))
    at = 0
    while at < len(places):
        start = int(places[at])
        segment = waiting[int(tokens_S[start])].take(tokens_S[start:], row)
        yield start, segment
        at += segment.num_visual_tokens


def _mask(value: Any, ids_BL: Ids, padding: int | None) -> NDArray[np.bool_]:
    """Return which tokens are of the prompts: in each row one run."""
    if value is None:
        value = np.ones_like(ids_BL) if padding is None else (ids_BL != padding).astype(np.int64)
    mask_BL = _integers("attention_mask", value, 2)
    if mask_BL.shape != ids_BL.shape:
        raise UsageError(
            f"attention_mask has the shape {list(mask_BL.shape)}, input_ids {list(ids_BL.shape)}", remedy=_AS_IT_IS
        )
    if not np.isin(mask_BL, (0, 1)).all():
        raise UsageError("attention_mask holds other numbers than 0 and 1", remedy=_AS_IT_IS)
    for row, mask_L in enumerate(mask_BL):
        places = np.flatnonzero(mask_L)
        if not len(places):
            raise UsageError(f"row {row} of attention_mask has no token", remedy="leave empty prompts out")
        if places[-1] - places[0] + 1 != len(places):
            raise UsageError(
                f"row {row} of attention_mask has a hole: the tokens of a prompt have to follow each other",
                remedy="pad at one side alone, as the processor does",
            )
    return mask_BL.astype(np.bool_)


def _check_ids(ids_BL: Ids, mask_BL: NDArray[np.bool_], config: ModelConfig) -> None:
    most = config.text.vocab_size
    beyond = ids_BL[mask_BL & ((ids_BL < 0) | (ids_BL >= most))]
    if len(beyond):
        raise UsageError(
            f"input_ids holds the token {beyond[0]}, the engine has the ids 0 to {most - 1}: they are of another "
            "checkpoint's processor",
            remedy=_AS_IT_IS,
        )


def _check_kinds(value: Any, ids_BL: Ids, mask_BL: NDArray[np.bool_], config: ModelConfig) -> None:
    """Raise if `mm_token_type_ids`, 1 for images and 2 for videos, marks other tokens than the engine's."""
    if value is None:
        return
    kinds_BL = _integers("mm_token_type_ids", value, 2)
    expected_BL = 1 * (ids_BL == config.image_token_id) + 2 * (ids_BL == config.video_token_id)
    if kinds_BL.shape != ids_BL.shape or (kinds_BL != expected_BL)[mask_BL].any():
        raise UsageError(
            "mm_token_type_ids marks other tokens than the image and video tokens of the engine, "
            f"{config.image_token_id} and {config.video_token_id}: they are of another checkpoint's processor",
            remedy=_AS_IT_IS,
        )


def _segments(
    name: str, tensors: Mapping[str, Any], config: ModelConfig, settings: ImageProcessorConfig
) -> list[ProcessedImage]:
    """Return the images, or the temporal patches of the videos, of a call."""
    names = _PIXELS_AND_GRIDS[name]
    there = [each for each in names if tensors.get(each) is not None]
    if not there:
        return []
    if len(there) == 1:
        (missing,) = {*names} - {*there}
        raise UsageError(f"{there[0]} is given without {missing}", remedy=_AS_IT_IS)
    pixels, grid = names
    grids_N3 = _grids(grid, tensors[grid], config.vision, is_image=name == "image")
    values_PE = _pixels(pixels, tensors[pixels], config.vision, settings)
    num_patches = sum(map(math.prod, grids_N3.tolist()))  # of Python, whose numbers do not overflow
    if len(values_PE) != num_patches:
        raise UsageError(f"{pixels} holds {len(values_PE)} patches, {grid} is of {num_patches}", remedy=_AS_IT_IS)
    found, start = [], 0
    for frames, height, width in grids_N3.tolist():
        for _ in range(frames):
            end = start + height * width
            found.append(_segment(values_PE[start:end], (1, height, width), settings))
            start = end
    return found


def _segment(values_PE: NDArray[Any], grid_thw: tuple[int, int, int], settings: ImageProcessorConfig) -> ProcessedImage:
    scale = PixelScale.of(settings)
    digest = hashlib.sha256(repr((grid_thw, values_PE.dtype.str, scale)).encode())
    digest.update(np.ascontiguousarray(values_PE).data)
    _, height, width = grid_thw
    size = width * settings.patch_size, height * settings.patch_size
    return ProcessedImage(values_PE, grid_thw, settings.merge_size, digest.digest(), scale, size)


def _grids(name: str, value: Any, vision: VisionConfig, *, is_image: bool) -> Ids:
    grids_N3 = _integers(name, value, 2)
    merge = vision.spatial_merge_size
    if grids_N3.shape[1] != 3 or (grids_N3 < 1).any() or (grids_N3[:, 1:] % merge).any():
        raise UsageError(
            f"{name} has to be [images, 3]: patches along time, height and width, the last two multiples of {merge}; "
            f"got {shown(grids_N3.tolist())}",
            remedy=_AS_IT_IS,
        )
    if is_image and (grids_N3[:, 0] != 1).any():
        raise UsageError(
            f"{name} has an image of several temporal patches", remedy="pass videos as pixel_values_videos"
        )
    return grids_N3


def _pixels(name: str, value: Any, vision: VisionConfig, settings: ImageProcessorConfig) -> NDArray[Any]:
    """Return patches as the engine takes them: float32, or grey levels."""
    array = _array(name, value)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise UsageError(f"{name} has to be a tensor of numbers, got {array.dtype}", remedy=_AS_IT_IS)
    values_PE = np.ascontiguousarray(array, np.float32)
    if values_PE.ndim != 2 or values_PE.shape[1] != vision.patch_elements:
        size = vision.patch_size
        raise UsageError(
            f"{name} has the shape {list(values_PE.shape)}, the engine takes [patches, {vision.patch_elements}]: "
            f"{vision.temporal_patch_size} frames of {size} x {size} pixels of {vision.in_channels} channels; these "
            "are of another processor",
            remedy="open the processor of the checkpoint that the engine was exported from",
        )
    scale = PixelScale.of(settings)
    _check_range(name, values_PE, scale)
    if not settings.keeps_levels:
        return values_PE
    levels_PE = grey_levels(values_PE, scale)
    if levels_PE is None:
        raise UsageError(
            f"{name} is of no grey levels from 0 to 255, which this engine takes and normalises itself",
            remedy="pass the processor's float32 values unchanged: no cast to bfloat16, no augmentation",
        )
    return levels_PE


def _check_range(name: str, values_PE: NDArray[np.float32], scale: PixelScale) -> None:
    """Raise if values are no numbers, or lie outside of what the engine's own processor can give."""
    if not len(values_PE):
        return
    bounds_1C2 = np.tile(np.array([0, 255], np.float32), (1, NUM_CHANNELS, 1))
    scale.normalise(bounds_1C2)
    low, high = bounds_1C2[0, :, :1], bounds_1C2[0, :, 1:]
    slack = _SLACK * (high - low)
    values_PCN = values_PE.reshape(len(values_PE), NUM_CHANNELS, -1)
    least_C1, most_C1 = values_PCN.min(axis=(0, 2))[:, None], values_PCN.max(axis=(0, 2))[:, None]
    if not ((least_C1 >= low - slack) & (most_C1 <= high + slack)).all():  # no number is neither
        raise UsageError(
            f"{name} goes from {least_C1.min():.3g} to {most_C1.max():.3g}, the engine's own processor gives values "
            f"from {low.min():.3g} to {high.max():.3g}: these were normalised otherwise",
            remedy="open the processor of the checkpoint that the engine was exported from",
        )


def _integers(name: str, value: Any, num_axes: int) -> Ids:
    array = _array(name, value)
    if array.dtype == np.bool_ and name == "attention_mask":
        array = array.astype(np.int64)
    if array.ndim != num_axes or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"{name} has to be a tensor of whole numbers with {num_axes} axes, got {array.dtype} of the shape "
            f"{list(array.shape)}",
            remedy='ask the processor for return_tensors="pt"',
        )
    return array.astype(np.int64)


def _array(name: str, value: Any) -> NDArray[Any]:
    """Return a tensor of any device and dtype, an array or nested lists as an array."""
    if value is None:
        raise UsageError(f"{name} is missing", remedy=_AS_IT_IS)
    with reading(name, 'ask the processor for return_tensors="pt" and padding=True'):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if value.is_floating_point():
                value = value.float()
            return np.asarray(value.numpy())
        return np.asarray(value)
