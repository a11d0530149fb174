"""What pruning makes of the segments of a prompt, before the vision tower has run and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.contract import FloatArray, VisualEmbeds, on_host, rows_around
from runtime.positions import Kept, VisualSpan
from runtime.visual_pruning.choice import choose_visual_tokens, num_kept_tokens
from runtime.visual_pruning.frames import changed_tokens, pixel_changes

if TYPE_CHECKING:
    from runtime.image_processor import ProcessedImage


def kept_of(segments: Sequence[ProcessedImage], share: float) -> list[Kept]:
    """Return what stays of each segment of one input: the number for an image, the tokens for a video.

    Args:
        segments: An image, or the temporal patches of a video.
        share: Of the visual tokens, 0 < share ≤ 1.
    """
    num_tokens = sum(each.num_visual_tokens for each in segments)
    num_kept = num_kept_tokens(num_tokens, share)
    if num_kept == num_tokens:
        return [None] * len(segments)
    if len(segments) == 1:
        return [num_kept]
    changes_FV = pixel_changes([each.pixel_values for each in segments], segments[0].merge_size ** 2)
    return [tuple(each.tolist()) for each in changed_tokens(changes_FV, num_kept)]


def decided_spans(
    spans: Sequence[VisualSpan], embeds: VisualEmbeds, num_skipped: int = 0, scores: FloatArray | None = None
) -> list[VisualSpan]:
    """Return the spans of a prompt with the tokens that stay in place of their number.

    Args:
        spans: All of them.
        embeds: Visual embeddings of those behind the skipped ones, one after the other, [1+D, V, hidden].
        num_skipped: Spans at the start that stay undecided.
        scores: Those of the embeddings, [V], if the engine has some.
    """
    decided, row = list(spans[:num_skipped]), 0
    for span in spans[num_skipped:]:
        if isinstance(span.kept, int):
            part, first = rows_around(embeds, row, row + span.num_rows)
            rows = slice(row, row + span.num_rows)
            level = on_host(part)[0, row - first : row - first + span.num_rows]
            tokens = choose_visual_tokens(level, span.kept, None if scores is None else scores[rows])
            span = replace(span, kept=tuple(tokens.tolist()))
        decided.append(span)
        row += span.num_rows
    return decided
