"""The ladder: what rungs cost, and which one is taken."""

import itertools
from dataclasses import replace

import pytest

from unisono.forecast import penalty
from unisono.forecast.ladder import (
    TARGET,
    WAYS,
    Situation,
    accumulation_for,
    choose,
    ladder,
    table,
)
from unisono.forecast.overlap import Lane
from unisono.forecast.probe import FACTOR
from unisono.forecast.replay import Passes, Tensors

TENSORS = Tensors((1_300_000,) * 8, (1_300_000,) * 8, 3_100_000, True)


def situation(bits_per_s: float, ranks: int = 2) -> Situation:
    """A step of one second of a model of 13.5 M parameters."""
    passes = Passes(0.32, 0.63, 0.03, pack_s=0.015, pack_narrow_s=0.012)
    lane = Lane(3e-4, bits_per_s / 8, 0.97)
    lanes = dict.fromkeys(FACTOR, lane)
    buckets = {"float32": 2e6, "bfloat16": 4e6, "int8": 6e6, "int4": 8e6}
    return Situation(TENSORS, passes, lanes, ranks, buckets, 900, 384, codec_s={"int8": 0.01, "int4": 0.02})  # fmt: skip


def test_rungs_are_in_the_order_of_their_loss_within_each_kind() -> None:
    rungs = ladder(situation(1e9))
    assert [r.way for r in rungs] == list(WAYS)
    costs = {r.name: r.loss_cost for r in rungs}
    assert costs["exact"] == costs["exact, bfloat16"] == 0
    assert 0 < costs["quantized, int8"] < costs["quantized, int4"]
    every = [costs[f"streaming, every {h}"] for h in (10, 30, 100)]
    assert every == sorted(every) and every[0] > 0


@pytest.mark.parametrize("name", [w.name for w in WAYS])
def test_a_slower_link_keeps_no_rung_busier(name: str) -> None:
    found = [
        next(r for r in ladder(situation(rate)) if r.name == name).utilization
        for rate in (40e9, 2.5e9, 5e8, 2e8, 1e8)
    ]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found)), found
    assert 0 < found[-1] <= found[0] <= 1


def test_a_fast_link_is_exact_and_a_slow_one_moves_up_the_ladder() -> None:
    taken = [choose(ladder(situation(rate)), 0.01)[0] for rate in (1e11, 1e9, 2e8, 2e7)]
    assert taken[0].name == "exact"
    places = [WAYS.index(r.way) for r in taken]
    assert places == sorted(places) and places[-1] > places[0]


def test_nothing_beyond_the_budget_is_taken_and_what_is_missed_is_said() -> None:
    rungs = ladder(situation(1e8))
    taken, why = choose(rungs, 0.0)
    assert taken.name == "exact, bfloat16" and taken.utilization < TARGET
    assert "no rung keeps 95% busy" in why and "streaming, every 10 would, at a loss of" in why
    assert choose(rungs, 0.001)[0].name == "quantized, int8"


def test_bytes_are_those_of_the_formulas() -> None:
    values = TENSORS.total
    by_name = {r.name: r.sent_bytes for r in ladder(situation(1e9))}
    rows = 900 * 384
    # Gradients out, weights or sums back, half of each with two ranks; rows of the table besides.
    assert by_name["exact"] == pytest.approx(4 * values + 4 * rows, rel=0.01)
    assert by_name["quantized, int8"] == pytest.approx(1.016 * values + rows, rel=0.01)
    assert by_name["streaming, every 30"] == pytest.approx(4.125 / 8 * values / 30, rel=0.01)
    assert by_name["sparse, every 30"] == pytest.approx(116 / 4096 * values / 30, rel=0.01)
    eight = {r.name: r.sent_bytes for r in ladder(situation(1e9, ranks=8))}
    assert eight["streaming, every 30"] == pytest.approx(4.125 / 8 * values / 30 * 2 * 7 / 8, rel=0.01)  # fmt: skip


def test_accumulation_that_would_do() -> None:
    slow = situation(1e9)
    exact = WAYS[0]
    factor = accumulation_for(slow, exact)
    assert factor is not None and factor > 1
    larger = replace(slow.passes, accumulation=factor)
    assert ladder(replace(slow, passes=larger), [exact])[0].utilization >= TARGET
    assert accumulation_for(situation(1e5), exact) is None


def test_the_table_marks_the_rung_that_was_taken() -> None:
    rungs = ladder(situation(2e8))
    taken, _ = choose(rungs, 0.005)
    marked = [row for row in table(rungs, taken) if row[0]]
    assert [row[1] for row in marked] == [taken.name]


# --- what it costs in loss


def test_the_law_goes_through_the_published_points() -> None:
    assert penalty.of_interval(2, 35e6, 30) == pytest.approx(0.007 * penalty.MEASURED)
    assert penalty.of_interval(4, 1.3e9, 30) == pytest.approx(0.005)
    assert penalty.of_interval(8, 2.4e9, 30) == pytest.approx(0.011)
    assert penalty.of_interval(2, 4e9, 30) == 0.0, "a gain is no cost below zero"
    assert penalty.of_interval(1, 1e6, 30) == 0.0


@pytest.mark.parametrize("parameters", [1e6, 13.5e6, 60e6, 1e9])
def test_more_workers_and_fewer_synchronizations_cost_more(parameters: float) -> None:
    by_workers = [penalty.of_interval(m, parameters, 30) for m in (1, 2, 3, 4, 6, 8, 16)]
    assert by_workers == sorted(by_workers)
    by_steps = [penalty.of_interval(4, parameters, h) for h in (5, 10, 30, 100)]
    assert by_steps == sorted(by_steps) and by_steps[0] < by_steps[-1]


def test_smaller_models_pay_more() -> None:
    costs = [penalty.of_interval(4, n, 30) for n in (1e6, 1e7, 35e6, 1e8, 1e9)]
    assert costs == sorted(costs, reverse=True)
