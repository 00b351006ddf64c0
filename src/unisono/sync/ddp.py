"""PyTorch's DistributedDataParallel behind the seam: the baseline, and the peer to beat.

In its own documented best practice: gradients are views of its buckets, accumulation runs under
no_sync, buckets of 25 MiB with a first one of 1 MiB. Buffers are not kept equal after the start. It averages over ranks with its own all-reduce,
whose order of sums depends on the number of ranks, so strict mode refuses it. A step cannot be given
up half-way: an exception on one rank ends the run.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unisono.sync.ledger import Group, Ledger

# Its forward pass would be a collective even under no_sync, so no rank could run alone. torch 2.13
# renames the argument.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DDP:
    """The strategy of this file. Collective: every rank makes it with the same model.

    `model` is what the forward pass must call instead of the module itself.
    """

    def __init__(
        self,
        module: nn.Module,
        ledger: Ledger,
        *,
        bucket_mb: float | None = None,
        find_unused_parameters: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.ledger = ledger
        self._group = Group("control", ledger, timeout_s)
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.params = [p for _, p in self.named]
        buffers: Any = {_BUFFER_SYNC: False}
        self.model = DistributedDataParallel(
            module,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,
            **buffers,
            find_unused_parameters=find_unused_parameters,
        )

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; only the `last` communicates."""
        with nullcontext() if last else self.model.no_sync():
            yield

    @torch.no_grad()
    def finish(self, *values: float) -> list[float]:
        """Collective: complete the gradients; returns the sum over ranks of each of `values`."""
        with self.ledger.clock("communication"):
            totals = self._group.sum(*values)
            grads = [p.grad for p in self.params if p.grad is not None]
            if self._group.size > 1:
                torch._foreach_mul_(grads, float(self._group.size))  # from its mean to the sum
        return totals

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        for p in self.params:
            p.grad = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that are trained, each once, in the model's order."""
        return self.named

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradients that this rank has accumulated itself, under micro_batch(last=False)."""
        for name, p in self.named:
            if p.grad is not None:
                yield name, p.grad

    def blame(self) -> tuple[int, str] | None:
        """(rank, parameter) of a non-finite contribution, where the strategy still knows it."""
        return None

    def close(self) -> None:
        pass
