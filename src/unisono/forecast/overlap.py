"""What is on the wire when: a rank follows its segments, and the link carries what they set off.

A rank computes segments one after another; a segment may need transfers that have ended, and sets
others off at its end. Ranks are alike and each direction of their link is by itself (sync/ledger.py: two
ranks of gloo have a connection for each), so that one rank and what it sends stand for all. Transfers of one group
follow one another on one connection; connections share the link equally.

While the link is busy a rank computes at `compute_speed`, and beside compute a transfer goes at
`transfer_speed`: gloo's threads share the cores with the model. A shaped link lets a burst through at
once after a pause.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

GAP = 2
"""sync/zero.py: what is offered leaves while at most so many others are under way."""
_NOTHING = 1e-12


@dataclass(frozen=True)
class Lane:
    """One collective over all ranks: T = latency + bytes sent by a rank / rate."""

    latency_s: float
    bytes_per_s: float
    compute_speed: float = 1.0
    transfer_speed: float = 1.0
    burst_s: float = 0.0
    """Of the link's time, what passes at once after a pause of as long."""

    def seconds(self, sent_bytes: float) -> float:
        return self.latency_s + sent_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Transfer:
    """`seconds` alone on the link."""

    seconds: float
    lane: Lane
    group: str = ""
    after: int | None = None
    """Where it is offered: a transfer that must have ended."""
    beside: tuple[int, ...] = ()
    """Where it is offered: those that it lets go first."""


@dataclass(frozen=True)
class Segment:
    """Of compute; `needs`, `sends` and `offers` number transfers."""

    seconds: float
    needs: tuple[int, ...] = ()
    sends: tuple[int, ...] = ()
    """Set off at its end, unless they are under way."""
    offers: tuple[int, ...] = ()
    """Set off at its end if the link has a gap for them."""


def play(segments: Sequence[Segment], transfers: Sequence[Transfer]) -> float:
    """Seconds until every segment is done and every transfer set off has ended."""
    link = _Link(transfers)
    for segment in segments:
        link.wait(segment.needs)
        link.compute(segment.seconds)
        link.send(segment.sends)
        link.offer(segment.offers)
    link.wait(link.sent)
    return link.now


class _Link:
    """The clock of one rank, and what is on its way."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self.transfers = transfers
        self.now = 0.0
        self.sent: set[int] = set()
        self._ended: set[int] = set()
        self._queues: dict[str, deque[int]] = {}
        self._left = [t.seconds for t in transfers]
        self._burst_s = max((t.lane.burst_s for t in transfers), default=0.0)
        self._saved_s = 0.0

    def wait(self, needs: Collection[int]) -> None:
        assert self.sent.issuperset(needs), "a transfer is needed before it leaves"
        while not self._ended.issuperset(needs):
            self._advance(math.inf, 1.0, computes=False)

    def compute(self, seconds: float) -> None:
        while seconds > _NOTHING:
            lanes = [self.transfers[n].lane for n in self._heads()]
            taken = sum(1 - lane.compute_speed for lane in lanes) / len(lanes) if lanes else 0.0
            seconds -= self._advance(seconds, 1 - taken, computes=True)

    def send(self, numbers: Sequence[int]) -> None:
        for n in numbers:
            if n not in self.sent:
                self.sent.add(n)
                self._queues.setdefault(self.transfers[n].group, deque()).append(n)
        self._land()

    def offer(self, numbers: Sequence[int]) -> None:
        for n in numbers:
            if n in self.sent:
                continue
            t = self.transfers[n]
            others = sum(k in self.sent and k not in self._ended for k in t.beside)
            if t.after not in self._ended or others > GAP:
                break
            self.send([n])

    def _heads(self) -> list[int]:
        """What the link carries now, one transfer a connection."""
        return [queue[0] for queue in self._queues.values() if queue]

    def _advance(self, work_s: float, speed: float, computes: bool) -> float:
        """To the end of `work_s` at `speed`, or of a transfer, if that is sooner; the work done."""
        heads = self._heads()
        rates = [
            (self.transfers[n].lane.transfer_speed if computes else 1.0) / len(heads) for n in heads
        ]
        ends = [self._left[n] / rate for n, rate in zip(heads, rates, strict=True)]
        passed = min([work_s / speed, *ends])
        self.now += passed
        for n, rate in zip(heads, rates, strict=True):
            self._left[n] -= passed * rate
        if not heads:
            self._saved_s = min(self._burst_s, self._saved_s + passed)
        self._land()
        return passed * speed

    def _land(self) -> None:
        """What has come to its end, some of it in a burst, makes room for the next."""
        for queue in self._queues.values():
            while queue:
                burst = min(self._left[queue[0]], self._saved_s)
                self._saved_s -= burst
                self._left[queue[0]] -= burst
                if self._left[queue[0]] > _NOTHING:
                    break
                self._ended.add(queue.popleft())
