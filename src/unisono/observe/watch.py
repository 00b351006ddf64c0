"""The watch: hangs and desynchronization are named while they last, and on every rank's exit.

Each rank has one daemon thread. Twice a second it posts a record on the board that the ranks share
(sync/board.py): a heartbeat, where the main thread is (file:line and the calls that led there, from
sys._current_frames), and from the ledger how far it is in every group. It reads the others' only
once its own rank has stood still for PATIENCE_S, and then judges (observe/verdict.py). All ranks
judge alike; the lowest that waits says it, once, and says so when it has passed. The same verdict is
part of the LostReplicas that ends the wait (`why_lost`), on every rank.

A machine that sleeps, a container that is frozen, all ranks stopped and continued: the watch finds
that it has not run itself, forgets what it knew of the others, and begins to count anew. If a wait
was over meanwhile, that is the cause it gives.

Standing still means to be blocked in a collective's `wait`; where that only tells a GPU's stream to
wait, to have a collective on the stream that is not finished; and else not to use the processor, which
covers collectives that are not in the ledger (torch's DDP, the making of a group): then what needs
no collective to be named is found, a failed or stopped rank.

Cost, measured by benchmarks/hangs.py: 0.6 ms of this thread twice a second and 2 us for a collective,
0.14% of a step of 16 ms. While a rank stands still it looks four times a second. The thread ends with the
`with`, also when an exception leaves it; it holds no reference to torch's works or groups and keeps
no process alive.
"""

import itertools
import os
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

from unisono.errors import EXIT_DONE, EXIT_STOPPED, Elsewhere, LostReplicas, Stopped, UnisonoError
from unisono.observe.verdict import (
    GONE,
    LATE_EARLY_S,
    LATE_S,
    LOST,
    OVER,
    PATIENCE_S,
    SILENT_S,
    STEP,
    STOPPED_S,
    Progress,
    Record,
    Seen,
    Verdict,
    Wait,
    judge,
)
from unisono.sync.board import Board, open_board, tape_key
from unisono.sync.ledger import Entry, Ledger, Position

BEAT_S = 0.5
"""Between two records."""
LOOK_S = 0.25
"""The same, while this rank stands still and looks at the others'."""
AWAY_S = 1.5
"""A beat that is so late was one that this process did not run for."""
WAKING_S = 10.0
"""After an absence: so long, a wait that fails does so for timeouts that were over meanwhile."""
EARLY_S = 120.0
"""From the first step on; models are compiled in this time."""
LAST_LOOK_S = 2.5
"""How long a rank that has lost the others looks for who it was."""
GONE_S = 0.5
"""A process that is gone for less may have left a last word that has not been read yet."""
CALLS, LONGEST = 12, 300
"""Of a stack, and characters of a message, in a record."""
COMPUTES = 0.05
"""Share of a processor from which on a thread or process computes."""
RECENT = 4
"""Collectives of a group, in a record: so many of those under way, and of the last."""

_numbers = itertools.count()


@contextmanager
def watched(ledger: Ledger, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Watch all ranks inside; each enters it after `joined`, and then not one leaves without a word.

    `say` shows a line to the user; by default it goes to standard error, with the rank.
    """
    watch = Watch.begin(ledger, say)
    try:
        yield
    except BaseException as error:
        watch.end(error)
        raise
    watch.end()


class Watch:
    """One rank's. `end` may be called more than once; the first call counts."""

    def __init__(
        self, ledger: Ledger, board: Board | None, say: Callable[[str], None] | None = None
    ) -> None:
        """Without a board, where a rank is alone, it does nothing."""
        self._here, self._clock = ledger.whereabouts, ledger.clock
        self.spent_s = 0.0
        """Processor time of the thread so far."""
        self._over = threading.Event()
        if board is None:
            self._over.set()
            return
        self._board = board
        self._say = say or self._to_stderr
        self._tape = board.own_tape()
        self._tape_keys: dict[str, int] = {}
        self._main = threading.get_ident()
        self._idle = _Idle(self._main)
        self._machine, self._host = _machine(), socket.gethostname()
        self._beat = 0
        self._seen: dict[int, _Beat] = {}
        self._sees: dict[int, tuple[str, bool]] = {}
        """What this rank sees of the silent ones of its machine, for those elsewhere."""
        self._gone_at: dict[int, float] = {}
        """When a rank's process was first found gone."""
        self._ran = time.monotonic()
        """When this process was last seen to run."""
        self._back = self._away_s = 0.0
        """Since when it runs again (time.perf_counter()), and for how long it had not."""
        self._first_step = float("inf")
        self._longest_wait_s = self._waited_s = 0.0
        self._known: set[tuple[str, tuple[int, ...]]] = set()
        """Verdicts on the present wait."""
        self._said: Verdict | None = None
        self._found: Verdict | None = None
        """The last one on the present wait that was proof."""
        self._why: str | None = None
        """What `why_lost` has answered."""
        self._lock = threading.Lock()
        """Of all this: when a wait has failed, the main thread looks too."""
        board.post(self._record().to_json())
        self._here.witness = self
        self._thread = threading.Thread(target=self._run, name="unisono-watch", daemon=True)
        self._thread.start()

    @staticmethod
    def begin(ledger: Ledger, say: Callable[[str], None] | None = None) -> "Watch":
        """Every rank alike, after it has joined the others."""
        return Watch(ledger, open_board(f"watch{next(_numbers)}"), say)

    def end(self, error: BaseException | None = None) -> None:
        """The others learn that this rank's program is over, or what `error` ended it."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(2.0)
        self._here.witness = None
        self._here.queued.clear()
        record = replace(self._record(), ended=_ending(error, self._why))
        if error is not None:
            calls = list(traceback.walk_tb(error.__traceback__))[::-1]
            stack = _stack((f.f_code.co_filename, n, f.f_code.co_name) for f, n in calls)
            record = replace(record, stack=stack)
        self._board.post(record.to_json())
        self._board.close()

    def end_with_program(self) -> None:
        """At the interpreter's exit; `last_value` is the exception that led to it, if one did."""
        self.end(getattr(sys, "last_value", None))

    # --- what the ledger asks (sync/ledger.py, Witness)

    def issued(self, position: Position, entry: Entry) -> None:
        if self._tape is None:
            return
        key = self._tape_keys.get(position.key)
        if key is None:
            key = self._tape_keys[position.key] = tape_key(position.key)
        self._tape.write(key, entry.operation, entry.sequence, entry.payload_bytes)

    def why_lost(self) -> str:
        """The peers that noticed first may not have said yet what they know, hence some patience.

        It never raises: that the others are lost must be told in any case.
        """
        try:
            return self._why_lost()
        except Exception as error:
            return f"why is not known: the watch failed with {type(error).__name__}: {error}"

    def _why_lost(self) -> str:
        deadline = time.monotonic() + LAST_LOOK_S
        while True:
            final = time.monotonic() > deadline
            with self._lock:
                self._notice_absence()
                verdict = self._judge(self._look(self._post()), final)
            if self._found and (verdict is None or verdict.kind in ("slow", self._found.kind)):
                verdict = self._found  # when all ranks were still there to be seen
            proof = verdict is not None and verdict.kind != "slow"
            if final or proof:
                why = verdict.text if verdict else ""
                self._why = why if proof else self._own_absence() or why
                return self._why
            time.sleep(0.1)

    # --- the thread

    def _run(self) -> None:
        looking = False
        try:
            while not self._over.wait(LOOK_S if looking else BEAT_S):
                with self._lock:
                    self._notice_absence()
                    looking, line = self._tick()
                if line:  # without the lock: a terminal may block
                    self._say(line)
                self.spent_s = time.thread_time()
        except Exception as error:
            self._say(f"hangs are no longer watched for: {type(error).__name__}: {error}")

    def _notice_absence(self) -> None:
        """If this process did not run for a while, the others may not have either: forget them."""
        now = time.monotonic()
        if now - self._ran > BEAT_S + AWAY_S:
            self._seen.clear()
            self._back, self._away_s = time.perf_counter(), now - self._ran
        self._ran = now

    def _own_absence(self) -> str:
        """What there is to say of it, if the present wait began before or soon after."""
        standing = self._here.standing
        if standing is None or not self._away_s or standing[2] > self._back + WAKING_S:
            return ""
        return f"this rank itself did not run for {self._away_s:.0f} s: it was stopped, or the machine slept"

    def _tick(self) -> tuple[bool, str]:
        """Whether this rank stands still, and what there is to say."""
        mine = self._post()
        if mine.phase in STEP:
            self._first_step = min(self._first_step, time.monotonic())
        standing_s = mine.wait.waited_s if mine.wait else mine.idle_s
        if standing_s < PATIENCE_S:
            return False, self._passed()
        if mine.wait:
            self._waited_s = standing_s
        seen = self._look(mine)
        verdict = self._judge(seen)
        if verdict and verdict.kind != "slow":
            self._found = verdict
        if verdict and (verdict.kind, verdict.ranks) not in self._known:
            self._known.add((verdict.kind, verdict.ranks))
            waiting = [r for r, s in seen.items() if s.waits and r not in verdict.ranks]
            if min(waiting, default=self._board.rank) == self._board.rank:
                self._said = verdict
                return True, verdict.line
        return True, ""

    def _passed(self) -> str:
        """This rank does not stand still, or no longer."""
        line = ""
        if self._said and self._why is None:
            line = f"went on after {self._waited_s:.0f} s: {self._said.subject}"
        self._longest_wait_s = max(self._longest_wait_s, self._waited_s)
        self._waited_s, self._said, self._found = 0.0, None, None
        self._known.clear()
        self._sees = {}
        return line

    def _judge(self, seen: dict[int, Seen], final: bool = False) -> Verdict | None:
        early = time.monotonic() - self._first_step < EARLY_S
        late_s = max(LATE_EARLY_S if early else LATE_S, 5 * self._longest_wait_s)
        verdict = judge(self._board.rank, seen, late_s=late_s, final=final)
        silent_s = self._board_silent_s()
        if silent_s < SILENT_S or (verdict and verdict.kind != "slow"):
            return verdict
        text = (
            f"the rendezvous store at {self._board.place} has not answered for {silent_s:.1f} s: "
            f"rank 0 or torchrun there, which keeps it, is stopped or gone, or the network is down"
        )
        return Verdict("store", (), text)

    def _board_silent_s(self) -> float:
        return min(self._board.silent_s(), time.perf_counter() - self._back)

    # --- records

    def _post(self) -> Record:
        record = self._record()
        self._board.post(record.to_json())
        return record

    def _record(self) -> Record:
        self._beat += 1
        frame = sys._current_frames().get(self._main)
        stack = _stack((f.f_code.co_filename, f.f_lineno, f.f_code.co_name) for f in _outwards(frame))  # fmt: skip
        return Record(
            beat=self._beat,
            pid=os.getpid(),
            machine=self._machine,
            host=self._host,
            phase=self._clock.phase,
            stack=stack,
            idle_s=self._idle.seconds(self._back),
            wait=self._wait(),
            groups={p.key: self._progress(p) for p in list(self._here.positions.values())},
            sees=self._sees,
        )

    def _wait(self) -> Wait | None:
        queued = self._here.queued
        # As torch's own NCCL watchdog does: asking for an event is allowed from any thread. Under the
        # capture of a CUDA graph both would break it, unless that is thread-local.
        while queued and queued[0][2].query():
            queued.popleft()
        standing = self._here.standing
        if standing:
            position, entry, began = standing
        elif queued:
            position, entry, _ = queued[0]
            began = entry.finished
        else:
            return None
        waited_s = time.perf_counter() - max(began, self._back)
        return Wait(
            position.key, entry.group, entry.operation, entry.sequence, entry.payload_bytes,
            waited_s, blocked=standing is not None,
        )  # fmt: skip

    def _progress(self, position: Position) -> Progress:
        issued = list(position.issued)
        under_way = [e for e in issued if not e.finished][:RECENT]
        recent = {
            e.sequence: (e.operation, e.payload_bytes, _began(e.calls))
            for e in [*under_way, *issued[-RECENT:]]
        }
        ranks = position.ranks if len(position.ranks) < self._board.size else ()
        return Progress(ranks, issued[-1].sequence if issued else 0, recent)

    def _look(self, mine: Record) -> dict[int, Seen]:
        """What all ranks say, and what can be seen of their processes on this machine."""
        # A board that cannot be reached makes nobody silent.
        now = time.monotonic() - self._board_silent_s()
        seen = {self._board.rank: Seen(mine)}
        for rank, text in self._board.read().items():
            record = Record.from_json(text)
            if record is None or rank == self._board.rank:
                continue
            process, used_s = "?", 0.0
            if record.machine == self._machine:
                process, used_s = _process(record.pid)
            if process == GONE:
                gone_s = time.monotonic() - self._gone_at.setdefault(rank, time.monotonic())
                process = GONE if gone_s >= GONE_S else "S"
            beat = self._seen.get(rank)
            if beat is None or beat.number != record.beat:
                beat = self._seen[rank] = _Beat(record.beat, now, used_s)
            silent_s = max(0.0, now - beat.at)
            computes = used_s - beat.used_s > COMPUTES * silent_s
            record = replace(record, groups=self._from_tape(rank, record, mine))
            seen[rank] = Seen(record, silent_s, process, computes)
        self._sees = {
            r: (s.process, s.computes)
            for r, s in seen.items()
            if s.record.machine == self._machine and s.silent_s >= STOPPED_S
        }
        return _with_neighbours(seen)

    def _from_tape(self, rank: int, record: Record, mine: Record) -> dict[str, Progress]:
        """How far the rank is, up to this moment if it has a tape here."""
        tape = self._board.tape(rank)
        if tape is None:
            return record.groups
        begun = tape.read()
        groups = dict(record.groups)
        for key in {*groups, *mine.groups}:
            newest = begun.get(tape_key(key))
            if newest:
                before = groups.get(key) or replace(mine.groups[key], recent={})
                asked = mine.groups[key].recent if key in mine.groups else {}
                known = {s: (*what, "") for s, what in newest.items() if s in asked}
                recent = known | before.recent
                groups[key] = Progress(before.ranks, max(newest), recent)
        return groups

    def _to_stderr(self, line: str) -> None:
        with suppress(OSError):
            print(f"unisono [rank {self._board.rank}]: {line}", file=sys.stderr, flush=True)


def _with_neighbours(seen: dict[int, Seen]) -> dict[int, Seen]:
    """What cannot be seen of a rank from here, as a rank that runs on its machine says it is."""
    told = {
        (s.record.machine, rank): sight
        for s in seen.values()
        if s.silent_s < STOPPED_S
        for rank, sight in s.record.sees.items()
    }
    found = dict(seen)
    for rank, s in seen.items():
        sight = told.get((s.record.machine, rank))
        if s.process == "?" and s.silent_s >= STOPPED_S and sight:
            found[rank] = replace(s, process=sight[0], computes=sight[1])
    return found


@dataclass(frozen=True)
class _Beat:
    """A rank's last heartbeat: its number, when it was first seen here, what its process had used."""

    number: int
    at: float
    used_s: float


class _Idle:
    """For how long a thread has used no processor."""

    def __init__(self, thread: int) -> None:
        self._clock = None
        with suppress(AttributeError, OSError):  # not on every system
            self._clock = time.pthread_getcpuclockid(thread)
        self._used_s, self._since = 0.0, time.perf_counter()

    def seconds(self, back: float) -> float:
        """`back`: nothing before it counts."""
        now = time.perf_counter()
        used_s = time.clock_gettime(self._clock) if self._clock is not None else now
        if used_s - self._used_s > COMPUTES * (now - self._since):
            self._used_s, self._since = used_s, now
        return now - max(self._since, back)


def _process(pid: int) -> tuple[str, float]:
    """Its state as /proc has it, GONE if there is none, and the processor time it has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return GONE, 0.0
    state = GONE if fields[0] in "ZX" else fields[0]
    return state, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _machine() -> str:
    """The machine since its start, and the namespace of its process numbers; unlike any other's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # without /proc a rank knows only itself


def _ending(error: BaseException | None, why_lost: str | None) -> str:
    if error is None or isinstance(error, Stopped | Elsewhere):
        return OVER
    if isinstance(error, LostReplicas):
        return LOST + (why_lost or str(error))
    if isinstance(error, SystemExit) and error.code in (None, EXIT_DONE, EXIT_STOPPED):
        return OVER
    if isinstance(error, UnisonoError) and error.everywhere:
        return OVER
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:LONGEST]}" if lines else type(error).__name__


# --- places


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stack(calls: Iterable[tuple[str, int, str]]) -> list[str]:
    """`calls` (file, line, function), innermost first, without those inside of libraries and the ledger.

    If the innermost is a library's, it is told with the call that led to it.
    """
    found: list[str] = []
    library = ""
    for file, line, function in calls:
        name, ours = _file(file)
        if not ours:
            library = library or (f" (in {name}:{line} {function})" if not found and name else "")
        elif len(found) < CALLS:
            found.append(f"{name}:{line} {function}{library}")
            library = ""
    return found


@lru_cache(maxsize=4096)
def _began(calls: tuple[tuple[CodeType, int], ...]) -> str:
    return " < ".join(_stack((code.co_filename, line, code.co_name) for code, line in calls))


_PACKAGE = Path(__file__).parents[1]
_HIDDEN = {str(_PACKAGE / name) for name in ("sync/ledger.py", "clock.py", "observe/watch.py")}
_LIBRARIES = tuple({str(Path(p)) + os.sep for p in sysconfig.get_paths().values()})


@lru_cache(maxsize=4096)
def _file(path: str) -> tuple[str, bool]:
    """(short name, whether it is a user's or ours)."""
    if path in _HIDDEN:
        return "", False
    if path.startswith(str(_PACKAGE) + os.sep):
        return os.path.relpath(path, _PACKAGE.parent), True
    short = os.sep.join(path.split(os.sep)[-2:])
    if path.startswith(("<", *_LIBRARIES)):
        return short, False
    return os.path.basename(path), True
