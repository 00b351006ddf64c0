"""Intervals and tests against values worked out elsewhere, and against what they promise."""

import math

import numpy as np
import pytest

from unisono.evaluate.intervals import bootstrap, holm, mcnemar, paired, ratio, wilson


def test_wilson_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (k, n), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson(k, n) == pytest.approx(expected, abs=1e-4)


def test_wilson_covers_as_often_as_it_says() -> None:
    n, share = 60, 0.2
    covered = sum(
        math.comb(n, k) * share**k * (1 - share) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n)[0] <= share <= wilson(k, n)[1]
    )
    assert 0.93 < covered < 0.97


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap([(float(v), 1.0) for v in values])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_a_ratio_weighs_items_by_their_tokens() -> None:
    assert ratio([(1.0, 1.0), (30.0, 10.0)]) == pytest.approx(31 / 11)


def test_paired_sees_a_small_shift_that_separate_intervals_do_not() -> None:
    random = np.random.default_rng(2)
    base = random.normal(0, 10, 200)
    before = [(float(v), 1.0) for v in base]
    after = [(float(v) + 0.5 + float(e), 1.0) for v, e in zip(base, random.normal(0, 1, 200))]
    low, high, p = paired(before, after)
    assert 0.3 < low < 0.5 < high < 0.8
    assert p < 0.001
    assert paired(before, before) == (0.0, 0.0, 1.0)


def test_few_items_are_never_certain() -> None:
    before = [(float(k), 3.0) for k in range(5)]
    after = [(a - 1.0, b) for a, b in before]
    assert paired(before, after)[2] == pytest.approx(2 / 2**5, abs=0.006)


def test_p_is_small_as_seldom_as_it_says() -> None:
    random = np.random.default_rng(3)
    found = []
    for _ in range(100):
        a, b = random.exponential(size=(2, 8))
        found.append(paired([(float(v), 1.0) for v in a], [(float(v), 1.0) for v in b])[2])
    assert np.mean(np.array(found) < 0.1) <= 0.1 + 2 * 0.03


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(700, 500) == pytest.approx(9.2e-9, rel=0.3)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
