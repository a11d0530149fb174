"""mRoPE positions of a prompt against transformers' `get_rope_index`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import judge
from helpers.random_checkpoints import tiny_values
from runtime.positions import PromptPositions, VisualSpan, mrope_positions

MERGE = 2
Grid = tuple[int, int, int]


@pytest.fixture(scope="module")
def model() -> Any:
    """The tiny model of transformers, without memory: positions need no weight."""
    import torch

    with torch.device("meta"):
        return judge.new_model(tiny_values()).model


def reference(model: Any, num_tokens: int, spans: list[VisualSpan]) -> tuple[np.ndarray, int]:
    import torch

    kinds = torch.zeros(1, num_tokens, dtype=torch.int64)
    for span in spans:
        kinds[0, span.start : span.end] = judge.IMAGE
    grids = [[t, h * MERGE, w * MERGE] for t, h, w in (span.merged_grid_thw for span in spans)]
    position_ids, deltas = judge.rope_index(model, kinds, torch.tensor(grids) if grids else None)
    return position_ids.numpy(), int(deltas[0, 0])


def layout(pieces: list[int | Grid]) -> tuple[int, list[VisualSpan]]:
    """Lay out pieces in order: a number of text tokens, or the merged grid of an image."""
    length, spans = 0, []
    for piece in pieces:
        if isinstance(piece, int):
            length += piece
        else:
            spans.append(VisualSpan(length, piece))
            length = spans[-1].end
    return length, spans


def assert_equal(model: Any, pieces: list[int | Grid]) -> PromptPositions:
    num_tokens, spans = layout(pieces)
    expected, delta = reference(model, num_tokens, spans)
    found = mrope_positions(num_tokens, spans)
    assert found.position_ids.dtype == np.int64 and found.visual_rows.dtype == np.int64
    np.testing.assert_array_equal(found.position_ids, expected)
    assert found.delta == delta
    return found


@pytest.mark.judge
@pytest.mark.parametrize(
    "pieces",
    [
        [1],
        [37],
        [5, (1, 3, 4), 7],
        [(1, 3, 4), 7],
        [5, (1, 4, 3)],
        [(1, 1, 1)],
        [1, (1, 1, 1)],
        [(1, 2, 9), 1, (1, 9, 2), 3, (1, 4, 4)],
        [1, (1, 2, 9), 1, (1, 9, 2), 3, (1, 4, 4)],
        [3, (4, 2, 3), 6],  # more temporal patches than rows or columns
    ],
)
def test_positions_are_equal(model: Any, pieces: list[int | Grid]) -> None:
    first, *_ = pieces
    starts_with_image, is_long = isinstance(first, tuple), any(isinstance(p, tuple) and p[0] > 1 for p in pieces)
    if starts_with_image:
        judge.skip_unless(not judge.images_need_a_start_token(), "an image without a token before it is not found")
    if is_long:
        judge.skip_unless(not judge.images_need_a_start_token(), "text after many temporal patches goes on otherwise")
    assert_equal(model, pieces)


sides = st.integers(1, 12)
grids = st.tuples(st.integers(1, 3), sides, sides)


@pytest.mark.judge
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.lists(st.tuples(grids, st.integers(1, 9)), min_size=1, max_size=5), st.booleans())
def test_random_prompts_are_equal(
    model: Any, before: int, images: list[tuple[Grid, int]], ends_with_image: bool
) -> None:
    if judge.images_need_a_start_token():  # as in every prompt; and images, unlike videos, have one temporal patch
        before, images = max(before, 1), [((1, h, w), text) for (_, h, w), text in images]
    # At least one token of text between images: transformers tells them apart by that.
    pieces: list[int | Grid] = [before]
    for grid, text in images:
        pieces += [grid, text]
    found = assert_equal(model, pieces[:-1] if ends_with_image else pieces)
    _, spans = layout(pieces)
    rows = found.visual_rows[0]
    num_rows = sum(span.num_tokens for span in spans)
    np.testing.assert_array_equal(rows[rows >= 0], np.arange(num_rows))
    for span in spans:
        assert (rows[span.start : span.end] >= 0).all()


@pytest.mark.portable
def test_a_small_prompt_by_hand() -> None:
    found = mrope_positions(9, [VisualSpan(2, (1, 2, 3))])
    assert found.position_ids[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert found.visual_rows.tolist() == [[-1, -1, 0, 1, 2, 3, 4, 5, -1]]
    assert found.delta == -3  # token 9 has position 6


@pytest.mark.portable
def test_segments_may_touch() -> None:
    found = mrope_positions(4, [VisualSpan(0, (1, 1, 2)), VisualSpan(2, (1, 1, 2))])
    assert found.position_ids[:, 0].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [0, 1, 2, 3]]
    assert found.visual_rows.tolist() == [[0, 1, 2, 3]]
    assert found.delta == 0


@pytest.mark.portable
@pytest.mark.parametrize(
    "spans",
    [[VisualSpan(8, (1, 1, 3))], [VisualSpan(0, (1, 1, 3)), VisualSpan(2, (1, 1, 3))], [VisualSpan(0, (1, 0, 3))]],
)
def test_impossible_spans_are_our_own_bug(spans: list[VisualSpan]) -> None:
    with pytest.raises(AssertionError):
        mrope_positions(10, spans)
