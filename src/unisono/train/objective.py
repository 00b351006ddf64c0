"""What is minimised: a sum over a micro-batch, divided once and globally by what was counted.

An `Objective` measures one micro-batch and knows nothing of ranks: the step (train/step.py) adds losses,
counts and metrics over micro-batches and, in its vote, over ranks, so that a mean is the global batch's
whatever the number of replicas. A loss is divided by the sum of `count`, in `unit`s: target tokens for a
language model, pairs for preferences. A metric is divided by its own count.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unisono.attention.shard import Shard
from unisono.data.blocks import NO_LABEL, Batch

Sums = Mapping[str, tuple[torch.Tensor | float, float]]
"""(sum, what it is divided by) by metric; detached."""


@dataclass(frozen=True)
class Measured:
    """Of one micro-batch, or of this rank's part of its sequences: parts add up to the whole."""

    loss: torch.Tensor
    """The sum, a float32 scalar with its graph."""
    count: int
    sums: Sums = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """What a run minimises, and what it tells of it."""

    measure: Callable[[Any, Any, str, bool], Measured]
    """(model, batch, device, bf16) -> Measured. `batch` is what the run's blocks read."""
    unit: str = "target token"
    """What `count` counts."""
    metrics: tuple[str, ...] = ()
    """Names that `sums` may have, in the order of the vote: the same on every rank."""
    shown: str = ""
    """The metric of the live line."""


def flat(names: Iterable[str], sums: Sums) -> list[float]:
    """The slots of one micro-batch in the vote, two a metric; reads from the device."""
    found = (sums.get(name, (0.0, 0.0)) for name in names)
    return [float(value) for pair in found for value in pair]


def means(names: Iterable[str], slots: list[float]) -> dict[str, float]:
    """Metrics from added slots; one that nothing was counted for is left out."""
    pairs = zip(names, slots[::2], slots[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}


def causal_lm(model: Any, batch: Batch | Shard, device: str, bf16: bool) -> torch.Tensor:
    """Sum of -log p(next token) over the targets of `batch`, a float32 scalar.

    Targets are labels[:, 1:] that are not -100; a `Shard`, one rank's part of sequences, has them
    shifted already. No attention mask is passed: positions restart at each document, from which
    transformers keeps documents apart, while an all-ones mask would let them leak into one another.
    """
    # Shifting the labels instead of the logits spares a copy of the largest tensor of all.
    targets = batch.targets if isinstance(batch, Shard) else _shifted(batch.labels)
    ids, positions, wanted = (
        torch.from_numpy(x).to(device, non_blocking=True)
        for x in (batch.input_ids, batch.position_ids, targets)
    )
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )


def target_tokens(batch: Batch | Shard) -> int:
    """What `causal_lm` sums over."""
    targets = batch.targets if isinstance(batch, Shard) else batch.labels[:, 1:]
    return int(np.count_nonzero(targets != NO_LABEL))


def _shifted(labels: np.ndarray) -> np.ndarray:
    return np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=NO_LABEL)
