"""What a comparison saw of one prompt beyond its checks: errors by kind of token, the worst tokens, the pictures.

A report that one looks at is made of it (page.py). The limits hold for whole tensors; what stands here says where in
them an error is.

Shapes: S prompt tokens, N greedy tokens, T = S+N-1 positions that were compared, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.parity.metrics import FloatArray, kl_divergence
from runtime.image_processor import ProcessedImage
from runtime.patches import assemble_frames

if TYPE_CHECKING:
    from runtime.input_kinds.kind import InputSettings
    from runtime.preparation import Prepared
    from runtime.tokenizer import Tokenizer

    Layers = Sequence[tuple[FloatArray, FloatArray]]

_NUM_WORST = 8
_NUM_NEIGHBOURS = 5
_NUM_LIKELY = 3
_JPEG_QUALITY = 88


class Kind(StrEnum):
    """What a token is."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    ANSWER = "answer"


@dataclass(frozen=True)
class ErrorRow:
    """The errors of one tensor, by kind of token.

    Attributes:
        name: Of the tensor.
        limit: That of the whole tensor.
        values: Norm of the difference over the norm of the reference over the tokens of a kind; of logits, the largest
            difference over max(1, std of the reference's logits). Infinite where a value is not finite.
    """

    name: str
    limit: float
    values: Mapping[Kind, float]


@dataclass(frozen=True)
class WorstToken:
    """A token after which the logits differ most, or are those of another choice.

    Attributes:
        position: Its position, from 0.
        kind: What it is.
        before: The tokens before it.
        text: The token.
        after: Those after it.
        max_abs: Largest difference of two logits.
        kl: KL(reference ‖ engine), in nats.
        expected: The reference's likeliest next tokens with their logits.
        found: The engine's; none if its logits are not finite.
        is_other: The engine's likeliest token is another one, and no near-tie.
    """

    position: int
    kind: Kind
    before: str
    text: str
    after: str
    max_abs: float
    kl: float
    expected: tuple[tuple[str, float], ...]
    found: tuple[tuple[str, float], ...]
    is_other: bool


@dataclass(frozen=True)
class Picture:
    """An image, or the first frame of a temporal patch, as the vision tower gets it.

    Attributes:
        name: In reports.
        jpeg: The file.
        size: Width and height in pixels.
        grid: Visual tokens along height and width.
        errors: Relative error of each visual token over all levels, row by row; none if they were not compared.
        digest: What tells it from others.
    """

    name: str
    jpeg: bytes
    size: tuple[int, int]
    grid: tuple[int, int]
    errors: tuple[float, ...]
    digest: bytes


@dataclass(frozen=True)
class CaseDetails:
    """What was seen of one prompt; without rows and tokens if it was not the reference's prompt.

    Attributes:
        case: Its name.
        counts: Tokens of each kind.
        rows: Errors, in the order of computation.
        worst: The worst tokens, from the worst on.
        pictures: Its images and frames.
        visual_limit: Limit of the errors of pictures.
    """

    case: str
    counts: Mapping[Kind, int]
    rows: tuple[ErrorRow, ...]
    worst: tuple[WorstToken, ...]
    pictures: tuple[Picture, ...]
    visual_limit: float


@dataclass(frozen=True)
class Compared:
    """What an engine and the reference gave for one prompt.

    Attributes:
        visual: Embeddings of both, [1+D, visual tokens, hidden]; None without images.
        layers: Keys and values of the engine, then of the reference, [1, K, T, H] each, for each layer.
        logits: Of both, [T, V].
        tokens: The greedy tokens that both were given.
    """

    visual: tuple[FloatArray, FloatArray] | None
    layers: tuple[Layers, Layers]
    logits: tuple[FloatArray, FloatArray]
    tokens: Sequence[int]


def details_of(
    case: str,
    prepared: Prepared,
    compared: Compared | None,
    limits: Mapping[str, float],
    *,
    tokenizer: Tokenizer,
    settings: InputSettings,
) -> CaseDetails:
    """Look at one prompt.

    Args:
        case: Its name.
        prepared: The prompt.
        compared: What both gave; None if the prompts were different ones.
        limits: Those of the engine's precision.
        tokenizer: That of the prompt.
        settings: Those that its images were processed with.
    """
    ids = [*prepared.prompt.input_ids, *(compared.tokens if compared else ())]
    kinds = _kinds(prepared, len(ids))
    return CaseDetails(
        case,
        {kind: int((kinds == kind).sum()) for kind in Kind if (kinds == kind).any()},
        () if compared is None else tuple(_rows(prepared, compared, kinds, limits)),
        () if compared is None else tuple(_worst(ids, kinds, compared, limits["near_tie_gap"], tokenizer)),
        tuple(_pictures(prepared, compared.visual if compared else None, settings)),
        limits["visual_embeds_relative"],
    )


def _segments(prepared: Prepared) -> Iterator[tuple[Kind, str, ProcessedImage]]:
    """Yield kind, name and segment of each place of the prompt, in order."""
    counts = dict.fromkeys(Kind, 0)
    for each in prepared.inputs:
        kind = Kind.IMAGE if isinstance(each, ProcessedImage) else Kind.VIDEO
        counts[kind] += 1
        if isinstance(each, ProcessedImage):
            yield kind, f"image {counts[kind]}", each
            continue
        for segment, seconds in zip(each.segments, each.timestamps, strict=True):
            yield kind, f"video {counts[kind]} at {seconds:.1f} s", segment


def _kinds(prepared: Prepared, num_tokens: int) -> NDArray[np.object_]:
    """Return the kind of each token of the prompt and of the answer."""
    kinds = np.full(num_tokens, Kind.TEXT, object)
    for (kind, _, _), span in zip(_segments(prepared), prepared.prompt.spans, strict=True):
        kinds[span.start : span.start + span.num_tokens] = kind
    kinds[len(prepared.prompt.input_ids) :] = Kind.ANSWER
    return kinds


def _rows(
    prepared: Prepared, compared: Compared, kinds: NDArray[np.object_], limits: Mapping[str, float]
) -> Iterator[ErrorRow]:
    if compared.visual is not None:
        of_rows = np.concatenate(
            [np.full(each.num_visual_tokens, kind, object) for kind, _, each in _segments(prepared)]
        )
        limit = limits["visual_embeds_relative"]
        # Level 0 is that of the last block.
        for level in (*range(1, len(compared.visual[0])), 0):
            name = f"vision, DeepStack {level}" if level else "vision, embeddings"
            found, expected = (each[level] for each in compared.visual)
            yield ErrorRow(name, limit, _by_kind(found, expected, of_rows))
    compared_kinds = kinds[:-1]  # the last token is no input
    for layer, pairs in enumerate(zip(*compared.layers, strict=True)):
        for name, found, expected in zip(("keys", "values"), *pairs, strict=True):
            rows = (np.moveaxis(each, 2, 0).reshape(each.shape[2], -1) for each in (found, expected))
            yield ErrorRow(f"layer {layer}, {name}", limits["cache_relative"], _by_kind(*rows, compared_kinds))
    found, expected = compared.logits
    gaps_T = _largest_gaps(found, expected) / max(1.0, float(np.std(expected)))
    values = {kind: float(gaps_T[compared_kinds == kind].max()) for kind in Kind if (compared_kinds == kind).any()}
    yield ErrorRow("logits", limits["logits_scaled"], values)


def _by_kind(found: FloatArray, expected: FloatArray, kinds: NDArray[np.object_]) -> dict[Kind, float]:
    """Return the relative error of the rows [rows, …] of each kind."""
    return {kind: _relative(found[kinds == kind], expected[kinds == kind]) for kind in Kind if (kinds == kind).any()}


def _relative(found: FloatArray, expected: FloatArray) -> float:
    return float(_relative_rows(found.reshape(1, -1), expected.reshape(1, -1))[0])


def _relative_rows(found: FloatArray, expected: FloatArray) -> NDArray[np.float64]:
    """Return the norm of the difference over that of the reference for each row; infinite if it is not finite."""
    theirs = expected.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        gap, norm = np.linalg.norm(found - theirs, axis=-1), np.linalg.norm(theirs, axis=-1)
        relative: NDArray[np.float64] = np.where(gap == 0, 0.0, gap / norm)
    return np.where(np.isfinite(relative), relative, np.inf)


def _largest_gaps(found: FloatArray, expected: FloatArray) -> NDArray[np.float64]:
    """Return the largest difference of two logits of each row; infinite if one is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(found - expected).max(-1).astype(np.float64)
    return np.where(np.isfinite(gaps), gaps, np.inf)


def _worst(
    ids: Sequence[int], kinds: NDArray[np.object_], compared: Compared, near_tie_gap: float, tokenizer: Tokenizer
) -> Iterator[WorstToken]:
    found_TV, expected_TV = compared.logits
    gaps_T = _largest_gaps(found_TV, expected_TV)
    rows = np.arange(len(gaps_T))
    below_T = expected_TV.max(-1) - expected_TV[rows, found_TV.argmax(-1)]
    others_T = (below_T > near_tie_gap) | ~np.isfinite(gaps_T)
    texts = [_shown_token(tokenizer, token_id) for token_id in ids]
    # Other choices first, then by the difference.
    for position in np.lexsort((-gaps_T, ~others_T))[:_NUM_WORST].tolist():
        found, expected = found_TV[position], expected_TV[position]
        is_finite = bool(np.isfinite(found).all())
        yield WorstToken(
            position,
            kinds[position],
            "".join(texts[max(0, position - _NUM_NEIGHBOURS) : position]),
            texts[position],
            "".join(texts[position + 1 : position + 1 + _NUM_NEIGHBOURS]),
            float(gaps_T[position]),
            float(kl_divergence(found[None], expected[None])[0]) if is_finite else float("inf"),
            _likeliest(expected, tokenizer),
            _likeliest(found, tokenizer) if is_finite else (),
            bool(others_T[position]),
        )


def _likeliest(logits_V: FloatArray, tokenizer: Tokenizer) -> tuple[tuple[str, float], ...]:
    ids = np.argsort(-logits_V, kind="stable")[:_NUM_LIKELY].tolist()
    return tuple((_shown_token(tokenizer, each), float(logits_V[each])) for each in ids)


def _shown_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text of a token; a number for an id without one, of which a vocabulary may be padded."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace") or f"[{token_id}]"


def _pictures(
    prepared: Prepared, visual: tuple[FloatArray, FloatArray] | None, settings: InputSettings
) -> Iterator[Picture]:
    start = 0
    for kind, name, segment in _segments(prepared):
        end = start + segment.num_visual_tokens
        errors: list[float] = []
        if visual is not None:
            rows = (np.moveaxis(each[:, start:end], 1, 0).reshape(end - start, -1) for each in visual)
            errors = _relative_rows(*rows).tolist()
        start = end
        config = settings.image if kind is Kind.IMAGE else settings.video.image
        frame_HWC = assemble_frames(segment.pixel_values, segment.grid_thw, config)[0]
        height, width = frame_HWC.shape[:2]
        grid = segment.merged_grid_thw[1], segment.merged_grid_thw[2]
        yield Picture(name, _jpeg(frame_HWC), (width, height), grid, tuple(errors), segment.digest)


def _jpeg(frame_HWC: NDArray[Any]) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(frame_HWC).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
