"""Who keeps the others waiting: the judgement on a hang, from what every rank says about itself.

A pure function of records (observe/watch.py gathers them and has the thread). What is proof is said
at once, whatever the run is doing:

- failed: a rank's program has ended with an exception, or ended without a collective that others are
  in; or its process is gone without a word.
- parted: ranks have begun different collectives at the same place of a group's order: another
  operation, or other bytes where those must be equal. One more of the same kind on one rank cannot
  be seen as such; it ends in one of the others.
- circle: each of some ranks stands still in a collective that another one of them has not begun,
  which stands still itself. Nothing can move any more. Not with NCCL, where a rank does not stand
  still in a collective but leaves it to a stream.

What may be innocent takes longer:

- stopped: a rank's heartbeat is gone. On the same machine /proc tells a stopped process from one that
  computes in a single call under the interpreter's lock (json, sorted), which is only slow; a rank of that
  machine that waits too tells all others.
- silent: the same on a machine on which nobody else waits. Of that nobody can tell one from the other,
  and so it is no hang but said for what it is; after longer, and outside of steps much longer.
- slow: a rank is alive and has not begun what others wait for. Whether that is a hang nobody can know:
  who writes a checkpoint, evaluates, compiles, prepares data or loads a model is late for good reason.
  So it is information, given after LATE_S inside of a step, LATE_EARLY_S in the first steps (which
  compile), five times the longest wait that has passed, and never in a checkpoint, an
  evaluation or before the first step. When a wait has failed it is always given.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

PATIENCE_S = 1.0
"""Standing still for less is nobody's business."""
CIRCLE_S = 1.5
"""More than two beats: records of waits as old as that describe one moment."""
STOPPED_S = 1.0
"""Without a heartbeat, while /proc says that the process is stopped."""
SILENT_S = 3.0
"""Without a heartbeat, on another machine, inside of a step."""
BLOCKED_S = 10.0
"""The same on this machine, neither stopped nor computing."""
SILENT_OUTSIDE_S = 120.0
"""Outside of a step, wherever: safetensors up to 0.6 holds the interpreter while it writes a file."""
LATE_S, LATE_EARLY_S = 30.0, 120.0
SHOWN = 6
"""Calls of a stack in a line."""

STEP = ("compute", "communication", "waiting", "data", "optimizer")
"""Phases of the clock in which nobody is late for long."""


# --- what a rank says about itself


@dataclass(frozen=True)
class Progress:
    """How far a rank is in a group."""

    ranks: tuple[int, ...]
    """Those in the group; empty: all."""
    issued: int
    """Sequence number of the last collective that it has begun."""
    recent: dict[int, tuple[str, int, str]] = field(default_factory=dict)
    """Some of the last ones: sequence -> (operation, payload bytes, who began it).

    The bytes are -1 where ranks may differ; who began it may be empty, where that was lost."""


@dataclass(frozen=True)
class Wait:
    """The collective that a rank waits in."""

    key: str
    group: str
    operation: str
    sequence: int
    payload_bytes: int
    waited_s: float
    blocked: bool
    """Its main thread stands still in it, instead of having left it to a GPU's stream."""

    def __str__(self) -> str:
        size = f" ({_size(self.payload_bytes)})" if self.payload_bytes >= 0 else ""
        return f"{self.operation} {self.sequence}{size} of group {self.group!r}"


@dataclass(frozen=True)
class Record:
    """What a rank posts. Read from JSON that any peer may have written."""

    beat: int
    pid: int
    machine: str
    """Names the machine, and the namespace that `pid` is of."""
    host: str
    phase: str
    stack: list[str]
    """Where its main thread is, innermost call first."""
    idle_s: float = 0.0
    """For how long the main thread has used no processor."""
    wait: Wait | None = None
    groups: dict[str, Progress] = field(default_factory=dict)
    sees: dict[int, tuple[str, bool]] = field(default_factory=dict)
    """Silent ranks of its own machine: /proc's letter for the state, and whether it computes."""
    ended: str | None = None
    """How its program has ended: OVER, LOST and by what, or the exception."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @staticmethod
    def from_json(text: bytes) -> "Record | None":
        """None where it is none; every field has its type, and words are on one line."""
        try:
            v = json.loads(text)
            w, ended = v["wait"], v["ended"]
            return Record(
                beat=int(v["beat"]),
                pid=int(v["pid"]),
                machine=_words(v["machine"]),
                host=_words(v["host"]),
                phase=_words(v["phase"]),
                stack=[_words(call) for call in v["stack"]],
                idle_s=float(v["idle_s"]),
                wait=Wait(
                    _words(w["key"]), _words(w["group"]), _words(w["operation"]), int(w["sequence"]),
                    int(w["payload_bytes"]), float(w["waited_s"]), bool(w["blocked"]),
                ) if w else None,
                groups={
                    key: Progress(
                        tuple(map(int, g["ranks"])),
                        int(g["issued"]),
                        {int(s): (_words(op), int(n), _words(by)) for s, (op, n, by) in g["recent"].items()},
                    )
                    for key, g in v["groups"].items()
                },
                sees={int(r): (_words(state), bool(computes)) for r, (state, computes) in v["sees"].items()},
                ended=None if ended is None else _words(ended),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None


def _words(value: Any) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value))


OVER, LOST = "over", "lost: "
"""Ended as all do, or because of somebody else."""
GONE = "gone"


@dataclass(frozen=True)
class Seen:
    """What this rank knows of one rank."""

    record: Record
    silent_s: float = 0.0
    """Since its record has last changed, as seen from here; 0 when it was read for the first time."""
    process: str = "?"
    """/proc's letter for its state, GONE, or ? on another machine."""
    computes: bool = False
    """Silent, but its process uses the processor."""

    @property
    def waits(self) -> bool:
        """It runs and stands still, so that it will look for the reason."""
        still = self.record.wait is not None or self.record.idle_s >= PATIENCE_S
        return still and not self.record.ended and self.silent_s < STOPPED_S


# --- the judgement


@dataclass(frozen=True)
class Verdict:
    """`kind`: failed, parted, circle, stopped, silent, slow, store."""

    kind: str
    ranks: tuple[int, ...]
    """Whom it names."""
    text: str
    """One line."""

    @property
    def line(self) -> str:
        return f"{HEADLINE[self.kind]}: {self.text}"

    @property
    def subject(self) -> str:
        return _ranks(self.ranks) if self.ranks else "all ranks"


HEADLINE = {
    "failed": "lost", "parted": "desynchronized", "circle": "desynchronized", "stopped": "hang",
    "silent": "silent", "store": "hang", "slow": "slow",
}  # fmt: skip


def judge(
    me: int, seen: dict[int, Seen], *, late_s: float = LATE_S, final: bool = False
) -> Verdict | None:
    """Who keeps rank `me`, itself part of `seen`, waiting; None while there is nothing to say.

    `late_s`: after which an alive rank is called slow. `final`: the wait is over, so say what is
    known of it, however innocent.
    """
    return (
        _failed(me, seen)
        or _parted(seen)
        or _gone(me, seen)
        or _stopped(me, seen, final)
        or _circle(seen)
        or (_adopted(me, seen) if final else None)
        or _slow(me, seen, 0.0 if final else late_s, final)
    )


def _failed(me: int, seen: dict[int, Seen]) -> Verdict | None:
    ended = {r: s.record for r, s in seen.items() if r != me and s.record.ended}
    for rank, record in ended.items():
        assert record.ended
        if record.ended != OVER and not record.ended.startswith(LOST):
            return Verdict("failed", (rank,), f"rank {rank} ended with {record.ended}, in {_place(record)}{_who_waits(seen)}")  # fmt: skip
    for other in seen.values():
        for rank, record in ended.items():
            wait = other.record.wait
            if record.ended == OVER and wait and rank in _missing(wait, seen):
                text = f"rank {rank}'s program is over, without {wait}{_who_waits(seen)}"
                return Verdict("failed", (rank,), text)
    return None


def _parted(seen: dict[int, Seen]) -> Verdict | None:
    """The earliest place of a group's order at which ranks do not agree."""
    table: dict[tuple[int, str], dict[int, tuple[str, int, str]]] = {}
    for rank, known in seen.items():
        for key, progress in known.record.groups.items():
            for sequence, what in progress.recent.items():
                table.setdefault((sequence, key), {})[rank] = what
    for (sequence, key), by_rank in sorted(table.items()):
        sizes = {size for _, size, _ in by_rank.values() if size >= 0}
        if len({operation for operation, _, _ in by_rank.values()}) == 1 and len(sizes) <= 1:
            continue
        kinds: dict[tuple[str, int], list[int]] = {}
        for rank, (operation, size, _) in sorted(by_rank.items()):
            kinds.setdefault((operation, size), []).append(rank)
        parts = [
            f"{_ranks(ranks)} began {operation}"
            + (f" of {_size(size)}" if size >= 0 else "")
            + (f" in {by}" if (by := by_rank[ranks[0]][2]) else "")
            for (operation, size), ranks in sorted(
                kinds.items(), key=lambda item: (len(item[1]), item[1])
            )
        ]
        where = f"collective {sequence} of group {key.partition('/')[0]!r}"
        text = f"ranks have parted: as {where} " + ", ".join(parts)
        return Verdict("parted", _fewest(kinds.values()), text)
    return None


def _fewest(parts: Iterable[list[int]]) -> tuple[int, ...]:
    """The smallest part; of equal ones that without the lowest rank."""
    fewest: list[int] = min(parts, key=lambda ranks: (len(ranks), -ranks[0]))
    return tuple(fewest)


def _gone(me: int, seen: dict[int, Seen]) -> Verdict | None:
    for rank, known in seen.items():
        if rank != me and known.process == GONE and known.silent_s and not known.record.ended:
            text = (
                f"rank {rank} (process {known.record.pid}) has ended without a word: killed, or "
                f"crashed; last seen in {_place(known.record)}{_who_waits(seen)}"
            )
            return Verdict("failed", (rank,), text)
    return None


def _stopped(me: int, seen: dict[int, Seen], final: bool) -> Verdict | None:
    # A silent rank's phase is that of its last heartbeat; the one that waits knows where it is now.
    inside = seen[me].record.phase in STEP
    found = {r: why for r, s in seen.items() if r != me and (why := _why_silent(s, inside, final))}
    sure = [r for r in sorted(found) if seen[r].process != "?"]
    if not found:
        return None
    first, *more = sure or sorted(found)
    known = seen[first]
    who = f"rank {first} (process {known.record.pid} on {known.record.host})"
    neither = f"; neither {'does' if len(more) == 1 else 'do'} {_ranks(more)}" if more else ""
    after = f"{known.silent_s:.1f} s: {found[first]}; last seen in {_place(known.record)}{neither}"
    if sure:
        return Verdict(
            "stopped", (first, *more), f"{who} does not run for {after}{_who_waits(seen)}"
        )
    return Verdict(
        "silent", (first, *more), f"{who} gives no sign of life for {after}{_who_waits(seen)}"
    )


def _why_silent(known: Seen, inside: bool, final: bool) -> str | None:
    silent_s = known.silent_s
    inside = inside and known.record.phase in STEP
    if known.record.ended or known.process == GONE:
        return None
    if known.process in "Tt":
        why = "stopped by a signal" if known.process == "T" else "stopped by a debugger"
        return why if silent_s >= STOPPED_S else None
    if known.computes or known.process == "R":
        return None
    if known.process == "?":
        limit_s = SILENT_S
        why = "in one long call that lets no other thread run, or stopped, or its host or network is gone"
    elif known.process == "D":
        limit_s, why = LATE_S, "waits for the disk or swap"
    else:
        limit_s, why = BLOCKED_S, "its interpreter is blocked"
    limit_s = limit_s if inside else SILENT_OUTSIDE_S
    if final and known.process == "?":
        limit_s = STOPPED_S
    return why if silent_s >= limit_s else None


def _circle(seen: dict[int, Seen]) -> Verdict | None:
    """The ranks that stand still for one another: none of them can ever go on."""
    stuck = {
        r: wait
        for r, s in seen.items()
        if (wait := s.record.wait) and wait.blocked and wait.waited_s >= CIRCLE_S
        and not s.record.ended and s.silent_s < CIRCLE_S
    }  # fmt: skip
    while free := [r for r, wait in stuck.items() if not stuck.keys() & _missing(wait, seen)]:
        for rank in free:
            del stuck[rank]
    if not stuck:
        return None
    kinds: dict[str, list[int]] = {str(wait): [] for wait in stuck.values()}
    for rank, known in sorted(seen.items()):  # those too that came there a moment ago
        if str(known.record.wait) in kinds:
            kinds[str(known.record.wait)].append(rank)
    parts = [
        f"{_ranks(ranks)} in {what} at {_place(seen[ranks[0]].record)}"
        for what, ranks in sorted(kinds.items(), key=lambda item: (len(item[1]), item[1]))
    ]
    text = "ranks wait for one another: " + ", ".join(parts)
    return Verdict("circle", _fewest(kinds.values()), text)


def _adopted(me: int, seen: dict[int, Seen]) -> Verdict | None:
    """What a rank that has given up before has found."""
    for rank, known in seen.items():
        ended = known.record.ended or ""
        if rank != me and ended.startswith(LOST):
            return Verdict("failed", (), f"as rank {rank} has found, {ended.removeprefix(LOST)}")
    return None


def _slow(me: int, seen: dict[int, Seen], late_s: float, final: bool) -> Verdict | None:
    mine = seen[me].record
    if mine.wait is None or mine.wait.waited_s < late_s:
        return None
    if not final and mine.phase not in STEP:
        return None
    missing = _missing(mine.wait, seen)
    # Who stands still itself waits for somebody who comes first.
    at_work = [r for r in missing if not (w := seen[r].record.wait) or not w.blocked]
    for rank in at_work or missing:
        known = seen[rank].record
        if not final and known.phase in ("checkpoint", "evaluation"):
            return None
        idle = f"without using the processor for {known.idle_s:.0f} s" if known.idle_s >= 1 else "computing"  # fmt: skip
        if known.phase == "checkpoint":
            idle = "which writes a checkpoint: raise timeout_s, or write to a faster disk"
        text = (
            f"rank {rank} has not reached {mine.wait}; it is in {_place(known)}, {idle}"
            f"{_who_waits(seen)}"
        )
        return Verdict("slow", (rank,), text)
    if final:
        return Verdict("slow", (), f"every rank has reached {mine.wait}: the network does not carry it")  # fmt: skip
    return None


def _missing(wait: Wait, seen: dict[int, Seen]) -> set[int]:
    """Ranks of the group that have not begun what is waited for."""
    issued: dict[int, int] = {}
    for rank, known in seen.items():
        progress = known.record.groups.get(wait.key)
        if progress:
            issued[rank] = progress.issued
            for other in progress.ranks or seen:
                issued.setdefault(other, 0)
    return {r for r, sequence in issued.items() if r in seen and sequence < wait.sequence}


def _who_waits(seen: dict[int, Seen]) -> str:
    waits = {r: s.record.wait for r, s in seen.items() if s.record.wait and not s.record.ended and s.silent_s < STOPPED_S}  # fmt: skip
    if not waits:
        return ""
    longest = max(waits.values(), key=lambda wait: wait.waited_s)
    verb = "waits" if len(waits) == 1 else "wait"
    return f"; {_ranks(sorted(waits))} {verb} in {longest} for {longest.waited_s:.0f} s"


def _place(record: Record) -> str:
    return " < ".join(record.stack[:SHOWN]) or "no Python code"


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names)}"


def _size(nbytes: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
