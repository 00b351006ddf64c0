"""What a step does once gradients are complete on every replica: scale, check, clip, update.

The sum of squares that clipping needs is the finite check too, so the check costs nothing. Every
replica computes the same from the same bits; nothing is communicated.
"""

from dataclasses import dataclass

import torch
from torch.nn import Parameter


@dataclass(frozen=True)
class Update:
    """What an update did."""

    gradient_norm: float
    """Of the mean gradient, before clipping."""
    committed: bool
    """False: a gradient was not finite and neither weights nor optimizer state changed."""


@torch.no_grad()
def update(
    params: list[Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    divide_by: float,
    max_norm: float,
) -> Update:
    """Divide the gradient sums once, clip their global norm, step the optimizer, drop gradients.

    `divide_by`: the global number of target tokens (or samples). `max_norm`: 0 clips nothing.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = global_norm(grads) / divide_by
    committed = bool(torch.isfinite(torch.tensor(norm)))
    if committed:
        factor = 1.0 / divide_by
        if max_norm and norm > max_norm:
            factor *= max_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(grads, factor)
        optimizer.step()
    for p in params:
        p.grad = None
    return Update(norm, committed)


def global_norm(grads: list[torch.Tensor]) -> float:
    """The L2 norm over all tensors; not finite if any value is not."""
    if not grads:
        return 0.0
    norms = torch._foreach_norm(grads, dtype=torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(norms).double()))
