"""Which visual tokens of a video stay in the prompt: those whose pixels change.

As Efficient Video Sampling (arXiv:2510.14624) does it: the first temporal patch stays whole, and of the later ones the
tokens that differ most from the same place one temporal patch before, whatever patch they are of. Here the differences
are of pixels and not of embeddings, so that the length of a prompt is known before the vision tower runs.

Shapes: F temporal patches, V visual tokens of each, P patches of each, E elements of a patch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from runtime.contract import FloatArray, IntArray


def pixel_changes(patches: Sequence[FloatArray], patches_per_token: int) -> FloatArray:
    """Return how far the pixels of each token are from those one temporal patch before, float32 [F - 1, V].

    Args:
        patches: Those of each temporal patch, [P, E] in merge order, normalised pixels.
        patches_per_token: Patches that one visual token is merged of.
    """
    found = [
        np.abs(later - earlier).reshape(-1, patches_per_token * later.shape[1]).mean(axis=1)
        for earlier, later in itertools.pairwise(patches)
    ]
    return np.stack(found)


def changed_tokens(changes_FV: FloatArray, num_kept: int) -> list[IntArray]:
    """Return the tokens that stay of each temporal patch, in their order, int64.

    Args:
        changes_FV: What `pixel_changes` returned.
        num_kept: How many of all F·V tokens stay; more where that is less than the first temporal patch and one token
            of each other.
    """
    num_later, num_tokens = changes_FV.shape
    stays_FV = np.zeros((num_later, num_tokens), bool)
    stays_FV[np.arange(num_later), changes_FV.argmax(axis=1)] = True
    order = np.argsort(np.where(stays_FV, -np.inf, -changes_FV), axis=None, kind="stable")
    stays_FV.flat[order[: max(num_later, num_kept - num_tokens)]] = True
    return [np.arange(num_tokens), *(np.flatnonzero(stays_V) for stays_V in stays_FV)]
