"""Compare what an engine answers with a setting and without: tokens and logits of one prompt, before it is taken.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwen3vl_export.parity.metrics import agreement, difference
from qwen3vl_export.tune.settings import Effect
from runtime.contract import FloatArray


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after the reference prompt, and the logits that they were chosen by, float32 [N, V]."""

    tokens: tuple[int, ...]
    logits: FloatArray


@dataclass(frozen=True)
class Deviation:
    """How far an answer is from that of the defaults.

    Attributes:
        same_bits: All logits are equal.
        logits_scaled: As `qwen3vl_export.parity.metrics.Difference.scaled`.
        differing: Tokens of the defaults' that it would not choose, near-ties set aside.
        total: All tokens.
    """

    same_bits: bool
    logits_scaled: float
    differing: int
    total: int

    def refusal(self, effect: Effect, limits: Mapping[str, float]) -> str:
        """Return why a setting with this effect is not taken; empty if nothing speaks against it."""
        if effect is Effect.SAME:
            return "" if self.same_bits else f"logits differ by {self.logits_scaled:.2g}, and have to be equal"
        if self.differing:
            return f"{self.differing} of {self.total} tokens differ"
        limit = limits["logits_scaled"]
        # Written so that what is not a number is refused, too.
        return "" if self.logits_scaled <= limit else f"logits differ by {self.logits_scaled:.2g}, at most {limit:.2g}"

    def __str__(self) -> str:
        """Say it in a few words."""
        return "same bits" if self.same_bits else f"logits within {self.logits_scaled:.1g}"


def deviation(found: Answer, expected: Answer, limits: Mapping[str, float]) -> Deviation:
    """Compare an answer, which was given the defaults' tokens, with that of the defaults."""
    if found.logits.shape != expected.logits.shape or not np.isfinite(found.logits).all():
        return Deviation(False, float("inf"), len(expected.tokens), len(expected.tokens))
    same = agreement(found.logits.argmax(-1), expected.logits, limits["near_tie_gap"])
    return Deviation(
        bool(np.array_equal(found.logits, expected.logits)),
        difference(found.logits, expected.logits).scaled,
        len(same.differing),
        same.total,
    )
