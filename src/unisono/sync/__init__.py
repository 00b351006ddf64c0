"""One seam for synchronization: how the gradients of N replicas become one.

A strategy wraps each micro-batch's backward pass (`micro_batch`) and completes the step (`finish`);
then gradients are sums over the whole global batch, to be divided once by its number of targets.
Every strategy is a file here and is tested against `reference`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from unisono.sync.ddp import DDP
from unisono.sync.exact import Exact
from unisono.sync.ledger import Group, Ledger
from unisono.sync.reference import Reference


class Strategy(Protocol):
    """The seam. What each does to the bits, what it sends and how it fails is in its own file."""

    ledger: Ledger

    def micro_batch(self, last: bool = True) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; `last`: of this step."""

    def finish(self, *values: float) -> list[float]:
        """Collective: gradients are complete afterwards; returns sums over ranks of `values`."""
        ...

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that are trained, each once, in the model's order."""
        ...

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank's own backward passes have left, before `finish`."""
        ...

    def blame(self) -> tuple[int, str] | None:
        """After `finish`: (rank, parameter) of a non-finite contribution, if this rank saw one."""

    def close(self) -> None:
        """Remove what was hooked into the model."""


def broadcast_model(model: nn.Module, group: Group) -> None:
    """Collective: parameters and buffers of every replica become rank 0's, so that all start equal."""
    for tensor in [*model.parameters(), *model.buffers()]:
        group.broadcast(tensor.detach()).wait()


def make_strategy(
    name: str,
    model: nn.Module,
    ledger: Ledger,
    *,
    bucket_mb: float,
    leaves: int | None,
    timeout_s: float,
) -> Strategy:
    """Collective: the strategy of that name. `leaves`: as in Exact, None unless strict."""
    if name == "reference":
        return Reference(model.named_parameters(), ledger, timeout_s)
    if name == "ddp":
        return DDP(model, ledger, timeout_s=timeout_s)
    assert name == "exact", name
    return Exact(
        model.named_parameters(), ledger, bucket_mb=bucket_mb, leaves=leaves, timeout_s=timeout_s
    )
