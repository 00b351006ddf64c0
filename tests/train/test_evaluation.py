"""Evaluation and trials where forward passes communicate, so that all ranks run the same number."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import run_ranks
from unisono.data.blocks import NO_LABEL, Batch
from unisono.sync.ledger import Group, Ledger
from unisono.sync.sharded import Sharded
from unisono.train.evaluation import Evaluation, evaluate
from unisono.train.objective import Measured, target_tokens
from unisono.train.trial import find_micro_batch, measure_baseline


class Rows:
    """Eleven blocks of ten tokens, of which a part are targets."""

    def __len__(self) -> int:
        return 11

    def read(self, indices: np.ndarray) -> Batch:
        ids = (np.arange(10) * (indices[:, None] + 3)) % 17
        labels = np.where(np.arange(10) < indices[:, None], ids, NO_LABEL)
        return Batch(ids, labels, np.tile(np.arange(10), (len(ids), 1)), False)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(17, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(8, 17)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def sgd(matrices, vectors) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=0.1)


def loss_of(world, sharded: bool, lockstep: bool, fails: int | None = None) -> tuple:
    model, group = Small(), Group("votes", Ledger(), 10)
    if sharded:
        Sharded(model, Ledger(), optimizer=sgd, timeout_s=10)
    passes = []

    def measure(batch: Batch) -> Measured:
        passes.append(len(batch.labels))
        if world.rank == fails:
            raise MemoryError
        logits = model(torch.from_numpy(batch.input_ids)).flatten(0, 1)
        labels = torch.from_numpy(batch.labels).flatten()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL)
        rows = float(len(batch.labels))
        return Measured(loss, target_tokens(batch), {"twos": (2 * rows, rows), "none": (0.0, 0.0)})

    names = ("none", "twos", "absent")
    found = evaluate(model, Rows(), measure, group, batch_rows=2, lockstep=lockstep, metrics=names)
    return found, len(passes)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_lockstep_changes_no_bit_of_the_loss(size: int) -> None:
    """Six batches, the last one short; on four ranks two have none in the second round."""
    expected = run_ranks(loss_of, 1, False, False)[0][0]
    assert expected.metrics == {"twos": 2.0}, "what nothing was counted for has no mean"
    assert expected.count == sum(max(0, k - 1) for k in range(11))
    rounds = -(-6 // size)
    for sharded in (False, True):
        assert run_ranks(loss_of, size, sharded, True) == [(expected, rounds)] * size
    alone = run_ranks(loss_of, size, False, False)
    assert [found for found, _ in alone] == [expected] * size
    assert sum(passes for _, passes in alone) == 6


def test_memory_that_runs_out_in_lockstep_ends_the_run() -> None:
    with pytest.raises(AssertionError, match="MemoryError"):
        run_ranks(loss_of, 2, False, True, 1)
    for found, _ in run_ranks(loss_of, 2, False, False, 1):
        assert isinstance(found, Evaluation) and found.loss != found.loss


def test_no_rank_runs_alone_in_lockstep() -> None:
    sync = SimpleNamespace(lockstep=True)
    assert measure_baseline(None, 4, 3, sync, None, "cpu") is None
    with pytest.raises(AssertionError):
        find_micro_batch(None, 4, sync, None, "cpu")
