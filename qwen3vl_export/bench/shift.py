"""By what factor two samples of times differ, with an interval, without an assumption on their distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_EXACT_PAIRS = 400
"""Up to so many pairs the null distribution is counted out; its counts are whole numbers of 64 bits there."""


class Verdict(StrEnum):
    """What a comparison shows."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no difference seen"
    TOO_FEW = "too few repetitions"


@dataclass(frozen=True)
class Shift:
    """By what factor times became longer.

    Attributes:
        ratio: Later over earlier; above 1 is slower.
        low: Lower end of the interval of `CONFIDENCE`; None if there are too few repetitions for one, as the next.
        high: Upper end.
    """

    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """Whether the interval leaves 1 out."""
        if self.low is None or self.high is None:
            return Verdict.TOO_FEW
        if self.low > 1:
            return Verdict.SLOWER
        return Verdict.FASTER if self.high < 1 else Verdict.SAME


def shift(earlier: Sequence[float], later: Sequence[float], confidence: float = CONFIDENCE) -> Shift:
    """Return the factor between two samples, and its interval.

    The factor is the Hodges-Lehmann estimate on logarithms: the median of the ratios of all pairs. Its interval is that
    of the Mann-Whitney test turned round (Moses): those factors that the test does not reject, which are the k-th
    smallest to the k-th largest ratio. Both are of Hollander, Wolfe and Chicken, Nonparametric Statistical Methods,
    3rd edition (2014), sections 4.2 and 4.3. k comes from the exact distribution, or from its normal approximation
    for more than 400 pairs. It assumes that repetitions are independent, and that both samples
    have one shape on a scale of logarithms; with 95 %, three repetitions on each side are too few for an interval.

    Args:
        earlier: Times above 0.
        later: The same.
        confidence: Of the interval.
    """
    ratios = np.sort(np.subtract.outer(np.log(later), np.log(earlier)).ravel())
    k = _rank(len(earlier), len(later), 1 - confidence)
    ends = (None, None) if k < 1 else (float(np.exp(ratios[k - 1])), float(np.exp(ratios[-k])))
    return Shift(float(np.exp(np.median(ratios))), *ends)


def has_interval(num_earlier: int, num_later: int, confidence: float = CONFIDENCE) -> bool:
    """Whether there are repetitions enough for an interval."""
    return _rank(num_earlier, num_later, 1 - confidence) > 0


def null_distribution(m: int, n: int) -> NDArray[np.float64]:
    """Return the probability of each value of the Mann-Whitney statistic where samples do not differ, [m n + 1].

    The counts are the coefficients of the Gaussian binomial coefficient of m + n over m (Mann and Whitney, 1947).
    """
    counts = np.zeros(m * n + 1, np.int64)
    counts[0] = 1
    for i in range(1, m + 1):
        if n + i <= m * n:  # times 1 - q^(n + i)
            counts[n + i :] -= counts[: -(n + i)].copy()
        for j in range(i):  # over 1 - q^i
            counts[j::i] = np.cumsum(counts[j::i])
    return counts / math.comb(m + n, m)


def _rank(m: int, n: int, alpha: float) -> int:
    """Return which of the ordered ratios of all pairs, counted from 1, ends the interval; 0 if none does."""
    if m * n <= _EXACT_PAIRS:
        below = np.cumsum(null_distribution(m, n))
        return int(np.searchsorted(below, alpha / 2 * (1 + 1e-12), side="right"))
    z = NormalDist().inv_cdf(1 - alpha / 2)
    return math.floor(m * n / 2 - z * math.sqrt(m * n * (m + n + 1) / 12))
