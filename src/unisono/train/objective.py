"""What is minimised: the sum of the loss over target tokens. The step divides once, globally."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unisono.attention.shard import Shard
from unisono.data.blocks import NO_LABEL, Batch


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


def _shifted(labels: np.ndarray) -> np.ndarray:
    return np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=NO_LABEL)
