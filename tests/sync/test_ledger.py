"""Every collective is in the ledger with its bytes and times, and a lost peer has a name."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from unisono.errors import ReplicaError
from unisono.sync.ledger import Group, Ledger


def every_operation(world) -> list[tuple]:
    n, ledger = world.size, Ledger()
    group = Group("test", ledger, 60)
    with ledger.clock("communication"):
        sent = torch.arange(n * 6.0) + 100 * world.rank
        received = torch.empty(n * 6)
        group.all_to_all(received, sent).wait()
        for r in range(n):
            row = torch.arange(6.0) + 6 * world.rank + 100 * r
            assert torch.equal(received[6 * r : 6 * r + 6], row)

        whole = torch.empty(n, 5, dtype=torch.bfloat16)
        group.all_gather(whole, torch.full((5,), float(world.rank), dtype=torch.bfloat16)).wait()
        assert whole[:, 0].tolist() == list(range(n))

        tensor = torch.full((3,), world.rank + 1.0, dtype=torch.float64)
        handle = group.all_reduce(tensor)
        handle.wait()
        assert handle.done()
        assert tensor.tolist() == [n * (n + 1) / 2] * 3
        handle.wait()  # a second time does nothing

        tensor = torch.full((4,), float(world.rank))
        group.broadcast(tensor, source=n - 1).wait()
        assert tensor.tolist() == [n - 1] * 4

        for by in range(n):  # sizes may differ by rank, and be nothing
            behind = (world.rank - by) % n
            got, given = torch.empty(3 * behind), torch.full((3 * world.rank,), world.rank + 0.5)
            group.shift(got, given, by).wait()
            assert got.tolist() == [behind + 0.5] * 3 * behind

        assert group.sum(1.0, float(world.rank)) == [n, n * (n - 1) / 2]
        assert group.each(float(world.rank), 7.0).tolist() == [[r, 7.0] for r in range(n)]
        group.barrier()
    assert ledger.sent_bytes == sum(e.sent_bytes for e in ledger.entries)
    assert ledger.collectives == len(ledger.entries)
    for entry in ledger.entries:
        assert 0 < entry.started <= entry.finished
        assert 0 <= entry.waited_s <= entry.finished - entry.started
    waited = sum(e.waited_s for e in ledger.entries)
    assert ledger.clock.read()["waiting"] == pytest.approx(waited, abs=0.01)
    return [(e.operation, e.group, e.sequence, e.sent_bytes) for e in ledger.entries]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes_of_every_operation(n: int) -> None:
    for rank, entries in enumerate(run_ranks(every_operation, n)):
        assert entries == [
            ("all-to-all", "test", 1, 24 * (n - 1)),
            ("all-gather", "test", 2, 10 * (n - 1)),
            ("all-reduce", "test", 3, 2 * 24 * (n - 1) // n),
            ("broadcast", "test", 4, 16 * (n - 1) if rank == n - 1 else 0),
            *[("shift", "test", 5 + by, 12 * rank if by else 0) for by in range(n)],
            ("all-reduce", "test", 5 + n, 2 * 16 * (n - 1) // n),
            ("all-gather", "test", 6 + n, 16 * (n - 1)),
            ("all-reduce", "test", 7 + n, 2 * 4 * (n - 1) // n),
        ]


def both_ways(world, pairs: list[list[int]]) -> list[str]:
    """Exchanges of two ranks, alike on one connection and on two; what each group of torch carries."""
    carried: list[str] = []
    broadcast = dist.broadcast

    def seen(tensor: torch.Tensor, **options: Any) -> Any:
        carried.append(options["group"].group_name)
        return broadcast(tensor, **options)

    dist.broadcast = seen
    found = []
    for duplex in (False, True):
        group = Group("pair", Ledger(), 60, parts=pairs, duplex=duplex)
        rank, handles, results = group.rank, [], []
        for k in range(5):  # all under way at once
            mine = 100.0 * world.rank + 10 * k + torch.arange(6.0)
            rows, whole, other = torch.empty(6), torch.zeros(2, 6), torch.empty(6)
            whole[rank] = mine
            uneven = torch.empty(3 if rank == 0 else 5)  # 1 of its own, 2 or 4 of the other's
            given = [1, 4] if rank == 0 else [2, 1]
            taken = [1, 2] if rank == 0 else [4, 1]
            handles += [
                group.all_to_all(rows, mine),
                group.all_gather(whole, whole[rank] if duplex else mine),
                group.exchange(other, mine),
                group.all_to_all_rows(uneven, mine[: sum(given)], taken, given),
                group.all_to_all_rows(torch.empty(0), torch.empty(0), [0, 0], [0, 0]),
            ]
            results += [rows, whole, other, uneven]
        for handle in handles:
            handle.wait()
            assert handle.done()
        found.append((results, [e.sent_bytes for e in group.ledger.entries]))
        group.close()
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]
    return carried


@pytest.mark.parametrize("pairs", [[[0, 1]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]])
def test_each_direction_between_two_ranks_has_its_own_connection(pairs: list[list[int]]) -> None:
    for carried in run_ranks(both_ways, 2 * len(pairs), pairs):
        assert len(carried) == 5 * 4 * 2  # what is empty does not travel
        assert len(set(carried[::2]) | set(carried[1::2])) == 2
        assert len(set(carried[::2])) == 1


def test_one_rank_communicates_nothing_and_is_right() -> None:
    [entries] = run_ranks(alone, 1)
    assert entries == 0


def alone(world) -> int:
    ledger = Ledger()
    group = Group("test", ledger, 60)
    assert group.sum(2.0, 3.0) == [2.0, 3.0]
    assert group.each(4.0).tolist() == [[4.0]]
    tensor = torch.ones(2)
    group.broadcast(tensor).wait()
    group.barrier()
    assert tensor.tolist() == [1, 1]
    return ledger.collectives + ledger.sent_bytes + len(ledger.entries)


def many(world) -> tuple[int, int, int]:
    ledger = Ledger()
    group = Group("test", ledger, 60)
    for _ in range(4100):
        group.all_reduce(torch.zeros(1)).wait()
    return len(ledger.entries), ledger.collectives, ledger.sent_bytes


def test_the_ledger_does_not_grow_but_counts_all() -> None:
    assert run_ranks(many, 2) == [(4096, 4100, 16_400)] * 2


def leave(world) -> str:
    """Rank 1 goes away; the others are in a collective with it."""
    from unisono.world import joined

    with joined(world):
        ledger = Ledger()
        group = Group("gradients", ledger, 60)
        group.barrier()
        if world.rank == 1:
            return "left"
        began = time.monotonic()
        try:
            for _ in range(2):
                group.barrier()
        except ReplicaError as error:
            assert time.monotonic() - began < 20
            return str(error)
        return "nothing happened"


@pytest.mark.parametrize("size", [2, 3])
def test_a_lost_peer_is_an_error_that_names_the_collective(size: int) -> None:
    told = run_ranks(leave, size, join=False)
    assert told.pop(1) == "left"
    for line in told:
        assert line.startswith("lost the other replicas ")
        assert "all-reduce" in line
        assert "'gradients'" in line
        assert "\n" not in line


def be_late(world) -> str:
    group = Group("votes", Ledger(), timeout_s=0.5)
    if world.rank == 1:
        time.sleep(1.5)  # a stalled rank: this is the fault, not synchronization
    try:
        group.barrier()
    except ReplicaError as error:
        return str(error)
    return "in time"


def test_a_collective_that_takes_too_long_is_an_error() -> None:
    told = run_ranks(be_late, 2)
    assert told[0].startswith("lost the other replicas in all-reduce 1 of group 'votes' after 0.")


def wait_in_a_group_of_torchs_own(world) -> str:
    """Half of what init_device_mesh does: a group that knows nothing of our timeout."""
    import torch.distributed as dist

    Group("first", Ledger(), 60).barrier()
    group = Group("axis", Ledger(), 2.0, dist.new_group())
    if world.rank == 1:
        Group("second", Ledger(), 60).barrier()
        return ""
    message = ""
    try:
        group.barrier()
    except ReplicaError as error:
        message = str(error)
    Group("second", Ledger(), 60).barrier()
    return message


def test_an_existing_group_gets_the_timeout() -> None:
    message, _ = run_ranks(wait_in_a_group_of_torchs_own, 2)
    assert message.startswith("lost the other replicas in all-reduce 1 of group 'axis' after 2.")
