"""The timeline: which steps, one clock for all ranks, and rows that account for a whole step."""

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.observe import report, timeline
from unisono.sync.ledger import Entry, Group, Ledger


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**5))
def test_a_few_steps_are_recorded(first: int, more: int, every: int) -> None:
    last = first + more
    chosen = timeline.steps_to_record(first, last, every)
    assert 1 <= len(chosen) <= timeline.EARLY_STEPS + timeline.MOST_LATER
    assert all(first < s <= last for s in chosen)
    if more >= 8:
        assert {first + 5, first + 6, first + 7} <= chosen
    newest = last - last % every
    if newest > first:
        assert newest in chosen


def test_steps_of_the_shipped_recipe() -> None:
    assert sorted(timeline.steps_to_record(0, 450, 150)) == [5, 6, 7, 150, 300, 450]
    assert timeline.steps_to_record(0, 3, 150) == {3}


def _align(world, shift_s: float):
    real = time.perf_counter
    if world.rank == 2:
        time.perf_counter = lambda: real() + shift_s
    votes = Group("votes", Ledger(), 60)
    return [timeline.align(votes, float(world.rank)) for _ in range(3)]


@pytest.mark.parametrize("shift_s", [0.0, 5.0, -3.0])
def test_clocks_are_aligned_within_the_bound(shift_s: float) -> None:
    # Ranks of one host read one monotonic clock, so the offset that was made is the true one.
    for rank, rounds in enumerate(run_ranks(_align, 4, shift_s)):
        for alignment, others in rounds:
            assert others == [[0.0], [1.0], [2.0], [3.0]]
            wrong = abs(alignment.offset_s - (shift_s if rank == 2 else 0.0))
            assert wrong <= alignment.error_s + 1e-9
            assert alignment.error_s < 1.0


def test_long_rows_keep_the_longest_and_count_the_rest() -> None:
    spans = [(p, k + 0.0, k + (0.9 if k % 10 else 0.1)) for k in range(1000) for p in ["ab"[k % 2]]]
    row = timeline._spans(spans, zero=0.0)
    assert len(row["spans"]) == timeline.MOST_SPANS
    assert row["spans_left_out"] == 1000 - timeline.MOST_SPANS
    assert all(end - begin > 800 for _, begin, end in row["spans"])
    assert row["spans"] == sorted(row["spans"], key=lambda s: s[1])
    entries = [Entry("all-reduce", "g", k, k, started=float(k)) for k in range(1000)]
    row = timeline._collectives(entries, zero=0.0)
    assert len(row["collectives"]) == timeline.MOST_COLLECTIVES
    assert row["collectives_left_out"] == 1000 - timeline.MOST_COLLECTIVES
    assert min(c["sent_bytes"] for c in row["collectives"]) == 1000 - timeline.MOST_COLLECTIVES
    assert {c["finished_ms"] for c in row["collectives"]} == {None}


def cache(place: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(place / "cache")}


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / timeline.FILE).read_text().splitlines()]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_run_records_whole_steps_of_every_rank(tmp_path: Path, replicas: int) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "run"
    config = make_job(corpus, output, max_steps=12, eval_steps=6)
    results = run_ranks(run, replicas, config, join=False, env=cache(tmp_path))
    assert {end for end, _, _ in results} == {"done"}
    rows = rows_of(output)
    ranks = range(replicas)
    assert [(r["step"], r["rank"]) for r in rows] == [(s, r) for s in (5, 6, 7, 12) for r in ranks]
    for row in rows:
        spans = row["spans"]
        assert spans[0][1] == pytest.approx(row["began_ms"], abs=0.5)
        assert all(a[2] == pytest.approx(b[1], abs=0.002) for a, b in pairwise(spans))  # fmt: skip
        assert spans[-1][2] >= row["ended_ms"] - 0.002
        assert {"compute", "data", "optimizer"} <= {s[0] for s in spans}
        assert (row["offset_error_ms"] == 0) == (row["rank"] == 0)
        for c in row["collectives"]:
            assert c["waited_ms"] >= 0
            assert c["finished_ms"] is None or c["finished_ms"] >= c["started_ms"] + c["waited_ms"] - 0.01  # fmt: skip
    # What a rank sends in a step is what the receipt says.
    sent = [sum(c["sent_bytes"] for c in r["collectives"]) for r in rows if r["step"] == 7]
    receipt = json.loads((output / "receipt.json").read_text())
    assert sum(sent) / replicas == pytest.approx(receipt["sent_bytes_per_step"], rel=0.02)
    # All ranks tell of the same collectives.
    kinds = [{(c["operation"], c["group"], c["sequence"]) for c in r["collectives"]} for r in rows if r["step"] == 7]  # fmt: skip
    assert all(k == kinds[0] for k in kinds)
    assert bool(kinds[0]) == (replicas > 1)


def test_groups_that_not_all_ranks_share_are_told_apart(tmp_path: Path) -> None:
    """Two pairs of shards, whose groups have one name and count alike."""
    corpus, output = write_corpus(tmp_path), tmp_path / "run"
    mesh = {"sync": "sharded", "mesh": {"replica": 2, "shard": 2}}
    config = make_job(corpus, output, max_steps=7, **mesh)
    run_ranks(run, 4, config, join=False, env=cache(tmp_path))
    rows = rows_of(output)
    assert [r["groups"]["shard"] for r in rows[:4]] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    shown = report.timeline(rows)
    assert shown
    for step in shown["steps"]:
        for rank in step["ranks"]:
            pair = {rank["rank"], rank["rank"] ^ 1}
            last = {c[7] for c in rank["collectives"] if c[1] == "shard"}
            assert last and last <= pair


def late_clock(world) -> None:
    if world.rank == 1:
        real = time.perf_counter
        time.perf_counter = lambda: real() + 5.0


def test_rows_of_hosts_whose_clocks_differ_are_on_one(tmp_path: Path) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "run"
    config = make_job(corpus, output, max_steps=8)
    run_ranks(run, 2, config, late_clock, join=False, env=cache(tmp_path))
    for row in rows_of(output):
        assert abs(row["began_ms"]) < 1000
        assert abs(row["spans"][0][1]) < 1000
        # A rank cannot have been done with a collective that another one had not begun.
        assert all(abs(c["started_ms"]) < 1000 for c in row["collectives"])


def test_a_resume_replaces_what_it_repeats(tmp_path: Path) -> None:
    corpus, output = write_corpus(tmp_path), tmp_path / "run"
    run_ranks(
        run, 2, make_job(corpus, output, max_steps=8, eval_steps=4), join=False, env=cache(tmp_path)
    )
    # As a run leaves it that was killed after its last checkpoint.
    with (output / timeline.FILE).open("a") as file:
        file.write(json.dumps({"step": 13, "rank": 0, "stale": True}) + "\n" + '{"step": 14, "ra')
    run_ranks(
        run,
        2,
        make_job(corpus, output, max_steps=16, eval_steps=4),
        join=False,
        env=cache(tmp_path),
    )
    rows = rows_of(output)
    assert not any("stale" in r for r in rows)
    steps = [(r["step"], r["rank"]) for r in rows]
    assert len(set(steps)) == len(steps)
    assert {4, 5, 6, 7, 8, 12, 13, 14, 15, 16} == {s for s, _ in steps}
