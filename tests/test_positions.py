"""mRoPE positions of a prompt against transformers' `get_rope_index`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from runtime.positions import PromptPositions, VisualSpan, mrope_positions

MERGE = 2
Grid = tuple[int, int, int]


def reference(num_tokens: int, spans: list[VisualSpan]) -> tuple[np.ndarray, int]:
    """Call the unbound method: it reads nothing of a model but the merge size."""
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE)))
    model.get_vision_position_ids = Qwen3VLModel.get_vision_position_ids.__get__(model)
    types = torch.zeros(1, num_tokens, dtype=torch.int32)
    for span in spans:
        types[0, span.start : span.end] = 1
    grids = [[t, h * MERGE, w * MERGE] for t, h, w in (span.merged_grid_thw for span in spans)]
    position_ids, deltas = Qwen3VLModel.get_rope_index(
        model,
        torch.zeros(1, num_tokens, dtype=torch.long),
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
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


def assert_equal(pieces: list[int | Grid]) -> PromptPositions:
    num_tokens, spans = layout(pieces)
    expected, delta = reference(num_tokens, spans)
    found = mrope_positions(num_tokens, spans)
    assert found.position_ids.dtype == np.int64 and found.visual_rows.dtype == np.int64
    np.testing.assert_array_equal(found.position_ids, expected)
    assert found.delta == delta
    return found


@pytest.mark.parametrize(
    "pieces",
    [
        [1],
        [37],
        [5, (1, 3, 4), 7],
        [(1, 3, 4), 7],
        [5, (1, 4, 3)],
        [(1, 1, 1)],
        [(1, 2, 9), 1, (1, 9, 2), 3, (1, 4, 4)],
        [3, (4, 2, 3), 6],  # more temporal patches than rows or columns
    ],
)
def test_positions_are_equal(pieces: list[int | Grid]) -> None:
    assert_equal(pieces)


sides = st.integers(1, 12)
grids = st.tuples(st.integers(1, 3), sides, sides)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.lists(st.tuples(grids, st.integers(1, 9)), min_size=1, max_size=5), st.booleans())
def test_random_prompts_are_equal(before: int, images: list[tuple[Grid, int]], ends_with_image: bool) -> None:
    # At least one token of text between images: transformers tells them apart by that.
    pieces: list[int | Grid] = [before]
    for grid, text in images:
        pieces += [grid, text]
    found = assert_equal(pieces[:-1] if ends_with_image else pieces)
    _, spans = layout(pieces)
    rows = found.visual_rows[0]
    num_rows = sum(span.num_tokens for span in spans)
    np.testing.assert_array_equal(rows[rows >= 0], np.arange(num_rows))
    for span in spans:
        assert (rows[span.start : span.end] >= 0).all()


def test_a_small_prompt_by_hand() -> None:
    found = mrope_positions(9, [VisualSpan(2, (1, 2, 3))])
    assert found.position_ids[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert found.visual_rows.tolist() == [[-1, -1, 0, 1, 2, 3, 4, 5, -1]]
    assert found.delta == -3  # token 9 has position 6


def test_segments_may_touch() -> None:
    found = mrope_positions(4, [VisualSpan(0, (1, 1, 2)), VisualSpan(2, (1, 1, 2))])
    assert found.position_ids[:, 0].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [0, 1, 2, 3]]
    assert found.visual_rows.tolist() == [[0, 1, 2, 3]]
    assert found.delta == 0


@pytest.mark.parametrize(
    "spans",
    [[VisualSpan(8, (1, 1, 3))], [VisualSpan(0, (1, 1, 3)), VisualSpan(2, (1, 1, 3))], [VisualSpan(0, (1, 0, 3))]],
)
def test_impossible_spans_are_our_own_bug(spans: list[VisualSpan]) -> None:
    with pytest.raises(AssertionError):
        mrope_positions(10, spans)
