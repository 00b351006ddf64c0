"""What the ranks tell each other once a step, in one small all-reduce of float64.

Every rank fills its own slots and leaves zeros elsewhere, so the sum is exact and the same bits on
all ranks: the loss of each micro-batch (added afterwards in a fixed order) and what it is divided by,
sums of metrics (of all ranks in the same slots, so they may differ in the last bit), whether a signal asked for
the end, whether somebody ran out of memory or failed, and where the time of its previous step went
(observe/arrival.py).
Ranks act on the sum only, never on what they know alone; that is how all skip, stop or repeat the
same step.
"""

import math
from dataclasses import dataclass, field

from unisono.observe.arrival import NAMES, Period, values_of

FINE, OUT_OF_MEMORY, FAILED = 0, 1, 2


@dataclass
class Ballot:
    """One rank's part. `losses` and `counts` of its own micro-batches, in order."""

    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    stop: bool = False
    trouble: int = FINE
    period: Period = field(default_factory=Period)
    """Of the previous step; only now it is known."""
    sums: list[float] = field(default_factory=list)
    """(sum, count) of each metric, one after the other; as many on every rank."""


@dataclass(frozen=True)
class Outcome:
    """All ranks' parts."""

    losses: list[float]
    """By micro-batch of the global batch."""
    count: int
    """What the sum of the losses is divided by."""
    stop: bool
    trouble: list[int]
    """By rank."""
    periods: list[Period]
    """By rank, of the previous step; of no length in the first."""
    sums: list[float] = field(default_factory=list)
    """(sum, count) of each metric over the global batch."""

    @property
    def step_s(self) -> float:
        """Of the previous step, the longest of any rank."""
        return max(p.step for p in self.periods)

    @property
    def stood_s(self) -> float:
        """The longest that a rank stood still in the previous step."""
        return max(p.stood for p in self.periods)

    @property
    def loss(self) -> float:
        """Mean over the global batch, per target token or whatever the objective counts."""
        return sum(self.losses) / self.count if self.count else math.nan


def pack(ballot: Ballot, rank: int, size: int, leaves: int, start: int) -> list[float]:
    """`leaves`: micro-batches of the global batch; this rank's begin with `start`.

    Ranks that share a micro-batch fill the same slot: each with its part, or one of them alone.
    """
    values = [0.0] * (2 * leaves + (2 + len(NAMES)) * size)
    values[start : start + len(ballot.losses)] = ballot.losses
    values[leaves + start : leaves + start + len(ballot.counts)] = map(float, ballot.counts)
    own = [float(ballot.stop), float(ballot.trouble), *values_of(ballot.period)]
    for k, value in enumerate(own):
        values[2 * leaves + k * size + rank] = value
    return values + ballot.sums


def unpack(values: list[float], size: int, leaves: int) -> Outcome:
    stop, trouble, *spent = (
        values[2 * leaves + k * size : 2 * leaves + (k + 1) * size] for k in range(2 + len(NAMES))
    )
    return Outcome(
        losses=values[:leaves],
        count=int(sum(values[leaves : 2 * leaves])),
        stop=any(stop),
        trouble=[int(t) for t in trouble],
        periods=[Period(*own) for own in zip(*spent, strict=True)],
        sums=values[2 * leaves + (2 + len(NAMES)) * size :],
    )
