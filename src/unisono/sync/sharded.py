"""Parameters, gradients and optimizer state each on one rank of a group, for models that do not fit.

PyTorch's FSDP2 (`fully_shard`) decides when to gather and when to reduce. Of the mesh (mesh.py) it sees
`replica` rows of n = shard x context ranks, for each tensor rank by itself: a row shares one copy of the
model, or of its slices; rank i of a row holds rows [i*c, (i+1)*c), c = ceil(rows/n), of every parameter. Every repeated block (an element of a
ModuleList) is one unit of communication, what is left of the model another.

Gradients are sums over all ranks, as the losses are sums over tokens; `update` divides once. The sum
over a row is taken in the fixed tree of sync/tree.py, the one over replicas is the backend's.

Bytes that a rank sends per step of m micro-batches, for r = replica, and the float32
bytes, filled up to multiples of n rows: B of the blocks, L of the last of them, R of the rest, S of
what is trained:

    parameters   m (2 B - L + R) (n-1)/n     for the forward pass, and for the backward pass again
    gradients    S (n-1)/n + 2 (S/n) (r-1)/r

and at most (B + R) (n-1)/n for each evaluated batch. All of it passes the ledger, through FSDP's
seam for one's own collectives, and what a step stands still in them is charged to communication.
On CPU FSDP would stand still in each of them for its whole time, and gloo's reduce-scatter is an
all-reduce that sends 2 S (n-1)/n (measured, torch 2.13); here an all-to-all and local sums do it,
and the next block's parameters and the last two blocks' sums are under way while it computes.

Memory per rank: weights, gradients and optimizer state S/n each, two whole blocks and what is left
of the model. With more than one micro-batch the gradients are whole, S, until the last one.

Every rank must run the same blocks in the same order, forward and backward (`lockstep`): FSDP2's
collectives carry no names. Within a block ranks may use different parameters. Blocks that only some
ranks run end in an error or in the timeout, never in wrong weights: `finish` compares the orders.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from unisono.errors import ConfigError, ReplicaError
from unisono.mesh import Mesh
from unisono.sync.digest import fingerprint
from unisono.sync.ledger import Group, Ledger
from unisono.sync.parts import Parts
from unisono.sync.slices import Slices
from unisono.sync.traffic import Gather, Scatter, Traffic
from unisono.sync.update import (
    MASTER,
    OptimizerFactory,
    Update,
    by_dimension,
    clip_factor,
    global_norm,
    is_finite,
    step,
    without_own,
)

_ORDER = 1 << 20


class Sharded:
    """The strategy of this file. Collective: every rank makes it with the same parameters.

    Shards `model` in place: afterwards its parameters are shards, whole only inside of the forward
    pass of the module that holds them. A model that waits on the CPU for a GPU goes there block by
    block, so that it need never be whole on it.
    """

    lockstep = True
    can_give_up = False

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory,
        mesh: Mesh | None = None,
        slices: Slices | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """`mesh`: by default all ranks shard. `slices`: what this rank's model holds of each parameter."""
        self.model = model
        self.slices = slices or Slices()
        self._root: Any = model
        self.ledger = ledger
        named = list(model.named_parameters())
        _check(named)
        self._control = Group("control", ledger, timeout_s)
        self._mesh = mesh or Mesh(shard=self._control.size)
        axes = self._mesh.replica, self._mesh.shard * self._mesh.context, self._mesh.tensor
        device = _device(named[0][1])
        ranks = init_device_mesh(device, axes, mesh_dim_names=("replica", "shard", "tensor"))
        self._replica = Group("replica", ledger, timeout_s, ranks.get_group("replica"))
        rows = self._mesh.groups("shard", "context")
        row = ranks.get_group("shard")
        self._shard = Group("shard", ledger, timeout_s, row, parts=rows, duplex=True)
        self.parts = Parts("rank" if self._control.size > 1 else "half")
        self._traffic = Traffic(self._shard, self._replica, device != "cpu", self.parts)
        self._order = 0
        self._used: set[str] = set()

        units: list[Any] = [*find_blocks(model), self._root]
        homes = {name: _home(model, name) for name, _ in named}
        members = _members(units, named)
        for i, unit in enumerate(units):
            # What the backward pass begins with stays whole: the last block, and by default the root.
            again = i < len(units) - 2 if unit is not model else None
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
            fully_shard(unit, mesh=ranks["shard"], mp_policy=policy, reshard_after_forward=again)
            self._connect(unit, i)
        for before, following in zip([units[-1], *units], units[:-1]):
            before.set_modules_to_forward_prefetch([following])
        units[-1].set_reduce_scatter_unused_params(True)

        self._began = False
        model.register_forward_pre_hook(self._begin)
        self._whole: dict[str, Parameter] = {}
        for unit, names in zip(units, members):
            unit.unshard()
            for name in names:
                self._watch(name, getattr(*homes[name]))
            unit.reshard()
        self._named = [(name, getattr(*homes[name])) for name, p in named if p.requires_grad]
        # A sharded tensor's own arithmetic costs a dispatch for each; the optimizer needs none of it.
        self._local = {name: Parameter(p.to_local().detach()) for name, p in self._named}
        matrices, vectors = by_dimension([p for _, p in self._named])
        local = {id(p): self._local[name] for name, p in self._named}
        self._optimizer = optimizer(
            [local[id(p)] for p in matrices], [local[id(p)] for p in vectors]
        )

    def _connect(self, unit: Any, index: int) -> None:
        def came(kind: int) -> None:
            # Tells an order from another one, which a sum of indices does not.
            self._order = (self._order * 31 + 2 * index + kind + 1) % _ORDER

        unit.set_custom_all_gather(Gather(self._traffic, came))
        unit.set_custom_reduce_scatter(sums := Scatter(self._traffic, came))
        if self._replica.size > 1:
            unit.set_all_reduce_hook(sums.over_replicas)
        # Else it averages over ranks, which is not what `update` divides.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)

    def _begin(self, *_: Any) -> None:
        self._began = True  # before, FSDP has nothing to reset and fails at it

    def _watch(self, name: str, whole: Parameter) -> None:
        """FSDP fills in zeros where this rank has no gradient; the optimizer must know better."""
        if whole.requires_grad:
            self._whole[name] = whole
            whole.register_post_accumulate_grad_hook(lambda _: self._used.add(name))

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; gradients leave in the `last`."""
        self._root.set_requires_gradient_sync(last)
        self._traffic.in_step = True
        try:
            yield
        finally:
            self._traffic.in_step = False

    @torch.no_grad()
    def finish(self, *values: float) -> list[float]:
        """Collective: complete the gradients; returns the sum over ranks of each of `values`."""
        with self.ledger.clock("communication"):
            self._traffic.complete()
            used = [float(name in self._used) for name, _ in self._named]
            order = float(self._order)
            totals = self._control.sum(*values, order, order * order, *used)
        self._used.clear()
        self._order = 0
        self._traffic.reduced.clear()
        first, second = totals[len(values) : len(values) + 2]
        if int(second) * self._control.size != int(first) ** 2:
            raise ReplicaError(
                "sharded: ranks ran the model's blocks in different orders, so parameters were "
                "mixed up; a model that skips blocks at random needs sync: exact"
            ).on_every_rank()
        for (_, p), ranks in zip(self._named, totals[len(values) + 2 :]):
            if not ranks:
                p.grad = None
        return totals[: len(values)]

    @torch.no_grad()
    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Collective: clip the global norm, step the optimizer on the shard, drop gradients.

        Every rank computes the norm from the same numbers in the same order.
        """
        for name, p in self._named:
            self._local[name].grad = None if p.grad is None else p.grad.to_local()
        named = [(n, p.grad) for n, p in self._local.items() if p.grad is not None]
        grads = [g for _, g in named]
        mine = global_norm([g for n, g in named if self.slices.counts(n)])
        with self.ledger.clock("communication"):  # of one copy: the first ranks
            squares = self._control.each(mine * mine)[: self._mesh.size // self._mesh.replica, 0]
        norm = math.sqrt(sum(squares.tolist())) / divide_by
        committed = is_finite(norm)
        if committed:
            torch._foreach_mul_(grads, clip_factor(norm, divide_by, max_norm))
            step(self._optimizer, learning_rate)
        self.discard()
        return Update(norm, committed)

    def settle(self) -> None:
        """Nothing is under way and every parameter is a shard. `state_dict` gives whole ones."""
        self._traffic.complete()
        if self._began:
            self._root.reset_iter_state()

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        self._traffic.complete()
        self._traffic.reduced.clear()
        self._used.clear()
        for p in [*self._whole.values(), *self._local.values(), *(p for _, p in self._named)]:
            p.grad = None

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """Those that are trained, each once, in the model's order; their values are shards."""
        return self._named

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradients that this rank has accumulated itself, under micro_batch(last=False)."""
        for name, _ in self._named:
            gradient = self._whole[name].grad
            if gradient is not None:
                yield name, gradient

    def blame(self) -> tuple[int, str] | None:
        """(rank, parameter) of a non-finite contribution, where the strategy still knows it."""
        return None

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: fingerprints of weights and optimizer state of this rank's row of the mesh.

        A single row has no equal, but for what is on all of its tensor ranks.
        """
        if self._mesh.replica * self._mesh.tensor == 1:
            return
        shards = [*self._local.items(), *self._states()]
        mine = torch.stack([fingerprint(t) for _, t in shards])
        row = mine.new_empty(self._shard.size, *mine.shape)
        self._shard.all_gather(row, mine).wait()
        yield from self.slices.alike((name, row[:, i]) for i, (name, _) in enumerate(shards))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Collective: whole parameters on rank 0's CPU, tied ones as one, and the buffers."""
        self.settle()
        state: dict[str, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            if not isinstance(value, DTensor):
                state[key] = value
                continue
            if id(value) not in seen:
                held = self._gather(value.to_local().detach(), value.shape)
                whole = self.slices.whole(key, held)
                seen[id(value)] = whole.cpu() if self._control.rank == 0 else whole[:0]
            if self._control.rank == 0:
                state[key] = seen[id(value)]
        return state

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: (state.parameter, whole tensor), one after another; to be exhausted."""
        shapes = {name: p.shape for name, p in self._named}
        for key, value in self._states():
            name = key.partition(".")[2]
            split = value.shape == self._local[name].shape
            held = self._gather(value, shapes[name]) if split else value
            yield key, self.slices.whole(key, held)

    def _states(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self._local.items():
            for key, value in sorted(self._optimizer.state.get(p, {}).items()):
                if isinstance(value, torch.Tensor):
                    yield f"{key}.{name}", value

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `optimizer_state` of any strategy gave. Each rank takes its own part."""
        self.settle()
        shapes = {name: p.shape for name, p in self._named}
        for key, whole in tensors.items():
            state, _, name = key.partition(".")
            p, value = self._local[name], self.slices.part(key, whole)
            if value.shape == shapes[name]:
                value = value[self._rows(len(value))]
            if state == MASTER:
                p.copy_(value)
            else:
                # torch keeps the step count of a fused optimizer on the parameter's device.
                self._optimizer.state[p][state] = value.to(p.device, copy=True)

    def _rows(self, rows: int) -> slice:
        """Which of a tensor's rows this rank holds: torch.chunk's, as FSDP deals them out."""
        chunk = math.ceil(rows / self._shard.size)
        return slice(min(rows, self._shard.rank * chunk), min(rows, (self._shard.rank + 1) * chunk))

    def _gather(self, mine: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        chunk = math.ceil(shape[0] / self._shard.size)
        filled = mine.new_zeros(chunk, *shape[1:])
        filled[: len(mine)] = mine
        whole = mine.new_empty(chunk * self._shard.size, *shape[1:])
        self._shard.all_gather(whole, filled).wait()
        return whole[: shape[0]]

    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """All state is every replica's."""
        return without_own(tensors)

    def layout(self) -> dict[str, Any]:
        """Nothing is learned."""
        return {}

    def close(self) -> None:
        """The model stays sharded."""
        self.settle()
        self._control.close()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: elements of the outermost ModuleLists, in the model's order.

    What is no block belongs to the root: single layers, whose output is often a view, which FSDP
    cannot follow through in-place operations; and what shares a parameter with the rest of the
    model. Containers are looked into.
    """

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            called = type(child).forward is not nn.Module.forward
            if isinstance(module, nn.ModuleList) and called and any(child.children()):
                yield child
            else:
                yield from outermost(child)

    def homes(module: nn.Module) -> Counter[int]:
        return Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))

    everywhere = homes(model)
    blocks = {id(block): block for block in outermost(model)}.values()
    return [b for b in blocks if (own := homes(b)) and all(own[p] == everywhere[p] for p in own)]


def _members(units: list[Any], named: list[tuple[str, Parameter]]) -> list[list[str]]:
    """Which parameters each unit holds: the last one, the root, those that no block does."""
    left = {id(p): name for name, p in named}
    return [[left.pop(id(p)) for p in unit.parameters() if id(p) in left] for unit in units]


def _home(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _check(named: list[tuple[str, Parameter]]) -> None:
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"sync: 'sharded' needs torch 2.13, found {torch.__version__}, where ranks that use "
            f"different parameters wait for each other for ever; write sync: exact"
        ).on_every_rank()
    for name, p in named:
        if p.requires_grad and p.dtype != torch.float32:
            raise ConfigError(
                f"sync: 'sharded' trains float32 parameters, found {p.dtype} in {name}"
            ).on_every_rank()


def _device(parameter: Parameter) -> str:
    return "cuda" if "nccl" in str(dist.get_backend_config()) else parameter.device.type
