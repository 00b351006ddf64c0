"""Definitions as in nccl-tests, fits that find what was put in, and who is named as slow."""

import pytest

from ranks import run_ranks
from unisono.forecast.probe import FACTOR, Pair, Timing
from unisono.mesh import Mesh
from unisono.probe import links


def timing(operation: str, nbytes: int, seconds: float, ranks: int = 4) -> Timing:
    algbw = nbytes / seconds / 1e9
    factor = FACTOR[operation.replace("-", "_")](ranks)
    return Timing(operation=operation, axis="world", ranks=ranks, bytes=nbytes, seconds=seconds,  # type: ignore[arg-type]
                  algbw_GBps=algbw, busbw_GBps=algbw * factor)  # fmt: skip


def made_up(operation: str, latency_s: float, rate: float, ranks: int = 4) -> list[Timing]:
    factor = FACTOR[operation.replace("-", "_")](ranks)
    return [timing(operation, s, latency_s + factor * s / rate, ranks) for s in links.SIZES]


@pytest.mark.parametrize("operation", ["all-reduce", "reduce-scatter", "all-gather", "all-to-all"])
def test_a_fit_finds_latency_and_bus_bandwidth(operation: str) -> None:
    (fit,) = links.fit(made_up(operation, 2e-4, 1.25e8), nodes=2)
    assert fit.latency_s == pytest.approx(2e-4, rel=1e-3)
    assert fit.bytes_per_s == pytest.approx(1.25e8, rel=1e-3)
    assert fit.error < 1e-3 and fit.nodes == 2
    half = fit.knee_bytes
    assert FACTOR[fit.collective](4) * half / fit.bytes_per_s == pytest.approx(fit.latency_s)


def test_one_disturbed_size_does_not_move_the_fit() -> None:
    rows = made_up("all-reduce", 2e-4, 1.25e8)
    rows[4] = timing("all-reduce", rows[4].bytes, 5 * rows[4].seconds)
    (fit,) = links.fit(rows, nodes=1)
    assert fit.bytes_per_s == pytest.approx(1.25e8, rel=0.02)
    assert fit.latency_s == pytest.approx(2e-4, rel=0.05)


def test_what_passes_in_a_burst_is_no_bandwidth() -> None:
    """A token bucket of 192 KiB on 100 Mbit/s: small messages show the latency, large ones the rate."""
    rows = made_up("all-gather", 1e-4, 12.4e6, ranks=2)
    quick = [timing("all-gather", t.bytes, 1e-4, 2) if t.bytes / 2 < 190_000 else t for t in rows]
    (plain,), (fit,) = links.fit(quick, nodes=2), links.fit(quick, nodes=2, burst=190_000)
    assert fit.bytes_per_s == pytest.approx(12.4e6, rel=0.01)
    assert fit.latency_s == pytest.approx(1e-4) and fit.error < 0.01
    assert plain.error > 0.1


def test_a_slow_link_and_a_slow_rank_are_named() -> None:
    pairs = [
        Pair(source=a, target=b, bytes_per_s=2e7 if (a, b) == (2, 0) else 1e8)
        for a in range(3)
        for b in range(3)
        if a != b
    ]
    (line,) = links.slow_pairs(pairs)
    assert line == "slow link: host 2 to host 0, 160 Mbit/s where the median pair has 800 Mbit/s"
    assert links.slow_pairs([p for p in pairs if p.bytes_per_s > 5e7]) == []
    assert links.slow_ranks("memory bandwidth", [10.0, 9.5, 5.0]) == [
        "slow rank: rank 2 reaches 53% of the usual memory bandwidth"
    ]
    assert links.slow_ranks("memory bandwidth", [10.0, 4.0]), "of two, the other is the usual"
    assert links.slow_ranks("memory bandwidth", [10.0]) == []


def timed(world, patched_sizes: tuple[int, ...], most_s: float) -> tuple[list[dict], list[str]]:
    from unisono.sync.ledger import Group, Ledger

    links.SIZES, links.MOST_S, links.BUDGET_S = patched_sizes, most_s, 0.0  # type: ignore[misc]
    ledger = Ledger()
    votes = Group("probe", ledger, 60)
    before = ledger.sent_bytes
    found, notes = links.time_collectives(votes, "world", votes, "cpu")
    assert ledger.sent_bytes > before
    return [t.model_dump() for t in found], notes


def test_real_ranks_time_every_collective_alike() -> None:
    each = run_ranks(timed, 3, (4096, 16384), 100.0)
    assert each[0] == each[1] == each[2], "the slowest rank's times, on all"
    rows, notes = each[0]
    assert [(r["operation"], r["bytes"]) for r in rows] == [
        (name.replace("_", "-"), size) for name in FACTOR for size in (4096, 16384)
    ]
    assert not notes
    for r in rows:
        algbw = r["bytes"] / r["seconds"] / 1e9
        factor = {"all-reduce": 4 / 3}.get(r["operation"], 2 / 3)
        assert r["algbw_GBps"] == pytest.approx(algbw)
        assert r["busbw_GBps"] == pytest.approx(algbw * factor)


def test_what_a_slow_link_leaves_out_is_said() -> None:
    rows, (note,) = run_ranks(timed, 2, (1 << 20, 4 << 20), 0.0)[0]
    assert {r["bytes"] for r in rows} == {1 << 20}
    assert note.startswith("world: sizes end where") and "all-reduce at 1 MiB" in note


def sent_in_pairs(world, nodes: list[int]) -> list[tuple[int, int]]:
    from unisono.sync.ledger import Group, Ledger

    votes = Group("probe", Ledger(), 60)
    found = links.time_pairs(votes, nodes, "cpu")
    assert all(p.bytes_per_s > 0 for p in found)
    return [(p.source, p.target) for p in found]


def test_every_pair_of_hosts_is_timed_in_both_directions() -> None:
    each = run_ranks(sent_in_pairs, 4, [0, 0, 1, 2])
    assert each[0] == each[3]
    assert sorted(each[0]) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert run_ranks(sent_in_pairs, 2, [0, 0])[0] == []


def axes_of(world, mesh: Mesh | None, local: list[int]) -> tuple[list[int], dict]:
    from unisono.sync.axes import axes, nodes_of
    from unisono.sync.ledger import Group, Ledger

    votes = Group("probe", Ledger(), 60)
    nodes = nodes_of(votes, local[world.rank])
    found = axes(votes, nodes, mesh, Ledger(), 60)
    sums = {name: group.sum(float(world.rank))[0] for name, group in found.items()}
    return nodes, sums


def test_axes_of_a_mesh() -> None:
    each = run_ranks(axes_of, 4, Mesh(2, 2), [0, 1, 0, 1])
    assert all(nodes == [0, 0, 1, 1] for nodes, _ in each)
    sums = [found for _, found in each]
    assert [s["world"] for s in sums] == [6, 6, 6, 6]
    assert [s["shard"] for s in sums] == [s["node"] for s in sums] == [1, 1, 5, 5]
    assert [s["replica"] for s in sums] == [2, 4, 2, 4]
    alone = run_ranks(axes_of, 2, None, [0, 1])
    assert [set(found) for _, found in alone] == [{"world"}, {"world"}]
