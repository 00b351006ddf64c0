"""Hangs and desynchronization are named in one line, and nothing else is."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ranks import Ranks, started
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


# --- what must not be named


def test_a_machine_that_sleeps_names_nobody(tmp_path: Path) -> None:
    with started(take_part, 3, str(tmp_path), join=True) as ranks:
        for _ in range(2):
            wait_for(training(tmp_path))
            ranks.signal(signal.SIGSTOP)
            time.sleep(watch.AWAY_S + verdict.SILENT_S)  # how long the machine sleeps
            ranks.signal(signal.SIGCONT)
        wait_for(training(tmp_path))
        (tmp_path / "enough").touch()
        assert ranks.result() == ["done"] * 3
    assert said(tmp_path) == []
