"""FSDP's collectives, through the ledger: a unit's parameters gathered, its gradients summed.

FSDP asks for them where it needs them (its seam for collectives of one's own). On CPU it would stand still
in each for its whole time; here a gather is waited for where the parameters are used, and sums are under
way while the next blocks compute, UNDER_WAY of them at most. Sums over a row are taken in the fixed tree of
sync/tree.py, over replicas by the backend.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from unisono.sync.ledger import Group, Handle
from unisono.sync.parts import Parts
from unisono.sync.tree import tree_sum

UNDER_WAY = 2
"""Blocks whose sums may be under way at once; each holds its gradients twice."""


@dataclass(slots=True)
class _Sum:
    output: torch.Tensor
    handle: Handle
    received: torch.Tensor | None
    """Every rank's contribution, if `output` is still to be made of them."""


class Traffic:
    """What is under way while a step computes: gradient sums, until `complete`."""

    def __init__(self, shard: Group, replica: Group, at_once: bool, parts: Parts) -> None:
        self.shard, self.replica, self.parts = shard, replica, parts
        self.at_once = at_once
        """A GPU's streams overlap by themselves; there only the stream waits."""
        self.in_step = False
        self.reduced: set[int] = set()
        """Units that have reduced in this step: FSDP adds what comes now to what came then."""
        self._under_way: deque[_Sum] = deque()
        self._over_replicas: list[Handle] = []

    def scatter(self, output: torch.Tensor, sent: torch.Tensor, unit: int) -> None:
        """Collective: this rank's part of the sum of `sent` over the row, in `output` after `complete`."""
        self.parts.add(sent)
        if self.at_once:
            self.shard.reduce_scatter(output, sent).wait()
            return
        received = torch.empty_like(sent)
        handle = self.shard.all_to_all(received, sent)
        self._add(_Sum(output, handle, received), unit)

    def over_replicas(self, output: torch.Tensor, unit: int) -> None:
        """Collective: the sum of a scattered part over the replicas, in place."""
        if self.shard.size == 1:  # nothing was scattered
            self.parts.add(output)
        if self.shard.size > 1 and not self.at_once:
            return  # as soon as the sum over the row is there
        handle = self.replica.all_reduce(output)
        if self.at_once:
            handle.wait()
        else:
            self._add(_Sum(output, handle, None), unit)

    def standing_still(self) -> AbstractContextManager[None]:
        """Inside of a step's computation; an evaluation keeps its time."""
        return self.shard.ledger.clock("communication") if self.in_step else nullcontext()

    def _add(self, new: _Sum, unit: int) -> None:
        self._under_way.append(new)
        if unit in self.reduced:
            self.complete()
        self.reduced.add(unit)
        while len(self._under_way) > UNDER_WAY:
            self._land()

    def _land(self) -> None:
        oldest = self._under_way.popleft()
        with self.standing_still():
            oldest.handle.wait()
            if oldest.received is None:
                return
            oldest.output.copy_(tree_sum(list(oldest.received.view(self.shard.size, -1))))
        if self.replica.size > 1:
            self._over_replicas.append(self.replica.all_reduce(oldest.output))

    @torch.no_grad()
    def complete(self) -> None:
        while self._under_way:
            self._land()
        with self.standing_still():
            for handle in self._over_replicas:
                handle.wait()
        self._over_replicas.clear()


class _Allocated:
    """What FSDP asks of a collective of one's own, besides the call."""

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Allocated):
    """A unit's parameters from the ranks of its row."""

    def __init__(self, traffic: Traffic, came: Callable[[int], None]) -> None:
        self._traffic, self._came = traffic, came

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        self._came(0)
        handle = self._traffic.shard.all_gather(output_tensor, input_tensor)
        if not self._traffic.at_once:
            return _Arrival(handle, self._traffic)
        handle.wait()
        return None


class _Arrival(dist.Work):
    """A handle as FSDP waits for it: where the parameters are needed."""

    def __init__(self, handle: Handle, traffic: Traffic) -> None:
        super().__init__()
        self._handle, self._traffic = handle, traffic

    def wait(self, timeout: Any = None) -> bool:
        with self._traffic.standing_still():
            self._handle.wait()
        return True


class Scatter(_Allocated):
    """A unit's gradient sums, each rank's rows to it."""

    def __init__(self, traffic: Traffic, came: Callable[[int], None]) -> None:
        self._traffic, self._came = traffic, came

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        self._came(1)
        self._traffic.scatter(output_tensor, input_tensor, id(self))

    def over_replicas(self, output: torch.Tensor) -> None:
        self._came(1)
        self._traffic.over_replicas(output, id(self))
