"""Ratios of samples and their intervals: by hand, by SciPy, and by how often they are wrong on known samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen3vl_export.bench.shift import (
    Shift,
    Verdict,
    has_interval,
    has_paired_interval,
    null_distribution,
    paired_shift,
    shift,
    signed_rank_distribution,
)

ROUNDS = 4000


def test_by_hand() -> None:
    """All 16 ratios in order: with four on each side, the interval of 95 % is the smallest to the largest."""
    found = shift([1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0])
    assert (found.ratio, found.low, found.high) == pytest.approx((16.0, 2.0, 128.0))
    assert found.verdict is Verdict.SLOWER
    # With five, the third smallest of 25: P(U <= 2) = 4 / 252 is below 2.5 %, P(U <= 3) = 7 / 252 above it.
    earlier, later = [1.0, 1.1, 1.2, 1.3, 1.4], [0.9, 1.05, 1.15, 1.25, 1.7]
    ratios = sorted(b / a for a in earlier for b in later)
    found = shift(earlier, later)
    assert (found.low, found.high) == pytest.approx((ratios[2], ratios[-3]))
    assert found.ratio == pytest.approx(ratios[12]) and found.verdict is Verdict.SAME


def test_the_null_distribution_by_counting() -> None:
    """Of all orders of 3 and 2, how often a later one is below an earlier one."""
    from itertools import combinations

    counted = np.zeros(7)
    for places in combinations(range(5), 2):
        counted[sum(place - index for index, place in enumerate(places))] += 1
    assert null_distribution(3, 2) == pytest.approx(counted / counted.sum())
    assert null_distribution(2, 3) == pytest.approx(counted / counted.sum())
    assert null_distribution(1, 1) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("m", "n"), [(5, 5), (4, 9), (20, 20)])
def test_the_null_distribution_by_scipy(m: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    tail = np.cumsum(null_distribution(m, n))
    for u in (0, 3, m * n // 3, m * n // 2):
        # Samples whose statistic is u: u pairs in which the first is larger.
        whole, rest = divmod(u, n)
        first = np.full(m, -1.0) - np.arange(m)
        first[:whole] = n + 1.0 + np.arange(whole)
        if rest:
            first[whole] = rest - 0.5
        found = stats.mannwhitneyu(first, np.arange(float(n)), alternative="less", method="exact")
        assert found.statistic == u and tail[u] == pytest.approx(found.pvalue)


def test_the_interval_is_that_of_the_test_turned_round() -> None:
    """What SciPy's test just does not reject lies inside, what it rejects outside."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    earlier, later = rng.lognormal(0, 0.1, 7), 1.2 * rng.lognormal(0, 0.1, 6)
    found = shift(earlier, later)
    assert found.low is not None and found.high is not None

    def p(ratio: float) -> float:
        return float(stats.mannwhitneyu(earlier * ratio, later, method="exact").pvalue)

    assert p(found.low * 1.0001) > 0.05 >= p(found.low * 0.9999)
    assert p(found.high * 0.9999) > 0.05 >= p(found.high * 1.0001)


@pytest.mark.parametrize(("m", "n"), [(4, 4), (5, 5), (9, 9), (5, 30), (25, 25)])
def test_how_often_equal_samples_are_called_different(m: int, n: int) -> None:
    """At most in 5 %, and as often as the exact distribution says; the times are skewed, as real ones are."""
    rng = np.random.default_rng([m, n])
    different = sum(
        shift(rng.lognormal(0, 0.3, m), rng.lognormal(0, 0.3, n)).verdict is not Verdict.SAME for _ in range(ROUNDS)
    )
    tail = np.cumsum(null_distribution(m, n)) if m * n <= 400 else None
    level = 0.05 if tail is None else 2 * float(tail[tail <= 0.025][-1])
    deviation = math.sqrt(level * (1 - level) / ROUNDS)
    assert level <= 0.05 and abs(different / ROUNDS - level) < 4 * deviation + (0.002 if tail is None else 0)


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.07])
def test_how_often_the_interval_holds_the_truth(ratio: float) -> None:
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(ROUNDS):
        found = shift(rng.lognormal(0, 0.1, 6), ratio * rng.lognormal(0, 0.1, 6))
        assert found.low is not None and found.high is not None
        held += found.low <= ratio <= found.high
    assert held / ROUNDS > 0.95 - 4 * math.sqrt(0.05 * 0.95 / ROUNDS)


@pytest.mark.parametrize(("ratio", "verdict"), [(1.1, Verdict.SLOWER), (0.9, Verdict.FASTER)])
def test_a_difference_above_the_noise_is_seen(ratio: float, verdict: Verdict) -> None:
    rng = np.random.default_rng(5)
    seen = [shift(rng.lognormal(0, 0.02, 5), ratio * rng.lognormal(0, 0.02, 5)) for _ in range(200)]
    assert sum(each.verdict is verdict for each in seen) >= 198
    assert np.median([each.ratio for each in seen]) == pytest.approx(ratio, rel=0.005)


def test_one_outlier_is_no_difference() -> None:
    assert shift([1.0, 1.01, 0.99, 1.02, 0.98], [1.005, 1.015, 0.995, 0.985, 50.0]).verdict is Verdict.SAME


@pytest.mark.parametrize(
    ("m", "n", "enough"), [(1, 1, False), (3, 3, False), (3, 4, False), (4, 4, True), (2, 9, True)]
)
def test_too_few_repetitions_are_said(m: int, n: int, enough: bool) -> None:
    found = shift(np.arange(1.0, m + 1), 100 * np.arange(1.0, n + 1))
    assert has_interval(m, n) is enough
    assert (found.verdict is Verdict.TOO_FEW, found.low is None) == (not enough, not enough)
    assert found.ratio > 1


def test_the_approximation_joins_the_exact_distribution() -> None:
    """One repetition more than those that are counted out changes an interval by little."""
    rng = np.random.default_rng(2)
    earlier, later = rng.lognormal(0, 0.1, 20), rng.lognormal(0, 0.1, 21)
    exact, approximate = shift(earlier, later[:20]), shift(earlier, later)
    assert exact.low is not None and approximate.low is not None
    assert approximate.low == pytest.approx(exact.low, rel=0.02)
    assert approximate.ratio == pytest.approx(exact.ratio, rel=0.02)


def test_verdicts_at_the_edge() -> None:
    assert Shift(1.1, 1.0, 1.2).verdict is Verdict.SAME
    assert Shift(1.1, 1.0001, 1.2).verdict is Verdict.SLOWER
    assert Shift(0.9, 0.8, 1.0).verdict is Verdict.SAME
    assert Shift(0.9, 0.8, 0.9999).verdict is Verdict.FASTER


def test_paired_by_hand() -> None:
    """Of six rounds the interval is the smallest to the largest ratio, since P(T = 0) = 1 / 64 is below 2.5 %."""
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    found = paired_shift(baseline, [2.0, 8.0, 8.0, 32.0, 32.0, 256.0])
    assert (found.low, found.high) == pytest.approx((2.0, 8.0)) and found.verdict is Verdict.SLOWER
    # Logarithms 1, 2, 1, 2, 1, 3: of their 21 means, 13 are 1.5 or less, 6 of them 1.
    assert found.ratio == pytest.approx(2**1.5)
    assert paired_shift(baseline[:5], baseline[1:]).verdict is Verdict.TOO_FEW
    assert has_paired_interval(6) and not has_paired_interval(5)


@pytest.mark.parametrize("n", [1, 6, 12, 50])
def test_the_signed_rank_distribution_by_scipy(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    tail = np.cumsum(signed_rank_distribution(n))
    assert tail[-1] == pytest.approx(1)
    for t in {0, min(3, n), n * (n + 1) // 4}:
        # Differences 1 to n, those of some ranks that add up to t above 0.
        signs, left = np.full(n, -1.0), t
        for rank in range(n, 0, -1):
            if rank <= left:
                signs[rank - 1], left = 1.0, left - rank
        found = stats.wilcoxon(signs * np.arange(1, n + 1), alternative="less", method="exact")
        assert left == 0 and found.statistic == t and tail[t] == pytest.approx(found.pvalue)


@pytest.mark.parametrize("n", [6, 9, 20])
def test_how_often_equal_engines_are_called_different_in_busy_rounds(n: int) -> None:
    """A minute that makes everything three times as slow falls on both, and the verdict is wrong no more often."""
    rng = np.random.default_rng(n)
    different = 0
    for _ in range(ROUNDS):
        busy = np.where(rng.random(n) < 0.4, 3.0, 1.0)
        different += (
            paired_shift(busy * rng.lognormal(0, 0.05, n), busy * rng.lognormal(0, 0.05, n)).verdict is not Verdict.SAME
        )
    tail = np.cumsum(signed_rank_distribution(n))
    level = 2 * float(tail[tail <= 0.025][-1])
    assert level <= 0.05 and abs(different / ROUNDS - level) < 4 * math.sqrt(level * (1 - level) / ROUNDS)


def test_turns_see_what_busy_minutes_hide() -> None:
    """A difference of 10 % under a load that changes times threefold: the pairs show it, whole samples do not."""
    rng = np.random.default_rng(1)
    seen = {"paired": 0, "whole": 0}
    for _ in range(200):
        busy = rng.uniform(1.0, 3.0, 9)
        before, after = busy * rng.lognormal(0, 0.02, 9), 1.1 * busy * rng.lognormal(0, 0.02, 9)
        seen["paired"] += paired_shift(before, after).verdict is Verdict.SLOWER
        seen["whole"] += shift(before, after).verdict is Verdict.SLOWER
    assert seen["paired"] >= 198 and seen["whole"] < 20


def test_many_rounds_are_approximated() -> None:
    rng = np.random.default_rng(4)
    before, after = rng.lognormal(0, 0.1, 51), 1.05 * rng.lognormal(0, 0.1, 51)
    exact, approximate = paired_shift(before[:50], after[:50]), paired_shift(before, after)
    assert exact.low is not None and approximate.low is not None
    assert approximate.low == pytest.approx(exact.low, rel=0.01)
