"""Loss on the held-out split: the exact mean per target token, whatever the number of replicas.

Batches are cut the same way for every number of replicas and dealt out in turn; each batch's sum
has a slot of its own in the vector that is added over ranks, and the slots are added in order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from unisono.data.blocks import Batch, Blocks
from unisono.sync.ledger import Group

MOST_ROWS = 8
"""Of a batch. Small and the same for every number of replicas, so that the sums are the same."""
ROUNDS_BETWEEN_VOTES = 8


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean per target token, nats."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: nn.Module,
    blocks: Blocks,
    loss_sum: Callable[[Batch], torch.Tensor],
    group: Group,
    *,
    batch_rows: int,
    most_rows: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Collective: evaluate on the first `most_rows` samples, or all. None when `stop` said so.

    `batch_rows`: what surely fits into memory, a micro-batch; MOST_ROWS at most are used.
    """
    rows = len(blocks) if most_rows is None else min(most_rows, len(blocks))
    size = min(MOST_ROWS, batch_rows)
    batches = math.ceil(rows / size)
    sums = [0.0] * (2 * batches)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for round_ in range(math.ceil(batches / group.size)):
                if round_ % ROUNDS_BETWEEN_VOTES == 0 and group.sum(float(stop()))[0]:
                    return None
                index = round_ * group.size + group.rank
                if index >= batches:
                    continue
                batch = blocks.read(np.arange(index * size, min((index + 1) * size, rows)))
                sums[index] = float(loss_sum(batch))
                sums[batches + index] = float((batch.labels[:, 1:] != -100).sum())
    finally:
        model.train(was_training)
    totals = group.sum(*sums)
    tokens = int(sum(totals[batches:]))
    return Evaluation(sum(totals[:batches]) / tokens if tokens else math.nan, tokens)
