"""One step of unisono's own strategies, tensor by tensor and transfer by transfer, on a measured link.

`cost` needs a few shapes and answers in microseconds; this follows what sync/ does, for the machine that
a probe has measured: a run's own forecast, and our grid of shaped links. A step becomes segments of
compute and transfers between them, which `overlap` plays. What a step takes beyond the sum of its
segments is communication, exposed or stolen.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from unisono.forecast.overlap import Lane, Segment, Transfer, play
from unisono.forecast.probe import FACTOR, LinkFit, Probe, Sharing

System = Literal["ddp", "whole", "shards", "sharded"]
"""sync: ddp; exact with whole gradients; exact with the optimizer on shards; sharded."""
FIRST_MB, DDP_MB = 1, 25
"""PyTorch DDP's buckets."""
TAIL_SHARE = 0.25
"""sync/zero.py: of a bucket, what leaves last."""
HOOK_S = 5e-5
"""Python around one gradient that has come: hook, clock, bucket, handle."""
CHUNK_BYTES = 1 << 20
"""sync/shard.py: of a table's row, or of more ranks than two, what travels as one message; half a bucket if
that is more."""
UNDER_WAY = 2
"""sync/sharded.py: blocks whose sums may be under way at once."""
FAIR = 0.5
"""Of a core, what a transfer's thread gets beside one that computes, by the system's equal weights."""


@dataclass(frozen=True)
class Tensors:
    """What is trained, in values, as sync/ cuts it."""

    sizes: tuple[int, ...]
    """In the order of the forward pass, without the table."""
    blocks: tuple[int, ...]
    """Of it, what each repeated block holds together."""
    table: int = 0
    """The embedding that is looked up; 0 where there is none."""
    tied: bool = True
    """It is the output layer as well."""

    @property
    def total(self) -> int:
        return sum(self.sizes) + self.table


@dataclass(frozen=True)
class Passes:
    """What one rank computes in a step, alone: seconds, as a probe or the run's start measured them."""

    forward_s: float
    backward_s: float
    """Of one micro-batch."""
    optimizer_s: float
    """Of all weights, with the norm and the clipping."""
    accumulation: int = 1
    waiting_s: float = 0.0
    """For the slowest rank."""
    pack_s: float = 0.0
    """To copy all gradients into flat memory, tensor by tensor."""
    pack_narrow_s: float = 0.0
    """Likewise into bfloat16."""
    units_s: float = 0.0
    """What FSDP2 adds to a pass by itself, with nothing to send (`sharded` only)."""


@dataclass(frozen=True)
class Foretold:
    """Seconds of a step by where they go, and bytes sent by each rank."""

    compute: float
    communication: float
    """Exposed, and what transfers take from the compute beside them."""
    waiting: float
    optimizer: float
    sent_bytes: float

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.waiting + self.optimizer


def foretell(
    system: System, tensors: Tensors, passes: Passes, lanes: Mapping[str, Lane], ranks: int,
    *, wire_bytes: float = 4, bucket_bytes: float = 4 * 2**20, rows: int = 0, width: int = 0, votes: int = 1,
    codec_s: float = 0.0, bucket_s: float = 0.0, replicas: int = 1, everyone: int = 0, gathered: bool = False,
) -> Foretold:  # fmt: skip
    """A step in full swing. `rows`: of the table that a rank looks up in a step, `width` values each;
    `wire_bytes`: of a value on its way; `votes`: values that ranks add up besides; `codec_s`: where values
    are encoded, to encode and decode as many as there are; `bucket_s`: what a bucket of rounded or encoded
    values costs a rank beside them (`shards` only; sync/link.py, NARROW_BUSY_S).

    `sharded`: `ranks` are those of a row of the mesh, of which there are `replicas`; `everyone`: all that
    agree on a step, where tensor ranks do so too; `gathered`: `passes` hold the gathering of weights already.
    """
    step = _Step(
        tensors, passes, lanes, ranks, wire_bytes, bucket_bytes, rows, width, votes, codec_s, bucket_s,
        replicas, everyone or ranks * replicas, gathered,
    )  # fmt: skip
    if max(ranks, step.everyone) > 1:
        {"ddp": step.ddp, "whole": step.whole, "shards": step.shards, "sharded": step.sharded}[
            system
        ]()
    else:
        step.compute(passes.accumulation * (passes.forward_s + passes.backward_s))
    owned = {"ddp": 1.0, "whole": 1.0, "sharded": 1 / ranks}.get(system)
    if owned is None:  # the table is whole on every rank
        owned = (tensors.table + sum(tensors.sizes) / ranks) / tensors.total
    optimizer = passes.optimizer_s * owned
    step.compute(optimizer, needs=range(len(step.transfers)))
    total = play(step.segments, step.transfers)
    compute = sum(s.seconds for s in step.segments) - optimizer
    return Foretold(
        compute, total - compute - optimizer, passes.waiting_s, optimizer, step.sent_bytes
    )


class _Step:
    """Segments and transfers of one step, as they are added."""

    def __init__(
        self, tensors: Tensors, passes: Passes, lanes: Mapping[str, Lane], ranks: int,
        wire_bytes: float, bucket_bytes: float, rows: int, width: int, votes: int, codec_s: float,
        bucket_s: float, replicas: int, everyone: int, gathered: bool,
    ) -> None:  # fmt: skip
        self.tensors, self.passes, self.lanes, self.ranks = tensors, passes, lanes, ranks
        self.wire_bytes, self.bucket_bytes = wire_bytes, bucket_bytes
        self.rows, self.width, self.votes = rows, width, votes
        self.codec_s, self.bucket_s = codec_s, bucket_s if wire_bytes < 4 else 0.0
        self.replicas, self.everyone, self.gathered = replicas, everyone, gathered
        self.segments: list[Segment] = []
        self.transfers: list[Transfer] = []
        self.sent_bytes = 0.0
        head = tensors.table if tensors.tied else 0
        self._per_value = 1 / max(1, sum(tensors.sizes) + head)

    # --- what is added

    def compute(
        self, seconds: float, needs: Iterable[int] = (), sends: Sequence[int] = (), offers: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.segments.append(Segment(seconds, tuple(needs), tuple(sends), tuple(offers)))

    def send(self, group: str, *parts: tuple[str, float], after: int | None = None, beside: Sequence[int] = ()) -> int:  # fmt: skip
        """A transfer of (collective, bytes that each rank sends) one after another; its number."""
        seconds = sum(self.lanes[name].seconds(sent) for name, sent in parts)
        lane = self.lanes[parts[0][0]]
        self.transfers.append(Transfer(seconds, lane, group, after, tuple(beside)))
        self.sent_bytes += sum(sent for _, sent in parts)
        return len(self.transfers) - 1

    def chunks(self, values: float) -> list[float]:
        """Bytes that a rank sends at once of a bucket, as sync/shard.py cuts its rows."""
        row = values / self.ranks
        size = int(max(CHUNK_BYTES, self.bucket_bytes / 2) // self.wire_bytes)
        rows = [min(size, row - at) for at in range(0, math.ceil(row), size)]
        return [self._share(one * self.ranks, "all_to_all") for one in rows]

    def _share(self, values: float, collective: str) -> float:
        return FACTOR[collective](self.ranks) * values * self.wire_bytes

    def _plain(self, passes: int) -> None:
        if passes:
            self.compute(passes * (self.passes.forward_s + self.passes.backward_s))

    def _backward(
        self, groups: Sequence[Sequence[int]], ready: Sequence[Sequence[int]], handling_s: float,
        offers: Sequence[int] = (), early: bool = False,
    ) -> None:  # fmt: skip
        """Compute by tensor in reverse order; `ready`: transfers to set off when a group is complete.

        `groups` in the order in which they leave, of numbers of tensors; -1 is the table.
        `handling_s`: of all values, what is done with a gradient beside computing it; half of `bucket_s`
        comes before each group leaves. `early`: the first one leaves after one product of two (sync/early.py).
        """
        last = {group[-1]: k for k, group in enumerate(groups)}
        order = [i for group in groups for i in group]
        for k, i in enumerate(order):
            values = self.tensors.sizes[i] if i >= 0 else 0
            sends = ready[last[i]] if i in last else ()
            seconds = self.passes.backward_s * values * self._per_value + HOOK_S
            seconds += handling_s * self._values([i]) / self.tensors.total
            seconds += self.bucket_s / 2 if i in last else 0.0
            if early and k == 0:
                seconds /= 2
                self.compute(seconds, sends=sends)
            self.compute(seconds, sends=sends, offers=offers)

    def _head(self) -> float:
        """Seconds of the backward pass before the first block: the tied output layer."""
        tied = self.tensors.table if self.tensors.tied else 0
        return self.passes.backward_s * tied * self._per_value

    def scalars(self, count: int) -> None:
        """What `finish` adds up besides: which tensors were used, and the caller's values."""
        nbytes = 8 * (count + self.votes)
        self.sent_bytes += 2 * nbytes * (self.everyone - 1) // self.everyone

    # --- strategies

    def ddp(self) -> None:
        """Buckets of 25 MiB, the first of 1 MiB, filled as gradients come; the table's comes last."""
        groups: list[list[int]] = [[]]
        filled, limit = 0, FIRST_MB * 2**20
        for i in self._reverse():
            groups[-1].append(i)
            filled += 4 * self._values([i])
            if filled >= limit:
                groups.append([])
                filled, limit = 0, DDP_MB * 2**20
        self._whole([g for g in groups if g])

    def whole(self) -> None:
        """sync/exact.py: an all-reduce a bucket; from three ranks on a tree between two trips."""
        order = self._reverse()
        self._whole(self._cut(order, self.bucket_bytes), tree=True)
        self.scalars(len(order))

    def _whole(self, groups: list[list[int]], tree: bool = False) -> None:
        p = self.passes
        self._plain(p.accumulation - 1)
        self.compute(p.forward_s + self._head())
        trips = []
        for group in groups:
            values = self._values(group)
            trip = ["all_to_all", "all_gather"] if tree and self.ranks > 2 else ["all_reduce"]
            trips.append(
                self.send("scatter", *((name, self._share(values, name)) for name in trip))
            )
        # Into the bucket; and divided (DDP), or added up in the tree.
        adds = (1 / self.ranks if self.ranks > 2 else 0.0) if tree else 0.5
        self._backward(groups, [[trip] for trip in trips], (1 + adds) * p.pack_s)
        self.compute(0.0, needs=trips)

    def shards(self) -> None:
        """sync/zero.py: gradients out, weights back in the next forward pass, the table by itself."""
        p, n, t = self.passes, self.ranks, self.tensors
        order = [i for i in self._reverse() if i >= 0]
        groups = self._cut(order, self.bucket_bytes, TAIL_SHARE * self.bucket_bytes)
        way = "all_to_all" if n == 2 else "all_gather"
        back = [
            self.send("gather", (way, self._share(self._values(g), way))) for g in reversed(groups)
        ]
        self.compute(0.0, sends=back)
        of = {i: back[len(groups) - 1 - k] for k, group in enumerate(groups) for i in group}
        first = {group[-1] for group in groups}
        for i, values in enumerate(t.sizes):
            unpacked_s = self.bucket_s / 2 if i in first else 0.0
            self.compute(unpacked_s + p.forward_s * values * self._per_value, needs=[of[i]])
        head = t.table if t.tied else 0
        self.compute(p.forward_s * head * self._per_value)
        if p.accumulation > 1:
            self.compute(p.backward_s)
            self._plain(p.accumulation - 2)
            self.compute(p.forward_s)

        def out(values: float, chunks: bool) -> list[int]:
            cut = self.chunks(values) if chunks else [self._share(values, "all_to_all")]
            return [self.send("scatter", ("all_to_all", sent)) for sent in cut]

        dense = out(head, True) if head else []
        if head:  # after one product of two (sync/early.py)
            self.compute(self._head() / 2, sends=dense)
            self.compute(self._head() / 2)
        trips = [out(self._values(g), n > 2) for g in groups]
        gone = [*dense, *(n for trip in trips for n in trip)]
        # The sum of the table's dense half returns in gaps of the others' way, or when all are there.
        sums: list[int] = []
        for sent in self.chunks(head) if head else []:
            after = sums[-1] if sums else dense[-1]
            sums.append(self.send("sum", ("all_gather", sent), after=after, beside=gone))
        self._backward(groups, trips, self._shard_handling(), offers=sums, early=not head)
        rows = self.rows * self.width * self.wire_bytes * (n - 1) if t.table else 0
        tail = [self.send("rows", ("all_gather", rows))] if rows else []
        if rows:  # their number, and which
            self.sent_bytes += (8 + 4 * self.rows) * (n - 1)
        self.scalars(len(t.sizes) + bool(t.table) + 1)
        self.compute(0.0, sends=tail)
        self.compute(0.0, needs=gone, sends=sums)
        self.compute(0.0, needs=[*tail, *sums], sends=[self.send("control", ("all_reduce", 0.0))])
        if t.table:  # packed, added up, returned, scaled on every rank
            self.compute(2 * p.pack_s * t.table / t.total + HOOK_S)

    def sharded(self) -> None:
        """sync/sharded.py: each block's weights before its forward and its backward pass, the next
        one's while it computes; its gradients behind it, and then their sums over the replicas."""
        p, t = self.passes, self.tensors
        blocks = t.blocks or (sum(t.sizes),)
        root = t.total - sum(blocks)
        scale = 1 / max(1, sum(blocks) + (t.table if t.tied else root))
        ends = 1 - scale * sum(blocks)
        first, last = 0, len(blocks) - 1
        under_way: deque[int] = deque()

        shared: deque[float] = deque()
        over: list[int] = []

        def gather(values: float) -> int:
            sent = self._share(values, "all_gather")
            if not self.gathered:
                return self.send("shard", ("all_gather", sent))
            self.transfers.append(Transfer(0.0, self.lanes["all_gather"], "shard"))
            self.sent_bytes += sent
            return len(self.transfers) - 1

        def scatter(values: float) -> None:
            under_way.append(self.send("shard", ("all_to_all", self._share(values, "all_to_all"))))
            shared.append(values / self.ranks)
            self.compute(0.0, sends=[under_way[-1]])

        def land() -> None:
            self.compute(0.0, needs=[under_way.popleft()])
            part = shared.popleft()
            if self.replicas > 1:
                sent = FACTOR["all_reduce"](self.replicas) * part * self.wire_bytes
                over.append(self.send("replica", ("all_reduce", sent)))
                self.compute(0.0, sends=[over[-1]])

        for k in range(p.accumulation):
            whole = gather(root)
            coming = gather(blocks[first])
            self.compute(0.0, sends=[whole])
            self.compute(0.0, needs=[whole], sends=[coming])
            for b, values in enumerate(blocks):
                after = gather(blocks[b + 1]) if b < last else None
                self.compute(0.0, needs=[coming], sends=[] if after is None else [after])
                self.compute(p.forward_s * values * scale)
                coming = coming if after is None else after
            self.compute((p.forward_s + p.backward_s) * ends)
            needed: list[int] = []
            for b in range(last, -1, -1):
                before = gather(blocks[b - 1]) if b > first else None
                self.compute(0.0, needs=needed, sends=[] if before is None else [before])
                self.compute(p.backward_s * blocks[b] * scale)
                needed = [] if before is None else [before]
                if k == p.accumulation - 1:
                    scatter(blocks[b])
                    if len(under_way) > UNDER_WAY:
                        land()
        scatter(root)
        while under_way:
            land()
        self.compute(0.0, needs=over, sends=[self.send("control", ("all_reduce", 0.0))])
        self.scalars(len(t.sizes) + bool(t.table) + 2)
        self.sent_bytes += 8 * (self.everyone - 1)  # squares of the gradients' norms
        # A gather copies in and out into fresh memory; a scatter copies in, adds up, copies out.
        again = sum(blocks[:-1]) / t.total
        copies_s = p.pack_s * ((0 if self.gathered else 3 * p.accumulation * (1 + again)) + 4)
        self.compute(max(copies_s, p.accumulation * p.units_s))  # those of one rank are in units_s

    def _shard_handling(self) -> float:
        """Seconds for all values: others' parts packed, the own part added to what came and scaled.

        In bfloat16 also widened, and the weights' change taken, rounded, and added on both sides; likewise
        where both are encoded.
        """
        p, own = self.passes, 1 / self.ranks
        if self.wire_bytes == 4:
            return p.pack_s * ((1 - own) + 2 * own)
        narrow_s = self.codec_s + p.pack_s * (1 - own) if self.codec_s else p.pack_narrow_s
        return narrow_s + p.pack_s * (4 * own + (1 - own))

    # --- tensors

    def _reverse(self) -> list[int]:
        table = [-1] if self.tensors.table else []
        return [*range(len(self.tensors.sizes) - 1, -1, -1), *table]

    def _values(self, group: Sequence[int]) -> int:
        return sum(self.tensors.sizes[i] if i >= 0 else self.tensors.table for i in group)

    def _cut(self, order: Sequence[int], bucket: float, tail: float | None = None) -> list[list[int]]:  # fmt: skip
        """As sync/bucket.py's group_by_size: from the end, whose bucket may be smaller."""
        groups: list[list[int]] = []
        filled, limit = 0.0, bucket if tail is None else tail
        for i in reversed(order):
            nbytes = 4 * self._values([i])
            if not groups or filled + nbytes > limit:
                limit = bucket if groups else limit
                groups.append([])
                filled = 0.0
            groups[-1].append(i)
            filled += nbytes
        return [group[::-1] for group in reversed(groups)]


def lanes_of(probe: Probe, ranks: int, per_core: float = 1.0) -> dict[str, Lane]:
    """Of `ranks` ranks on the links of a probe; `per_core`: how many share what one had to itself there.

    Latencies are hops of a ring. On a core that r ranks share a transfer takes at least r times what it
    takes of a core; beside compute it gets an equal share of the core, at most.
    """
    fits: dict[str, LinkFit] = {f.collective: f for f in probe.links if f.axis == "world"}
    shared: dict[str, Sharing] = {s.collective: s for s in probe.sharing}
    found = {}
    for name in FACTOR:
        f = fits.get(name) or fits["all_reduce"]
        hops = (ranks - 1) / (f.ranks - 1)
        s = shared.get(name)
        if s is None:
            burst_s = probe.burst_bytes / f.bytes_per_s
            found[name] = Lane(f.latency_s * hops, f.bytes_per_s, burst_s=burst_s)
            continue
        busy = per_core * s.busy
        slower = max(1.0, busy)
        beside = s.transfer_speed
        if per_core > 1 and busy * beside > FAIR:
            beside = FAIR / busy
        compute = max(0.05, 1 - busy * beside)
        found[name] = Lane(
            f.latency_s * hops, s.bytes_per_s / slower, compute, min(1.0, beside * slower),
            probe.burst_bytes / s.bytes_per_s,
        )  # fmt: skip
    return found
