"""Position inputs of the vision tower against transformers' outputs, and to the bit against one release."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import judge, own_model
from helpers.random_checkpoints import random_model, randomise, tiny_values
from runtime.vision_inputs import patch_coordinates, position_interpolation, vision_rotary

merged_sides = st.integers(1, 70)


@pytest.fixture(scope="module")
def towers() -> tuple[Any, Any]:
    """Our model and transformers' with the same weights: positions are larger than pixels, so that they decide."""
    values = tiny_values(vision_config={"num_position_embeddings": 7**2})
    own, theirs = random_model(values), randomise(judge.new_model(values))
    own.visual.pos_embed.weight.data.normal_(std=3)
    missing, unexpected = theirs.load_state_dict(own.state_dict(), strict=False)
    assert not unexpected and not [key for key in missing if key.startswith("model.visual.")]
    return own, theirs


# Merged rows and columns; the largest is a strip as long as the processor lets through.
@pytest.mark.judge
@pytest.mark.parametrize(
    "grid",
    [(1, 1), (3, 5), (5, 3), (7, 14), (4, 4), (1, 40), (31, 2), (1, 300)],
    ids=lambda grid: "x".join(map(str, grid)),
)
def test_a_tower_places_patches_as_transformers_does(towers: tuple[Any, Any], grid: tuple[int, int]) -> None:
    """Indices, weights and angles all show in the outputs: a patch that is misplaced by one row changes them."""
    import torch

    own, theirs = towers
    grids = torch.tensor([[1, grid[0] * 2, grid[1] * 2]])
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4 * grid[0] * grid[1], 1536))).float()
    (found,) = own_model.visual_levels(own, pixels, grids)
    expected = judge.visual_levels(theirs, pixels, grids)
    assert float(expected.std()) > 0.5
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.std())


@pytest.mark.judge
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24))
def test_a_tower_places_patches_of_any_grid_as_transformers_does(
    towers: tuple[Any, Any], rows: int, columns: int
) -> None:
    test_a_tower_places_patches_as_transformers_does(towers, (rows, columns))


@settings(max_examples=150, deadline=None)
@given(merged_sides, merged_sides, st.sampled_from([1, 2, 7, 24, 48]), st.integers(1, 3))
def test_interpolation_is_equal_to_the_bit_in_the_locked_release(
    rows: int, columns: int, side: int, merge: int
) -> None:
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    h, w = rows * merge, columns * merge
    expected_indices, expected_weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, h, w]]), side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    indices, weights = position_interpolation(h, w, side, merge)
    assert indices.dtype == np.int64 and weights.dtype == np.float32
    np.testing.assert_array_equal(indices, expected_indices.numpy())
    np.testing.assert_array_equal(weights, expected_weights.numpy())


@pytest.mark.portable
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
def test_rotary_is_the_first_half_of_that_of_the_locked_release(
    hidden_size: int, num_heads: int, h: int, w: int
) -> None:
    import torch
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
    from transformers.vision_utils import get_vision_position_ids

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


@pytest.mark.portable
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
