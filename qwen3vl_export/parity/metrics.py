"""Measures of how far an engine's tensor is from the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Deviation of one tensor.

    Attributes:
        max_abs: Largest absolute difference.
        relative: Norm of the difference over the norm of the reference.
        cosine: Cosine of the angle between both, flattened; 1 if both are zero.
        reference_std: Standard deviation of the reference.
    """

    max_abs: float
    relative: float
    cosine: float
    reference_std: float

    @property
    def scaled(self) -> float:
        """`max_abs` over max(1, std of the reference), for logits: greedy tokens hang on absolute differences."""
        return self.max_abs / max(1.0, self.reference_std)


def difference(found: FloatArray, expected: FloatArray) -> Difference:
    """Compare two arrays; another shape, or anything not finite, gives infinite differences."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if found.shape != expected.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(float("inf"), float("inf"), 0.0, 0.0)
    norm_a, norm_b, gap = float(np.linalg.norm(a)), float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    relative = gap / norm_b if norm_b else float("inf") if gap else 0.0
    return Difference(float(np.max(np.abs(a - b), initial=0.0)), relative, cosine, float(np.std(b)))


def relative_by_position(found_BKTH: FloatArray, expected_BKTH: FloatArray) -> NDArray[np.float64]:
    """Return the norm of the difference over that of the reference at each position, [T]; infinite if not finite."""
    gap, norm = (
        np.linalg.norm(np.moveaxis(values, 2, 0).reshape(values.shape[2], -1).astype(np.float64), axis=-1)
        for values in (found_BKTH - expected_BKTH, expected_BKTH)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        relative: NDArray[np.float64] = np.where(gap == 0, 0.0, gap / norm)
    return np.where(np.isfinite(relative), relative, np.inf)


def kl_divergence(found_SV: FloatArray, expected_SV: FloatArray) -> NDArray[np.float64]:
    """Return KL(reference ‖ engine) of the distributions at every position, in nats, [S]."""
    p, q = log_softmax(expected_SV), log_softmax(found_SV)
    values: NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1)
    return values


@dataclass(frozen=True)
class Agreement:
    """How often the engine chooses the reference's token.

    Attributes:
        total: Positions compared.
        differing: Positions where the engine's token is another one.
        near_ties: Positions where it is another one, but as good as the reference's: not in `differing`. Each with
            the gap, the reference's largest logit minus that of the engine's token.
    """

    total: int
    differing: tuple[int, ...]
    near_ties: tuple[tuple[int, float], ...]

    @property
    def share(self) -> float:
        """Share of positions that agree, near-ties counted as agreeing."""
        return 1 - len(self.differing) / self.total


def agreement(tokens_S: NDArray[np.int64], expected_SV: FloatArray, near_tie_gap: float) -> Agreement:
    """Compare the engine's tokens with the reference's logits; a gap of at most `near_tie_gap` is a near-tie."""
    rows = np.arange(len(expected_SV))
    gaps_S = (expected_SV.max(-1) - expected_SV[rows, tokens_S]).astype(np.float64)
    differs, tie = tokens_S != expected_SV.argmax(-1), gaps_S <= near_tie_gap
    return Agreement(
        len(rows),
        tuple(int(i) for i in rows[differs & ~tie]),
        tuple((int(i), float(gaps_S[i])) for i in rows[differs & tie]),
    )


def log_softmax(logits_SV: FloatArray) -> NDArray[np.float64]:
    """Return the logarithms of the probabilities, [S, vocab]."""
    shifted = logits_SV.astype(np.float64) - logits_SV.max(-1, keepdims=True)
    values: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return values
