"""What is on the wire when: two ranks follow the same segments, each direction between them by itself.

A rank computes segments one after another; a segment may need transfers that have ended, and sets
others off at its end. Transfers of one group follow one another on one connection, at most THREADS of
them at a time, as gloo's threads do; connections share their direction equally.

Two ranks of gloo take turns where they could send at once. A message leaves when its receiver has said
that it is ready, and all-to-all and all-gather hand over their data before they say so (gloo:
alltoallv.cc and allgather.cc send, then receive; transport/tcp/pair.cc). So the rank that comes later,
if only by a hair, sends at once, its readiness lies behind its own data, and the earlier one begins a
message later: of an all-gather, which is cut in two, half of the time is lost, of an all-to-all all of
it, unless more is under way. The lag makes the same rank late the next time. An all-reduce says that it
is ready first.

While a direction is busy a rank computes at `compute_speed`, and beside compute a transfer goes at
`transfer_speed`: gloo's threads share the cores with the model. A shaped link lets a burst through at
once after a pause.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

THREADS = 2
"""Of a gloo group: as many of its collectives are under way at once."""
HAIR_S = 1e-10
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
    """`seconds` in each direction, alone."""

    seconds: float
    lane: Lane
    group: str = ""
    messages: int = 0
    """Handed over before readiness is told; 0: one, and readiness first."""
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
    """Seconds until both ranks have done every segment and every transfer set off has ended."""
    pair = _Pair(transfers)
    ranks = [_Rank(segments, 0.0), _Rank(segments, HAIR_S)]
    now = 0.0
    while True:
        while any(pair.follow(r, rank) for r, rank in enumerate(ranks)) or pair.deliver():
            pass
        computing = [rank.started for rank in ranks]
        heads = [pair.heads(r) for r in (0, 1)]
        beside = any(computing)
        rates = [[_rate(pair, n, beside) / len(part) for n in part] for part in heads]
        speed = 1.0 - sum(_taken(pair, part) for part in heads)
        until = [rank.rest / speed for rank in ranks if rank.started]
        until += [
            pair.left[r][n] / rate
            for r in (0, 1)
            for n, rate in zip(heads[r], rates[r], strict=True)
        ]
        if not until:
            break
        passed = min(until)
        now += passed
        for rank in ranks:
            if rank.started:
                rank.rest -= passed * speed
        for r in (0, 1):
            pair.carry(r, passed, dict(zip(heads[r], rates[r], strict=True)))
    assert all(rank.at == len(segments) for rank in ranks), "a transfer is needed before it leaves"
    return now


def _rate(pair: "_Pair", n: int, beside_compute: bool) -> float:
    return pair.transfers[n].lane.transfer_speed if beside_compute else 1.0


def _taken(pair: "_Pair", heads: Sequence[int]) -> float:
    """Of a rank's compute, by one of two directions."""
    if not heads:
        return 0.0
    return sum(1 - pair.transfers[n].lane.compute_speed for n in heads) / len(heads) / 2


class _Rank:
    """Where a rank is in its segments."""

    def __init__(self, segments: Sequence[Segment], late_s: float) -> None:
        self.segments, self.at = segments, 0
        self.started = late_s > 0
        self.rest = late_s
        self.ahead = self.started
        """It has yet to begin with the first one."""


class _Pair:
    """Both ranks' side of every transfer. Lists are indexed by the rank that sends, or that has."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self.transfers = transfers
        self.issued: list[set[int]] = [set(), set()]
        self.ended: list[set[int]] = [set(), set()]
        self.left: list[dict[int, float]] = [{}, {}]
        """Of the message at the head."""
        self._queues: list[dict[str, deque[tuple[int, bool]]]] = [{}, {}]
        """By group: (transfer, whether it is data or the word that its sender is ready)."""
        self._backlog = [defaultdict[str, deque[int]](deque) for _ in range(2)]
        self._active = [defaultdict[str, int](int) for _ in range(2)]
        self._told = [defaultdict[int, int](int) for _ in range(2)]
        """Messages that the other side is ready for."""
        self._held = [defaultdict[int, int](int) for _ in range(2)]
        """Messages that wait for it."""
        self._got = [defaultdict[int, int](int) for _ in range(2)]
        self._burst_s = max((t.lane.burst_s for t in transfers), default=0.0)
        self._saved_s = [0.0, 0.0]

    # --- a rank's compute

    def follow(self, r: int, rank: _Rank) -> bool:
        """Go on to the next segment where this one is done and its needs are there."""
        if rank.started:
            if rank.rest > _NOTHING:
                return False
            rank.started = False
            if rank.ahead:
                rank.ahead = False
                return True
            segment = rank.segments[rank.at]
            for n in segment.sends:
                self._issue(r, n)
            for n in segment.offers:
                if n in self.issued[r]:
                    continue
                t = self.transfers[n]
                if t.after not in self.ended[r] or self._under_way(r, t.beside) > GAP:
                    break
                self._issue(r, n)
            rank.at += 1
            return True
        if rank.at == len(rank.segments):
            return False
        if any(n not in self.ended[r] for n in rank.segments[rank.at].needs):
            return False
        rank.started, rank.rest = True, rank.segments[rank.at].seconds
        return True

    def _under_way(self, r: int, numbers: Sequence[int]) -> int:
        return sum(n in self.issued[r] and n not in self.ended[r] for n in numbers)

    def _issue(self, r: int, n: int) -> None:
        if n not in self.issued[r]:
            self.issued[r].add(n)
            self._backlog[r][self.transfers[n].group].append(n)
            self._begin(r, self.transfers[n].group)

    def _begin(self, r: int, group: str) -> None:
        """As many as there are threads for."""
        waiting = self._backlog[r][group]
        while waiting and self._active[r][group] < THREADS:
            self._active[r][group] += 1
            n = waiting.popleft()
            t = self.transfers[n]
            if not t.messages:
                self._push(r, n, data=False)
            for _ in range(max(1, t.messages)):
                if self._told[r][n]:
                    self._told[r][n] -= 1
                    self._push(r, n, data=True)
                else:
                    self._held[r][n] += 1
                if t.messages:
                    self._push(r, n, data=False)

    # --- the link

    def _push(self, r: int, n: int, data: bool) -> None:
        self._queues[r].setdefault(self.transfers[n].group, deque()).append((n, data))

    def heads(self, r: int) -> list[int]:
        """What rank r's direction carries now, one transfer a connection."""
        return [queue[0][0] for queue in self._queues[r].values() if queue]

    def deliver(self) -> bool:
        """Words arrive at once, and what a burst or the last advance has brought to its end."""
        some = False
        for r in (0, 1):
            for queue in self._queues[r].values():
                while queue:
                    n, data = queue[0]
                    if data:
                        t = self.transfers[n]
                        left = self.left[r].setdefault(n, t.seconds / max(1, t.messages))
                        burst = min(left, self._saved_s[r])
                        self._saved_s[r] -= burst
                        self.left[r][n] = left - burst
                        if self.left[r][n] > _NOTHING:
                            break
                        del self.left[r][n]
                    queue.popleft()
                    some = True
                    self._arrive(1 - r, n, data)
        return some

    def _arrive(self, r: int, n: int, data: bool) -> None:
        if not data:
            if self._held[r][n]:
                self._held[r][n] -= 1
                self._push(r, n, data=True)
            else:
                self._told[r][n] += 1
            return
        self._got[r][n] += 1
        if self._got[r][n] == max(1, self.transfers[n].messages):
            self.ended[r].add(n)
            group = self.transfers[n].group
            self._active[r][group] -= 1
            self._begin(r, group)

    def carry(self, r: int, seconds: float, rates: dict[int, float]) -> None:
        for n, rate in rates.items():
            self.left[r][n] -= seconds * rate
        if not rates:
            self._saved_s[r] = min(self._burst_s, self._saved_s[r] + seconds)
