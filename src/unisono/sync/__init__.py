"""One seam for synchronization: how the gradients of N replicas become one, and the weights stay one.

A strategy wraps each micro-batch's forward and backward pass (`micro_batch`), completes the gradients
(`finish`), and owns the optimizer on whatever shard it holds (`update`). What must travel afterwards
may still travel while the next forward pass runs; `settle` waits for it. Every strategy is a file
here and is tested against `reference`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from unisono.mesh import Mesh
from unisono.sync.ddp import DDP
from unisono.sync.exact import Exact
from unisono.sync.ledger import Group, Ledger
from unisono.sync.outer import Outer
from unisono.sync.parts import Parts
from unisono.sync.powersgd import PowerSGD
from unisono.sync.reference import Reference
from unisono.sync.slices import Slices
from unisono.sync.update import OptimizerFactory, Update
from unisono.sync.zero import Zero


class Strategy(Protocol):
    """The seam. What each does to the bits, what it sends and how it fails is in its own file."""

    ledger: Ledger
    model: nn.Module
    """What the forward pass must call."""
    slices: Slices
    """What this rank's model holds of each parameter."""
    lockstep: bool
    """Forward passes communicate: all ranks must run the same number of them, in the same order."""
    can_give_up: bool
    """A step may be given up half-way; otherwise an exception on one rank ends the run."""
    parts: Parts
    """Norms of what this rank's own gradients were, in steps that are measured."""

    def micro_batch(self, last: bool = True) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; `last`: of this step."""

    def finish(self, *values: float) -> list[float]:
        """Collective: gradient sums are complete where they are owned; sums of `values` over ranks."""
        ...

    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Collective, after `finish`: clip the global norm, step the optimizer, drop gradients.

        Nothing changes on any rank when a gradient is not finite.
        """
        ...

    def settle(self) -> None:
        """Every rank alike: wait until all parameters are whole and current on this rank.

        Needed before weights are read outside of `micro_batch`.
        """

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

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: what must be equal on all ranks, bit for bit."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Collective: the model's whole state dict, settled; only rank 0's needs to be complete.

        Valid until the next `update`.
        """
        ...

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: (state.parameter, whole tensor), one after another; to be exhausted.

        A replica's own state has keys of `update.own_key`, and comes on rank 0 too. What is yielded is valid until the next one.
        """
        ...

    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `optimizer_state` of any strategy gave. Each rank takes its own part."""

    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Put back what single replicas had, keys as `update.own_key` makes them; all of it is given to
        each rank. Returns a line for the user where something could not be put back as it was, else ""."""
        ...

    def layout(self) -> dict[str, Any]:
        """JSON: what was learned about the order of gradients, for `make_strategy` of a resume."""
        ...

    def close(self) -> None:
        """Collective: remove what was hooked into the model."""


def broadcast_model(model: nn.Module, group: Group) -> None:
    """Collective: parameters and buffers of every replica become rank 0's, so that all start equal."""
    for tensor in [*model.parameters(), *model.buffers()]:
        group.broadcast(tensor.detach()).wait()


def make_strategy(
    name: str,
    model: nn.Module,
    ledger: Ledger,
    *,
    optimizer: OptimizerFactory | None = None,
    bucket_mb: float = 4.0,
    leaves: int | None = None,
    shard: bool = False,
    wire: str = "float32",
    tables: bool = True,
    low_rank: tuple[int, int] = (0, 0),
    layout: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    slices: Slices | None = None,
    outer: Outer | None = None,
    timeout_s: float = 600.0,
) -> Strategy:
    """Collective: the strategy of that name.

    `optimizer`: without one there is no `update` (a loop of one's own has its own). `leaves`: as in
    Exact, None unless strict. `shard`, `wire`, `tables`, `layout`: as in Zero. `low_rank`: (rank, first
    step), as in PowerSGD. `mesh`: by default all ranks are replicas, or shard (sharded). `slices`: what
    `tensor.apply` returned for this model. `outer`: of streaming and sparse.
    """
    if name == "reference":
        return Reference(model, ledger, optimizer=optimizer, timeout_s=timeout_s)
    if name == "ddp":
        return DDP(model, ledger, optimizer=optimizer, timeout_s=timeout_s)
    if name == "sharded":
        from unisono.sync.sharded import Sharded

        assert optimizer is not None
        return Sharded(
            model, ledger, optimizer=optimizer, mesh=mesh, slices=slices, timeout_s=timeout_s
        )
    if name in ("streaming", "sparse"):
        from unisono.sync.streaming import Streaming

        assert optimizer is not None and outer is not None
        return Streaming(model, ledger, optimizer=optimizer, outer=outer, timeout_s=timeout_s)
    if name == "powersgd":
        assert optimizer is not None
        return PowerSGD(
            model,
            ledger,
            optimizer=optimizer,
            rank=low_rank[0],
            start=low_rank[1],
            layout=layout,
            mesh=mesh,
            bucket_mb=bucket_mb,
            timeout_s=timeout_s,
        )
    assert name in ("exact", "quantized"), name
    shard = shard or name == "quantized"
    if shard and (mesh.holders if mesh else torch.distributed.get_world_size()) > 1:
        assert optimizer is not None and not leaves
        return Zero(
            model,
            ledger,
            optimizer=optimizer,
            bucket_mb=bucket_mb,
            wire=wire,
            tables=tables,
            layout=layout,
            mesh=mesh,
            slices=slices,
            timeout_s=timeout_s,
        )
    return Exact(
        model,
        ledger,
        optimizer=optimizer,
        bucket_mb=bucket_mb,
        leaves=leaves,
        mesh=mesh,
        slices=slices,
        timeout_s=timeout_s,
    )
