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
_EXACT_PAIRS, _EXACT_ROUNDS = 400, 50
"""Up to so many the null distributions are counted out; their counts are whole numbers of 64 bits there."""


class Verdict(StrEnum):
    """What a comparison shows."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no difference seen"
    TOO_FEW = "too few repetitions"


@dataclass(frozen=True)
class Shift:
    """By what factor times are longer than those that they are compared with.

    Attributes:
        ratio: Above 1 is slower.
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
    logs = np.subtract.outer(np.log(later), np.log(earlier)).ravel()
    return _shift_of(logs, _rank(len(earlier), len(later), 1 - confidence))


def paired_shift(baseline: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE) -> Shift:
    """Return the factor between two engines that took turns, and its interval.

    What slows a round down slows both engines down, so that only the ratio within each round counts. The factor is the
    Hodges-Lehmann estimate on logarithms: the median of the means of all pairs of ratios, each with itself included
    (Walsh averages). Its interval is that of Wilcoxon's signed-rank test turned round (Tukey): Hollander, Wolfe and
    Chicken (2014), sections 3.2 and 3.3; exact up to 50 rounds, then by the normal approximation. It assumes that
    rounds are independent, and the logarithms of their ratios symmetric; with 95 %, five rounds are too few.

    Args:
        baseline: Times above 0, by round.
        other: Those of the other engine in the same rounds.
        confidence: Of the interval.
    """
    logs = np.log(other) - np.log(baseline)
    first, second = np.triu_indices(len(logs))
    return _shift_of((logs[first] + logs[second]) / 2, _signed_rank(len(logs), 1 - confidence))


def _shift_of(logs: NDArray[np.float64], k: int) -> Shift:
    """Return the median of logarithms as a factor, and the k-th smallest and largest as the ends of its interval."""
    logs = np.sort(logs)
    ends = (None, None) if k < 1 else (float(np.exp(logs[k - 1])), float(np.exp(logs[-k])))
    return Shift(float(np.exp(np.median(logs))), *ends)


def has_interval(num_earlier: int, num_later: int, confidence: float = CONFIDENCE) -> bool:
    """Whether there are repetitions enough for an interval."""
    return _rank(num_earlier, num_later, 1 - confidence) > 0


def has_paired_interval(num_rounds: int, confidence: float = CONFIDENCE) -> bool:
    """Whether there are rounds enough for an interval."""
    return _signed_rank(num_rounds, 1 - confidence) > 0


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
    return counts / float(math.comb(m + n, m))


def signed_rank_distribution(n: int) -> NDArray[np.float64]:
    """Return the probability of each value of Wilcoxon's signed-rank statistic where nothing differs.

    There are n (n + 1) / 2 + 1. The counts are the coefficients of the product of 1 + q^i, i = 1 to n (Wilcoxon, 1945).
    """
    counts = np.zeros(n * (n + 1) // 2 + 1, np.int64)
    counts[0] = 1
    for i in range(1, n + 1):
        counts[i:] += counts[:-i].copy()
    return counts / float(2**n)


def _rank(m: int, n: int, alpha: float) -> int:
    """Return which of the ordered ratios of all pairs, counted from 1, ends the interval; 0 if none does."""
    if m * n <= _EXACT_PAIRS:
        return _below(null_distribution(m, n), alpha)
    return _approximated(m * n / 2, m * n * (m + n + 1) / 12, alpha)


def _signed_rank(n: int, alpha: float) -> int:
    """Return which of the ordered Walsh averages, counted from 1, ends the interval; 0 if none does."""
    if n <= _EXACT_ROUNDS:
        return _below(signed_rank_distribution(n), alpha)
    return _approximated(n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24, alpha)


def _below(distribution: NDArray[np.float64], alpha: float) -> int:
    """Return how many of the smallest values have at most half of alpha together."""
    return int(np.searchsorted(np.cumsum(distribution), alpha / 2 * (1 + 1e-12), side="right"))


def _approximated(mean: float, variance: float, alpha: float) -> int:
    return math.floor(mean - NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(variance))
