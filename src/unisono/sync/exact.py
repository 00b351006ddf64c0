"""Exact synchronization: flat buckets that leave during the backward pass.

Contract: after `finish` every parameter's `.grad` is the sum of what all replicas' backward passes
added since the last one, bit for bit the same on every replica; None where no replica used the
parameter. How a gradient travels:

    backward pass -> copied into its bucket -> (bucket full) all-to-all: each rank receives every
    rank's piece of its own 1/n -> fixed tree sum, float32 or wider -> all-gather of the sums

Two replicas use one all-reduce a bucket instead: a sum of two has one order, and it is one trip for
two (5.7 MB over loopback: 6.3 ms for 9.4). Buckets leave in the order in which the backward pass
fills them, seen in the first step. Cost: each rank sends 2 S (n-1)/n bytes for S bytes of gradients,
as a ring all-reduce does, and holds one more copy of the gradients (the received pieces) from three
replicas on. With `leaves`, the micro-batches of a step are summed in the fixed tree too
(sync/tree.py), which makes the result independent of the number of replicas.

Failure: a lost peer or a timeout raises ReplicaError. A step may be given up at any point before
`finish`, which still completes every collective, so that the replicas stay in step.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import Parameter

from unisono.errors import ConfigError, UnisonoError
from unisono.mesh import HOLDERS, Mesh
from unisono.sync.bucket import Bucket, group_by_size
from unisono.sync.ledger import Group, Ledger
from unisono.sync.parts import Parts
from unisono.sync.slices import Slices
from unisono.sync.tree import HALF, tree_sum
from unisono.sync.update import OptimizerFactory
from unisono.sync.whole import Whole


class Exact(Whole):
    """The strategy of this file. Collective: every rank makes it with the same arguments."""

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory | None = None,
        bucket_mb: float = 4.0,
        leaves: int | None = None,
        mesh: Mesh | None = None,
        slices: Slices | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """`leaves`: micro-batches of this replica in every step, summed in the fixed tree.

        `mesh`: whose `shard` is 1; by default all ranks are replicas.
        """
        super().__init__(model, ledger, optimizer, mesh, slices)
        self.can_give_up = not self.lockstep
        self.names = [n for n, _ in self.named]
        half = next((n for n, p in self.named if p.dtype in HALF), None)
        if leaves and half:
            # Rounded on the way between ranks, but not within one: the bits would tell them apart.
            raise ConfigError(
                f"determinism: strict needs weights in float32, but {half} is in half precision; "
                f"write bf16: true instead"
            ).on_every_rank()
        self.leaves = leaves
        self.bucket_bytes = int(bucket_mb * 2**20)
        # Three groups: the order of all-gathers against all-to-alls depends on timing.
        self._control = Group("control", ledger, timeout_s)
        holders = mesh.groups(*HOLDERS) if mesh else []
        self._scatters = Group("scatter", ledger, timeout_s, parts=holders)
        self._gathers = Group("gather", ledger, timeout_s, parts=holders)
        self.replicas = self._scatters.size
        """Ranks whose gradients are summed: replicas, each perhaps of several context ranks."""
        self._used = [False] * len(self.params)
        self._reached = [False] * len(self.params)
        self._order: list[int] = []
        self._order_known = False
        self._learned: dict[str, Any] = {}
        self._own_fault: str | None = None
        """In the first step: the parameter in which what this rank sent was not finite."""
        self._last = True
        # Alone, without a tree, gradients are complete where autograd leaves them.
        self._alone = self.replicas == 1 and not leaves
        self.parts = Parts("micro-batch" if leaves else "half" if self._alone else "rank")
        self._buckets: list[Bucket] = []
        self._num_sent = self._num_gathered = 0
        if not self._alone:
            self._lay_out(range(len(self.params) - 1, -1, -1))
        hook = self._on_gradient_alone if self._alone else self._on_gradient
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(hook, i))
            for i, p in enumerate(self.params)
        ]

    # --- the seam

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; only the `last` communicates."""
        self._last = last
        try:
            yield
        finally:
            self._last = True
        if self.leaves and not last:
            with self.ledger.clock("communication"):
                self._keep_leaf()

    def finish(self, *values: float) -> list[float]:
        """Collective: complete the gradients; returns the sum over ranks of each of `values`."""
        with self.ledger.clock("communication"):
            if self._alone:
                self._reset()
                return self._control.sum(*values)
            scalars = torch.tensor([*values, *self._used], dtype=torch.float64)
            summing = self._control.all_reduce(scalars)
            for bucket in self._buckets[self._num_sent :]:
                self._send(bucket)
            if self.leaves:
                self.parts.cut()
            self._advance(wait=True)
            for bucket in self._buckets:
                assert bucket.gather is not None
                bucket.gather.wait()
            self._join_streams()
            summing.wait()
            result = scalars.tolist()
            self._hand_over(result[len(values) :])
            self._reset()
            if not self._order_known:
                self._learn_order()
        return result[: len(values)]

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        for bucket in self._buckets:
            if bucket.tree:
                bucket.tree.reset()
        self._reset()
        self._order, self._order_known = [], False  # a step that was given up taught nothing
        super().discard()

    def rebucket(self, bucket_mb: float) -> None:
        """Collective, between steps: let about `bucket_mb` MiB travel together from now on."""
        self.bucket_bytes = int(bucket_mb * 2**20)
        if self._order_known and not self._alone:
            self._lay_out(self._learned["order"])

    def layout(self) -> dict[str, Any]:
        """What the first step learned, for a resume; empty before."""
        return dict(self._learned)

    def blame(self) -> tuple[int, str] | None:
        """After `finish`: (rank, parameter) of a non-finite contribution that this rank received.

        After the first step, whose buckets are laid out anew, one that it sent. Else None with two
        replicas, which receive no pieces, or one.
        """
        if self._own_fault:
            return self._control.rank, self._own_fault
        if self.replicas <= 2:
            return None
        for bucket in self._buckets:
            if bucket.received is None:
                continue
            # The first row holds the sum by now; the others are, or contain, single ranks' pieces.
            for rank, row in reversed(list(enumerate(bucket.received))):
                bad = (~torch.isfinite(row)).nonzero()
                if len(bad):
                    start = self._scatters.rank * len(row)
                    i = bucket.index_at(start + int(bad[0]))
                    return self._scatters.ranks[rank], "padding" if i is None else self.names[i]
        return None

    def close(self) -> None:
        """Collective: the hooks go, gradients stay where they are."""
        for hook in self._hooks:
            hook.remove()
        for group in (self._control, self._scatters, self._gathers):
            group.close()

    # --- the backward pass

    @torch.no_grad()
    def _on_gradient(self, i: int, param: Parameter) -> None:
        """Runs when the backward pass has added the last contribution to `param.grad`."""
        with self.ledger.clock("communication"):
            bucket, view = self._places[i]
            if bucket.scatter is not None:
                refuse_second(self.names[i])
            if param.grad is not view:
                assert param.grad is not None
                view.copy_(param.grad.to_dense())
                param.grad = view
            bucket.missing.discard(i)
            self._used[i] = True
            if not self._last or self._reached[i]:
                return
            self._reached[i] = True
            if not self._order_known:
                self._order.append(i)
            bucket.pending -= 1
            while self._num_sent < len(self._buckets) and not self._next_bucket.pending:
                self._send(self._next_bucket)
            self._advance(wait=False)

    def _on_gradient_alone(self, i: int, param: Parameter) -> None:
        """What several replicas could not do is refused for one too."""
        if self._reached[i]:
            refuse_second(self.names[i])
        self._reached[i] = self._last

    @property
    def _next_bucket(self) -> Bucket:
        return self._buckets[self._num_sent]

    def _keep_leaf(self) -> None:
        for bucket in self._buckets:
            bucket.fill_missing()
            assert bucket.tree is not None
            self.parts.add(bucket.flat)
            bucket.tree.add(bucket.flat)
            bucket.missing = set(bucket.indices)
        self.parts.cut()
        for p in self.params:
            p.grad = None

    def _send(self, bucket: Bucket) -> None:
        bucket.fill_missing()
        self.parts.add(bucket.flat)
        if bucket.tree:
            if bucket.tree.complete_but_one:
                bucket.tree.finish(bucket.flat)
            else:  # the step was given up half-way; what travels is not used
                bucket.tree.reset()
        if not self._num_sent:
            self._own_fault = None
        if not self._order_known:
            self._look_at_own(bucket)
        if self.replicas <= 2:
            # One replica: nothing is sent. Two: the sum has one order, whoever computes it.
            bucket.scatter = bucket.gather = self._scatters.all_reduce(bucket.flat)
        else:
            assert bucket.received is not None
            bucket.scatter = self._scatters.all_to_all(bucket.received.view(-1), bucket.flat)
        self._num_sent += 1

    def _look_at_own(self, bucket: Bucket) -> None:
        """What this rank adds to the sum is not known afterwards; a look at it costs a pass over it."""
        if self._own_fault is None and not torch.isfinite(bucket.flat).all():
            i = bucket.index_at(int((~torch.isfinite(bucket.flat)).nonzero()[0]))
            self._own_fault = "padding" if i is None else self.names[i]

    def _advance(self, wait: bool) -> None:
        """Sum and return the buckets whose pieces have arrived, always in the order of sending."""
        stream = self._stream
        while self._num_gathered < self._num_sent:
            bucket = self._buckets[self._num_gathered]
            assert bucket.scatter is not None
            if self.replicas > 2:
                if not (wait or stream or bucket.scatter.done()):
                    return
                with torch.cuda.stream(stream):  # no-op on a CPU, where `stream` is None
                    bucket.scatter.wait()
                    assert bucket.received is not None
                    total = tree_sum(list(bucket.received)).to(bucket.flat.dtype)
                    bucket.gather = self._gathers.all_gather(bucket.flat, total)
            self._num_gathered += 1

    def _join_streams(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            # On a GPU `wait` only orders streams; the clock must stand still where the wire is. The
            # update reads the gradients' norm next anyway.
            with self.ledger.clock.standing_still():
                torch.cuda.current_stream().synchronize()

    # --- between steps

    def _hand_over(self, used: Sequence[float]) -> None:
        for i, (_, view) in enumerate(self._places):
            self.params[i].grad = view if used[i] else None

    def _reset(self) -> None:
        for bucket in self._buckets:
            bucket.reset()
        self._num_sent = self._num_gathered = 0
        self._used = [False] * len(self.params)
        self._reached = [False] * len(self.params)

    def _learn_order(self) -> None:
        """Collective: lay the buckets out as rank 0's first backward pass filled them."""
        rest = [i for i in range(len(self.params) - 1, -1, -1) if i not in set(self._order)]
        order = torch.tensor([*self._order, *rest])
        self._control.broadcast(order).wait()
        grads = [p.grad for p in self.params]
        self._learned = {"order": order.tolist()}
        self._lay_out(order.tolist())
        for i, grad in enumerate(grads):
            if grad is not None:
                self._places[i][1].copy_(grad)
                self.params[i].grad = self._places[i][1]
        self._order_known = True

    def _lay_out(self, order: Iterable[int]) -> None:
        """Fill buckets in `order`, each of one dtype and device and about `bucket_bytes`."""
        groups = group_by_size(order, self.params, self.bucket_bytes, self.bucket_bytes)
        self._buckets = [Bucket(g, self.replicas, self.leaves) for g in groups]
        places = {i: (b, v) for b in self._buckets for i, v in zip(b.indices, b.views, strict=True)}
        self._places = [places[i] for i in range(len(self.params))]
        on_gpu = self.replicas > 1 and any(b.flat.is_cuda for b in self._buckets)
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._num_sent = self._num_gathered = 0


def refuse_second(name: str) -> NoReturn:
    """A gradient came after the one that was complete."""
    raise UnisonoError(
        f"{name} received a gradient after its bucket was sent: several backward passes in one "
        f"step need `with sync.micro_batch(last=False)` around all but the last, and gradient "
        f"checkpointing needs use_reentrant=False"
    )
