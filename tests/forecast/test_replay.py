"""A step followed transfer by transfer: against sums that can be done by hand."""

import pytest

from unisono.forecast.overlap import Lane
from unisono.forecast.probe import FACTOR, LinkFit, Probe, Sharing
from unisono.forecast.replay import HOOK_S, Passes, System, Tensors, foretell, lanes_of

FREE = Lane(0.0, 1e6)


TENSORS = Tensors(sizes=(100_000,) * 8, blocks=(200_000,) * 4, table=100_000, tied=True)
PASSES = Passes(forward_s=1.0, backward_s=2.0, optimizer_s=0.1)


def lanes(lane: Lane) -> dict[str, Lane]:
    return dict.fromkeys(FACTOR, lane)


@pytest.mark.parametrize("system", ["ddp", "whole", "shards", "sharded"])
def test_a_link_that_costs_nothing_leaves_the_pass(system: System) -> None:
    got = foretell(system, TENSORS, PASSES, lanes(Lane(0.0, 1e30)), 2)
    assert got.communication == pytest.approx(0.0, abs=1e-9)
    assert got.compute == pytest.approx(3.0, abs=12 * HOOK_S)
    share = {"ddp": 1, "whole": 1, "shards": (1 + 8 / 2) / 9, "sharded": 1 / 2}[system]
    assert got.optimizer == pytest.approx(0.1 * share)


@pytest.mark.parametrize("system", ["ddp", "whole", "shards", "sharded"])
def test_a_slow_link_is_the_step(system: System) -> None:
    """Nothing hides more than the compute there is: wire <= step <= wire + compute."""
    got = foretell(system, TENSORS, PASSES, lanes(Lane(0.0, 1e4)), 2)
    wire = got.sent_bytes / 1e4
    assert wire * 0.99 <= got.total <= wire + 3.2


@pytest.mark.parametrize(
    ("system", "ranks", "values"),
    [
        ("ddp", 2, 900_000),
        ("whole", 2, 900_000),
        ("whole", 4, 2 * 900_000 * 3 / 4),
        ("shards", 4, 2 * 900_000 * 3 / 4),
        # Parameters for each pass, the last block's and the root's once; gradients once.
        ("sharded", 2, ((2 * 800_000 - 200_000 + 100_000) + 900_000) / 2),
    ],
)
def test_bytes_are_those_of_the_strategies_own_files(
    system: System, ranks: int, values: float
) -> None:
    got = foretell(system, TENSORS, PASSES, lanes(FREE), ranks, votes=0)
    assert got.sent_bytes == pytest.approx(4 * values, abs=600), "and a few scalars"
    if system == "shards":
        narrow = foretell(system, TENSORS, PASSES, lanes(FREE), ranks, votes=0, wire_bytes=2)
        assert narrow.sent_bytes == pytest.approx(2 * values, abs=600)


def test_buckets_that_are_rounded_cost_by_their_number() -> None:
    def total(wire_bytes: float, bucket_s: float, bucket_bytes: float = 4e5) -> float:
        free = lanes(Lane(0.0, 1e30))
        got = foretell(
            "shards", TENSORS, PASSES, free, 2,
            wire_bytes=wire_bytes, bucket_bytes=bucket_bytes, bucket_s=bucket_s,
        )  # fmt: skip
        return got.total

    assert total(2, 0.01) == pytest.approx(total(2, 0.0) + 8 * 0.01)
    assert total(2, 0.01, 8e5) == pytest.approx(total(2, 0.0, 8e5) + 5 * 0.01)
    assert total(4, 0.01) == total(4, 0.0)


def test_more_micro_batches_are_plain_compute_but_for_sharded() -> None:
    twice = Passes(1.0, 2.0, 0.1, accumulation=2)
    free = lanes(Lane(0.0, 1e30))
    for system in ("ddp", "whole", "shards", "sharded"):
        got = foretell(system, TENSORS, twice, free, 2)  # type: ignore[arg-type]
        assert got.compute == pytest.approx(6.0, abs=0.01), system
    one = foretell("sharded", TENSORS, PASSES, lanes(FREE), 2).sent_bytes
    two = foretell("sharded", TENSORS, twice, lanes(FREE), 2).sent_bytes
    assert two - one == pytest.approx(4 * (2 * 800_000 - 200_000 + 100_000) / 2)


def test_where_nothing_can_hide_all_of_it_is_exposed() -> None:
    """One tensor: its weight comes before the forward pass, its gradient leaves after the backward, of
    the output layer between its two products."""
    one = Tensors(sizes=(1_000_000,), blocks=(600_000,), table=0, tied=False)
    for system, trips in (("whole", 2), ("ddp", 2), ("shards", 1.5)):
        got = foretell(system, one, PASSES, lanes(FREE), 2, bucket_bytes=2**30)  # type: ignore[arg-type]
        assert got.communication == pytest.approx(trips * 4 * 500_000 / 1e6, rel=1e-3), system
    # Gathered: the root, the block; scattered: the block behind the root's backward pass, the root.
    got = foretell("sharded", one, PASSES, lanes(FREE), 2)
    assert got.communication == pytest.approx(4 * (400_000 + 600_000 + 600_000 + 400_000) / 2 / 1e6)


def test_a_block_is_gathered_while_the_one_before_computes() -> None:
    """In the forward pass 2 of 3 gathers hide, in the backward pass the one of the first block (the
    last stays whole, the middle one hides half)."""
    lane = Lane(0.0, 1e6)
    three = Tensors(sizes=(250_000,) * 3, blocks=(250_000,) * 3, table=0, tied=False)
    slow = Passes(3.0, 6.0, 0.0)
    got = foretell("sharded", three, slow, lanes(lane), 2)
    each = 4 * 250_000 / 2 / 1e6
    assert got.communication == pytest.approx(2 * each), "the first gather and the last scatter"
    uneven = Tensors(sizes=(250_000, 250_000, 2_000_000), blocks=(250_000, 250_000, 2_000_000), table=0, tied=False)  # fmt: skip
    got = foretell("sharded", uneven, Passes(30.0, 60.0, 0.0), lanes(lane), 2)
    assert got.sent_bytes == pytest.approx(2 * (2 * 2_500_000 - 2_000_000 + 2_500_000), abs=100)


def probe(compute: float, transfer: float) -> Probe:
    fit = LinkFit(collective="all_reduce", axis="world", ranks=2, nodes=2, latency_s=1e-4, bytes_per_s=1e8)  # fmt: skip
    shared = Sharing(collective="all_reduce", ranks=2, message_bytes=1 << 20, bytes_per_s=1e8,
                     compute_speed=compute, transfer_speed=transfer)  # fmt: skip
    return Probe(device="x", ranks=2, nodes=2, memory_bytes=1, memory_bytes_per_s=1,
                 matmul_flops={"fp32": 1}, links=(fit,), sharing=(shared,))  # fmt: skip


def test_ranks_that_share_a_core_share_it_with_the_link_too() -> None:
    alone = lanes_of(probe(0.9, 1.0), 2)["all_reduce"]
    assert (alone.compute_speed, alone.transfer_speed) == pytest.approx((0.9, 1.0))
    two = lanes_of(probe(0.9, 1.0), 4, per_core=2)["all_reduce"]
    assert two.compute_speed == pytest.approx(0.8)
    assert two.latency_s == pytest.approx(3e-4), "hops of the ring"
    assert two.bytes_per_s == pytest.approx(1e8), "the wire still limits it"
    bound = lanes_of(probe(0.5, 0.5), 4, per_core=2)["all_reduce"]
    assert bound.bytes_per_s == pytest.approx(0.5e8), "the core limits it"
    assert bound.compute_speed == pytest.approx(0.5)
    assert bound.compute_speed + bound.transfer_speed == pytest.approx(1.0)
