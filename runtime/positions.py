"""Make the decoder's position inputs of one prompt: 3-axis mRoPE positions and rows of the visual embeddings.

What is visual is told by spans, never found by looking for image tokens: an `<|image_pad|>` that a user typed is text.

Shapes: S prompt tokens; the leading 3 is time, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


Kept: TypeAlias = int | tuple[int, ...] | None
"""Visual tokens of a segment that stay in the prompt: their number, which they are, or None for all."""


@dataclass(frozen=True)
class VisualSpan:
    """Where the tokens of one segment stand in a prompt.

    Attributes:
        start: Index of its first token.
        merged_grid_thw: Visual tokens along time, height and width: the patch grid with height and width divided by
            the merge size.
        kept: Those of them that the prompt holds (`runtime.visual_pruning`), in rising order if it says which.
    """

    start: int
    merged_grid_thw: tuple[int, int, int]
    kept: Kept = None

    @property
    def num_rows(self) -> int:
        """Rows of the segment's visual embeddings."""
        return math.prod(self.merged_grid_thw)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the segment in the prompt."""
        if self.kept is None:
            return self.num_rows
        return self.kept if isinstance(self.kept, int) else len(self.kept)

    @property
    def end(self) -> int:
        """Index after its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False)
class PromptPositions:
    """Position inputs of one prompt.

    Attributes:
        position_ids: int64 [3, 1, S]; -1 where it is not known yet which tokens of a segment stay.
        visual_rows: int64 [1, S]: row of the visual embeddings that a token takes, -1 for text. Rows count through
            the spans in order, those of tokens that do not stay included.
        delta: Position of the next token minus its index; the n-th token of the sequence, n ≥ S, has position
            n + delta on all three axes.
    """

    position_ids: npt.NDArray[np.int64]
    visual_rows: npt.NDArray[np.int64]
    delta: int


def mrope_positions(num_tokens: int, spans: Sequence[VisualSpan] = ()) -> PromptPositions:
    """Number the tokens of a prompt as `Qwen3VLModel.get_rope_index` of transformers 5.23 does.

    Text counts up on all axes alike. A segment of grid (t, h, w) that starts at position p gives its tokens p plus
    their place in the grid, and the text after it goes on at p + max(h, w). Tokens that do not stay in the prompt leave
    gaps: all others have the positions and rows that they would have beside them.

    Args:
        num_tokens: Length S of the prompt, at least 1.
        spans: Segments in order of `start`, not overlapping, inside the prompt. They may touch.
    """
    assert num_tokens > 0
    position_ids = np.empty((3, num_tokens), np.int64)
    visual_rows = np.full(num_tokens, -1, np.int64)
    index = position = row = highest = 0
    for span in spans:
        assert index <= span.start and span.end <= num_tokens and span.num_tokens > 0, span
        text = span.start - index
        position_ids[:, index : span.start] = position + np.arange(text)
        position += text
        tokens = slice(span.start, span.end)
        if isinstance(span.kept, int):
            position_ids[:, tokens] = visual_rows[tokens] = -1
        else:
            stays = slice(None) if span.kept is None else np.array(span.kept)
            position_ids[:, tokens] = position + np.indices(span.merged_grid_thw).reshape(3, -1)[:, stays]
            visual_rows[tokens] = row + np.arange(span.num_rows)[stays]
        highest = max(highest, position + max(span.merged_grid_thw) - 1)
        position += max(span.merged_grid_thw[1:])
        row += span.num_rows
        index = span.end
    position_ids[:, index:] = position + np.arange(num_tokens - index)
    delta = max(highest, position + num_tokens - index - 1) + 1 - num_tokens
    return PromptPositions(position_ids[:, None, :], visual_rows[None, :], delta)
