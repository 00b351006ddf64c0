"""Who waited for whom in a step: told from when every rank arrived at its synchronization.

All ranks leave a collective together, so a rank that waits looks as if it communicated, and phases of
equal length hide who was late (traceml #252). Here every rank stamps, on one clock, when it arrived
with its gradients, and tells in the next step's vote (no collective of its own) what it did until then.
Of what rank r stood still, with `busy` the time in which a rank did something itself:

    for a slower rank   w_r = min(busy_last - busy_r, early_r + min(late_r, arrived_last - arrived_r))
    of that, for load   min(w_r, (work_last - work_r) x seconds of a FLOP + the same of what was generated)
    for the wire        the rest

`late` is standing still after one's own arrival, `early` before it: for weights on their way, or in
strategies that synchronize block by block. A rank that came late because the wire held it up has not
been busy, so nobody waited for it. `last` is whoever was busy longest.

Cost: 15 numbers a rank in a vote that travels anyway, two readings of the clock, and some
additions a rank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from statistics import median_low

from unisono.clock import PHASES, Clock


@dataclass(frozen=True, slots=True)
class Period:
    """From the end of one synchronization to the end of the next on one rank, in seconds.

    It holds the update and whatever came between the steps, then the passes of the next step.
    """

    compute: float = 0.0
    recomputation: float = 0.0
    packing: float = 0.0
    """Communication without standing still, before the rank arrived."""
    data: float = 0.0
    optimizer: float = 0.0
    other: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0
    early: float = 0.0
    """Stood still before it arrived."""
    late: float = 0.0
    """Stood still after it arrived."""
    adding: float = 0.0
    """Communication without standing still, after the rank arrived."""
    arrived: float = 0.0
    """On rank 0's clock."""
    work: float = 0.0
    """FLOPs that it was given."""
    generation: float = 0.0
    drawn: float = 0.0
    """What its completions cost, in rows of one token (train/rollout.py)."""

    @property
    def busy(self) -> float:
        """What it did itself until it arrived."""
        return (
            self.compute + self.recomputation + self.generation + self.packing + self.data + self.optimizer
            + self.other
        )  # fmt: skip

    @property
    def stood(self) -> float:
        return self.early + self.late

    @property
    def step(self) -> float:
        """All of it but what comes between steps."""
        return self.busy + self.stood + self.adding


NAMES = tuple(f.name for f in fields(Period))
values_of = attrgetter(*NAMES)
"""The fields of a period as a tuple, in order."""


def spread(period: Period, rank: int, size: int) -> list[float]:
    """A period for a sum over `size` ranks that is to hold every rank's own."""
    values = [0.0] * (len(NAMES) * size)
    values[rank::size] = values_of(period)
    return values


def gathered(sums: Sequence[float], size: int) -> list[Period]:
    """The periods by rank, from the sum of what all ranks have `spread`."""
    return [Period(*sums[rank::size]) for rank in range(size)]


def split(periods: Sequence[Period]) -> list[tuple[float, float, float]]:
    """(waiting, imbalance, communication) of what each rank stood still in one step."""
    busy = [p.busy for p in periods]
    last_rank = busy.index(max(busy))
    last = periods[last_rank]
    load_s = seconds_of_load(periods)
    latest = max(p.arrived for p in periods)
    found = []
    for k, p in enumerate(periods):
        waited = min(last.busy - p.busy, p.early + max(0.0, min(p.late, latest - p.arrived)))
        load = min(waited, max(0.0, load_s[last_rank] - load_s[k]))
        found.append((waited - load, load, p.stood - waited))
    return found


def seconds_of_load(periods: Sequence[Period]) -> list[float]:
    """What each rank was given to compute and to generate, in seconds of ranks that are not slow."""
    work, drawn = seconds_of_work(periods), _rate((p.generation, p.drawn) for p in periods)
    return [p.work * work + p.drawn * drawn for p in periods]


def seconds_of_work(periods: Sequence[Period]) -> float:
    """Of a FLOP, as the ranks compute that are not slow: the lower median."""
    return _rate((p.compute, p.work) for p in periods)


def _rate(pairs: Iterable[tuple[float, float]]) -> float:
    rates = [seconds / given for seconds, given in pairs if given > 0]
    return median_low(rates) if rates else 0.0


def by_phase(periods: Sequence[Period]) -> list[dict[str, float]]:
    """Seconds of one step by phase on every rank; they sum to the length of its period."""
    found = []
    for p, (waiting, imbalance, wire) in zip(periods, split(periods), strict=True):
        own = {"waiting": waiting, "imbalance": imbalance}
        own["communication"] = p.packing + p.adding + wire
        found.append({phase: own.get(phase, getattr(p, phase, 0.0)) for phase in PHASES})
    return found


class Stamps:
    """Takes the stamps of one rank: `began` once, then `arrived` and `left` in every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.offset_s = 0.0
        """To take from this rank's clock to get rank 0's; may be set anew between steps."""
        self.period = Period()
        """The newest that is complete; of no length before the first."""
        self.slowest_s = 0.0
        """The longest step of any rank, as last told; the same on all ranks."""
        self.flops: Callable[[int, int], float] = lambda rows, length: float(rows * length)
        """Of a step on so many rows of so many tokens; tokens, unless the model is known."""
        self._before: dict[str, float] = {}
        self._here: dict[str, float] = {}
        self._arrived = self._work = self._drawn = 0.0

    def began(self) -> None:
        """Count from now on."""
        self._before = self.clock.read()

    def arrived(self, work: float, drawn: float = 0.0) -> None:
        """This rank has done its part of a step, `work` FLOPs and completions that cost `drawn`, and from
        here on needs the others."""
        self._here, self._work, self._drawn = self.clock.read(), work, drawn
        self._arrived = self.clock.since - self.offset_s

    def left(self) -> None:
        """The step's synchronization is complete."""
        before, here, now = self._before, self._here, self.clock.read()

        def spent(phase: str) -> float:
            return now.get(phase, 0.0) - before.get(phase, 0.0)

        early, packing = (
            here.get(p, 0.0) - before.get(p, 0.0) for p in ("waiting", "communication")
        )
        self.period = Period(
            spent("compute"), spent("recomputation"), packing, spent("data"), spent("optimizer"),
            spent("other"), spent("checkpoint"), spent("evaluation"), early, spent("waiting") - early,
            spent("communication") - packing, self._arrived, self._work,
            spent("generation"), self._drawn,
        )  # fmt: skip
        self._before = now

    def settle(self, periods: Sequence[Period], rank: int) -> None:
        """Charge what this rank stood still in a former period to its causes, now that they are told."""
        _, load, wire = split(periods)[rank]
        for target, seconds in (("imbalance", load), ("communication", wire)):
            self.clock.move("waiting", target, seconds)
            # The present period is not touched by what is moved meanwhile.
            self._before["waiting"] = self._before.get("waiting", 0.0) - seconds
            self._before[target] = self._before.get(target, 0.0) + seconds
