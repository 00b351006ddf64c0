"""What the ranks tell each other once a step, in one small all-reduce of float64.

Every rank fills its own slots and leaves zeros elsewhere, so the sum is exact and the same bits on
all ranks: the loss of each micro-batch (added afterwards in a fixed order), token counts, whether a
signal asked for the end, whether somebody ran out of memory or failed, and how long each waited.
Ranks act on the sum only, never on what they know alone; that is how all skip, stop or repeat the
same step.
"""

import math
from dataclasses import dataclass, field

FINE, OUT_OF_MEMORY, FAILED = 0, 1, 2


@dataclass
class Ballot:
    """One rank's part. `losses` and `tokens` of its own micro-batches, in order."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stop: bool = False
    trouble: int = FINE
    waited_s: float = 0.0
    """In the previous step; only then it is known."""
    step_s: float = 0.0
    """Wall time of the previous step."""


@dataclass(frozen=True)
class Outcome:
    """All ranks' parts."""

    losses: list[float]
    """By micro-batch of the global batch."""
    tokens: int
    stop: bool
    trouble: list[int]
    """By rank."""
    waited_s: list[float]
    """By rank, in the previous step."""
    step_s: float
    """The longest, of the previous step."""

    @property
    def loss(self) -> float:
        """Mean per target token over the global batch."""
        return sum(self.losses) / self.tokens if self.tokens else math.nan


def pack(ballot: Ballot, rank: int, size: int, leaves: int) -> list[float]:
    """`leaves`: micro-batches of the global batch; each rank has leaves / size of them."""
    mine = leaves // size
    start = rank * mine
    values = [0.0] * (2 * leaves + 4 * size)
    values[start : start + len(ballot.losses)] = ballot.losses
    values[leaves + start : leaves + start + len(ballot.tokens)] = map(float, ballot.tokens)
    own = [float(ballot.stop), float(ballot.trouble), ballot.waited_s, ballot.step_s]
    for k, value in enumerate(own):
        values[2 * leaves + k * size + rank] = value
    return values


def unpack(values: list[float], size: int, leaves: int) -> Outcome:
    stop, trouble, waited, step = (
        values[2 * leaves + k * size : 2 * leaves + (k + 1) * size] for k in range(4)
    )
    return Outcome(
        losses=values[:leaves],
        tokens=int(sum(values[leaves : 2 * leaves])),
        stop=any(stop),
        trouble=[int(t) for t in trouble],
        waited_s=waited,
        step_s=max(step),
    )
