"""Intervals and tests for figures over items: Wilson, bootstrap, McNemar, Holm. Seeds are fixed.

Every item gives one or more pairs (numerator, denominator); a figure is the sum of numerators over
the sum of denominators. A share of items has denominator 1 and numerator 0 or 1; a mean has
denominator 1; a loss per token has a window's nats over its tokens. Items are what is resampled: they
are taken as independent of each other, which windows of one text are only roughly.

Cost: RESAMPLES x items random numbers for each figure that is no share.
"""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 20260601
_CHUNK = 1 << 21
"""Indices that are drawn at a time: 16 MiB."""

Pair = tuple[float, float]


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927): it stays within 0 and 1, at 0 of 10 too."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, z * z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == count else min(1.0, centre + half)
    return low, high


def ratio(pairs: Sequence[Pair]) -> float:
    """Sum of numerators over sum of denominators; NaN without any."""
    below = math.fsum(p[1] for p in pairs)
    return math.fsum(p[0] for p in pairs) / below if below else math.nan


def bootstrap(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The 95% percentile interval of `ratio` over resampled items (Efron 1979)."""
    if len(pairs) < 2:
        return -math.inf, math.inf
    found = np.sort(_resampled(np.asarray(pairs, dtype=np.float64)[None])[0])
    return _between(found)


def paired(before: Sequence[Pair], after: Sequence[Pair]) -> tuple[float, float, float]:
    """after - before on the same items: the 95% interval, and the two-sided p of no difference.

    The interval is a bootstrap that draws the same items for both. p is of a permutation test (Fisher
    1935): how often a difference at least as large comes of swapping before and after in items by fair
    coins, counting one more (so never 0). It holds for few items too, where a bootstrap's would not: n
    items that all move one way have p near 2 / 2^n. Without two items, or any difference, p is 1.
    """
    if len(before) != len(after):
        raise ValueError(f"paired: {len(before)} items before, {len(after)} after")
    if len(before) < 2:
        return -math.inf, math.inf, 1.0
    both = np.asarray([before, after], dtype=np.float64)
    if np.array_equal(both[0], both[1]):
        return 0.0, 0.0, 1.0
    first, second = _resampled(both)
    low, high = _between(np.sort(second - first))
    return low, high, _permuted(both)


def _permuted(both: np.ndarray) -> float:
    """p of pairs [2, items, 2]."""
    change, sums = both[1] - both[0], both.sum(axis=1)
    random = np.random.default_rng(SEED)
    seen = abs(sums[1, 0] / sums[1, 1] - sums[0, 0] / sums[0, 1])
    as_large = 0
    rows = max(1, _CHUNK // len(change))
    for start in range(0, RESAMPLES, rows):
        swapped = random.integers(0, 2, (min(rows, RESAMPLES - start), len(change))) @ change
        first, second = sums[0] + swapped, sums[1] - swapped
        found = np.abs(second[:, 0] / second[:, 1] - first[:, 0] / first[:, 1])
        as_large += int((found >= seen * (1 - 1e-9)).sum())
    return (as_large + 1) / (RESAMPLES + 1)


def mcnemar(only_before: int, only_after: int) -> float:
    """The exact two-sided p that items which changed went either way by a fair coin (McNemar 1947)."""
    changed = only_before + only_after
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(only_before, only_after) + 1))
    return min(1.0, float(2 * tail / 2**changed) if changed < 1000 else _normal_mcnemar(only_before, only_after))  # fmt: skip


def _normal_mcnemar(only_before: int, only_after: int) -> float:
    z = (abs(only_before - only_after) - 1) / math.sqrt(only_before + only_after)
    return math.erfc(max(0.0, z) / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p, adjusted so that all together keep the error rate (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, least = [1.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = least
    return adjusted


def _between(found: np.ndarray) -> tuple[float, float]:
    finite = found[np.isfinite(found)]
    if not len(finite):
        return -math.inf, math.inf
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _resampled(pairs: np.ndarray) -> np.ndarray:
    """[figures, RESAMPLES] of pairs [figures, items, 2]; all figures get the same draws."""
    items = pairs.shape[1]
    random = np.random.default_rng(SEED)
    found = []
    rows = max(1, _CHUNK // items)
    for first in range(0, RESAMPLES, rows):
        drawn = random.integers(0, items, (min(rows, RESAMPLES - first), items))
        sums = pairs[:, drawn].sum(axis=2)  # [figures, resamples, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(sums[..., 0] / sums[..., 1])
    return np.concatenate(found, axis=1)
