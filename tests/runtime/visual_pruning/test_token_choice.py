"""How many tokens stay, and which, of an image and of a video."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.visual_pruning.choice import MIN_TOKENS, choose_visual_tokens, num_kept_tokens
from runtime.visual_pruning.frames import changed_tokens, pixel_changes

pytestmark = pytest.mark.portable
RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("num_tokens", "share", "num_kept"),
    [(256, 0.5, 128), (255, 0.5, 128), (100, 1, 100), (MIN_TOKENS, 0.1, MIN_TOKENS), (MIN_TOKENS + 1, 0.1, MIN_TOKENS)],
)
def test_how_many_stay(num_tokens: int, share: float, num_kept: int) -> None:
    assert num_kept_tokens(num_tokens, share) == num_kept


@given(st.integers(1, 5000), st.floats(0, 1, exclude_min=True))
def test_never_more_than_there_are_and_never_less_than_the_share(num_tokens: int, share: float) -> None:
    found = num_kept_tokens(num_tokens, share)
    assert min(num_tokens, MIN_TOKENS, found) == min(num_tokens, MIN_TOKENS)
    assert share * num_tokens <= found <= num_tokens


def test_what_differs_from_the_rest_of_the_picture_stays() -> None:
    background = RNG.normal(size=64) + RNG.normal(0, 0.05, (100, 64))
    drawn = [3, 40, 77, 98]
    background[drawn] += RNG.normal(0, 1, (len(drawn), 64))
    kept = choose_visual_tokens(background.astype(np.float32), 20)
    assert set(drawn) <= set(kept.tolist()) and (np.diff(kept) > 0).all() and len(kept) == 20


def test_a_common_offset_does_not_change_the_choice() -> None:
    """The embeddings of one image share a large part, which says nothing about any of its tokens."""
    embeds = RNG.normal(size=(60, 32)).astype(np.float32)
    assert choose_visual_tokens(embeds, 30).tolist() == choose_visual_tokens(embeds + 10, 30).tolist()


def test_a_score_counts_as_much_as_the_square_of_a_length() -> None:
    """The kernel of the choice has score times squared length on its diagonal."""
    embeds = np.array([[2, 0], [-2, 0], [0, 1], [0, -1]], np.float32)
    for score, first in ((3.9, 0), (4.1, 2)):
        scores = np.array([1, 1, score, score], np.float32)
        assert choose_visual_tokens(embeds, 1, scores).tolist() == [first]


def frames(num_frames: int, num_tokens: int) -> list[np.ndarray]:
    """Return patches of a still picture, four to a token."""
    still = RNG.normal(size=(4 * num_tokens, 6)).astype(np.float32)
    return [still.copy() for _ in range(num_frames)]


def test_tokens_whose_pixels_change_stay() -> None:
    patches = frames(3, 5)
    patches[1][4 * 2 + 1] += 1  # a patch of token 2, which then stands still
    patches[2][4 * 2 + 1] += 1
    patches[2][4 * 4] += 2
    found = pixel_changes(patches, 4)
    assert found.shape == (2, 5)
    assert np.argwhere(found).tolist() == [[0, 2], [1, 4]]
    assert [each.tolist() for each in changed_tokens(found, 7)] == [[0, 1, 2, 3, 4], [2], [4]]


def test_each_temporal_patch_keeps_a_token_and_the_first_one_all() -> None:
    found = changed_tokens(np.zeros((3, 5), np.float32), 1)
    assert [len(each) for each in found] == [5, 1, 1, 1]


def test_tokens_are_counted_over_the_whole_video() -> None:
    """One temporal patch changes everywhere and the others hardly, so its tokens stay."""
    changes_FV = np.array([[0.1] * 8, [5.0] * 8, [0.1] * 7 + [0.2]], np.float32)
    found = [each.tolist() for each in changed_tokens(changes_FV, 18)]
    assert found == [list(range(8)), [0], list(range(8)), [7]]


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_as_many_stay_as_asked_for(num_later: int, num_tokens: int, data: st.DataObject) -> None:
    total = (num_later + 1) * num_tokens
    num_kept = data.draw(st.integers(1, total))
    values = np.random.default_rng(total).integers(0, 3, (num_later, num_tokens)).astype(np.float32)
    found = changed_tokens(values, num_kept)
    assert sum(map(len, found)) == max(num_kept, num_tokens + num_later)
    assert all(len(each) and (np.diff(each) > 0).all() for each in found)
