"""Position inputs of the vision tower against transformers' functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from runtime.vision_inputs import patch_coordinates, position_interpolation, vision_rotary

merged_sides = st.integers(1, 70)


@settings(max_examples=150, deadline=None)
@given(merged_sides, merged_sides, st.sampled_from([1, 2, 7, 24, 48]), st.integers(1, 3))
def test_interpolation_is_equal(rows: int, columns: int, side: int, merge: int) -> None:
    h, w = rows * merge, columns * merge
    expected_indices, expected_weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, h, w]]), side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    indices, weights = position_interpolation(h, w, side, merge)
    assert indices.dtype == np.int64 and weights.dtype == np.float32
    np.testing.assert_array_equal(indices, expected_indices.numpy())
    np.testing.assert_array_equal(weights, expected_weights.numpy())


def test_corners_take_the_corners_of_the_grid() -> None:
    indices, weights = position_interpolation(6, 10, 48, 2)
    row, column = patch_coordinates(6, 10, 2)
    for patch_row, grid_row in ((0, 0), (5, 47)):
        for patch_column, grid_column in ((0, 0), (9, 47)):
            patch = int(np.flatnonzero((row == patch_row) & (column == patch_column))[0])
            used = indices[patch][weights[patch] > 0]
            assert used.tolist() == [grid_row * 48 + grid_column]
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("hidden_size", "num_heads"), [(1024, 16), (1152, 16), (96, 4), (64, 4), (128, 1)])
@pytest.mark.parametrize(("h", "w"), [(2, 2), (6, 10), (14, 28), (250, 188), (2, 3620)])
def test_rotary_is_the_first_half_of_the_reference(hidden_size: int, num_heads: int, h: int, w: int) -> None:
    head_dim = hidden_size // num_heads
    rotary = Qwen3VLVisionRotaryEmbedding(Qwen3VLVisionConfig(hidden_size=hidden_size, num_heads=num_heads))
    expected = rotary(torch.zeros(1), get_vision_position_ids(torch.tensor([[1, h, w]]), 2))
    found = vision_rotary(h, w, head_dim, 2, 10000.0)
    for found_half, expected_full in zip(found, expected, strict=True):
        assert found_half.dtype == np.float32
        full = expected_full.numpy()
        np.testing.assert_array_equal(full[:, : head_dim // 2], full[:, head_dim // 2 :])
        # One unit in the last place of a float32 below 1.
        np.testing.assert_allclose(found_half, full[:, : head_dim // 2], rtol=0, atol=6e-8)


def test_merge_order_of_patches() -> None:
    row, column = patch_coordinates(4, 4, 2)
    assert list(zip(row.tolist(), column.tolist(), strict=True))[:8] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]
