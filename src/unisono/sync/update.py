"""What a step does once gradients are complete: scale, check, clip, step the optimizer.

The norm that clipping needs is the finite check too, so the check costs nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

OptimizerFactory = Callable[[list[Parameter], list[Parameter]], torch.optim.Optimizer]
"""Makes an elementwise optimizer of matrices (two dimensions or more) and vectors, which as a rule
do not decay. Either list may be empty; a strategy may pass flat pieces of the parameters."""

MASTER = "master"
"""State key of a float32 weight that is more exact than the replicas' own."""

OWN = "@"
"""In `state@replica.parameter`: optimizer state that only this replica has, unlike all others'."""


def own_key(state: str, replica: int, name: str) -> str:
    """The name of a replica's own state of parameter `name`."""
    return f"{state}{OWN}{replica}.{name}"


def without_own(keys: Iterable[str]) -> str:
    """What to tell where replicas' own state (keys of `own_key`) is of no use; "" if there is none."""
    states = sorted({key.partition(OWN)[0] for key in keys})
    if not states:
        return ""
    return (
        f"left out what single replicas had of their own ({', '.join(states)}): this sync has none"
    )


@dataclass(frozen=True)
class Update:
    """What an update did."""

    gradient_norm: float
    """Of the mean gradient, before clipping."""
    committed: bool
    """False: a gradient was not finite and neither weights nor optimizer state changed."""


def clip_factor(norm: float, divide_by: float, max_norm: float) -> float:
    """What gradient sums are multiplied with, `norm` being that of the mean; 0 clips nothing."""
    clipped = max_norm and norm > max_norm
    # As torch.nn.utils.clip_grad_norm_ does it.
    return (max_norm / (norm + 1e-6) if clipped else 1.0) / divide_by


def is_finite(value: float) -> bool:
    return value - value == 0.0


def by_dimension(params: list[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """(matrices, vectors): those of two dimensions or more, and the others."""
    return [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]


def step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def global_norm(grads: list[torch.Tensor]) -> float:
    """The L2 norm over all tensors; not finite if any value is not."""
    if not grads:
        return 0.0
    wide = any(g.dtype == torch.float64 for g in grads)
    norms = torch._foreach_norm(grads, dtype=torch.float64 if wide else torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(norms).double()))
