"""What is minimised: the sum of the loss over target tokens. The step divides once, globally."""

from typing import Any

import torch
import torch.nn.functional as F

from unisono.data.blocks import NO_LABEL, Batch


def causal_lm(model: Any, batch: Batch, device: str, bf16: bool) -> torch.Tensor:
    """Sum of -log p(next token) over the targets of `batch`, a float32 scalar.

    Targets are labels[:, 1:] that are not -100. No attention mask is passed: positions restart at
    each document, from which transformers keeps documents apart, while an all-ones mask would let
    them leak into one another.
    """
    ids = torch.from_numpy(batch.input_ids).to(device, non_blocking=True)
    positions = torch.from_numpy(batch.position_ids).to(device, non_blocking=True)
    labels = torch.from_numpy(batch.labels).to(device, non_blocking=True)
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    # Shifting the labels instead of the logits spares a copy of the largest tensor of all.
    targets = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
