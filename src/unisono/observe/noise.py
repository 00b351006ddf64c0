"""The gradient noise scale: how large a batch is worth its tokens, from norms that exist anyway.

A target token's gradient has mean mu and covariance Sigma. The noise scale B = tr(Sigma) / |mu|^2, in
target tokens, is the batch at which noise and signal are equal: a batch of x B needs 1 + 1/x of the
fewest steps and 1 + x of the fewest tokens (McCandlish et al. 2018, arXiv 1812.06162).

Estimate. S is the sum of N gradients, S_i that of the n_i among them that are part i. As
E |S_i|^2 = n_i^2 |mu|^2 + n_i tr(Sigma), and alike for S, with

    q = sum of |S_i|^2 / n_i,   m = sum of n_i,   c = number of parts,   s = |S|^2 / N

both of these are unbiased, whatever the n_i (appendix A there has c parts of one size):

    |mu|^2 = (c s - q) / (c N - m)          tr(Sigma) = s - N |mu|^2

Where the parts are all of the batch, m = N, it is the analysis of variance: tr(Sigma) = (q - s) / (c - 1),
of least variance for normal gradients. Parts that are less, such as the half of a replica that is alone,
need no other formula. A part without tokens is none.

Single estimates may be negative, so the two are averaged separately, over steps, with exponentially
falling weights that sum to one, and divided at the end. The interval is Fieller's (1954): all B for
which the mean of tr(Sigma) - B |mu|^2 is within two of its standard errors of zero. Steps are taken as
independent. Tokens of one sequence are not, which makes B larger for longer sequences.

Cost: what `Parts` costs (sync/parts.py), in every k-th step. k keeps it below BUDGET of the time. What
ranks must tell each other travels with the vote of the step that follows; k comes from those sums too,
so all ranks measure the same steps.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

BUDGET = 0.001
"""Of the time."""
WINDOW_STEPS = 100
"""About so many steps count in an average,"""
LEAST_SAMPLES = 25
"""or so many estimates, however rarely one is made,"""
MOST_SHARE = 1 / 3
"""but no more than this share of all: early gradients are large, and change most."""
WARM_STEPS = 2
"""Not measured: buckets are laid out, caches fill."""
MOST_APART = 256
ENOUGH = 10
"""Estimates before anything is said."""
ERRORS = 2.0
"""Standard errors in an interval: 95%."""


@dataclass(frozen=True)
class NoiseScale:
    """Target tokens. `tokens` and `high` are infinite where no mean gradient shows above the noise."""

    tokens: float
    low: float
    high: float
    batch: float
    """The batches it was measured on, in the same unit."""
    samples: int
    """Estimates so far."""

    @property
    def share(self) -> float:
        """The batch over the noise scale."""
        return self.batch / self.tokens if self.tokens else math.inf


def estimate(q: float, m: float, c: float, s: float, total: float) -> tuple[float, float] | None:
    """(tr(Sigma), |mu|^2) of one step, symbols as above, `total` N; None where parts tell nothing."""
    if c * total <= m:  # no part, or one that is everything
        return None
    mean = (c * s - q) / (c * total - m)
    return s - total * mean, mean


class Averages:
    """Weighted means of the estimates, and how far they may be off."""

    def __init__(self) -> None:
        self.samples = 0
        self._weight = self._weight_squares = 0.0
        self._sums = [0.0] * 6

    def add(self, trace: float, mean: float, batch: float, every: int = 1) -> None:
        """An estimate. `every`: of how many steps it is the only one."""
        self.samples += 1
        window = max(WINDOW_STEPS / every, LEAST_SAMPLES)
        decay = 1 - 1 / max(1.0, min(window, MOST_SHARE * self.samples))
        self._weight = decay * self._weight + 1
        self._weight_squares = decay * decay * self._weight_squares + 1
        new = (trace, mean, trace * trace, trace * mean, mean * mean, batch)
        self._sums = [decay * old + x for old, x in zip(self._sums, new, strict=True)]

    def scale(self) -> NoiseScale | None:
        """None before there are enough estimates."""
        if self.samples < ENOUGH:
            return None
        x, y, xx, xy, yy, batch = (value / self._weight for value in self._sums)
        effective = self._weight**2 / self._weight_squares
        k = ERRORS**2 / (effective - 1)
        # B is inside where (x - B y)^2 <= k (variance of trace - B mean): a B^2 - 2 b B + c <= 0.
        a, b, c = y * y - k * (yy - y * y), x * y - k * (xy - x * y), x * x - k * (xx - x * x)
        root = b * b - a * c
        low, high = 0.0, math.inf
        if root >= 0 and a:
            low = max(0.0, (b - math.sqrt(root)) / a) if c > 0 else 0.0
            high = (b + math.sqrt(root)) / a if a > 0 and y > 0 else math.inf
        return NoiseScale(
            max(0.0, x) / y if y > 0 else math.inf, low, max(0.0, high), batch, self.samples
        )


@dataclass(frozen=True)
class Share:
    """One rank's part of a measured step."""

    q: float = 0.0
    m: float = 0.0
    c: float = 0.0
    spent_s: float = 0.0
    step_s: float = 0.0


class Meter:
    """Which steps are measured, and what came of it. Every rank makes the same calls in each step:
    `due`, then `keep` with what it measured; and before or after, but alike, `told`, `hear`.
    """

    TOLD = 5
    """Values that `told` returns."""

    def __init__(self, budget: float = BUDGET) -> None:
        self._budget = budget
        self.every = 1
        """Steps from one measured step to the next."""
        self._left = WARM_STEPS + 1
        self._averages = Averages()
        self._measured = False
        self._share: Share | None = None
        self._s = self._total = 0.0
        self._spent_s = self._seconds = 0.0
        self._steps, self._began = 0, 0.0

    def due(self) -> bool:
        """Whether the step that begins is measured."""
        now = time.perf_counter()
        if self._began:
            self._steps, self._seconds = self._steps + 1, self._seconds + now - self._began
        self._began = now
        self._left -= 1
        self._measured = self._left <= 0
        if self._measured:
            self._left = self.every
        return self._measured

    def keep(
        self, squares: Sequence[float], sizes: Sequence[float], spent_s: float, norm: float, total: float
    ) -> None:  # fmt: skip
        """This rank's parts of the step, if it is measured; `norm` of the mean over `total` tokens.

        Nothing is kept of a step that was skipped, whose norm is not finite.
        """
        parts = [(square, n) for square, n in zip(squares, sizes, strict=False) if n]
        self._share = None
        # Only what all ranks know decides, so that all of them hear.
        if self._measured and total and math.isfinite(norm):
            self._share = Share(
                sum(square / n for square, n in parts),
                sum(n for _, n in parts),
                len(parts),
                spent_s,
                self._seconds / max(1, self._steps),
            )
            self._s, self._total = norm * norm * total, total

    def told(self) -> tuple[float, ...]:
        """What is to be summed over ranks."""
        share = self._share or Share()
        return share.q, share.m, share.c, share.spent_s, share.step_s

    def hear(self, sums: Sequence[float]) -> None:
        """The sums over ranks of what all told."""
        if self._share is None:
            return
        self._share = None
        q, m, c, spent_s, step_s = sums
        found = estimate(q, m, c, self._s, self._total)
        if found is None or not math.isfinite(found[0]):
            return
        self._averages.add(*found, self._total, self.every)
        # The mean over all measured steps: a single one may have been interrupted.
        self._spent_s += spent_s
        if step_s:
            mean_s = self._spent_s / self._averages.samples
            self.every = min(MOST_APART, max(1, math.ceil(mean_s / (self._budget * step_s))))

    def scale(self) -> NoiseScale | None:
        """The noise scale now, the same on all ranks; None before enough steps were measured."""
        return self._averages.scale()
