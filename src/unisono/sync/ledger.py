"""The ledger: the one thin layer through which every collective passes.

It records operation, payload, group and times of each, and charges the time that this rank stands
still in a step to the clock's phase `waiting`. The receipt and the tests on bytes read it; there is no
second instrumentation. A group of one communicates nothing and records nothing.

Bytes are those that this rank sends, S being the whole tensor and n the ranks of the group:
all-to-all and reduce-scatter S (n-1)/n, with uneven rows those that go to others; all-gather of a chunk S/n: S (n-1)/n;
all-reduce 2 S (n-1)/n (the least for any algorithm; gloo's own may send more); broadcast: S (n-1)
from the source; shift: S.
"""

import contextlib
import os
import re
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import CodeType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from unisono.clock import Clock
from unisono.errors import LostReplicas

# torch 2.13 renames the two; the new names have the same signature.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(slots=True)
class Entry:
    """One collective as this rank saw it. Times are time.perf_counter() seconds."""

    operation: str
    group: str
    sequence: int
    sent_bytes: int
    started: float
    payload_bytes: int = -1
    """What every rank of the group must hand in alike; -1 where ranks may differ."""
    calls: tuple[tuple[CodeType, int], ...] = ()
    """Who began it: code and line, innermost first. Only kept for a witness."""
    waited_s: float = 0.0
    """How long this rank stood still for it."""
    finished: float = 0.0
    """When this rank knew that it was finished."""


@dataclass(frozen=True)
class Position:
    """How far this rank is in one group. `key` names the group alike on all its ranks, and no other."""

    key: str
    ranks: tuple[int, ...]
    """Of all ranks, those in the group."""
    issued: deque[Entry] = field(default_factory=lambda: deque(maxlen=64))
    """The newest ones, in order."""


class Witness(Protocol):
    """Who follows a ledger while it is written (observe/watch.py)."""

    def issued(self, position: Position, entry: Entry) -> None:
        """Called before each collective begins. Must be quick."""

    def why_lost(self) -> str:
        """Called when a collective has failed: who is to blame, in one line; "" if nobody knows."""
        ...


@dataclass
class Whereabouts:
    """Where this rank stands, for other ranks to know. Written by one thread, read by another.

    Holds no reference to torch's works or groups: see Group on why those must be able to go. Where
    handing a collective to a GPU's stream is all that `wait` does, an event tells when it is done.
    """

    positions: dict[str, Position] = field(default_factory=dict)
    standing: tuple[Position, Entry, float] | None = None
    """The collective that this rank stands still in, and since when (time.perf_counter())."""
    queued: deque[tuple[Position, Entry, torch.cuda.Event]] = field(default_factory=deque)
    """Waited for by a stream only, oldest first, while a witness takes them away."""
    witness: Witness | None = None


QUEUED = 64
"""At most so many events are kept; the oldest are those that a hang is in."""


@dataclass
class Ledger:
    """What this rank has communicated. Not thread-safe."""

    clock: Clock = field(default_factory=Clock)
    born: float = field(default_factory=time.time)
    """When the job began: seconds since 1970."""
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=4096))
    """The newest ones; totals below count all."""
    sent_bytes: int = 0
    collectives: int = 0


class Handle:
    """A collective on its way. `done` never blocks; `wait` returns when the result is usable."""

    def __init__(
        self,
        work: Any,
        entry: Entry | None,
        ledger: Ledger,
        position: Position | None = None,
        cuda: bool = False,
    ) -> None:
        self._work, self._entry, self._position = work, entry, position
        self._ledger, self._cuda = ledger, cuda

    def done(self) -> bool:
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> None:
        """Raises LostReplicas when a peer is gone or the timeout is over."""
        if self._work is None:
            return
        assert self._entry is not None and self._position is not None
        here, entry = self._ledger.whereabouts, self._entry
        began = time.perf_counter()
        here.standing = self._position, entry, began
        try:
            with self._ledger.clock.standing_still():
                self._work.wait()
        except RuntimeError as error:
            after_s = time.perf_counter() - entry.started
            raise _lost(
                f"in {entry.operation} {entry.sequence} of group {entry.group!r} after {after_s:.1f} s",
                here,
                error,
            ) from error
        finally:
            here.standing = None
        entry.finished = time.perf_counter()
        entry.waited_s += entry.finished - began
        if self._cuda and here.witness is not None and len(here.queued) < QUEUED:
            event = torch.cuda.Event()
            event.record()
            here.queued.append((self._position, entry, event))
        self._work = None


@dataclass(frozen=True)
class _Works:
    """Several works of torch as one."""

    works: list[Any]

    def is_completed(self) -> bool:
        return all(w.is_completed() for w in self.works)

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _lost(where: str, here: Whereabouts, error: RuntimeError) -> LostReplicas:
    """gloo's own words without its source file and its guesses."""
    backend = re.sub(r"^\[/\S+\] ", "", str(error).splitlines()[0]).partition(". This is typ")[0]
    why = here.witness.why_lost() if here.witness is not None else None
    return LostReplicas(
        f"lost the other replicas {where}: " + (f"{why} ({backend})" if why else backend)
    )


CALLS = 3


def _calls() -> tuple[tuple[CodeType, int], ...]:
    """The innermost calls outside of this file."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    found = [(frame.f_code, frame.f_lineno)]
    while frame.f_back and len(found) < CALLS:
        frame = frame.f_back
        found.append((frame.f_code, frame.f_lineno))
    return tuple(found)


class Group:
    """The ranks of one process group and the collectives they share, written into a ledger.

    Within a group every rank must issue the same collectives in the same order; what may be issued
    in an order that depends on timing belongs in a group of its own.
    """

    def __init__(
        self,
        name: str,
        ledger: Ledger,
        timeout_s: float,
        existing: dist.ProcessGroup | None = None,
        parts: Sequence[Sequence[int]] = (),
        duplex: bool = False,
    ) -> None:
        """Collective: makes a process group of all ranks, unless there is an `existing` one.

        With `parts`, the ranks of each such group, which all ranks give alike, this is the one that holds
        this rank. An existing group has `timeout_s` from here on; torch's own default is half an hour.
        `duplex`: two ranks on gloo exchange over two connections, one for each direction. On one they
        take turns: a message leaves when the receiver has said that it is ready, and that word waits
        behind what the receiver itself is sending.
        """
        self.name, self.ledger = name, ledger
        alone = bool(parts) and max(map(len, parts)) == 1
        if len(parts) > 1 and not alone:
            existing = existing or _own_of(parts, timeout_s)
        self.size, self.rank = dist.get_world_size(existing), dist.get_rank(existing)
        self.ranks: tuple[int, ...] = tuple(range(self.size))
        """Of all ranks, those in the group."""
        if alone:
            self.size, self.rank, self.ranks = 1, 0, (dist.get_rank(),)
        self._sequence = 0
        # Weak: torch's own reference is the only one, so that leaving the replicas ends the group's
        # threads. One that still ran while the interpreter shuts down would abort the process.
        self._reference: weakref.ref[dist.ProcessGroup] | None = None
        self._back: weakref.ref[dist.ProcessGroup] | None = None
        """Of two ranks: what the second one sends on."""
        self._position: Position | None = None
        if self.size > 1:
            with yielding_threads():
                group = existing or dist.new_group(timeout=timedelta(seconds=timeout_s))
            if duplex and self.size == 2 and dist.get_backend(group) == "gloo":
                every = parts if len(parts) > 1 else [self.ranks]
                self._back = weakref.ref(_own_of(every, timeout_s))
            if existing is not None:
                _set_pg_timeout(timedelta(seconds=timeout_s), existing)
            self._reference = weakref.ref(group)
            # torch gives a group the same name on all its ranks; disjoint ones may share one.
            self.ranks = tuple(dist.get_process_group_ranks(group))
            key = f"{name}/{group.group_name}/{self.ranks[0]}"
            self._position = Position(key, self.ranks)
            ledger.whereabouts.positions[key] = self._position

    def _issue(
        self, operation: str, sent_bytes: int, tensor: torch.Tensor, call: Any, alike: bool = True
    ) -> Handle:
        """`alike`: every rank's `tensor` has the same number of bytes."""
        if self._position is None:
            return Handle(None, None, self.ledger)
        self._sequence += 1
        payload_bytes = _nbytes(tensor) if alike else -1
        entry = Entry(
            operation, self.name, self._sequence, sent_bytes, time.perf_counter(), payload_bytes
        )
        self.ledger.entries.append(entry)
        self.ledger.sent_bytes += sent_bytes
        self.ledger.collectives += 1
        here = self.ledger.whereabouts
        self._position.issued.append(entry)
        if here.witness is not None:
            entry.calls = _calls()
            here.witness.issued(self._position, entry)
        try:
            return Handle(call(), entry, self.ledger, self._position, tensor.is_cuda)
        except RuntimeError as error:
            where = f"on starting {operation} {self._sequence} of group {self.name!r}"
            raise _lost(where, here, error) from error

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> Handle:
        """Collective: row r of `sent` goes to rank r; row r of `received` comes from rank r."""

        def call() -> Any:
            if self._back is None:
                return dist.all_to_all_single(received, sent, group=self._group, async_op=True)
            return self._swap(received.view(2, -1).unbind(), sent.view(2, -1).unbind())

        sent_bytes = _nbytes(sent) * (self.size - 1) // self.size
        return self._issue("all-to-all", sent_bytes, sent, call)

    def all_to_all_rows(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_rows: list[int],
        sent_rows: list[int],
    ) -> Handle:
        """Collective: the first `sent_rows[0]` rows of `sent` go to rank 0, the next to rank 1, ...

        `received_rows[r]` rows come from rank r, in the order of the ranks. A rank's own rows are
        copied.
        """
        row_bytes = _nbytes(sent) // max(1, len(sent))
        if self.size == 1:
            received.copy_(sent)

        def call() -> Any:
            if self._back is None:
                return dist.all_to_all_single(
                    received, sent, received_rows, sent_rows, group=self._group, async_op=True
                )
            return self._swap(received.split(received_rows), sent.split(sent_rows))

        sent_bytes = row_bytes * (sum(sent_rows) - sent_rows[self.rank])
        return self._issue("all-to-all", sent_bytes, sent, call, alike=False)

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> Handle:
        """Collective of two ranks: `received` becomes what the other one sends, both contiguous.

        Nothing is copied.
        """
        assert self.size == 2, self.size
        lengths = [0, 0]
        lengths[1 - self.rank] = sent.numel()
        return self.all_to_all_rows(received.view(-1), sent.view(-1), lengths, lengths)

    def _swap(self, received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor]) -> "_Works":
        """Of two ranks: what is for the other, each direction in a group of its own."""
        other = 1 - self.rank
        if received[self.rank].data_ptr() != sent[self.rank].data_ptr():
            received[self.rank].copy_(sent[self.rank])
        tensors = [received[other], received[other]]
        tensors[self.rank] = sent[other]
        groups = self._group, self._back() if self._back else None
        return _Works([
            dist.broadcast(tensor, group=group, group_src=source, async_op=True)
            for source, (tensor, group) in enumerate(zip(tensors, groups, strict=True))
            if tensor.numel()
        ])  # fmt: skip

    def shift(self, received: torch.Tensor, sent: torch.Tensor, by: int) -> Handle:
        """Collective: `sent` goes `by` ranks on, `received` comes from as far behind; both contiguous.

        Only the two ranks of a transfer meet. Their sizes may differ from other ranks'; where nothing
        is sent, no message goes. `by` is the same on every rank.
        """
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        if to == self.rank:
            received.view(-1).copy_(sent.view(-1))
        return self._issue(
            "shift",
            0 if to == self.rank else _nbytes(sent),
            sent,
            lambda: self._messages(received, sent, to, source),
            alike=False,
        )

    def _messages(
        self, received: torch.Tensor, sent: torch.Tensor, to: int, source: int
    ) -> "_Works":
        group, tag = self._group, self._sequence
        messages = [(dist.irecv, received, source), (dist.isend, sent, to)]
        operations = [
            dist.P2POp(call, tensor, group=group, tag=tag, group_peer=peer)
            for call, tensor, peer in messages
            if tensor.numel() and peer != self.rank
        ]
        return _Works(dist.batch_isend_irecv(operations) if operations else [])

    def all_gather(self, whole: torch.Tensor, chunk: torch.Tensor) -> Handle:
        """Collective: `whole` becomes the chunks of all ranks in rank order."""
        if self.size == 1:
            whole.view(-1).copy_(chunk.view(-1))

        def call() -> Any:
            if self._back is None:
                return _gather_into(
                    whole.view(-1), chunk.view(-1), group=self._group, async_op=True
                )
            return self._swap(whole.view(2, -1).unbind(), [chunk.view(-1)] * 2)

        return self._issue("all-gather", _nbytes(chunk) * (self.size - 1), chunk, call)

    def reduce_scatter(self, received: torch.Tensor, sent: torch.Tensor) -> Handle:
        """Collective: `received` becomes this rank's row of the sum of `sent` over the ranks.

        In the backend's own order of sums, and on gloo with twice the bytes of an all-to-all.
        """
        return self._issue(
            "reduce-scatter",
            _nbytes(sent) * (self.size - 1) // self.size,
            sent,
            lambda: _scatter_into(
                received.view(-1), sent.view(-1), group=self._group, async_op=True
            ),
        )

    def all_reduce(self, tensor: torch.Tensor) -> Handle:
        """Collective: `tensor` becomes the sum over ranks, in place."""
        return self._issue(
            "all-reduce",
            2 * _nbytes(tensor) * (self.size - 1) // self.size,
            tensor,
            lambda: dist.all_reduce(tensor, group=self._group, async_op=True),
        )

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> Handle:
        """Collective: every rank's `tensor` becomes the source's, in place."""
        sent = _nbytes(tensor) * (self.size - 1) if self.rank == source else 0
        return self._issue(
            "broadcast",
            sent,
            tensor,
            lambda: dist.broadcast(tensor, source, group=self._group, async_op=True),
        )

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self._reference() if self._reference else None

    def close(self) -> None:
        """Collective: end the process group. Every collective must have been waited for."""
        for group in (self._group, self._back() if self._back else None):
            if group is not None:
                dist.destroy_process_group(group)
        if self._position is not None:
            self.ledger.whereabouts.positions.pop(self._position.key, None)

    def barrier(self) -> None:
        """Collective: returns when every rank has come here."""
        self.all_reduce(torch.zeros(1)).wait()

    def sum(self, *values: float) -> list[float]:
        """Collective: the sum of each value over the ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self.all_reduce(tensor).wait()
        return list(tensor.tolist())

    def each(self, *values: float) -> torch.Tensor:
        """Collective: every rank's values, float64 [size, len(values)], the same on all ranks."""
        table = torch.empty(self.size, len(values), dtype=torch.float64)
        self.all_gather(table, torch.tensor(values, dtype=torch.float64)).wait()
        return table


def _own_of(parts: Sequence[Sequence[int]], timeout_s: float) -> dist.ProcessGroup:
    """Every rank makes all groups, in the same order, and keeps its own."""
    timeout, rank = timedelta(seconds=timeout_s), dist.get_rank()
    with yielding_threads():
        made = [dist.new_group(list(part), timeout=timeout) for part in parts]
    return next(group for group, part in zip(made, parts, strict=True) if rank in part)


@contextlib.contextmanager
def yielding_threads() -> Iterator[None]:
    """Threads made here run when a core is free or a slice is over, not at once (Linux only).

    gloo's wake for every few packets, and by default each time interrupt what computes on their core:
    1,200 times a step where 13.5 M parameters travel at 1 Gbit/s, 300 as batch work; 5% of the step.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # threads inherit it
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
