"""Unbiased where the covariance is known, honest about its error, and cheap."""

import math

import numpy as np
import pytest

from unisono.observe import noise
from unisono.observe.noise import Averages, Meter, estimate

DIM = 300
SPREAD = np.linspace(0.1, 2.0, DIM) ** 2
"""Eigenvalues of Sigma: per token, not isotropic."""
MEAN = np.where(np.arange(DIM) % 3 == 0, 0.02, -0.01)
TRACE, SQUARE = float(SPREAD.sum()), float((MEAN**2).sum())
NOISE_SCALE = TRACE / SQUARE


def parts_of(generator: np.random.Generator, sizes: list[int]) -> list[np.ndarray]:
    """Sums of so many gradients, normal with MEAN and SPREAD."""
    return [
        n * MEAN + np.sqrt(n * SPREAD) * generator.standard_normal(DIM) if n else np.zeros(DIM)
        for n in sizes
    ]


def uneven(generator: np.random.Generator, parts: int) -> list[int]:
    return [int(n) for n in generator.integers(200, 6000, parts)]


def by_ranks(generator: np.random.Generator) -> tuple[float, float, float]:
    """All parts of an uneven batch, one of which is empty now and then: (trace, mean, tokens)."""
    sizes = uneven(generator, 4)
    if generator.random() < 0.2:
        sizes[1] = 0
    sums = parts_of(generator, sizes)
    kept = [(float(x @ x), n) for x, n in zip(sums, sizes, strict=True) if n]
    whole, total = sum(sums), sum(sizes)
    q, s = sum(square / n for square, n in kept), float(whole @ whole) / total
    return *estimate(q, total, len(kept), s, total), total


def by_halves(generator: np.random.Generator) -> tuple[float, float, float]:
    """The first part of an uneven batch against all of it."""
    sizes = uneven(generator, 2)
    first, second = parts_of(generator, sizes)
    whole, total = first + second, sum(sizes)
    q, s = float(first @ first) / sizes[0], float(whole @ whole) / total
    return *estimate(q, sizes[0], 1, s, total), total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("one_step", [by_ranks, by_halves])
def test_unbiased_within_three_percent(one_step, seed: int) -> None:
    generator = np.random.default_rng(seed)
    found = np.array([one_step(generator) for _ in range(20_000)])
    trace, square, _ = found.mean(axis=0)
    assert trace == pytest.approx(TRACE, rel=0.03)
    assert square == pytest.approx(SQUARE, rel=0.03)
    assert trace / square == pytest.approx(NOISE_SCALE, rel=0.03)


def test_two_sizes_are_the_paper_s() -> None:
    """McCandlish et al. 2018, appendix A.1: from |G|^2 at two batch sizes, here as means."""
    small, big, g_small, g_big = 64, 512, 0.31, 0.17
    mean = (big * g_big - small * g_small) / (big - small)
    trace = (g_small - g_big) / (1 / small - 1 / big)
    found = estimate(g_small * small, small, 1, g_big * big, big)
    assert found == pytest.approx((trace, mean))
    # Eight ranks of the small size instead of one.
    assert estimate(8 * g_small * small, big, 8, g_big * big, big) == pytest.approx((trace, mean))


def test_what_tells_nothing_is_none() -> None:
    assert estimate(0, 0, 0, 3.0, 100) is None
    assert estimate(3.0, 100, 1, 3.0, 100) is None, "one part that is all of the batch"


@pytest.mark.parametrize("one_step", [by_ranks, by_halves])
def test_the_interval_holds_the_truth_nineteen_times_of_twenty(one_step) -> None:
    held = 0
    for seed in range(200):
        generator, averages = np.random.default_rng(1000 + seed), Averages()
        for _ in range(150):
            averages.add(*one_step(generator))
        scale = averages.scale()
        assert scale.low <= scale.tokens <= scale.high
        held += scale.low <= NOISE_SCALE <= scale.high
    assert 0.91 * 200 <= held <= 0.985 * 200


def test_the_past_is_forgotten() -> None:
    averages = Averages()
    for k in range(900):
        averages.add(100.0 + k % 2, 1.0 if k < 300 else 0.1, 64)
    scale = averages.scale()
    assert scale.tokens == pytest.approx(1005, rel=0.03)
    assert scale.low < 1005 < scale.high < 1.1 * 1005
    assert scale.batch == 64 and scale.share == pytest.approx(64 / 1005, rel=0.03)


def test_no_mean_above_the_noise_has_no_upper_bound() -> None:
    generator, averages = np.random.default_rng(1), Averages()
    for _ in range(100):
        averages.add(100.0, float(generator.normal(0.0, 1.0)), 64)
    scale = averages.scale()
    assert scale.high == math.inf
    assert 100 < scale.low < math.inf


def test_too_few_estimates_say_nothing() -> None:
    averages = Averages()
    for _ in range(noise.ENOUGH - 1):
        averages.add(1.0, 1.0, 1.0)
        assert averages.scale() is None


# --- the meter


def step(meters: list[Meter], spent_s: list[float], norm: float = 2.0, squares=None) -> bool:
    """One step on all ranks; returns whether it was measured."""
    due = [m.due() for m in meters]
    assert len(set(due)) == 1
    sums = [sum(values) for values in zip(*(m.told() for m in meters), strict=True)]
    assert len(sums) == Meter.TOLD
    for meter, spent in zip(meters, spent_s, strict=True):
        meter.hear(sums)
        meter.keep(
            [900.0 if squares is None else squares], [100], spent if due[0] else 0.0, norm, 200
        )
    return due[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second between any two looks: two ranks make a step of 200 ms."""
    now = iter(k / 10 for k in range(1, 100_000))
    monkeypatch.setattr(noise.time, "perf_counter", lambda: next(now))


def test_it_measures_as_often_as_the_budget_allows(clock) -> None:
    meters = [Meter(budget=0.001), Meter(budget=0.001)]
    measured = [step(meters, [0.0008, 0.0022]) for _ in range(200)]
    assert measured[:3] == [False, False, True]
    # 1.5 ms of 200 ms on the mean is 0.75%: every eighth step.
    assert [m.every for m in meters] == [8, 8]
    assert sum(measured[100:]) in (12, 13)


def test_free_norms_are_taken_in_every_step(clock) -> None:
    meters = [Meter(), Meter()]
    assert sum(step(meters, [0.0001, 0.0001]) for _ in range(50)) == 48
    assert meters[0].every == 1
    assert meters[0].scale() == meters[1].scale()


def test_a_skipped_step_is_not_kept() -> None:
    meters = [Meter(), Meter()]
    for _ in range(30):
        step(meters, [0.0, 0.0], norm=math.nan)
    assert meters[0].scale() is None


def test_a_rank_without_gradients_or_tokens_hears_as_the_others_do() -> None:
    meters = [Meter(budget=math.inf), Meter(budget=math.inf)]
    for _ in range(30):
        for m in meters:
            m.due()
        sums = [sum(v) for v in zip(*(m.told() for m in meters), strict=True)]
        for m in meters:
            m.hear(sums)
        meters[0].keep([900.0], [100], 0.0, 0.1, 100)
        meters[1].keep([], [0], 0.0, 0.1, 100)
    assert meters[0].scale() is None and meters[1].scale() is None  # one part that is everything
    assert [m.every for m in meters] == [1, 1]
