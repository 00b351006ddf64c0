"""Verdicts from made-up steps with noise, and jumps."""

import random
from collections.abc import Callable

import pytest

from unisono.observe.arrival import Period
from unisono.observe.blame import Blame, Jumps, Suspects
from unisono.sync.pairs import SlowLink, shifts, slowest

WIRE = 0.004


def steps(
    count: int, ranks: int, change: Callable[[int, random.Random], dict[str, float]], seed: int = 0,
    wire: float = WIRE,
) -> list[list[Period]]:  # fmt: skip
    """100 ms of computing each, 10% of noise and now and then a step of double length; `change` adds."""
    chooser = random.Random(seed)
    found = []
    for _ in range(count):
        own = []
        for rank in range(ranks):
            compute = 0.1 * (1 + abs(chooser.gauss(0, 0.1))) * (2 if chooser.random() < 0.05 else 1)
            more = change(rank, chooser)
            own.append(
                (compute + more.get("compute", 0), more.get("data", 0.001), more.get("work", 1.0))
            )
        end = max(c + d for c, d, _ in own) + wire
        found.append(
            [Period(compute=c, data=d, late=end - c - d, arrived=c + d, work=w) for c, d, w in own]
        )
    return found


def follow(all_steps: list[list[Period]]) -> tuple[list[Blame], Suspects]:
    suspects = Suspects(bytes_per_step=1e6)
    said = [b for k, ps in enumerate(all_steps, 1) if (b := suspects.add(ps, k))]
    return said, suspects


def kinds(blames: list[Blame]) -> list[tuple[str, int | None]]:
    return [(b.kind, b.rank) for b in blames]


FAULTS = {
    "slow rank": lambda rank, _: {"compute": 0.02 * (rank == 1)},
    "slow loader": lambda rank, c: {"data": 0.001 + 0.06 * (rank == 1) * (c.random() < 0.5)},
    "uneven load": lambda rank, _: {"compute": 0.03 * (rank == 1), "work": 1 + 0.3 * (rank == 1)},
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_cause_is_named_once_with_its_rank(kind: str, ranks: int) -> None:
    said, suspects = follow(steps(150, ranks, FAULTS[kind]))
    assert kinds(said) == [(kind, 1)]
    assert kinds(suspects.all()) == [(kind, 1)]
    assert 0.03 < suspects.all()[0].cost < 0.3


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_nothing_is_named_in_noise(ranks: int) -> None:
    for seed in range(30):
        said, suspects = follow(steps(120, ranks, lambda *_: {}, seed))
        assert said == suspects.all() == []


def test_steps_after_a_checkpoint_do_not_count() -> None:
    """Rank 0 writes, and comes to the next step with cold caches."""
    found = steps(150, 2, lambda *_: {})
    slow = steps(150, 2, lambda rank, _: {"compute": 0.2 * (rank == 0)})
    for k in range(0, 150, 2):
        found[k] = [Period(**{n: getattr(p, n) for n in ("compute", "data", "late", "arrived", "work")}, checkpoint=1.0) for p in slow[k]]  # fmt: skip
    assert follow(found)[0] == []


def test_all_ranks_may_read_slowly() -> None:
    said, _ = follow(steps(100, 2, lambda *_: {"data": 0.03}))
    assert kinds(said) == [("slow loader", None)]
    assert "every rank reads batches" in said[0].line()


def test_the_heaviest_rank_may_change_each_step() -> None:
    def uneven(rank: int, chooser: random.Random) -> dict[str, float]:
        length = chooser.uniform(0.5, 1.5)
        return {"compute": 0.2 * length, "work": 1 + 2 * length}

    said, _ = follow(steps(100, 4, uneven))
    assert kinds(said) == [("uneven load", None)]


def test_a_fault_that_passes_costs_its_part_of_the_run() -> None:
    calm, slow = steps(200, 2, lambda *_: {}), steps(60, 2, FAULTS["slow rank"])
    _, suspects = follow([*slow, *calm])
    (blame,) = suspects.all()
    whole = follow(steps(260, 2, FAULTS["slow rank"]))[1].all()[0]
    assert blame.cost < 0.5 * whole.cost


def test_a_link_is_looked_at_only_where_the_wire_costs() -> None:
    assert not follow(steps(60, 2, lambda *_: {}, wire=0.001))[1].look_at_links
    suspects = Suspects(bytes_per_step=1e6)
    slow = SlowLink(1, 12.5e6, 125e6)
    said = []
    for k, ps in enumerate(steps(80, 2, lambda *_: {}, wire=0.08), 1):
        suspects.add(ps, k)
        if suspects.look_at_links:
            said += [b for b in [suspects.looked(slow, k)] if b]
    assert kinds(said) == [("slow link", 1)]
    # 1 MB at 100 Mbit/s takes 80 ms, at 1 Gbit/s 8 ms.
    assert said[0].cost == pytest.approx(0.072 / 0.18, rel=0.2)


def test_a_slow_link_that_costs_nothing_is_not_named() -> None:
    suspects = Suspects(bytes_per_step=1e3)
    for k, ps in enumerate(steps(80, 2, lambda *_: {}, wire=0.08), 1):
        suspects.add(ps, k)
        if suspects.look_at_links:
            assert suspects.looked(SlowLink(1, 12.5e6, 125e6), k) is None
    assert suspects.all() == []


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("way", ["out", "into", "both"])
def test_the_slow_link_of_a_table(size: int, way: str) -> None:
    table = [[0.0] * size for _ in range(size)]
    for k in range(size):
        for shift in shifts(size):
            to = (k + shift) % size
            slow = (way != "into" and k == 1) or (way != "out" and to == 1)
            table[k][to] = 1e7 if slow else 1e8
    found = slowest(table)
    if size == 2:  # one link: only a difference of its directions is told, and its sender named
        expected = {"out": 1, "into": 0, "both": None}[way]
        assert (found and found.rank) == expected
    else:
        assert found is not None and (found.rank, found.others) == (1, 1e8)


def test_even_links_have_no_slow_one() -> None:
    chooser = random.Random(1)
    for size in (2, 3, 8):
        for _ in range(50):
            table = [[0.0] * size for _ in range(size)]
            for k in range(size):
                for shift in shifts(size):
                    table[k][(k + shift) % size] = 1e8 * chooser.uniform(0.8, 1.2)
            assert slowest(table) is None


def test_jumps_are_flagged_once() -> None:
    jumps, chooser = Jumps(), random.Random(0)
    told = []
    for step in range(300):
        loss = 5 - step / 100 + chooser.gauss(0, 0.05) + 2 * (150 <= step < 155)
        norm = 1.0 * 2 ** chooser.gauss(0, 0.3) * (20 if step == 240 else 1)
        told.append(jumps.add(step, loss, norm))
    assert [k for k, line in enumerate(told) if line] == [150, 240]
    assert told[150].startswith("loss 5.") and told[240].startswith("gradient norm ")


def test_a_loss_that_is_not_finite_does_not_spoil_what_is_usual() -> None:
    jumps = Jumps()
    for step in range(100):
        jumps.add(
            step, float("nan") if step % 3 == 0 else 2.0, float("inf") if step % 5 == 0 else 1.0
        )
    assert jumps.add(101, 3.0, 1.0) == "loss 3.000 after 2.000"
