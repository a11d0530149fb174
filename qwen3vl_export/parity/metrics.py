"""Measures of how far an engine's tensor is from the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


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
        """`max_abs` over max(1, std of the reference): what tolerances bound."""
        return self.max_abs / max(1.0, self.reference_std)


def difference(found: Floats, expected: Floats) -> Difference:
    """Compare two arrays of one shape; anything not finite gives infinite differences and no std."""
    assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(
            float("inf"), float("inf"), 0.0, float(np.std(b[np.isfinite(b)])) if np.isfinite(b).any() else 0.0
        )
    norm_a, norm_b, gap = float(np.linalg.norm(a)), float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
    if norm_a == 0 or norm_b == 0:
        cosine = 1.0 if norm_a == norm_b else 0.0
        relative = 0.0 if gap == 0 else float("inf") if norm_b == 0 else gap / norm_b
    else:
        cosine, relative = float(a @ b) / (norm_a * norm_b), gap / norm_b
    return Difference(float(np.max(np.abs(a - b), initial=0.0)), relative, cosine, float(np.std(b)))


def kl_divergence(found_SV: Floats, expected_SV: Floats) -> NDArray[np.float64]:
    """Return KL(reference ‖ engine) of the distributions at every position, in nats, [S]."""
    p, q = _log_softmax(expected_SV), _log_softmax(found_SV)
    values: NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1)
    return values


def top2_gap(logits_SV: Floats) -> NDArray[np.float64]:
    """Return the gap between the two largest logits of every position, [S]."""
    top = np.partition(logits_SV.astype(np.float64), -2, axis=-1)
    gap: NDArray[np.float64] = top[:, -1] - top[:, -2]
    return gap


@dataclass(frozen=True)
class Agreement:
    """How often both sides choose the same token.

    Attributes:
        total: Positions compared.
        differing: Positions whose most likely token differs while the reference is decided.
        near_ties: Positions that differ where the reference's two best lie within the gap, so that either counts.
    """

    total: int
    differing: tuple[int, ...]
    near_ties: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of positions that agree, near-ties counted as agreeing."""
        return 1 - len(self.differing) / self.total


def agreement(found_SV: Floats, expected_SV: Floats, near_tie_gap: float) -> Agreement:
    """Compare the most likely tokens of every position."""
    differs = found_SV.argmax(-1) != expected_SV.argmax(-1)
    tie = top2_gap(expected_SV) <= near_tie_gap
    rows = np.arange(len(expected_SV))
    return Agreement(len(rows), tuple(int(i) for i in rows[differs & ~tie]), tuple(int(i) for i in rows[differs & tie]))


def _log_softmax(logits_SV: Floats) -> NDArray[np.float64]:
    shifted = logits_SV.astype(np.float64) - logits_SV.max(-1, keepdims=True)
    values: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return values
