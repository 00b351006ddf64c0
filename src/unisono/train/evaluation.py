"""Loss and metrics on the held-out split: the exact mean, whatever the number of replicas.

Batches are dealt out to the ranks in turn; each batch's sum has a slot of its own in the vector that
is added over ranks, and the slots are added in order. Batches have MOST_ROWS rows, or the
micro-batch's where that is smaller: as long as that is the same, so are the bits of the result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from unisono.data.pairs import Samples
from unisono.mesh import Mesh
from unisono.sync.ledger import Group
from unisono.train.objective import Measured, flat, means
from unisono.train.trial import is_out_of_memory

MOST_ROWS = 8
"""Of a batch, so that it seldom depends on the number of replicas."""
ROUNDS_BETWEEN_VOTES = 8


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean per target token, nats; or per whatever the objective counts."""
    count: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: nn.Module,
    blocks: Samples,
    measure: Callable[[Any], Measured],
    group: Group,
    *,
    batch_rows: int,
    most_rows: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    lockstep: bool = False,
    mesh: Mesh | None = None,
    metrics: tuple[str, ...] = (),
) -> Evaluation | None:
    """Collective: evaluate on the first `most_rows` samples, or all. None when `stop` said so.

    The loss is NaN when memory ran out on any rank. With `lockstep`, where forward passes
    communicate, a rank without a batch repeats the last one and counts nothing, and memory that runs
    out ends the run. `mesh`: by default every rank has samples of its own.
    `batch_rows`: what surely fits into memory, a micro-batch; MOST_ROWS at most are used.
    """
    mesh = mesh or Mesh(replica=group.size)
    tells = mesh.tensor_rank(group.rank) == 0  # as in train/step.py
    rows = len(blocks) if most_rows is None else min(most_rows, len(blocks))
    size = min(MOST_ROWS, batch_rows)
    batches = math.ceil(rows / size)
    width = 2 + 2 * len(metrics)
    sums = [0.0] * (width * batches)
    no_memory = False
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for round_ in range(math.ceil(batches / mesh.data)):
                if round_ % ROUNDS_BETWEEN_VOTES == 0 and group.sum(float(stop()))[0]:
                    return None
                index = round_ * mesh.data + mesh.data_rank(group.rank)
                if no_memory or (index >= batches and not lockstep):
                    continue
                first = min(index, batches - 1) * size
                batch = blocks.read(np.arange(first, min(first + size, rows)))
                try:
                    found = measure(batch)
                    slots = [float(found.loss), float(found.count), *flat(metrics, found.sums)]
                except (RuntimeError, MemoryError) as error:
                    if lockstep or not is_out_of_memory(error):
                        raise
                    no_memory = True
                    continue
                if index < batches and tells:
                    sums[index::batches] = slots
    finally:
        model.train(was_training)
    *totals, ranks_without = group.sum(*sums, float(no_memory))
    if ranks_without:
        return Evaluation(math.nan, 0)
    loss, counted, *rest = (sum(totals[k * batches : (k + 1) * batches]) for k in range(width))
    return Evaluation(loss / counted if counted else math.nan, int(counted), means(metrics, rest))
