"""Which visual tokens of an image stay in the prompt.

Shapes: V visual tokens of a segment, D their elements, K of them that stay.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.contract import FloatArray, IntArray
from runtime.visual_pruning.diversity import diverse_rows

MIN_TOKENS = 16
"""Images and videos of no more tokens stay whole, and of larger ones as many stay."""


def num_kept_tokens(num_tokens: int, share: float) -> int:
    """Return how many tokens of an image or a video stay: the share, rounded up, but no fewer than `MIN_TOKENS`."""
    return min(num_tokens, max(MIN_TOKENS, math.ceil(num_tokens * share)))


def choose_visual_tokens(embeds: FloatArray, num_kept: int, scores: FloatArray | None = None) -> IntArray:
    """Return the visual tokens that stay, in their order, int64 [K].

    The features of a token are its embedding without the mean of all tokens of its image. What most of the picture
    looks like is near the mean, so it has short features; `diverse_rows` takes long ones that differ. With scores,
    features are as much longer as the square root of the score.

    Args:
        embeds: Level 0 of the visual embeddings of one image, float32 [V, D].
        num_kept: How many stay, 1 to V.
        scores: The attention that each token gets in the vision tower, float32 [V], where the engine says it.
    """
    features = embeds - embeds.mean(axis=0, keepdims=True)
    if scores is not None:
        features = features * np.sqrt(scores)[:, None]
    return np.sort(diverse_rows(features, num_kept))
