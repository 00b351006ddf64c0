"""The definition of correct: every micro-batch's gradient to every rank, summed in the fixed tree.

Naive on purpose: nothing overlaps, and each rank holds the gradients of the whole global batch,
micro-batch by micro-batch: S (n-1) m bytes sent for m micro-batches a rank, and n m S of memory.
Every other strategy is tested against this one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unisono.sync.ledger import Group, Ledger
from unisono.sync.parts import Parts
from unisono.sync.tree import tree_sum
from unisono.sync.update import OptimizerFactory
from unisono.sync.whole import Whole


class Reference(Whole):
    """The strategy of this file. Collective: every rank makes it with the same parameters."""

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__(model, ledger, optimizer)
        self._group = Group("reference", ledger, timeout_s)
        self._leaves: list[list[torch.Tensor | None]] = []
        self.parts = Parts("micro-batch")

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch."""
        yield
        if not last:
            self._keep_leaf()

    def _keep_leaf(self) -> None:
        self._leaves.append([p.grad for p in self.params])
        for p in self.params:
            if p.grad is not None:
                self.parts.add(p.grad)
        self.parts.cut()
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def finish(self, *values: float) -> list[float]:
        """Collective: complete the gradients; returns the sum over ranks of each of `values`."""
        with self.ledger.clock("communication"):
            self._keep_leaf()
            mine = [
                any(leaf[i] is not None for leaf in self._leaves) for i in range(len(self.params))
            ]
            # A step that was given up may have fewer leaves on one rank than on another.
            totals = self._group.sum(*values, *mine)
            most = int(self._group.each(len(self._leaves)).max())
            for i, p in enumerate(self.params):
                leaves = [leaf[i] for leaf in self._leaves] + [None] * (most - len(self._leaves))
                own = torch.stack([torch.zeros_like(p) if g is None else g for g in leaves])
                every = own.new_empty(self._group.size * most, *p.shape)
                self._group.all_gather(every, own).wait()
                total = tree_sum(list(every)).to(p.dtype)
                p.grad = total.clone() if totals[len(values) + i] else None
            self._leaves = []
        return totals[: len(values)]

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        self._leaves = []
        super().discard()

    def close(self) -> None:
        """Collective: end the process group."""
        self._group.close()
