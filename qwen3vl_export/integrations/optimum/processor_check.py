"""Compare a processor of transformers with an engine: a wrong one gives wrong answers, not errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.errors import UsageError
from runtime.patches import PixelScale
from runtime.shown import shown

if TYPE_CHECKING:
    from runtime.image_config import ImageProcessorConfig
    from runtime.model import Qwen3VLModel

_REMEDY = "open the processor of the checkpoint that the engine was exported from"
_SIZES = ("patch_size", "temporal_patch_size", "merge_size")
_SCALES = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")


def check_processor(processor: Any, engine: Qwen3VLModel) -> None:
    """Raise if a processor, or a tokenizer alone, is not of the engine's checkpoint, as far as that shows.

    Compared are the id of each token, the sizes of patches, and how pixels are normalised.

    Raises:
        UsageError: It says what differs.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_vocab"):
        raise UsageError(
            f"a processor or a tokenizer is expected, got {type(processor).__name__}",
            remedy="pass AutoProcessor.from_pretrained(…)",
        )
    _check_vocabulary(tokenizer, engine)
    inputs = engine.preparation.inputs
    for name, settings in (("image_processor", inputs.image), ("video_processor", inputs.video.image)):
        part = getattr(processor, name, None)
        if part is not None:
            _check_part(name, part, settings)


def _check_vocabulary(tokenizer: Any, engine: Qwen3VLModel) -> None:
    own, other = engine.tokenizer.vocabulary, dict(tokenizer.get_vocab())
    if own == other:
        return
    differing = sorted(token for token in {*own, *other} if own.get(token) != other.get(token))
    first = differing[0]
    raise UsageError(
        f"the tokenizer is not the engine's: {len(differing)} tokens differ, such as {shown(first)}, which is "
        f"{_id_of(other, first)} there and {_id_of(own, first)} in the engine",
        remedy=_REMEDY,
    )


def _id_of(vocabulary: dict[str, int], token: str) -> str:
    return f"token {vocabulary[token]}" if token in vocabulary else "unknown"


def _check_part(name: str, part: Any, settings: ImageProcessorConfig) -> None:
    for size in _SIZES:
        found = getattr(part, size, None)
        if found is not None and found != getattr(settings, size):
            raise UsageError(
                f"{name}.{size} is {shown(found)}, the engine takes {getattr(settings, size)}", remedy=_REMEDY
            )
    values = {each: getattr(part, each, None) for each in _SCALES}
    if any(value is None for value in values.values()):
        return  # of another class, whose tensors are looked at
    mean, std = (tuple(float(value) for value in values[each]) for each in ("image_mean", "image_std"))
    other = PixelScale.of(
        type(settings)(
            image_mean=mean,
            image_std=std,
            rescale_factor=float(values["rescale_factor"]),
            do_rescale=bool(values["do_rescale"]),
            do_normalize=bool(values["do_normalize"]),
        )
    )
    if other != PixelScale.of(settings):
        raise UsageError(
            f"{name} normalises by the mean {list(mean)} and the deviation {list(std)}, the engine by "
            f"{list(settings.image_mean)} and {list(settings.image_std)}",
            remedy=_REMEDY,
        )
