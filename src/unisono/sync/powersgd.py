"""PowerSGD: the gradient of a matrix travels as two thin ones, every step.

Vogels et al., 2019 (arXiv:1905.13727), algorithm 1 and 2, for gradients M_i [a, b] of n replicas, E_i being
what replica i has yet to send, and Q [b, r] that of the step before (at first random, the same everywhere):

    M_i += E_i;  P = orthonormal(sum M_i Q);  Q = sum M_i^T P;  sum M_i ~ P Q^T;  E_i = M_i - P Q^T / n

All replicas compute the same from the same sums, so they stay equal bit for bit. Matrices of one shape are
multiplied together, all in float32. Vectors, embeddings, and matrices that two thin ones would not make half
as large travel whole. Before step `start` everything is exact (sync/exact.py): error feedback needs gradients
that change slowly, which those of the first steps do not.

Communication follows the backward pass and is not hidden. Bytes sent by each rank and step:
2 (n-1)/n times r (a + b) values of each such matrix and all values of the others, float32.
Memory: as exact, plus E and Q.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from unisono.mesh import HOLDERS, Mesh
from unisono.sync.exact import Exact
from unisono.sync.feedback import FEEDBACK, by_replica
from unisono.sync.ledger import Group, Ledger
from unisono.sync.parts import Parts
from unisono.sync.update import OWN, OptimizerFactory, Update, own_key
from unisono.sync.whole import Whole

WARM_START = "warm_start"
"""State key of Q."""


def is_low_rank(shape: Sequence[int], rank: int) -> bool:
    """Whether a matrix of this shape travels as two thin ones: no more than half of it then."""
    if len(shape) < 2:
        return False
    a, b = shape[0], math.prod(shape[1:])
    return 2 * rank * (a + b) <= a * b


def travelling_values(shapes: Sequence[Sequence[int]], whole: Sequence[bool], rank: int) -> int:
    """Values of a step; `whole`: the embeddings."""
    return sum(
        rank * (shape[0] + math.prod(shape[1:]))
        if is_low_rank(shape, rank) and not keep
        else math.prod(shape)
        for shape, keep in zip(shapes, whole, strict=True)
    )


def are_embeddings(model: nn.Module, params: Sequence[nn.Parameter]) -> list[bool]:
    """Of each parameter, whether it is looked up: most rows of such a gradient are zeros."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [id(p) in found for p in params]


class PowerSGD(Whole):
    """The strategy of this file. Collective: every rank makes it with the same arguments."""

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory,
        rank: int = 32,
        start: int = 0,
        bucket_mb: float = 4.0,
        layout: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """`rank`: r. `start`: updates that come first and are exact. `layout`: of the checkpoint."""
        super().__init__(model, ledger, optimizer, mesh)
        self.can_give_up = not self.lockstep
        self.parts = Parts("rank")
        self._updates = int((layout or {}).get("updates", 0))
        self._start = start
        holders = mesh.groups(*HOLDERS) if mesh else []
        self._control = Group("control", ledger, timeout_s)
        self._group = Group("low-rank", ledger, timeout_s, parts=holders)
        self.replicas = self._group.size
        embeddings = are_embeddings(model, self.params)
        wide = [p.dtype == torch.float32 for p in self.params]
        by_shape: dict[Any, list[int]] = {}
        for i, p in enumerate(self.params):
            if is_low_rank(p.shape, rank) and wide[i] and not embeddings[i] and self.replicas > 1:
                key = p.shape[0], p.shape[1:].numel(), p.device
                by_shape.setdefault(key, []).append(i)
        self._stacks = [_Stack(i, a, b, rank, device) for (a, b, device), i in by_shape.items()]
        thin = {i for stack in self._stacks for i in stack.indices}
        self._rest = [i for i in range(len(self.params)) if i not in thin]
        self._faults: list[torch.Tensor] = []
        self._exact: Exact | None = None
        if self._updates < start or self.replicas == 1:
            self._exact = Exact(model, ledger, bucket_mb=bucket_mb, mesh=mesh, timeout_s=timeout_s)
            self.parts = self._exact.parts

    # --- the seam

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch."""
        with self._exact.micro_batch(last) if self._exact else nullcontext():
            yield

    @torch.no_grad()
    def finish(self, *values: float) -> list[float]:
        """Collective: complete the gradients; returns the sum over ranks of each of `values`."""
        if self._exact:
            return self._exact.finish(*values)
        with self.ledger.clock("communication"):
            for p in self.params:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
            grads = [p.grad for p in self.params]
            for g in grads:
                if g is not None:
                    self.parts.add(g)
            self._faults = [g.norm() if g is not None else torch.zeros(()) for g in grads]
            scalars = torch.tensor([*values, *(g is not None for g in grads)], dtype=torch.float64)
            summing = self._control.all_reduce(scalars)
            # Those whose gradients are whole travel while the others are made thin.
            rest = [
                (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1)
                for p in (self.params[i] for i in self._rest)
            ]
            flat = torch.cat(rest) if rest else torch.zeros(0)
            travelling = self._group.all_reduce(flat)
            lefts = [s.left_products(grads) for s in self._stacks]
            self._sum(lefts)
            rights = [s.right_products(p) for s, p in zip(self._stacks, lefts, strict=True)]
            self._sum(rights)
            summing.wait()
            totals = scalars.tolist()
            used = totals[len(values) :]
            for stack, q in zip(self._stacks, rights, strict=True):
                for i, total in zip(stack.indices, stack.sums(q, self.replicas), strict=True):
                    self.params[i].grad = total.view(self.params[i].shape) if used[i] else None
                stack.used = [bool(used[i]) for i in stack.indices]
            travelling.wait()
            for i, part in zip(self._rest, flat.split([len(r) for r in rest]), strict=True):
                p = self.params[i]
                p.grad = part.view(p.shape).to(p.dtype) if used[i] else None
        return totals[: len(values)]

    @torch.no_grad()
    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Collective: as exact; what the step has left to send counts from here on."""
        done = super().update(divide_by=divide_by, max_norm=max_norm, learning_rate=learning_rate)
        for stack in self._stacks:
            stack.commit() if done.committed else stack.drop()
        self._updates += done.committed
        if self._exact and self._updates >= self._start and self.replicas > 1:
            self._exact.close()
            self._exact, kind = None, self.parts
            self.parts = Parts("rank") if kind.kind != "rank" else kind
        return done

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        if self._exact:
            self._exact.discard()
        for stack in self._stacks:
            stack.drop()
        super().discard()

    def blame(self) -> tuple[int, str] | None:
        """After `finish`: this rank and the parameter, where its own gradient was not finite."""
        if self._exact:
            return self._exact.blame()
        for (name, _), norm in zip(self.named, self._faults, strict=False):
            if not torch.isfinite(norm):
                return self._control.rank, name
        return None

    def rebucket(self, bucket_mb: float) -> None:
        """Collective, between steps: of the exact steps."""
        if self._exact:
            self._exact.rebucket(bucket_mb)

    def layout(self) -> dict[str, Any]:
        """How many updates there were."""
        return {"updates": self._updates}

    @torch.no_grad()
    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: as exact, then what each replica has yet to send, and Q."""
        yield from super().optimizer_state()
        for stack in self._stacks:
            for k, i in enumerate(stack.indices):
                name, p = self.named[i]
                mine = stack.left[k].contiguous()
                every = mine.new_empty(self.replicas, *mine.shape)
                self._group.all_gather(every, mine).wait()
                for replica, left in enumerate(every):
                    yield own_key(FEEDBACK, replica, name), left.view(p.shape)
                yield own_key(WARM_START, 0, name), stack.q[k]

    @torch.no_grad()
    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Error feedback and Q."""
        warm = {k: v for k, v in tensors.items() if k.partition(OWN)[0] == WARM_START}
        rest = {k: v for k, v in tensors.items() if k not in warm}
        feedback, *notes = by_replica(rest, self.replicas)
        rank = self._group.rank
        for stack in self._stacks:
            for k, i in enumerate(stack.indices):
                name = self.named[i][0]
                q = warm.get(own_key(WARM_START, 0, name))
                if q is not None and q.shape == stack.q[k].shape:
                    stack.q[k] = q
                if name in feedback:
                    stack.left[k] = feedback.pop(name)[rank].view(stack.left[k].shape)
        lost = [n for n, v in feedback.items() if v.any()]
        if lost:
            notes.append(f"left out error feedback of {len(lost)} parameters, which travel whole")
        return "; ".join(filter(None, notes))

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: weights, optimizer state and Q."""
        q = (
            (f"{WARM_START}.{self.named[i][0]}", stack.q[k])
            for stack in self._stacks
            for k, i in enumerate(stack.indices)
        )
        yield from chain(super().replicated(), q)

    @property
    def exact_steps(self) -> int:
        """That are yet to come before the first one of low rank."""
        return max(0, self._start - self._updates)

    @property
    def values(self) -> tuple[int, int, int, int]:
        """How many there are whole, in M of all thin ones, in their P, and in their Q."""
        whole = sum(self.params[i].numel() for i in self._rest)
        m, q = (sum(t.numel() for t in ts) for ts in zip(*((s.left, s.q) for s in self._stacks), strict=True)) if self._stacks else (0, 0)  # fmt: skip
        p = sum(s.left.shape[0] * s.left.shape[1] * s.q.shape[2] for s in self._stacks)
        return whole, m, p, q

    @torch.no_grad()
    def rehearse(self, clock: Callable[[], float]) -> tuple[float, float, float]:
        """Seconds by `clock` of what a step computes beside communicating, on gradients of zero and nothing
        kept: M Q, then orthonormal P and M^T P, then P Q^T."""
        at = [clock()]
        for stack in self._stacks:
            none = [None] * (1 + max(stack.indices))
            stack.left_products(none)
        at.append(clock())
        found = [
            s.right_products(torch.ones_like(s.left[..., : s.q.shape[2]])) for s in self._stacks
        ]
        at.append(clock())
        for stack, q in zip(self._stacks, found, strict=True):
            stack.sums(q, self.replicas)
        at.append(clock())
        for stack in self._stacks:
            stack.drop()
        return at[1] - at[0], at[2] - at[1], at[3] - at[2]

    def close(self) -> None:
        """Collective: hooks and groups go, gradients stay where they are."""
        if self._exact:
            self._exact.close()
        for group in (self._control, self._group):
            group.close()

    def _sum(self, parts: list[torch.Tensor]) -> None:
        """Collective: each becomes its sum over replicas, in one message."""
        if not parts:
            return
        flat = torch.cat([part.view(-1) for part in parts])
        self._group.all_reduce(flat).wait()
        for part, total in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(total.view(part.shape))


class _Stack:
    """Matrices of one shape [a, b]."""

    def __init__(self, indices: list[int], a: int, b: int, rank: int, device: torch.device) -> None:
        self.indices = indices
        generator = torch.Generator().manual_seed(indices[0])
        self.q = torch.randn(len(indices), b, rank, generator=generator).to(device)
        self.left = torch.zeros(len(indices), a, b, device=device)
        """What this replica has yet to send."""
        self.used = [True] * len(indices)
        """Of each, whether any replica had a gradient."""
        self.drop()

    def drop(self) -> None:
        """Forget what a step has come to."""
        self._matrices: torch.Tensor | None = None
        self._p: torch.Tensor | None = None
        self._next_q: torch.Tensor | None = None

    def left_products(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """This replica's M Q, [k, a, r]."""
        m = self._matrices = self.left.clone()
        for k, i in enumerate(self.indices):
            g = gradients[i]
            if g is not None:
                m[k] += g.reshape(m[k].shape)
        return m @ self.q

    def right_products(self, p: torch.Tensor) -> torch.Tensor:
        """This replica's M^T P, [k, b, r], once `p` is the sum over replicas."""
        assert self._matrices is not None
        self._p = torch.linalg.qr(p).Q
        return self._matrices.mT @ self._p

    def sums(self, q: torch.Tensor, replicas: int) -> torch.Tensor:
        """The gradients' sums, [k, a, b], once `q` is the sum over replicas."""
        assert self._matrices is not None and self._p is not None
        total = self._p @ q.mT
        self._matrices.sub_(total, alpha=1 / replicas)
        self._next_q = q
        return total

    def commit(self) -> None:
        """What the step has come to counts, but for matrices that no replica had a gradient of."""
        if self._next_q is None or self._matrices is None:
            return
        for k, used in enumerate(self.used):
            if used:
                self.left[k], self.q[k] = self._matrices[k], self._next_q[k]
        self.drop()
