"""Exact synchronization in both directions: gradients leave during the backward pass, weights return
during the next forward pass, and between the two each rank steps the optimizer on its own 1/n.

This is ZeRO stage 2 (Rajbhandari et al., 2020, arXiv:1910.02054) with the gather hidden. How a
gradient travels:

    backward -> bucket -> all-to-all -> fixed tree sum -> this rank's row of it
             -> norm over ranks -> clip -> optimizer on the row -> the row's new weights
             -> all-gather, in the order of the next forward pass, which waits where it needs them

Every replica has the same weights afterwards, bit for bit, since each row is computed once. Large
embeddings take a way of their own (sync/rows.py), all of it during the backward pass: their sums
return instead of their weights.

`wire: bfloat16` halves the bytes both ways. Gradients are rounded once, on the way, and added in
float32. A weight does not travel: what is sent is how much the replicas' copy has to change to become
the float32 master weight on the owner's shard, rounded. What rounding leaves behind is part of the
next change, so that replicas follow the master to within 2^-9 of one step's change, and no drift
builds up. All replicas, the owner too, add the same rounded change.

`wire: int8 | int4` (sync: quantized) is the same with a codec (sync/codec.py) in place of the cast:
gradients by all-to-all, decoded and added in float32, and changes of weights by all-gather, as in ZeRO++
(Wang et al., 2023, arXiv:2306.10209) and SDP4Bit (Jia et al., 2024, arXiv:2410.15526). What int4 takes from
a gradient stays with its sender and is added to the next one (error feedback, sync/shard.py).

Bytes sent by each rank, S being those of the weights on the wire, n the replicas:
S (n-1)/n for gradients and as many for weights or sums, plus the rows of sync/rows.py. With a codec,
(n-1) encoded_bytes(row) for each bucket's row, both ways.
Memory: weights whole; optimizer state (and masters) 1/n of what one replica would hold; gradients
until they have left, and then 1/n; of int4 (n-1)/n of the gradients for feedback.

The first step is the whole-gradient one of sync/exact.py, watched to learn the order in which gradients
become ready and weights are needed. `layout()` keeps it for a resume.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from unisono.errors import UnisonoError
from unisono.mesh import HOLDERS, Mesh
from unisono.sync import early
from unisono.sync.bucket import Layout, group_by_size
from unisono.sync.codec import mix
from unisono.sync.exact import Exact, refuse_second
from unisono.sync.feedback import FEEDBACK, by_replica
from unisono.sync.forward import Watch
from unisono.sync.ledger import Group, Ledger
from unisono.sync.parts import Parts
from unisono.sync.rows import Rows, Table
from unisono.sync.shard import Shard
from unisono.sync.slices import Slices
from unisono.sync.update import (
    MASTER,
    OptimizerFactory,
    Update,
    clip_factor,
    global_norm,
    is_finite,
    own_key,
    without_own,
)
from unisono.sync.wire import make_wires

TABLE_BYTES = 1 << 20
"""Smaller embeddings travel as any other parameter: rows cost two more round trips."""
TABLE_SHARE = 0.25
"""Rows that each rank may receive, as a share of the table, for rows to be worth sending alone."""
TAIL_SHARE = 0.25
"""Size of the bucket that is filled last (and needed first) beside the others."""
LAYOUT = ("order", "needs", "tables", "dense", "unseen")
"""What the first step learns: parameter indices in the order of gradients and of needs, embeddings
whose rows travel by themselves, those of them that have another use besides, and parameters that are
used where torch functions are not seen (TorchScript, C++ extensions)."""


def _saving_is_hooked() -> bool:
    """Something decides what the backward pass will find: gradient checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Zero:
    """The strategy of this file, for two replicas or more.

    Collective: every rank makes it with the same arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory,
        bucket_mb: float = 4.0,
        wire: str = "float32",
        tables: bool = True,
        layout: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        slices: Slices | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """`wire`: float32, bfloat16, int8 or int4. `tables`: large embeddings travel as in sync/rows.py, and
        their optimizer state is on every rank. `layout`: what `layout()` returned for the same model.
        `mesh`: whose `shard` is 1; by default all ranks are replicas.
        """
        self.model, self.ledger = model, ledger
        self.lockstep = mesh is not None and mesh.inner > 1
        self.can_give_up = not self.lockstep
        self.slices = slices or Slices()
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names, self.params = [n for n, _ in self.named], [p for _, p in self.named]
        self.bucket_bytes = int(bucket_mb * 2**20)
        self._factory = optimizer
        self._tables_whole = tables
        self._wire = wire
        # Groups of their own: what is issued in one of them would wait behind the others' traffic.
        self._control = Group("control", ledger, timeout_s)
        holders = mesh.groups(*HOLDERS) if mesh else []
        self._scatters = Group("scatter", ledger, timeout_s, parts=holders, duplex=True)
        self._gathers = Group("gather", ledger, timeout_s, parts=holders, duplex=True)
        self._returned_sums = Group("sum", ledger, timeout_s, parts=holders, duplex=True)
        self._row_group = Group("rows", ledger, timeout_s, parts=holders, duplex=True)
        self.replicas, self.rank = self._scatters.size, self._scatters.rank
        assert self.replicas > 1
        self.parts = Parts("rank")
        self._dense: dict[int, torch.Tensor] = {}
        """Of tables, until their rows are known: what both add up to has the norm."""
        self._index = {n: i for i, n in enumerate(self.names)}
        self._number = {id(p): i for i, p in enumerate(self.params)}
        self._watch = Watch(self, model)
        self._hooks: list[Any] = []
        self._learned: dict[str, list[int]] = {}
        self._saved: Mapping[str, torch.Tensor] | None = None
        self._saved_feedback: Mapping[str, torch.Tensor] = {}
        self._updates = int((layout or {}).get("updates", 0))
        """Since the beginning of the run: the seed of stochastic rounding."""
        self._clear()
        # The first step only: whole gradients, and what is seen of their order.
        self._first: Exact | None = None
        self._uses: list[int] = []
        self._touched: dict[int, int] = {}
        if layout and all(k in layout for k in LAYOUT):
            self._learned = {k: list(layout[k]) for k in LAYOUT}
            self._start()
        else:
            self._first = Exact(
                model, ledger, bucket_mb=bucket_mb, mesh=mesh, slices=slices, timeout_s=timeout_s
            )
            self._first.parts = self.parts

    def _clear(self) -> None:
        self._shards: list[Shard] = []
        """In the order in which the backward pass completes them."""
        self._returns: list[Shard] = []
        """In the order in which the forward pass needs them."""
        self._places: list[tuple[Shard, int]] = []
        self._tables: dict[int, Table] = {}
        self._foremost = -1
        """The parameter whose gradient is first in the backward pass."""
        self._under_way = 0
        """Shards whose weights are on their way."""
        self._square = 0.0
        self._culprit: tuple[int, str] | None = None
        self._last = True
        self._begin_step()

    def _begin_step(self) -> None:
        for shard in self._shards:
            shard.begin()
        self._num_sent = self._num_summed = 0
        self._returns_sum: list[Shard] = []
        """Whole shards whose sum is on its way to all ranks, or waits for its turn."""
        self._announced: Rows | None = None
        self._used = [False] * len(self.params)
        self._reached = [False] * len(self.params)

    # --- the seam

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; only the `last` communicates."""
        first = self._first
        watching = first or self._under_way or self._tables
        self._last = last
        try:
            with (
                first.micro_batch(last) if first else nullcontext(),
                self._watch if watching else nullcontext(),
            ):
                for i in self._learned.get("unseen", ()):
                    self._wait_for(i)
                yield
        finally:
            self._last = True
            for table in self._tables.values():
                table.merge()

    @torch.no_grad()
    def finish(self, *values: float) -> list[float]:
        """Collective: complete this rank's part; returns the sum over ranks of each of `values`."""
        if self._first:
            return self._first.finish(*values)
        with self.ledger.clock("communication"):
            while self._num_sent < len(self._shards):
                self._send_next()
            for i, table in self._tables.items():
                self._used[i] |= table.used
                self._measure_rows(i, table)
            rows = self._announce_rows()
            if rows:
                rows.send(self._updates)
            self._add_up(wait=True)
            for shard in self._shards:
                if shard.whole:
                    shard.take_sum()
            culprit = rows.add() if rows else None
            if culprit and self._culprit is None:
                self._blame(culprit[0], culprit[1].shard)
            *total, self._square = self._control.sum(*values, *self._used, self._square_of_sums())
            self._used_anywhere = [bool(x) for x in total[len(values) :]]
            for p in self.params:
                p.grad = None
            self._begin_step()
        return total[: len(values)]

    @torch.no_grad()
    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Collective: clip, step the optimizer on this rank's part, send the weights off."""
        self.settle()
        if self._first and not self._begin(self._first):
            return Update(math.nan, committed=False)
        norm = math.sqrt(self._square) / divide_by if is_finite(self._square) else math.nan
        if not is_finite(norm):
            self.discard()  # a table's sum would be the beginning of the next one
            return Update(norm, committed=False)
        factor = clip_factor(norm, divide_by, max_norm)
        for shard in self._returns:
            shard.step(self._used_anywhere, factor, learning_rate)
            shard.send_weights(self._gathers)
        self._updates += 1
        self._under_way = len(self._returns)
        for shard in self._shards:
            if shard.whole:
                shard.step(self._used_anywhere, factor, learning_rate)
        return Update(norm, committed=True)

    @torch.no_grad()
    def settle(self) -> None:
        """Every rank alike: wait until all parameters are whole and current on this rank."""
        if self._under_way:
            with self.ledger.clock("communication"):
                for shard in self._returns:
                    shard.receive_weights()
            self._under_way = 0

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        if self._first:
            self._first.discard()
        for p in self.params:
            p.grad = None
        for shard in self._shards:
            shard.drop()
        for table in self._tables.values():
            table.lookups.clear()
        self._dense.clear()
        self._begin_step()
        self._uses, self._touched = [], {}

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """Those that are trained, each once, in the model's order."""
        return self.named

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradients that this rank has accumulated itself, before `finish`."""
        for name, p in self.named:
            if p.grad is not None:
                yield name, p.grad
        for i, table in self._tables.items():
            for lookup in table.lookups:
                if lookup.gradient is not None:
                    yield self.names[i], lookup.gradient

    def blame(self) -> tuple[int, str] | None:
        """After `finish`: (rank, parameter) of a non-finite contribution to this rank's part."""
        return self._culprit

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: weights, and the optimizer state of large embeddings. The rest is on one rank each."""
        self.settle()
        whole = self._state_of([s for s in self._shards if s.whole])
        yield from self.slices.alike([*self.named, *whole])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Collective: the model's whole state dict; of slices, on rank 0."""
        self.settle()
        return self.slices.state_dict(self.model.state_dict())

    @torch.no_grad()
    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: (state.parameter, whole tensor), gathered bucket by bucket."""
        self.settle()
        if self._saved is not None:  # loaded, and laid out in the first update
            yield from self._saved.items()
        for key, value in self._state_of(self._shards):
            yield key, self.slices.whole(key, value)
        for name, every in chain(self._saved_feedback.items(), self._feedback_of(self._shards)):
            for replica, value in enumerate(every):
                yield own_key(FEEDBACK, replica, name), value

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a saved state; before the first step it is kept until then."""
        self.settle()  # what arrives later would lie upon it
        if self._first:
            self._saved = tensors
            return
        for key, value in tensors.items():
            self._load(key, self.slices.part(key, value))

    @torch.no_grad()
    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Error feedback, where this wire has any."""
        if self._wire not in ("int8", "int4") or (self._first and self._wire == "int8"):
            return without_own(tensors)
        feedback, *notes = by_replica(tensors, self.replicas)
        if self._first:
            self._saved_feedback = feedback
            feedback = {}
        lost = [n for n, v in feedback.items() if not self._load_feedback(n, v) and v.any()]
        if lost:
            notes.append(
                f"left out error feedback of {len(lost)} parameters: {self._wire} has none"
            )
        return "; ".join(filter(None, notes))

    def layout(self) -> dict[str, Any]:
        """What the first step learned, for a resume, and how many updates there were; empty before."""
        if not self._learned:
            return {}
        return {**{k: list(v) for k, v in self._learned.items()}, "updates": self._updates}

    @torch.no_grad()
    def rebucket(self, bucket_mb: float) -> None:
        """Collective, between steps: let about `bucket_mb` MiB travel together from now on.

        Optimizer state moves to its new owners: each rank sends its own once. Needs room for the
        weights twice meanwhile.
        """
        self.bucket_bytes = int(bucket_mb * 2**20)
        if self._first:
            self._first.rebucket(bucket_mb)
            return
        self.settle()
        old = self._shards
        self._start()
        for key, whole in self._state_of(old):
            self._load(key, whole)
        for name, every in self._feedback_of(old):
            self._load_feedback(name, every)

    def close(self) -> None:
        """Collective: the hooks go; weights are whole and stay where they are."""
        self.settle()
        if self._first:
            self._first.close()
        self._watch.close()
        for hook in self._hooks:
            hook.remove()
        for group in (
            self._control, self._scatters, self._gathers, self._returned_sums, self._row_group
        ):  # fmt: skip
            group.close()

    # --- the forward pass

    def on_use(self, tensor: torch.Tensor) -> None:
        """Wait for a weight's way back before it is used."""
        i = self._number.get(id(tensor))
        if i is None:
            return
        if self._first:
            self._uses.append(i)
        else:
            self._wait_for(i)

    def on_linear(self, x: torch.Tensor, weight: Parameter) -> torch.Tensor | None:
        """Let the first gradient of the backward pass leave before its layer's other one is computed."""
        i = self._number.get(id(weight))
        if i is None or i != self._foremost or not torch.is_grad_enabled() or _saving_is_hooked():
            return None
        if x.dim() < 2 or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        return early.linear(x, weight)

    def _wait_for(self, i: int) -> None:
        if self._under_way and self._places[i][0].gather is not None:
            with torch.no_grad(), self.ledger.clock("communication"):
                self._under_way -= self._places[i][0].receive_weights()

    def on_lookup(
        self, ids: torch.Tensor, weight: Parameter, padding_idx: int | None
    ) -> torch.Tensor | None:
        """Give a lookup in a table a leaf of its own."""
        i = self._number.get(id(weight))
        # Recomputed in the backward pass, where torch functions are not seen, a lookup would be the
        # plain one: in checkpointed segments (no gradient, or hooks on what is saved) it is so too.
        if i is None or not torch.is_grad_enabled() or _saving_is_hooked():
            return None
        if weight._backward_hooks:  # they are meant for the whole gradient
            return None
        if self._first:
            self._uses.append(~i)  # a lookup; `on_use` follows
            touched = 0 if weight.is_cuda else len(torch.unique(ids))
            self._touched[i] = max(self._touched.get(i, 0), touched)
            return None
        table = self._tables.get(i)
        if table is None or self._announced:
            return None
        return table.look_up(ids, weight, padding_idx)

    # --- the backward pass

    @torch.no_grad()
    def _on_gradient(self, i: int, param: Parameter) -> None:
        """Runs when the backward pass has added the last contribution to `param.grad`."""
        if self._reached[i]:
            refuse_second(self.names[i])
        self._used[i] = True
        assert param.grad is not None
        if param.grad.is_sparse:
            param.grad = param.grad.to_dense()
        shard, _ = self._places[i]
        if shard.gather is not None:
            raise UnisonoError(
                f"{self.names[i]} was used before its new value was there: by something that is not "
                f"seen (TorchScript, C++) and was not in the first step; write shard_optimizer: false"
            )
        if not shard.sends_gradients:
            if self._announced:
                refuse_second(self.names[i])
            raise UnisonoError(
                f"{self.names[i]} was only looked up in the first step, but has another use now; "
                f"write shard_optimizer: true"
            )
        if not self._last:
            return
        with self.ledger.clock("communication"):
            self._reached[i] = True
            rows = self._announce_rows()
            if rows:
                rows.advance()
            self._pack(i, param.grad)
            shard.pending -= 1
            while self._num_sent < len(self._shards):
                if self._shards[self._num_sent].pending:
                    break
                self._send_next()
            self._add_up(wait=False)

    def _pack(self, i: int, gradient: torch.Tensor) -> None:
        shard, place = self._places[i]
        shard.pack(place, gradient)
        self.parts.add(gradient)
        if self.parts.measuring and i in self._tables:
            self._dense[i] = gradient

    def _measure_rows(self, i: int, table: Table) -> None:
        """Add the norm of a table's rows, which may lie upon a dense gradient."""
        dense = self._dense.pop(i, None)
        if self.parts.measuring and table.used:
            ids, rows = table.own()
            if dense is not None:
                below = dense[ids]
                self.parts.add(below, -1.0)
                rows = rows + below
            self.parts.add(rows)

    def _announce_rows(self) -> Rows | None:
        """Collective: in the last backward pass, all lookups of the step are known."""
        if self._tables and not self._announced:
            self._announced = Rows(list(self._tables.values()), self._row_group)
        return self._announced

    def _send_next(self) -> None:
        if not self._num_sent:
            self._culprit = None
        shard = self._shards[self._num_sent]
        for place in sorted(shard.missing):  # used by an earlier micro-batch, not by the last one
            i = shard.layout.indices[place]
            gradient = self.params[i].grad
            if gradient is not None:
                self._pack(i, gradient)
        shard.send(self._scatters, mix(self._updates, self._num_sent))
        self._num_sent += 1

    def _add_up(self, wait: bool) -> None:
        """Sum the shards whose pieces have arrived, always in the order of sending."""
        while self._num_summed < self._num_sent:
            shard = self._shards[self._num_summed]
            if not (wait or shard.arrived()):
                break
            params = [self.params[i] for i in shard.layout.indices]
            culprit = shard.add_up([p.grad for p in params])
            if culprit is not None and self._culprit is None:
                self._blame(culprit, shard)
            if shard.sends_gradients:
                for p in params:
                    p.grad = None
            if shard.whole:
                self._returns_sum.append(shard)
            self._num_summed += 1
        # Not urgent: in the gaps that the gradients of other shards leave, and at the end.
        while self._returns_sum and (wait or self._num_sent - self._num_summed <= 2):
            if self._returns_sum[0].return_next(self._returned_sums, wait):
                continue
            if not wait and self._returns_sum[0].is_returning:
                break
            self._returns_sum.pop(0)

    def _square_of_sums(self) -> float:
        """Of this rank's rows, but for what another tensor rank counts."""
        norms = torch.stack([s.norm for s in self._shards]) if self._shards else torch.zeros(0)
        others = [
            shard.sum_of(place)
            for i, (shard, place) in enumerate(self._places)
            if not self.slices.counts(self.names[i])
        ]
        return float(norms.square().sum()) - global_norm(others) ** 2

    def _blame(self, rank: int, shard: Shard) -> None:
        i = shard.first_not_finite()
        self._culprit = (self._scatters.ranks[rank], self.names[i]) if i is not None else None

    # --- layout

    def _begin(self, first: Exact) -> bool:
        """Collective: after the first step that counts, whose gradients are whole, lay everything out.

        A step that was given up has taught nothing, nor one that is not finite: False.
        """
        gradients = [p.grad for p in self.params]
        norm = self.slices.norm(
            (name, g) for name, g in zip(self.names, gradients, strict=True) if g is not None
        )
        if not is_finite(norm):
            self._culprit = first.blame()
            self.discard()
            return False
        with self.ledger.clock("communication"):
            self._learned = self._agree(first.layout()["order"], gradients)
            first.close()
            self._first = None
            self._used_anywhere = [g is not None for g in gradients]
            self._start()
            for shard in self._shards:
                shard.take([gradients[i] for i in shard.layout.indices])
            for p in self.params:
                p.grad = None
            self._square = norm * norm
        return True

    def _agree(
        self, order: list[int], gradients: Sequence[torch.Tensor | None]
    ) -> dict[str, list[int]]:
        """Collective: rank 0's order of needs, and the tables and unseen uses of all ranks."""
        count = len(self.params)
        # ~i, i is a lookup in parameter i; any other i another use of it.
        lookups = {k + 1 for k, i in enumerate(self._uses) if i < 0}
        other = {i for k, i in enumerate(self._uses) if i >= 0 and k not in lookups}
        touched = [float(self._touched.get(i, 0)) for i in range(count)]
        mine = [float(i in uses) for uses in (other, set(self._uses)) for i in range(count)]
        every = self._control.each(*touched, *mine)
        most, used, visible = every.amax(dim=0).view(3, count).tolist()
        tables = [i for i, rows in enumerate(most) if self._is_table(i, rows)]
        seen = [
            i for k, i in enumerate(self._uses) if i >= 0 and not (k in lookups and i in tables)
        ]
        needs = torch.tensor(list(dict.fromkeys([*seen, *range(count)])), dtype=torch.int64)
        self._control.broadcast(needs).wait()
        self._uses, self._touched = [], {}
        return {
            "order": order,
            "needs": needs.tolist(),
            "tables": tables,
            "dense": [i for i in tables if used[i]],
            "unseen": [i for i, g in enumerate(gradients) if g is not None and not visible[i]],
        }

    def _is_table(self, i: int, touched: float) -> bool:
        p = self.params[i]
        return bool(
            self._tables_whole
            and 0 < touched * (self.replicas - 1) <= TABLE_SHARE * p.shape[0]
            and p.numel() * p.element_size() >= TABLE_BYTES
        )

    def _start(self) -> None:
        """Lay shards and tables out as learned."""
        learned = self._learned
        self._clear()
        # On a GPU, finding the rows would wait for it; what was learned may come from a CPU.
        tables = [i for i in learned["tables"] if self._tables_whole and not self.params[i].is_cuda]
        dense = learned["dense"]
        # What is not looked up of a table is the output layer, whose gradient is first.
        first = sorted(tables, key=lambda i: i in dense, reverse=True)
        order = [i for i in learned["order"] if i not in tables]
        tail_bytes = int(self.bucket_bytes * TAIL_SHARE)
        groups = [[(i, self.params[i])] for i in first]
        groups += group_by_size(order, self.params, self.bucket_bytes, tail_bytes)
        places: dict[int, tuple[Shard, int]] = {}
        for group in groups:
            index, p = group[0]
            wires = make_wires(self._wire, p.dtype)
            layout = Layout(group, self.replicas, wires.block)
            own = [p for _, p in group]
            shard = Shard(
                layout, own, self.rank, self._factory, wires, index in tables, self.bucket_bytes
            )
            shard.sends_gradients = index not in tables or index in dense
            if shard.whole:
                self._tables[index] = Table(shard)
            self._shards.append(shard)
            places |= {i: (shard, k) for k, (i, _) in enumerate(group)}
        self._places = [places[i] for i in range(len(self.params))]
        dense_shards = [s for s in self._shards if s.sends_gradients]
        self._foremost = dense_shards[0].layout.indices[0] if dense_shards else -1
        need = {i: k for k, i in enumerate(learned["needs"])}
        self._returns = sorted(
            (s for s in self._shards if not s.whole),
            key=lambda s: min(need[i] for i in s.layout.indices),
        )
        self._begin_step()
        if not self._hooks:
            self._hooks = [
                p.register_post_accumulate_grad_hook(partial(self._on_gradient, i))
                for i, p in enumerate(self.params)
            ]
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.load_optimizer_state(saved)
        feedback, self._saved_feedback = self._saved_feedback, {}
        for name, every in feedback.items():
            self._load_feedback(name, every)

    # --- optimizer state

    def _load(self, key: str, whole: torch.Tensor) -> None:
        """Take this rank's part of one saved tensor."""
        state, _, name = key.partition(".")
        i = self._index[name]
        shard, place = self._places[i]
        piece, (_, begin, end) = shard.pieces[place], shard.spans[place]
        # A count of the optimizer's has no dimensions, and neither has the state of a scalar weight.
        is_count = not whole.dim() and (state == "step" or self.params[i].dim() > 0)
        part = whole if is_count or shard.whole else whole.reshape(-1)[begin:end]
        if state != MASTER:
            shard.optimizer.state[piece][state] = part.to(piece.device, copy=True)
        elif shard.whole or shard.master is shard.row:
            self.params[i].copy_(whole)
        else:
            piece.copy_(part)

    def _state_of(self, shards: list[Shard]) -> Iterator[tuple[str, torch.Tensor]]:
        for shard in shards:
            states = [shard.optimizer.state.get(x, {}) for x in shard.pieces]
            if shard.whole:
                for i, state in zip(shard.layout.indices, states, strict=True):
                    yield from ((f"{k}.{self.names[i]}", v) for k, v in sorted(state.items()))
                continue
            for key in sorted({k for s in states for k in s}):
                yield from self._gather_state(shard, key, [s.get(key) for s in states])
            if shard.master is not shard.row:
                yield from self._gather_state(shard, MASTER, list(shard.pieces))

    def _gather_state(
        self, shard: Shard, key: str, values: list[torch.Tensor | None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: one state of a bucket's parameters, whole."""
        names = [self.names[i] for i in shard.layout.indices]
        if all(v is None or v.dim() == 0 for v in values):
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    yield f"{key}.{name}", value
            return
        row = torch.zeros_like(shard.master)
        for value, (at, _, _) in zip(values, shard.spans, strict=True):
            if value is not None:
                row[at : at + value.numel()] = value
        whole = row.new_empty(shard.layout.size)
        self._gathers.all_gather(whole, row).wait()
        for name, value, part in zip(names, values, shard.layout.cut(whole), strict=True):
            if value is not None:
                yield f"{key}.{name}", part

    def _feedback_of(self, shards: list[Shard]) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: (parameter, [replicas, *shape]), what each replica has yet to send."""
        for shard in shards:
            if not shard.has_feedback:
                continue
            mine = shard.feedback()
            every = mine.new_empty(self.replicas, len(mine))
            self._gathers.all_gather(every, mine).wait()
            by_parameter = zip(*(shard.layout.cut(row) for row in every), strict=True)
            for i, values in zip(shard.layout.indices, by_parameter, strict=True):
                yield self.names[i], torch.stack(values)

    def _load_feedback(self, name: str, every: torch.Tensor) -> bool:
        """Whether there is a place for it."""
        shard, place = self._places[self._index[name]]
        if shard.has_feedback:
            shard.take_feedback(place, every.reshape(self.replicas, -1))
        return shard.has_feedback
