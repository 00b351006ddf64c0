"""Meshes train what one process trains, and a checkpoint of one goes on upon any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import make_job, run, write_corpus
from ranks import run_ranks

STEPS = 3
SAME = {"max_steps": STEPS, "save_steps": STEPS, "adam_epsilon": 1e-6, "eval_batches": 1}
"""Without a larger epsilon AdamW makes a whole step of a gradient that is zero but for rounding."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(corpus: Path, output: Path, ranks: int, **changes: object) -> tuple[dict, list]:
    """(final parameters, losses of the steps)."""
    config = make_job(corpus, output, **{**SAME, **changes})
    ends = run_ranks(run, ranks, config, join=False)
    assert [end for end, _, _ in ends] == ["done"] * ranks, ends[0]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return load_file(output / "model.safetensors"), [r["train/loss"] for r in rows if "train/loss" in r]  # fmt: skip


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list]:
    return trained(corpus, tmp_path_factory.mktemp("one") / "run", 1)


def worst(found: dict, expected: dict) -> float:
    """The largest difference of any weight."""
    assert set(found) == set(expected)
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


PAIRS = {
    "replica x shard": ("sharded", {"replica": 2, "shard": 2}),
    "replica x context": ("exact", {"replica": 2, "context": 2}),
    "replica x tensor": ("exact", {"replica": 2, "tensor": 2}),
    "shard x context": ("sharded", {"shard": 2, "context": 2}),
    "shard x tensor": ("sharded", {"shard": 2, "tensor": 2}),
    "context x tensor": ("exact", {"context": 2, "tensor": 2}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_axes_train_what_one_process_trains(
    pair: str, corpus: Path, tmp_path: Path, one: tuple[dict, list]
) -> None:
    sync, mesh = PAIRS[pair]
    found, losses = trained(corpus, tmp_path / "run", 4, sync=sync, mesh=mesh)
    assert worst(found, one[0]) < 1e-5
    assert torch.allclose(torch.tensor(losses), torch.tensor(one[1]), rtol=1e-5)
