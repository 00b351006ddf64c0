"""Hangs and desynchronization are named in one line, and nothing else is."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unisono
from jobs import make_job, write_corpus
from jobs import run as run_job
from ranks import Ranks, run_ranks, started
from unisono.config import Config
from unisono.errors import ReplicaError
from unisono.observe import verdict, watch
from unisono.observe.watch import watched
from unisono.sync.ledger import Group, Ledger

TIMEOUT_S = 5.0


def take_part(world, folder: str, fault: Callable | None = None, timeout_s: float = 60.0) -> str:
    """Steps until a file `enough` exists; what each rank says goes to `said-RANK`."""
    path = Path(folder)

    def say(line: str) -> None:
        with (path / f"said-{world.rank}").open("a") as file:
            file.write(line + "\n")

    ledger = Ledger()
    end = "done"
    try:
        with watched(ledger, say):
            group, other = (Group(name, ledger, timeout_s) for name in ("votes", "other"))
            step, enough = 0, False
            while not enough:
                with ledger.clock("communication"):
                    enough = group.sum(float((path / "enough").exists()), 1.0)[0] > 0
                    other.each(1.0)
                step += 1
                (path / f"step-{world.rank}").write_text(str(step))
                if fault and step == 5:
                    fault(world, group, other)
    except (ReplicaError, ValueError) as error:
        end = f"{type(error).__name__}: {error}"
    (path / f"end-{world.rank}").write_text(end)
    if not end.startswith("done"):
        os._exit(1)
    return end


def said(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("said-*")) for line in path.read_text().splitlines()]  # fmt: skip


def ends(folder: Path) -> dict[int, str]:
    return {int(p.name[4:]): p.read_text() for p in sorted(folder.glob("end-*")) if p.read_text()}


def wait_for(condition: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def training(folder: Path) -> Callable[[], bool]:
    """All ranks have taken a step more than when this was called."""
    before = {p.name: p.read_text() for p in folder.glob("step-*")}
    return lambda: (
        len(list(folder.glob("step-*"))) == 3
        and all(p.read_text() not in ("", before.get(p.name)) for p in folder.glob("step-*"))
    )


def steps(folder: Path) -> set[int]:
    return {int(p.read_text() or 0) for p in folder.glob("step-*")}


def pid_of(ranks: Ranks, rank: int) -> int:
    return ranks._processes[rank].pid


# --- what must be named


def test_a_stopped_rank_is_named_while_the_others_wait_and_may_go_on(tmp_path: Path) -> None:
    with started(take_part, 3, str(tmp_path), join=True) as ranks:
        wait_for(training(tmp_path))
        ranks.signal(signal.SIGSTOP, rank=2)
        wait_for(lambda: said(tmp_path))
        ranks.signal(signal.SIGCONT, rank=2)
        wait_for(lambda: len(said(tmp_path)) > 1)
        (tmp_path / "enough").touch()
        assert ranks.result() == ["done"] * 3
        pid = pid_of(ranks, 2)
    hang, passed = said(tmp_path)
    assert hang.startswith(f"hang: rank 2 (process {pid} on ")
    assert ": stopped by a signal; last seen in test_watch.py:" in hang
    assert "ranks 0, 1 wait in all-" in hang
    assert passed.startswith("went on after ")
    assert passed.endswith(": rank 2")


def test_a_stopped_rank_is_in_what_every_other_rank_raises(tmp_path: Path) -> None:
    with started(take_part, 3, str(tmp_path), None, TIMEOUT_S, join=True) as ranks:
        wait_for(training(tmp_path))
        ranks.signal(signal.SIGSTOP, rank=1)
        wait_for(lambda: len(ends(tmp_path)) == 2)
    for rank in (0, 2):
        line = ends(tmp_path)[rank]
        assert line.startswith("LostReplicas: lost the other replicas in all-")
        assert f"rank 1 (process {pid_of(ranks, 1)} on " in line
        assert "stopped by a signal" in line
        assert "\n" not in line
    assert len(said(tmp_path)) == 1


def one_more(world, group: Group, other: Group) -> None:
    if world.rank == 2:
        group.each(1.0)


def one_more_alike(world, group: Group, other: Group) -> None:
    if world.rank == 2:
        group.sum(0.0, 1.0)


def one_less(world, group: Group, other: Group) -> None:
    if world.rank != 2:
        group.sum(1.0)


def a_larger_one(world, group: Group, other: Group) -> None:
    """gloo aborts the process that receives more than it asked for."""
    group.all_reduce(torch.ones(50_000 if world.rank == world.size - 1 else 2)).wait()


def raises(world, group: Group, other: Group) -> None:
    if world.rank == 1:
        raise ValueError("this sample cannot be")


def leaves(world, group: Group, other: Group) -> None:
    if world.rank == 1:
        os._exit(3)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (one_more, ["ranks have parted: as collective 6 of group 'votes' rank 2 began all-gather of 8 bytes in test_watch.py:", " one_more < test_watch.py:", "ranks 0, 1 began all-reduce of 16 bytes in test_watch.py:"]),
        (one_more_alike, ["ranks wait for one another: rank 2 in all-reduce 7", "ranks 0, 1 in all-gather 6"]),
        (one_less, ["ranks have parted: as collective 6 of group 'votes' rank 2 began all-reduce of 16 bytes", "ranks 0, 1 began all-reduce of 8 bytes"]),
        (a_larger_one, ["ranks have parted: as collective 6 of group 'votes' rank 2 began all-reduce of 195.3 KiB", "began all-reduce of 8 bytes"]),
        (raises, ["rank 1 ended with ValueError: this sample cannot be, in test_watch.py:", " raises < test_watch.py:"]),
        (leaves, ["rank 1 (process ", "has ended without a word: killed, or crashed; last seen in "]),
    ],
)  # fmt: skip
def test_who_is_to_blame_is_in_what_every_other_rank_raises(
    tmp_path: Path, fault: Callable, words: list[str]
) -> None:
    with started(take_part, 3, str(tmp_path), fault, TIMEOUT_S, join=True) as ranks:
        ranks.join()
    told = {r: line for r, line in ends(tmp_path).items() if line.startswith("LostReplicas: ")}
    assert told
    if fault in (raises, leaves):
        assert sorted(told) == [0, 2]
    elif fault is not a_larger_one:
        assert sorted(told) == [0, 1, 2]
    for line in told.values():
        for word in words:
            assert word in line
        assert "\n" not in line
    assert len(said(tmp_path)) <= 1


def test_two_ranks_of_which_one_is_aborted_by_gloo(tmp_path: Path) -> None:
    """The tape outlives the process that was aborted."""
    with started(take_part, 2, str(tmp_path), a_larger_one, TIMEOUT_S, join=True) as ranks:
        ranks.join()
    [line] = ends(tmp_path).values()
    assert "rank 1 began all-reduce of 195.3 KiB" in line
    assert "rank 0 began all-reduce of 8 bytes" in line


class LastWord:
    """A board on which the other rank's last word comes late."""

    place, rank, size = "", 0, 2

    def __init__(self, *records: verdict.Record) -> None:
        self.records = iter(records)

    def post(self, record: bytes) -> None: ...

    def read(self) -> dict[int, bytes]:
        return {1: next(self.records).to_json()}

    def silent_s(self) -> float:
        return 0.0

    def own_tape(self) -> None: ...

    def tape(self, rank: int) -> None: ...

    def close(self) -> None: ...


def test_a_last_word_is_waited_for() -> None:
    """The rank has said why it ends, and is gone before its record is read."""
    with subprocess.Popen(["true"]) as ended:
        pass
    living = verdict.Record(7, ended.pid, watch._machine(), "h", "compute", [])
    word = replace(living, beat=8, ended=verdict.LOST + "rank 3 is gone")
    looking = watch.Watch(Ledger(), LastWord(living, living, word))
    looks = [looking._look(looking._record()) for _ in range(3)]
    looking.end()
    assert [verdict.judge(0, seen) for seen in looks] == [None] * 3


def test_a_watch_that_fails_does_not_hide_that_the_others_are_lost() -> None:
    class Broken(LastWord):
        def read(self) -> dict[int, bytes]:
            raise MemoryError("no room")

    looking = watch.Watch(Ledger(), Broken())
    assert looking.why_lost() == "why is not known: the watch failed with MemoryError: no room"
    looking.end()


def elsewhere(rank: int, **changes) -> verdict.Seen:
    """What is known here of a rank on another machine."""
    record = verdict.Record(7, 1, "other machine", "h", "compute", [])
    silent_s = changes.pop("silent_s", 0.0)
    return verdict.Seen(replace(record, **changes), silent_s)


def test_a_rank_beside_a_silent_one_tells_the_ranks_elsewhere() -> None:
    """A process that computes in one long call is no hang, and one that is stopped is."""
    for sight, process in ((("T", False), "T"), (("R", True), "R"), (("S", True), "S")):
        known = {1: elsewhere(1, silent_s=3.5), 2: elsewhere(2, sees={1: sight})}
        found = watch._with_neighbours(known)
        assert (found[1].process, found[1].computes) == (process, sight[1])
        assert found[2] == known[2]
    on_a_third = replace(known[2].record, machine="third machine")
    for nothing in (
        {1: known[1]},
        {1: known[1], 2: elsewhere(2, sees={1: ("T", False)}, silent_s=3.5)},
        {1: known[1], 2: verdict.Seen(on_a_third)},
        {1: elsewhere(1, silent_s=0.2), 2: known[2]},
    ):
        assert watch._with_neighbours(nothing)[1].process == "?"


def on_two_machines(world, folder: str, first_there: int) -> str:
    """Ranks from `first_there` on are on another machine, as far as all of them know."""
    if world.rank >= first_there:
        watch._machine = lambda: "another machine"
    verdict.SILENT_OUTSIDE_S = verdict.SILENT_S  # its last heartbeat may come between two steps
    return take_part(world, folder, None, 60.0)


@pytest.mark.parametrize(
    ("first_there", "line"), [(2, "silent: rank 2 (process "), (1, "hang: rank 2 (process ")]
)
def test_rank_0_knows_of_a_stopped_rank_elsewhere_what_its_neighbour_sees(
    tmp_path: Path, meeting: dict[str, str], first_there: int, line: str
) -> None:
    with started(on_two_machines, 3, str(tmp_path), first_there, join=True, env=meeting) as ranks:
        wait_for(training(tmp_path))
        ranks.signal(signal.SIGSTOP, rank=2)
        wait_for(lambda: said(tmp_path))
        ranks.signal(signal.SIGCONT, rank=2)
        wait_for(lambda: len(said(tmp_path)) > 1)
        (tmp_path / "enough").touch()
        assert ranks.result() == ["done"] * 3
    found, passed = said(tmp_path)
    assert found.startswith(line), found
    assert passed.endswith(": rank 2")


# --- ranks that meet through a TCPStore, as under torchrun


@pytest.fixture
def meeting() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"UNISONO_STORE": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_a_stopped_rank_is_named_through_a_store(tmp_path: Path, meeting: dict[str, str]) -> None:
    with started(take_part, 3, str(tmp_path), join=True, env=meeting) as ranks:
        wait_for(training(tmp_path))
        ranks.signal(signal.SIGSTOP, rank=2)
        wait_for(lambda: said(tmp_path))
        ranks.signal(signal.SIGCONT, rank=2)
        wait_for(lambda: len(said(tmp_path)) > 1)
        (tmp_path / "enough").touch()
        assert ranks.result() == ["done"] * 3
    hang, passed = said(tmp_path)
    assert hang.startswith("hang: rank 2 (process ")
    assert passed.endswith(": rank 2")


def test_ranks_that_have_parted_are_named_through_a_store(
    tmp_path: Path, meeting: dict[str, str]
) -> None:
    with started(take_part, 3, str(tmp_path), one_less, TIMEOUT_S, join=True, env=meeting) as ranks:
        ranks.join()
    assert sorted(ends(tmp_path)) == [0, 1, 2]
    for line in ends(tmp_path).values():
        assert "ranks have parted: as collective 6 of group 'votes' rank 2 began" in line


def test_a_store_that_does_not_answer(tmp_path: Path, meeting: dict[str, str]) -> None:
    """Rank 0 keeps it; a thread that asks it stands for good, and still nothing outlives the run."""
    with started(take_part, 3, str(tmp_path), None, 8.0, join=True, env=meeting) as ranks:
        wait_for(training(tmp_path))
        ranks.signal(signal.SIGSTOP, rank=0)
        wait_for(lambda: len(ends(tmp_path)) == 2)
    for line in ends(tmp_path).values():
        assert (
            f"the rendezvous store at 127.0.0.1:{meeting['MASTER_PORT']} has not answered" in line
        )
    assert said(tmp_path)[0].startswith("hang: the rendezvous store at ")


# --- what is on a GPU's stream


class OnStream:
    """In place of a torch.cuda.Event: whether the stream has come to it."""

    def __init__(self, come: bool) -> None:
        self.come = come

    def query(self) -> bool:
        return self.come


def stand_before_streams(world) -> list:
    ledger = Ledger()
    watched_by = watch.Watch.begin(ledger)
    group = Group("shard", ledger, 60)
    group.sum(1.0)
    group.sum(2.0)
    [position] = ledger.whereabouts.positions.values()
    events = [OnStream(True), OnStream(False)]
    ledger.whereabouts.queued.extend(zip([position] * 2, position.issued, events))
    watched_by._back = time.perf_counter() - 60
    found = [watched_by._wait()]
    events[1].come = True
    found.append(watched_by._wait())
    watched_by.end()
    return [w and (w.operation, w.sequence, w.blocked) for w in found]


def test_the_oldest_collective_that_a_stream_has_not_finished_is_what_a_rank_waits_in() -> None:
    """NCCL's `wait` returns at once. Events are stood in for: no two GPUs were at hand."""
    assert run_ranks(stand_before_streams, 2) == [[("all-reduce", 2, False), None]] * 2


# --- a loop of one's own

OWN_LOOP = """
import os, sys, time, torch, unisono
world = unisono.join(timeout_s=20)
model = torch.nn.Linear(4, 1)
sync = unisono.replicate(model, timeout_s=20)
def load(step):
    if world.rank == 1 and step == 3:
        raise KeyError("no such sample")
    return torch.ones(2, 4)
for step in range(STEPS):
    model(load(step)).sum().backward()
    sync.finish(2)
"""


def own_loop(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "own.py"
    script.write_text(text)
    code = (
        "import sys; from unisono.launch.local import launch; "
        f"sys.exit(launch([sys.executable, {str(script)!r}], 3, 1))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(unisono.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100
    )


def test_an_exception_in_a_loop_of_ones_own_is_told_by_every_other_rank(tmp_path: Path) -> None:
    done = own_loop(tmp_path, OWN_LOOP.replace("STEPS", "9"))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "LostReplicas: lost the other" in line]
    assert len(lines) == 2
    for line in lines:
        assert "rank 1 ended with KeyError: 'no such sample', in own.py:8 load < own.py:11 <module>" in line  # fmt: skip


def test_a_loop_of_ones_own_that_ends_well_says_nothing(tmp_path: Path) -> None:
    """No thread keeps the interpreter, none is caught in its end."""
    done = own_loop(tmp_path, OWN_LOOP.replace("STEPS", "3"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what must not be named


def be_late_for_long(world, group: Group, other: Group) -> None:
    """So that the others look at it, while the machine sleeps."""
    if world.rank == 2:
        time.sleep(3 * watch.BEAT_S + verdict.PATIENCE_S + 5.0)


def test_a_machine_that_sleeps_names_nobody(tmp_path: Path) -> None:
    with started(take_part, 3, str(tmp_path), be_late_for_long, join=True) as ranks:
        wait_for(lambda: steps(tmp_path) == {5})
        time.sleep(3 * watch.BEAT_S + verdict.PATIENCE_S)  # the others look
        ranks.signal(signal.SIGSTOP)
        time.sleep(4.0)  # how long the machine sleeps
        ranks.signal(signal.SIGCONT, rank=0)
        ranks.signal(signal.SIGCONT, rank=1)
        time.sleep(verdict.STOPPED_S / 2)  # not all wake at once
        ranks.signal(signal.SIGCONT)
        wait_for(training(tmp_path))
        (tmp_path / "enough").touch()
        assert ranks.result() == ["done"] * 3
    assert said(tmp_path) == []


@pytest.mark.parametrize("through_a_store", [False, True])
def test_a_machine_that_sleeps_for_longer_than_the_timeout_blames_nobody(
    tmp_path: Path, meeting: dict[str, str], through_a_store: bool
) -> None:
    env = meeting if through_a_store else None
    with started(take_part, 3, str(tmp_path), be_late_for_long, 4.0, join=True, env=env) as ranks:
        wait_for(lambda: steps(tmp_path) == {5})
        time.sleep(3 * watch.BEAT_S + verdict.PATIENCE_S)  # the others look
        ranks.signal(signal.SIGSTOP)
        time.sleep(12.0)  # longer than it takes to call a silent rank blocked
        ranks.signal(signal.SIGCONT)
        wait_for(lambda: {0, 1} <= ends(tmp_path).keys())
    for rank in (0, 1):
        line = ends(tmp_path)[rank]
        assert " did not run for 1" in line, line
    assert not [line for line in said(tmp_path) if line.startswith("hang")]


def slowly(function: Callable, seconds: float) -> Callable:
    def slow(*args: object, **options: object) -> object:
        time.sleep(seconds)
        return function(*args, **options)

    return slow


def late_for_good_reasons(world) -> None:
    """Rank 0 prepares and saves, rank 1 loads and evaluates, all for longer than is usual."""
    from unisono.train import checkpoint, job, loop

    watch.LATE_S = watch.LATE_EARLY_S = 1.5
    if world.rank == 0:
        job.prepare = slowly(job.prepare, 2.5)
        checkpoint.save = slowly(checkpoint.save, 2.5)
    else:
        job.load_model = slowly(job.load_model, 2.5)
        loop.evaluate = slowly(loop.evaluate, 2.5)


def compile_first(world) -> None:
    """Rank 1 alone takes long for its first step."""
    from unisono.train import job

    watch.LATE_S, watch.LATE_EARLY_S = 1.5, 20.0
    first, compute = iter([3.0 * world.rank]), job.causal_lm

    def compiled(*args: object) -> object:
        time.sleep(next(first, 0.0))
        return compute(*args)

    job.causal_lm = compiled


def hold_the_interpreter(world) -> None:
    """Rank 1 saves in one call of C that lets no other thread run, its heartbeat neither."""
    from unisono.train import loop

    verdict.BLOCKED_S = 1.5
    evaluate = loop.evaluate

    def evaluate_long(*args: object, **options: object) -> object:
        if world.rank == 1:
            began = time.monotonic()
            while time.monotonic() - began < 4:
                sum(range(400_000_000))
        return evaluate(*args, **options)

    loop.evaluate = evaluate_long


def hold_the_interpreter_and_wait(world) -> None:
    """Rank 1 waits for a disk in one call of C, as safetensors did up to 0.6 while it wrote."""
    from unisono.train import loop

    verdict.BLOCKED_S = 1.5
    evaluate = loop.evaluate

    def evaluate_long(*args: object, **options: object) -> object:
        if world.rank == 1:
            ctypes.PyDLL(None).sleep(5)
        return evaluate(*args, **options)

    loop.evaluate = evaluate_long


@pytest.mark.parametrize("patch", [late_for_good_reasons, compile_first, hold_the_interpreter, hold_the_interpreter_and_wait])  # fmt: skip
def test_who_is_late_for_a_good_reason_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Callable
) -> None:
    config = make_job(write_corpus(tmp_path), tmp_path / "run", max_steps=8, eval_steps=4, save_steps=4)  # fmt: skip
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    (end, told, _), _ = run_ranks(run_job, 2, config, patch, join=False, env=cache)
    assert end == "done"
    assert not [line for line in told if line.startswith(("hang", "slow", "lost", "desync", "went"))]  # fmt: skip


def stop_reading(world) -> None:
    """Rank 1's loader hangs."""
    from unisono.train.step import Feed

    batch = Feed.batch

    def hang(feed: Feed, step: int, leaf: int) -> object:
        if world.rank == 1 and step == 3:
            time.sleep(60)
        return batch(feed, step, leaf)

    Feed.batch = hang
    watch.LATE_EARLY_S = 2.0


def fail_between_steps(world) -> None:
    """Where no vote protects it."""
    from unisono.train import loop

    def fail(job: object) -> object:
        raise RuntimeError("the ledger of samples is not for this")

    if world.rank == 1:
        loop.own_samples = fail


STRATEGIES: dict[str, dict] = {
    "exact": {},
    "quantized": {"sync": "quantized", "wire": "int4"},
    "powersgd": {"sync": "powersgd"},
    "streaming": {"sync": "streaming", "streaming": {"sync_every": 4, "num_fragments": 2}},
    "sparse": {"sync": "sparse", "sparse": {"sync_every": 2}},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_job_names_a_rank_that_is_late_in_a_step(tmp_path: Path, strategy: str) -> None:
    config = make_job(
        write_corpus(tmp_path), tmp_path / "run", max_steps=8, timeout_s=3, **STRATEGIES[strategy]
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with started(run_and_keep, 2, config, stop_reading, str(tmp_path), env=cache):
        wait_for(lambda: ends(tmp_path))
    end = ends(tmp_path)[0]
    assert end.startswith("LostReplicas: lost the other replicas in ")
    assert "rank 1 has not reached all-" in end
    assert "it is in test_watch.py:" in end
    assert " hang < unisono/train/step.py:" in end
    assert "without using the processor for " in end
    [line] = [line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("slow")]  # fmt: skip
    assert "rank 1 has not reached all-" in line


def test_a_job_names_an_exception_that_no_vote_carries(tmp_path: Path) -> None:
    config = make_job(write_corpus(tmp_path), tmp_path / "run", max_steps=8, timeout_s=30)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with started(run_and_keep, 2, config, fail_between_steps, str(tmp_path), env=cache) as ranks:
        ranks.join()
    assert "rank 1 ended with RuntimeError: the ledger of samples is not for this, in test_watch.py:" in ends(tmp_path)[0]  # fmt: skip


def run_and_keep(world, config: Config, patch: Callable, folder: str) -> None:
    end, told, _ = run_job(world, config, patch)
    if world.is_main:
        (Path(folder) / "told").write_text("\n".join(told))
        (Path(folder) / "end-0").write_text(end)
    os._exit(1)
