"""PyTorch's DistributedDataParallel behind the seam: the baseline, and the peer to beat.

In its own documented best practice: gradients are views of its buckets, accumulation runs under
no_sync, buckets of 25 MiB with a first one of 1 MiB. Buffers are not kept equal after the start. It averages over ranks with its own all-reduce,
whose order of sums depends on the number of ranks, so strict mode refuses it. A step cannot be given
up half-way: an exception on one rank ends the run.

Its collectives do not pass the ledger, but how long this rank stands still is seen: DDP waits for them
between the last gradient of the backward pass, when a hook of our own runs, and that pass's return. On a GPU
nothing of that is seen by the host, and counts as compute.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unisono.sync.ledger import Group, Ledger
from unisono.sync.parts import Parts
from unisono.sync.update import OptimizerFactory
from unisono.sync.whole import Whole

# Its forward pass would be a collective even under no_sync, so no rank could run alone. torch 2.13
# renames the argument.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DDP(Whole):
    """The strategy of this file. Collective: every rank makes it with the same model.

    `model` is what the forward pass must call instead of the module itself.
    """

    can_give_up = False  # its reducer cannot complete such a step

    def __init__(
        self,
        module: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory | None = None,
        bucket_mb: float | None = None,
        find_unused_parameters: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__(module, ledger, optimizer)
        self._module = module
        self._group = Group("control", ledger, timeout_s)
        buffers: Any = {_BUFFER_SYNC: False}
        self._ddp = DistributedDataParallel(
            module,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,
            **buffers,
            find_unused_parameters=find_unused_parameters,
        )
        self.model = self._ddp
        self.parts = Parts("rank" if self._group.size > 1 else "half")
        self._on_cpu = not any(p.is_cuda for p in self.params)
        self._still_to_come = 0
        """Gradients, in a backward pass that communicates."""
        self._waiting = ExitStack()
        # They run before the reducer's, which is none of a parameter but of its accumulator. All
        # parameters are reached: DDP refuses anything else unless told to look for it.
        for p in self.params if self._group.size > 1 else ():
            p.register_post_accumulate_grad_hook(self._on_gradient)

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; only the `last` communicates."""
        self._still_to_come = len(self.params) if last else 0
        with nullcontext() if last else self._ddp.no_sync(), self._waiting:
            yield

    def _on_gradient(self, param: nn.Parameter) -> None:
        if not self._still_to_come:
            return
        assert param.grad is not None
        self.parts.add(param.grad)
        self._still_to_come -= 1
        if not self._still_to_come and self._on_cpu:
            self._waiting.enter_context(self.ledger.clock("waiting"))

    @torch.no_grad()
    def finish(self, *values: float) -> list[float]:
        """Collective: complete the gradients; returns the sum over ranks of each of `values`."""
        with self.ledger.clock("communication"):
            totals = self._group.sum(*values)
            grads = [p.grad for p in self.params if p.grad is not None]
            if self._group.size > 1:
                torch._foreach_mul_(grads, float(self._group.size))  # from its mean to the sum
        return totals

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The model's own, without DDP's prefix."""
        return dict(self._module.state_dict())

    def close(self) -> None:
        """Collective: end the process group of the scalars; DDP itself cannot be removed."""
        self._group.close()
