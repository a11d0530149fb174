"""Which rows of a KV cache to keep after a prompt, by how much its last tokens attend to them.

As SnapKV (Li et al. 2024, arXiv:2404.14469, section 4): the queries of the last tokens of the prompt, the window, vote
for the rows before them by their attention; votes are summed over the window and over the query heads that share a
key-value head, and pooled, so that a row is kept with those around it; each key-value head of each layer keeps the rows
of most votes, and the window itself. Visual rows are judged apart from those of text, as VL-Cache does (Tu et al. 2024,
arXiv:2410.23317), which found that the two are attended to differently. They are pooled over rows and columns of their
image, since the row of a token's neighbour below lies a whole line away.

All functions take and return plain arrays.

Shapes: W tokens of the window, N query heads, K kv heads, T rows of the prompt, H head dim, M rows that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from runtime.contract import FloatArray, IntArray
from runtime.positions import VisualSpan

TEXT_POOL, IMAGE_POOL = 5, 3
"""Rows of text, and rows and columns of an image, that a vote counts for: odd numbers."""


def window_scores(queries_WNH: FloatArray, keys_KTH: FloatArray, scale: float) -> FloatArray:
    """Return the attention of the window to each row, summed over its tokens and averaged over query heads, [K, T].

    Args:
        queries_WNH: Of the last W of the T tokens, after norm and rotary embedding.
        keys_KTH: As the cache holds them, of all T rows.
        scale: Of the scores.
    """
    num_window, num_heads, _ = queries_WNH.shape
    num_kv_heads, num_rows, _ = keys_KTH.shape
    assert 0 < num_window <= num_rows and num_heads % num_kv_heads == 0
    group = num_heads // num_kv_heads
    after_TW = np.arange(num_rows)[:, None] > np.arange(num_rows - num_window, num_rows)
    scores_KT = np.empty((num_kv_heads, num_rows), np.float32)
    for k, keys_TH in enumerate(keys_KTH):  # head by head, so that one head's weights are in memory at once
        queries_GWH = queries_WNH[:, k * group : (k + 1) * group].transpose(1, 0, 2) * np.float32(scale)
        weights_GWT = queries_GWH @ keys_TH.T
        weights_GWT[:, after_TW.T] = -np.inf
        weights_GWT -= weights_GWT.max(-1, keepdims=True)
        np.exp(weights_GWT, out=weights_GWT)
        weights_GWT /= weights_GWT.sum(-1, keepdims=True)
        scores_KT[k] = weights_GWT.sum(1).mean(0)
    return scores_KT


def pool_scores(scores_KT: FloatArray, spans: Sequence[VisualSpan] = ()) -> FloatArray:
    """Return for each row the largest score around it: among rows of text, or in its image's rows and columns.

    Args:
        scores_KT: Of rows 0 … T - 1.
        spans: Segments in order; those of a video are its temporal patches. Tokens between them are text. Rows of an
            image of which not all tokens stayed (`runtime.visual_pruning`) are not pooled.
    """
    pooled_KT = np.empty_like(scores_KT)
    start = 0
    for span in spans:
        _pool_text(scores_KT, pooled_KT, start, span.start)
        if span.kept is not None:  # of a pruned image: a token's neighbours may be gone
            pooled_KT[:, span.start : span.end] = scores_KT[:, span.start : span.end]
            start = span.end
            continue
        grid = scores_KT[:, span.start : span.end].reshape(-1, *span.merged_grid_thw[1:])
        for axis in (-2, -1):
            grid = _largest_around(grid, IMAGE_POOL, axis)
        pooled_KT[:, span.start : span.end] = grid.reshape(len(scores_KT), -1)
        start = span.end
    _pool_text(scores_KT, pooled_KT, start, scores_KT.shape[1])
    return pooled_KT


def choose_rows(
    scores_KT: FloatArray,
    budget: int,
    window: int,
    spans: Sequence[VisualSpan] = (),
    *,
    visual_share: float | None = None,
) -> IntArray:
    """Return the rows that each kv head keeps, rising, [K, M]: as many as `budget`, the last `window` among them.

    Visual rows and those of text have budgets of their own, the same for all heads, and none gives rows to the other
    unless it has too few.

    Args:
        scores_KT: As `window_scores` gives them.
        budget: M, more than `window` and at most T.
        window: Last rows, which stay.
        spans: Segments, which lie before the window or in it.
        visual_share: Of the budget without the window, what visual rows get, 0 to 1; by default their share of the
            rows.
    """
    num_kv_heads, num_rows = scores_KT.shape
    assert window < budget <= num_rows, "nothing to choose"
    assert visual_share is None or 0 <= visual_share <= 1, visual_share
    first = num_rows - window
    is_visual = np.zeros(num_rows, bool)
    for span in spans:
        is_visual[span.start : span.end] = True
    kinds = [np.flatnonzero(is_visual[:first]), np.flatnonzero(~is_visual[:first])]
    most = budget - window
    share = len(kinds[0]) / first if visual_share is None else visual_share
    num_visual = min(len(kinds[0]), max(round(share * most), most - len(kinds[1])))
    votes_KT = pool_scores(scores_KT, spans)
    chosen = [np.broadcast_to(np.arange(first, num_rows), (num_kv_heads, window))]
    for rows, count in zip(kinds, (num_visual, most - num_visual), strict=True):
        # Of equal votes, the earlier row stays.
        order = np.argsort(-votes_KT[:, rows], axis=1, kind="stable")[:, :count]
        chosen.append(rows[order])
    return np.sort(np.concatenate(chosen, axis=1), axis=1)


def _pool_text(scores_KT: FloatArray, pooled_KT: FloatArray, start: int, stop: int) -> None:
    if start < stop:
        pooled_KT[:, start:stop] = _largest_around(scores_KT[:, start:stop], TEXT_POOL, -1)


def _largest_around(values: FloatArray, width: int, axis: int) -> FloatArray:
    """Return the largest of so many neighbours along an axis, whose ends have fewer."""
    padding = [(0, 0)] * values.ndim
    padding[axis] = (width // 2, width // 2)
    padded = np.pad(values, padding, constant_values=-np.inf)
    return np.asarray(sliding_window_view(padded, width, axis=axis).max(-1))
