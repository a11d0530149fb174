"""Make the decoder's position inputs of one prompt: 3-axis mRoPE positions and rows of the visual embeddings.

What is visual is told by spans, never found by looking for image tokens: an `<|image_pad|>` that a user typed is text.

Shapes: S prompt tokens; the leading 3 is time, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class VisualSpan:
    """Where the tokens of one segment stand in a prompt.

    Attributes:
        start: Index of its first token.
        merged_grid_thw: Visual tokens along time, height and width: the patch grid with height and width divided by
            the merge size.
    """

    start: int
    merged_grid_thw: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the segment."""
        return math.prod(self.merged_grid_thw)

    @property
    def end(self) -> int:
        """Index after its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False)
class PromptPositions:
    """Position inputs of one prompt.

    Attributes:
        position_ids: int64 [3, 1, S].
        visual_rows: int64 [1, S]: row of the visual embeddings that a token takes, -1 for text. Rows count through
            the spans in order.
        delta: Position of the next token minus its index; the n-th token of the sequence, n ≥ S, has position
            n + delta on all three axes.
    """

    position_ids: npt.NDArray[np.int64]
    visual_rows: npt.NDArray[np.int64]
    delta: int


def mrope_positions(num_tokens: int, spans: Sequence[VisualSpan] = ()) -> PromptPositions:
    """Number the tokens of a prompt as `Qwen3VLModel.get_rope_index` of transformers 5.23 does.

    Text counts up on all axes alike. A segment of grid (t, h, w) that starts at position p gives its tokens p plus
    their place in the grid, and the text after it goes on at p + max(h, w).

    Args:
        num_tokens: Length S of the prompt, at least 1.
        spans: Segments in order of `start`, not overlapping, inside the prompt. They may touch.
    """
    assert num_tokens > 0
    position_ids = np.empty((3, num_tokens), np.int64)
    visual_rows = np.full(num_tokens, -1, np.int64)
    index = position = row = 0
    for span in spans:
        assert index <= span.start and span.end <= num_tokens and span.num_tokens > 0, span
        text = span.start - index
        position_ids[:, index : span.start] = position + np.arange(text)
        position += text
        position_ids[:, span.start : span.end] = position + np.indices(span.merged_grid_thw).reshape(3, -1)
        visual_rows[span.start : span.end] = row + np.arange(span.num_tokens)
        position += max(span.merged_grid_thw[1:])
        row += span.num_tokens
        index = span.end
    position_ids[:, index:] = position + np.arange(num_tokens - index)
    delta = int(position_ids.max()) + 1 - num_tokens
    return PromptPositions(position_ids[:, None, :], visual_rows[None, :], delta)
