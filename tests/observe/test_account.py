"""Real jobs on gloo ranks with a fault: what is said while they run, and what their files hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.clock import PHASES


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("job"))


def job(corpus: Path, output: Path, size: int = 2, patch: Any = None, **changes: Any) -> dict:
    config = make_job(corpus, output, **changes)
    cache = {"XDG_CACHE_HOME": str(corpus.parent / "cache")}
    results = run_ranks(run, size, config, patch, join=False, env=cache)
    assert [end for end, *_ in results] == ["done"] * size
    return json.loads((output / "receipt.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def late_batches(world) -> None:
    """Rank 1 reads for 40 ms more: the fault itself, many times what else a step takes."""
    import time

    from unisono.train.step import Feed

    batch = Feed.batch

    def late(feed, step, leaf):
        time.sleep(0.04)
        return batch(feed, step, leaf)

    if world.rank == 1:
        Feed.batch = late


def test_a_slow_loader_is_named_and_the_other_rank_waits(corpus: Path, tmp_path: Path) -> None:
    found = job(corpus, tmp_path, patch=late_batches, max_steps=55, logging_steps=10)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.01)
    said = [e.partition(": ")[2] for e in found["events"] if "jump" not in e]
    assert len(said) == 1 and said[0].startswith("slow loader: rank 1 reads its batches for 1")
    assert [(b["kind"], b["rank"]) for b in found["blame"]] == [("slow loader", 1)]
    assert found["blame"][0]["cost"] > 0.3
    first, second = found["seconds_by_rank"]
    assert first["waiting"] > 10 * max(0.001, second["waiting"])
    assert first["waiting"] > first["communication"], "waiting is no communication"
    assert second["data"] > 10 * first["data"]
    assert {"slow loader, rank 1"} < {a["what"] for a in found["advice"]}
    told = [r["event"] for r in lines(tmp_path / "metrics.jsonl") if "event" in r]
    assert told == found["events"]
    rows = lines(tmp_path / "ranks.jsonl")
    assert sum(r["steps"] for r in rows) == 54, "the last step is settled in the receipt"
    for row in rows:
        assert len(row["seconds"]) == 2 and all(set(s) <= set(PHASES) for s in row["seconds"])
    waiting = sum(r["seconds"][0].get("waiting", 0) for r in rows)
    assert waiting == pytest.approx(first["waiting"], rel=0.1)


def slow_passes(world) -> None:
    """Rank 1 computes for 40 ms more."""
    import time

    from unisono.train import job

    compute = job.causal_lm

    def slow(*args: object) -> object:
        time.sleep(0.04)
        return compute(*args)

    if world.rank == 1:
        job.causal_lm = slow


@pytest.mark.parametrize(
    ("patch", "kind"), [(late_batches, "slow loader"), (slow_passes, "slow rank")]
)
def test_ddp_has_the_same_account(corpus: Path, tmp_path: Path, patch: Any, kind: str) -> None:
    """Its collectives pass no ledger, but how long a rank stands still in them is seen."""
    found = job(corpus, tmp_path, patch=patch, sync="ddp", max_steps=55)
    assert [(b["kind"], b["rank"]) for b in found["blame"]] == [(kind, 1)]
    first, second = found["seconds_by_rank"]
    assert first["waiting"] > 10 * max(0.001, second["waiting"])
    assert first["compute"] < 0.5 * (first["compute"] + first["waiting"]), "waiting is no compute"
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.01)


def own_loop(world, slow_s: float, more: int) -> tuple[list[str], float, float]:
    """A loop of one's own, of which rank 1 sleeps in each step, or gets more samples."""
    import time

    import torch

    import unisono

    torch.manual_seed(1)
    model = torch.nn.Linear(8, 4)
    sync = unisono.replicate(model, timeout_s=60)
    for _ in range(140):
        count = 4 + more * (world.rank == 1)
        time.sleep(0.02 + slow_s * (world.rank == 1) + 0.005 * more * (world.rank == 1))
        model(torch.ones(count, 8)).sum().backward()
        sync.finish(count)
        model.zero_grad()
    seconds = sync.ledger.clock.read()
    said = sync.verdicts()
    sync.close()
    return said, seconds["waiting"], seconds["imbalance"]


def test_a_loop_of_ones_own_names_who_is_slow_or_has_more() -> None:
    for slow_s, more, words in (
        (0.02, 0, ": slow rank: rank 1 computes "),
        (0.0, 4, ": uneven load: rank 1 was given 33% more than the mean"),
    ):
        (said, waiting, imbalance), other = run_ranks(own_loop, 2, slow_s, more)
        [line] = said
        assert words in line and "of the step" in line
        assert other[0] == said, "all replicas say the same"
        mine = imbalance if more else waiting
        assert mine > 10 * max(0.02, other[2 if more else 1])
    for said, *_ in run_ranks(own_loop, 2, 0.0, 0):
        assert said == []


def long_sequences(world) -> None:
    """Rank 1's sequences are four times as long."""
    from unisono.data.blocks import Batch
    from unisono.train.step import Feed

    batch = Feed.batch

    def longer(feed, step, leaf):
        rows = batch(feed, step, leaf)

        def four(values):
            return np.concatenate([values] * 4, axis=1)

        return Batch(four(rows.input_ids), four(rows.labels), four(rows.position_ids), packed=True)

    if world.rank == 1:
        Feed.batch = longer


def test_more_work_is_not_a_slow_rank(corpus: Path, tmp_path: Path) -> None:
    found = job(
        corpus, tmp_path, patch=long_sequences, max_steps=70, sequence_length=128,
        model={**make_job(corpus, tmp_path).model, "max_position_embeddings": 512, "hidden_size": 96},
    )  # fmt: skip
    assert [(b["kind"], b["rank"]) for b in found["blame"]] == [("uneven load", 1)]
    first, second = found["seconds_by_rank"]
    assert first["imbalance"] > first["waiting"] and second["imbalance"] == pytest.approx(
        0, abs=0.05
    )


def test_goodput_over_two_sessions_and_recomputation(corpus: Path, tmp_path: Path) -> None:
    job(corpus, tmp_path, max_steps=8)
    found = job(corpus, tmp_path, max_steps=16, gradient_checkpointing=True)
    assert found["goodput"]["sessions"] == 2
    assert 0 < found["goodput"]["value"] < 1
    assert found["goodput"]["lost_s"] == pytest.approx(0, abs=0.01)
    assert 0 < found["shares"]["recomputation"] < found["shares"]["compute"]
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.01)
    assert found["mfu"]["value"] is None and "no known peak" in found["mfu"]["source"]
    assert found["mfu"]["flops_per_second"] > 0
    assert len(found["memory_by_rank"]) == 2 and min(found["memory_by_rank"]) > 2**26
    metrics = [r for r in lines(tmp_path / "metrics.jsonl") if "perf/memory_bytes" in r]
    assert len(metrics) == 16
