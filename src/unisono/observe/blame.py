"""Who slows a run down, and what it costs: named in one line, once it is sure.

Every step's vote tells what every rank did until it arrived (observe/arrival.py). Over a window of steps
and for each cause, the cost is what the ranks together would gain if the one that is last in it were like
the others: at most until the next rank is the last one. A cause is

- slow rank: computes longer for the same work than the lower median of the ranks
- slow loader: reads its batches longer
- uneven load: was given more work (longer sequences, more rows), which is counted and not timed
- slow link: named by sync/pairs.py, asked when communication that nothing hides costs enough

Noise: medians over the steps of a window (for reading, which comes in bursts, a mean without the longest
tenth), a cost of at least COST of a step, and the same verdict in WINDOWS windows in a row. Steps with a
checkpoint or an evaluation before them do not count. All ranks compute this from the same numbers and
come to the same result, so that what follows from it may be collective.

A loss or gradient norm that jumps is flagged against the median of the steps before, in units of
their own spread.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import mean, median, median_low
from typing import Literal

from unisono.observe.arrival import Period, seconds_of_load, split
from unisono.sync.pairs import SlowLink

Kind = Literal["slow rank", "slow loader", "uneven load", "slow link"]
WARM_STEPS = 5
WINDOW_STEPS, WINDOW_S = 12, 1.0
"""A window has at least so many steps, and lasts at least so long."""
MOST_STEPS = 32
"""Of a window that are looked at; of more, every so-maniest."""
WINDOWS = 3
COST = {"slow rank": 0.05, "slow loader": 0.04, "uneven load": 0.03, "slow link": 0.05}
"""Shares of a step."""
MOST_OFTEN = 0.6
"""Of the steps one rank must have the most work to be named for it."""
CHECK_FIRST_S, CHECK_LONGEST_S = 30.0, 600.0
"""Between two looks at the links that found nothing, doubling."""


@dataclass(frozen=True)
class Blame:
    """What slows all ranks down."""

    kind: Kind
    rank: int | None
    """None: no single one."""
    cost: float
    """Share of a step that all ranks lose by it."""
    detail: str
    step: int = 0
    """When it was first said, 0 if only at the end."""

    @property
    def gain(self) -> float:
        """Throughput without it, over throughput, minus 1."""
        cost = min(self.cost, 0.99)
        return cost / (1 - cost)

    def line(self, place: str = "") -> str:
        who = "every rank" if self.rank is None else f"rank {self.rank}{place}"
        if self.kind == "uneven load" and self.rank is None:
            who = "a different rank each step"
        return f"{self.kind}: {who} {self.detail}; costs {self.cost:.0%} of the step"


def judge(window: Sequence[Sequence[Period]]) -> Blame | None:
    """The costliest cause in these steps (by step, by rank), where it costs enough."""
    steps = [ps for ps in window if not any(p.checkpoint or p.evaluation for p in ps)]
    steps = steps[:: -(-len(steps) // MOST_STEPS) or 1]
    if len(steps) < WINDOW_STEPS // 2:
        return None
    step_s = median(max(p.step for p in ps) for ps in steps)
    found = [b for b in (_slow(steps, step_s), _loader(steps, step_s), _load(steps, step_s)) if b]
    found = [b for b in found if b.cost >= COST[b.kind]]
    return max(found, key=lambda b: b.cost, default=None)


def _slow(steps: Sequence[Sequence[Period]], step_s: float) -> Blame | None:
    """Who computes longest for its work."""
    own = [
        [_own(p) - load for p, load in zip(ps, seconds_of_load(ps), strict=True)] for ps in steps
    ]
    rank, cost_s = _last([[p.busy for p in ps] for ps in steps], own, median)
    if rank is None:
        return None
    rates = [
        [_own(p) / (load or 1.0) for p, load in zip(ps, seconds_of_load(ps), strict=True)]
        for ps in steps
    ]
    slower = median(
        row[rank] / max(median_low(v for k, v in enumerate(row) if k != rank), 1e-30)
        for row in rates
    )
    detail = f"computes {slower - 1:.0%} longer for the same work"
    return Blame("slow rank", rank, cost_s / step_s, detail)


def _own(p: Period) -> float:
    """What a rank computes: what it waits for or reads does not count."""
    return p.compute + p.recomputation + p.generation + p.packing + p.optimizer


def _loader(steps: Sequence[Sequence[Period]], step_s: float) -> Blame | None:
    """Who reads longest; or that all do."""
    least = _without_longest([min(p.data for p in ps) for ps in steps])
    if least >= COST["slow loader"] * step_s:
        detail = f"reads batches for {1e3 * least:.1f} ms of a step of {1e3 * step_s:.1f} ms"
        return Blame("slow loader", None, least / step_s, detail)
    if len(steps[0]) < 2:
        return None
    data = [[p.data for p in ps] for ps in steps]
    rank, cost_s = _last([[p.busy for p in ps] for ps in steps], data, _without_longest)
    if rank is None:
        return None
    mine = _without_longest([ps[rank].data for ps in steps])
    detail = f"reads its batches for {1e3 * mine:.1f} ms of a step of {1e3 * step_s:.1f} ms"
    return Blame("slow loader", rank, cost_s / step_s, detail)


def _load(steps: Sequence[Sequence[Period]], step_s: float) -> Blame | None:
    """Who was given most; the work is counted, only its seconds are measured."""
    if len(steps[0]) < 2:
        return None
    loads = [seconds_of_load(ps) for ps in steps]
    heaviest = [max(range(len(row)), key=row.__getitem__) for row in loads]
    over = [max(row) / (sum(row) or 1.0) * len(row) for row in loads]
    waited = mean(max(load for _, load, _ in split(ps)) for ps in steps)
    level = median(max(row) - mean(row) for row in loads)
    cost = min(waited, level) / step_s
    rank = max(set(heaviest), key=heaviest.count)
    detail = f"was given {median(over) - 1:.0%} more than the mean (longer sequences or more rows)"
    often = heaviest.count(rank) >= MOST_OFTEN * len(steps)
    return Blame("uneven load", rank if often else None, cost, detail)


def _last(
    busy: Sequence[Sequence[float]],
    part: Sequence[Sequence[float]],
    middle: Callable[[Sequence[float]], float],
) -> tuple[int | None, float]:
    """Who exceeds the others in `part`, and the seconds of a step that all would gain otherwise.

    It would gain the excess, but only until somebody else is the last one.
    """
    ranks = range(len(busy[0]))
    if len(ranks) < 2:
        return None, 0.0
    rank = max(ranks, key=lambda r: middle([row[r] for row in part]))
    gains = []
    for total, row in zip(busy, part, strict=True):
        excess = row[rank] - median_low(v for k, v in enumerate(row) if k != rank)
        gains.append(min(excess, total[rank] - max(v for k, v in enumerate(total) if k != rank)))
    return rank, middle(gains)


def _without_longest(values: Sequence[float]) -> float:
    return mean(sorted(values)[: len(values) - len(values) // 10 or None])


# --- windows of a run


@dataclass
class Suspects:
    """Follows a run. The same on every rank."""

    bytes_per_step: float = 0.0
    """That each rank sends."""
    said: list[Blame] = field(default_factory=list)
    look_at_links: bool = False
    """What nothing hides has cost enough since the last look, or the last one has found something."""
    seconds: float = 0.0
    """Of steps so far, alike on all ranks."""
    _steps: int = 0
    _window: list[Sequence[Period]] = field(default_factory=list)
    _lasted_s: float = 0.0
    _found: list[Blame | None] = field(default_factory=list)
    _links: list[Blame | None] = field(default_factory=list)
    _exposed: tuple[float, float] = (0.0, 0.0)
    """Seconds of a step, and the step's."""
    _next_look_s: float = 0.0
    _pause_s: float = CHECK_FIRST_S

    def add(self, periods: Sequence[Period], step: int) -> Blame | None:
        """Count a step; what has just become sure."""
        step_s = max(p.step for p in periods)
        self._steps += step_s > 0
        if self._steps <= WARM_STEPS:
            return None
        self._window.append(periods)
        self._lasted_s += step_s
        self.seconds += step_s
        if len(self._window) < WINDOW_STEPS or self._lasted_s < WINDOW_S:
            return None
        found = judge(self._window)
        self._found.append(found)
        self._exposed = _exposed(self._window)
        self._window, self._lasted_s = [], 0.0
        exposed_s, window_step_s = self._exposed
        costs = exposed_s >= COST["slow link"] * window_step_s and len(periods) > 1
        self.look_at_links = costs and self.seconds >= self._next_look_s
        same = self._found[-WINDOWS:]
        if found and len(same) == WINDOWS and all(_alike(b, found) for b in same):
            return self._say(found, step)
        return None

    def looked(self, slow: SlowLink | None, step: int) -> Blame | None:
        """What the look at the links has found; what has just become sure."""
        self.look_at_links = False
        exposed_s, step_s = self._exposed
        blame = None
        if slow is not None:
            on_it, without = (self.bytes_per_step / b for b in (slow.bytes_per_s, slow.others))
            cost = min(exposed_s * (1 - without / on_it), on_it - without) / step_s
            blame = Blame("slow link", slow.rank, cost, slow.detail)
        if blame is None or blame.cost < COST["slow link"]:
            self._next_look_s = self.seconds + self._pause_s
            self._pause_s = min(2 * self._pause_s, CHECK_LONGEST_S)
            blame = None
        self._links.append(blame)
        same = self._links[-WINDOWS:]
        if blame and len(same) == WINDOWS and all(_alike(b, blame) for b in same):
            self._next_look_s = self.seconds + self._pause_s
            self._pause_s = min(2 * self._pause_s, CHECK_LONGEST_S)
            return self._say(blame, step)
        return None

    def _say(self, blame: Blame, step: int) -> Blame | None:
        if any(_alike(b, blame) for b in self.said):
            return None
        self.said.append(replace(blame, step=step))
        return self.said[-1]

    def all(self) -> list[Blame]:
        """What the run has to say: each with what it cost on average over the whole run, dearest first.

        Besides what was said, a cause that is in two thirds of a few windows.
        """
        windows = len(self._found)
        totals = []
        for blame in self.said:
            seen = self._links if blame.kind == "slow link" else self._found
            costs = [b.cost if b and _alike(b, blame) else 0.0 for b in seen]
            totals.append(replace(blame, cost=mean(costs)))
        for blame in {(b.kind, b.rank): b for b in self._found if b}.values():
            alike = [b for b in self._found if _alike(b, blame)]
            known = any(_alike(b, blame) for b in self.said)
            if not known and windows >= 2 and len(alike) >= 2 / 3 * windows:
                totals.append(replace(blame, cost=sum(b.cost for b in alike if b) / windows))
        return sorted(totals, key=lambda b: -b.cost)


def _alike(a: Blame | None, b: Blame) -> bool:
    return a is not None and (a.kind, a.rank) == (b.kind, b.rank)


def _exposed(window: Sequence[Sequence[Period]]) -> tuple[float, float]:
    """Seconds of a step that ranks stood still for the wire, and the step's."""
    steps = [ps for ps in window if not any(p.checkpoint or p.evaluation for p in ps)] or window
    wire = median(mean(max(0.0, wire) for _, _, wire in split(ps)) for ps in steps)
    return wire, median(max(p.step for p in ps) for ps in steps)


# --- loss and gradient norm


@dataclass
class Jumps:
    """Flags a loss or a gradient norm that is far off the steps before."""

    history: int = 64
    least: int = 24
    _loss: deque[float] = field(default_factory=deque)
    _norm: deque[float] = field(default_factory=deque)
    _quiet_until: int = 0

    def add(self, step: int, loss: float, norm: float) -> str:
        """What has jumped, in words, or ""; the steps that follow at once are not told again."""
        found = []
        log_norm = math.log(norm) if norm > 0 and math.isfinite(norm) else None
        if math.isfinite(loss):
            usual, spread = self._usual(self._loss)
            if loss - usual > max(SPREADS * spread, LEAST_RISE * abs(usual)):
                found.append(f"loss {loss:.3f} after {usual:.3f}")
        if log_norm is not None:
            usual, spread = self._usual(self._norm)
            if log_norm - usual > max(SPREADS * spread, math.log(LEAST_RATIO)):
                found.append(f"gradient norm {norm:.3g}, {math.exp(log_norm - usual):.1f} times the usual {math.exp(usual):.3g}")  # fmt: skip
        self._keep(self._loss, loss)
        self._keep(self._norm, log_norm)
        if not found:
            return ""
        again, self._quiet_until = step <= self._quiet_until, step + self.least
        return "" if again else " and ".join(found)

    def _usual(self, values: deque[float]) -> tuple[float, float]:
        """Median of the newest, and spread; infinite while unknown.

        The spread is that of the differences from step to step (1.4826 median deviations are a
        normal's sigma), so that a loss that falls has no more of it.
        """
        if len(values) < self.least:
            return 0.0, math.inf
        ordered = list(values)
        return median(ordered[-NEWEST:]), 1.4826 * median(abs(b - a) for a, b in pairwise(ordered))

    def _keep(self, values: deque[float], value: float | None) -> None:
        if value is not None and math.isfinite(value):
            values.append(value)
        if len(values) > self.history:
            values.popleft()


SPREADS = 8.0
NEWEST = 9
LEAST_RISE, LEAST_RATIO = 0.1, 3.0
"""Of the loss as a share of it, and of the gradient norm; a run that is calm has little spread."""
