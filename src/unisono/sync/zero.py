"""Exact synchronization in both directions: gradients leave during the backward pass, weights return
during the next forward pass, and between the two each rank steps the optimizer on its own 1/n.

This is ZeRO stage 2 (Rajbhandari et al., 2020, arXiv:1910.02054) with the gather hidden. How a
gradient travels:

    backward -> bucket -> all-to-all -> fixed tree sum -> this rank's row of it
             -> norm over ranks -> clip -> optimizer on the row -> the row's new weights
             -> all-gather, in the order of the next forward pass, which waits where it needs them

Every replica has the same weights afterwards, bit for bit, since each row is computed once. Large
embedding tables take a way of their own for what is looked up (sync/rows.py).

`wire: bfloat16` halves the bytes both ways. Gradients are rounded once, on the way, and added in
float32. A weight does not travel: what is sent is how much the replicas' copy has to change to become
the float32 master weight on the owner's shard, rounded. What rounding leaves behind is part of the
next change, so that replicas follow the master to within 2^-9 of one step's change, and no drift
builds up. All replicas, the owner too, add the same rounded change.

Bytes sent by each rank, S being those of the weights on the wire, n the replicas:
S (n-1)/n for gradients and as many for weights, plus the rows of sync/rows.py.
Memory: optimizer state (and masters) S/n of what one replica would hold; weights and gradients whole.

The first step is the whole-gradient one of sync/exact.py; it learns the order in which gradients
become ready and weights are needed. `layout()` keeps it for a resume.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from unisono.errors import UnisonoError
from unisono.sync.bucket import Bucket, group_by_size
from unisono.sync.exact import Exact
from unisono.sync.forward import Watch
from unisono.sync.ledger import Group, Handle, Ledger
from unisono.sync.rows import Table
from unisono.sync.tree import HALF, tree_sum
from unisono.sync.update import MASTER, OptimizerFactory, Update, clip_factor, is_finite, step

TABLE_BYTES = 1 << 20
"""Smaller embeddings travel as any other parameter: rows cost three more round trips."""
TABLE_SHARE = 0.25
"""Rows that a micro-batch may touch, as a share of the table, for rows to be worth sending alone."""
LAYOUT = ("order", "needs", "tables", "dense")
TAIL_SHARE = 0.25
"""Size of the bucket that is filled last (and needed first) beside the others."""


class Shard:
    """This rank's row of a bucket: weights, optimizer, and the way of the weights to the others."""

    def __init__(
        self,
        bucket: Bucket,
        params: list[Parameter],
        rank: int,
        factory: OptimizerFactory,
        wire: torch.dtype,
    ) -> None:
        self.bucket = bucket
        self.weights = torch.zeros_like(bucket.flat)
        for p, view in zip(params, bucket.cut(self.weights), strict=True):
            view.copy_(p.detach())
            p.data = view
        self.rows = self.weights.view(bucket.rows.shape)
        self.row, self.gradient = self.rows[rank], bucket.rows[rank]
        self.wire = wire
        rounded = wire != bucket.flat.dtype
        self.master = self.row.clone() if rounded else self.row
        self.spans = bucket.pieces(rank)
        self.pieces: list[Parameter] = []
        self._gradients: list[torch.Tensor] = []
        for at, begin, end in self.spans:
            self.pieces.append(Parameter(self.master[at : at + end - begin]))
            self._gradients.append(self.gradient[at : at + end - begin])
        dims = [len(shape) for shape in bucket.shapes]
        self.optimizer = factory(
            [x for x, d in zip(self.pieces, dims, strict=True) if d >= 2],
            [x for x, d in zip(self.pieces, dims, strict=True) if d < 2],
        )
        self.gather: Handle | None = None
        self._received: torch.Tensor | None = None

    def step(self, used: list[bool], factor: float, learning_rate: float) -> None:
        """Scale the row's gradients and step its optimizer."""
        self.gradient.mul_(factor)
        for piece, gradient, i in zip(
            self.pieces, self._gradients, self.bucket.indices, strict=True
        ):
            piece.grad = gradient if used[i] else None
        step(self.optimizer, learning_rate)

    def send(self, group: Group) -> None:
        """Collective: start the way of this rank's new weights to the others, and of theirs here."""
        if self.master is self.row:
            if group.size == 2:
                self.gather = group.exchange(self.rows[1 - group.rank], self.row)
            else:
                self.gather = group.all_gather(self.weights, self.row.clone())
            return
        change = (self.master - self.row).to(self.wire)
        self.row.add_(change)
        self._received = change.new_empty(self.rows.shape)
        if group.size == 2:
            self.gather = group.exchange(self._received[1 - group.rank], change)
        else:
            self.gather = group.all_gather(self._received, change)

    @torch.no_grad()
    def receive(self, rank: int) -> None:
        """Wait for the other ranks' weights."""
        if self.gather is None:
            return
        self.gather.wait()
        self.gather = None
        if self._received is not None:
            for r, change in enumerate(self._received):
                if r != rank:
                    self.rows[r].add_(change)
            self._received = None


class Zero(Exact):
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
        layout: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """`wire`: float32 or bfloat16. `layout`: what `layout()` returned for the same model."""
        super().__init__(model, ledger, bucket_mb=bucket_mb, timeout_s=timeout_s)
        assert self.replicas > 1
        self._factory = optimizer
        self._wire = torch.bfloat16 if wire == "bfloat16" else None
        self._rows_group = Group("rows", ledger, timeout_s)
        self._index = {n: i for i, n in enumerate(self.names)}
        self._number = {id(p): i for i, p in enumerate(self.params)}
        self._shards: list[Shard] = []
        self._shard_of: dict[int, Shard] = {}
        self._sends: list[Shard] = []
        self._tables: dict[int, Table] = {}
        self._watch = Watch(self)
        self._square = 0.0
        self._used_anywhere: list[bool] = []
        self._under_way = 0
        self._culprit: tuple[int, str] | None = None
        self._saved: Mapping[str, torch.Tensor] | None = None
        # What the first step learns.
        self._uses: list[int] = []
        self._touched: dict[int, int] = {}
        if layout and all(k in layout for k in LAYOUT):
            self._learned = {k: list(layout[k]) for k in LAYOUT}
            self._order_known = True
            self._start()

    # --- the seam

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch. Collective when rows are stale."""
        watching = not self._order_known or self._under_way or self._tables
        try:
            with super().micro_batch(last), self._watch if watching else nullcontext():
                yield
        finally:
            self._fetch_nothing()

    def finish(self, *values: float) -> list[float]:
        """Collective: complete this rank's rows; returns the sum over ranks of each of `values`."""
        self._fetch_nothing()
        if not self._shards:
            return self._first_finish(*values)
        with self.ledger.clock("communication"):
            self._culprit = None
            for bucket in self._buckets[self._num_sent :]:
                self._send(bucket)
            for table in self._tables.values():
                self._used[table.index] |= any(x.rows.grad is not None for x in table.lookups)
            returned = [(t, t.send_gradients()) for t in self._tables.values()]
            self._advance(wait=True)
            for table, received in returned:
                table.add(*received)
                self._check(table.bucket, received[1].split(received[2]))
            square = float(torch.stack([b.norm for b in self._buckets]).double().square().sum())
            total = self._control.sum(*values, *self._used, square)
            self._square = total.pop()
            self._used_anywhere = [bool(x) for x in total[len(values) :]]
            for p in self.params:
                p.grad = None
            self._reset()
        return total[: len(values)]

    @torch.no_grad()
    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Collective: clip, step the optimizer on this rank's rows, send the weights off."""
        self.settle()
        norm = math.sqrt(self._square) / divide_by if is_finite(self._square) else math.nan
        if not is_finite(norm):
            return Update(norm, committed=False)
        factor = clip_factor(norm, divide_by, max_norm)
        stepped = {t.index for t in self._tables.values()}
        for table in self._tables.values():  # its rows are asked for first of all
            self._shard_of[table.index].step(self._used_anywhere, factor, learning_rate)
            table.stale = True
        for shard in self._sends:
            if not stepped.intersection(shard.bucket.indices):
                shard.step(self._used_anywhere, factor, learning_rate)
            shard.send(self._gathers)
        self._under_way = len(self._sends)
        return Update(norm, committed=True)

    def settle(self) -> None:
        """Every rank alike: wait until all parameters are whole and current on this rank."""
        if self._under_way:
            with self.ledger.clock("communication"):
                for shard in self._sends:
                    shard.receive(self._control.rank)
            self._under_way = 0
        for table in self._tables.values():
            table.stale = False

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        super().discard()
        for table in self._tables.values():
            table.lookups.clear()
        self._uses, self._touched = [], {}

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradients that this rank has accumulated itself, before `finish`."""
        yield from super().local_gradients()
        for table in self._tables.values():
            for lookup in table.lookups:
                if lookup.rows.grad is not None:
                    yield self.names[table.index], lookup.rows.grad

    def blame(self) -> tuple[int, str] | None:
        """After `finish`: (rank, parameter) of a non-finite contribution to this rank's rows."""
        return self._culprit if self._shards else super().blame()

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights. Optimizer state lies on one rank each."""
        self.settle()
        yield from self.named

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The model's whole state dict."""
        self.settle()
        return super().state_dict()

    @torch.no_grad()
    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: (state.parameter, whole tensor), gathered bucket by bucket."""
        self.settle()
        yield from self._state_of(self._shards)

    def _state_of(self, shards: list[Shard]) -> Iterator[tuple[str, torch.Tensor]]:
        for shard in shards:
            states = [shard.optimizer.state.get(x, {}) for x in shard.pieces]
            for key in sorted({k for s in states for k in s}):
                yield from self._gather_state(shard, key, [s.get(key) for s in states])
            if shard.master is not shard.row:
                yield from self._gather_state(shard, MASTER, list(shard.pieces))

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's part of a saved state; before the first step it is kept until then."""
        if not self._shards:
            self._saved = tensors
            return
        for key, value in tensors.items():
            self._load(key, value)

    def _load(self, key: str, whole: torch.Tensor) -> None:
        """Take this rank's part of one saved tensor."""
        state, _, name = key.partition(".")
        i = self._index[name]
        shard = self._shard_of[i]
        k = shard.bucket.indices.index(i)
        piece, (_, begin, end) = shard.pieces[k], shard.spans[k]
        part = whole.reshape(-1)[begin:end] if whole.dim() else whole
        if state == MASTER:
            piece.copy_(part)
            if shard.master is shard.row:
                self.params[i].copy_(whole)
        else:
            shard.optimizer.state[piece][state] = part.to(piece.device, copy=True)

    def rebucket(self, bucket_mb: float) -> None:
        """Collective, between steps: as in Exact. Optimizer state moves to its new owners.

        Sends each rank's state once, as `optimizer_state` does; needs room for weights and
        gradients twice.
        """
        self.bucket_bytes = int(bucket_mb * 2**20)
        if not self._shards:
            return
        self.settle()
        old = self._shards
        self._start()
        for key, whole in self._state_of(old):
            self._load(key, whole)

    def close(self) -> None:
        """Collective: the hooks go; weights are whole and stay where they are."""
        self.settle()
        super().close()
        self._rows_group.close()

    # --- the forward pass

    def on_use(self, param: Parameter) -> None:
        """Wait for a weight's way back before it is used."""
        i = self._number.get(id(param))
        if i is None:
            return
        if not self._order_known:
            self._uses.append(i)
        elif self._under_way and self._shard_of[i].gather is not None:
            with self.ledger.clock("communication"):
                self._shard_of[i].receive(self._control.rank)
                self._under_way -= 1

    def on_lookup(
        self, ids: torch.Tensor, weight: Parameter, padding_idx: int | None
    ) -> torch.Tensor | None:
        """Collective on the first lookup after an update: fetch the rows."""
        i = self._number.get(id(weight))
        if i is None:
            return None
        if not self._order_known:
            self._uses.append(~i)  # a lookup; `on_use` follows
            touched = 0 if weight.is_cuda else len(torch.unique(ids))
            self._touched[i] = max(self._touched.get(i, 0), touched)
            return None
        table = self._tables.get(i)
        if table is None or not torch.is_grad_enabled():
            return None
        if not table.stale:
            self.on_use(weight)
        with self.ledger.clock("communication") if table.stale else nullcontext():
            return table.look_up(ids, weight, padding_idx)

    def _fetch_nothing(self) -> None:
        """Collective where this rank has not asked for rows, having failed before: others wait."""
        for table in self._tables.values():
            if table.stale:
                with self.ledger.clock("communication"):
                    table.fetch(torch.empty(0, dtype=torch.int64))

    # --- the backward pass

    def _on_gradient(self, i: int, param: Parameter) -> None:
        if i in self._tables and not self._tables[i].dense:
            raise UnisonoError(
                f"{self.names[i]} was only looked up in the first step, but has another use now; "
                f"write shard_optimizer: false"
            )
        super()._on_gradient(i, param)

    def _reset(self) -> None:
        super()._reset()
        for table in self._tables.values():
            if not table.dense:
                table.bucket.pending = 0  # there is nothing to wait for

    def _send(self, bucket: Bucket) -> None:
        if not self._shards:
            super()._send(bucket)
            return
        bucket.fill_missing()
        table = self._tables.get(bucket.indices[0])
        self._num_sent += 1
        if table is not None and not table.dense:
            bucket.scatter = Handle(None, None, self.ledger)
            return
        wire = self._shard_of[bucket.indices[0]].wire
        if bucket.flat.is_cuda and wire == bucket.flat.dtype and wire not in HALF:
            bucket.received = torch.empty_like(bucket.rows[:1])
            bucket.scatter = self._scatters.reduce_scatter(bucket.received, bucket.flat)
            bucket.reduced = True
        elif self.replicas == 2:
            other = bucket.rows[1 - self._control.rank].to(wire)  # no copy where it is the same
            bucket.received = torch.empty_like(other).unsqueeze(0)
            bucket.scatter = self._scatters.exchange(bucket.received, other)
        else:
            rows = bucket.rows.to(wire)
            bucket.received = torch.empty_like(rows)
            bucket.scatter = self._scatters.all_to_all(bucket.received.view(-1), rows.view(-1))

    @torch.no_grad()
    def _advance(self, wait: bool) -> None:
        """Sum the buckets whose pieces have arrived, always in the order of sending."""
        if not self._shards:
            super()._advance(wait)
            return
        while self._num_gathered < self._num_sent:
            bucket = self._buckets[self._num_gathered]
            assert bucket.scatter is not None
            if not (wait or bucket.scatter.done()):
                return
            bucket.scatter.wait()
            if bucket.received is not None:
                self._sum(bucket, bucket.received)
                bucket.received = None
            self._num_gathered += 1

    def _sum(self, bucket: Bucket, received: torch.Tensor) -> None:
        """The tree over all ranks' pieces, into this rank's row. Its own piece was never rounded."""
        rank = self._control.rank
        own = bucket.rows[rank]
        if bucket.reduced:
            own.copy_(received[0])
        elif self.replicas == 2:
            own.add_(received[0])
        else:
            pieces = [own if r == rank else x for r, x in enumerate(received)]
            if own.dtype not in HALF and received.dtype in HALF:
                pieces = [p.float() for p in pieces]
            total = tree_sum(pieces)
            if total is not own:
                own.copy_(total)
        self._check(bucket, list(received))

    def _check(self, bucket: Bucket, received: Sequence[torch.Tensor]) -> None:
        """The norm of this rank's row, and whose contribution made it not finite, if one did."""
        rank = self._control.rank
        bucket.norm = torch.linalg.vector_norm(bucket.rows[rank], dtype=torch.float32)
        # On a GPU, looking would wait for it.
        if bucket.norm.is_cuda or is_finite(float(bucket.norm)) or self._culprit:
            return
        others = [r for r in range(self.replicas) if r != rank]
        ranks = others if len(received) == 1 else list(range(self.replicas))
        # The sum was made in the first piece; the last ones are, or contain, single ranks' own.
        for r, piece in reversed(list(zip(ranks, received, strict=False))):
            if r != rank and not torch.isfinite(piece).all():
                break
        else:
            r = rank
        position = int((~torch.isfinite(bucket.rows[rank])).nonzero()[0])
        self._culprit = r, self._name_at(bucket, rank * bucket.rows.shape[1] + position)

    # --- layout

    def _first_finish(self, *values: float) -> list[float]:
        """Collective: the first step, with whole gradients, after which everything is laid out."""
        result = super().finish(*values)
        with self.ledger.clock("communication"):
            self._used_anywhere = [p.grad is not None for p in self.params]
            grads = [p.grad for p in self.params]
            self._learned = self._agree()
            self._order_known = True
            self._start()
            for i, g in enumerate(grads):
                self._places[i][1].copy_(g) if g is not None else self._places[i][1].zero_()
                self.params[i].grad = None
            for bucket in self._buckets:
                self._check(bucket, [])
            square = float(torch.stack([b.norm for b in self._buckets]).double().square().sum())
            self._square = self._control.sum(square)[0]
        return result

    def _learn_order(self) -> None:
        """Done at the end of the first step, by `_agree`."""

    def _agree(self) -> dict[str, list[int]]:
        """Collective: rank 0's order of gradients and of needs, and the tables of all ranks."""
        count = len(self.params)
        # ~i, i is a lookup in parameter i; any other i another use of it.
        lookups = {k + 1 for k, i in enumerate(self._uses) if i < 0}
        other = {i for k, i in enumerate(self._uses) if i >= 0 and k not in lookups}
        touched = [float(self._touched.get(i, 0)) for i in range(count)]
        every = self._control.each(*touched, *(float(i in other) for i in range(count)))
        most, used = every.amax(dim=0).view(2, count).tolist()
        tables = [i for i, rows in enumerate(most) if self._is_table(i, rows)]
        needs = [
            i for k, i in enumerate(self._uses) if i >= 0 and not (k in lookups and i in tables)
        ]
        complete = [
            list(dict.fromkeys([*seen, *rest]))
            for seen, rest in (
                (self._order, range(count - 1, -1, -1)),
                (needs, range(count)),
            )
        ]
        orders = torch.tensor(complete, dtype=torch.int64)
        self._control.broadcast(orders).wait()
        order, needs = orders.tolist()
        self._uses, self._touched = [], {}
        dense = [i for i in tables if used[i]]
        return {"order": order, "needs": needs, "tables": tables, "dense": dense}

    def _is_table(self, i: int, touched: float) -> bool:
        p = self.params[i]
        return bool(
            0 < touched <= TABLE_SHARE * p.shape[0] and p.numel() * p.element_size() >= TABLE_BYTES
        )

    def _start(self) -> None:
        """Lay buckets, shards and tables out as learned."""
        learned, rank = self._learned, self._control.rank
        tables, dense = set(learned["tables"]), set(learned["dense"])
        # The part of a table that is not looked up is the output layer, whose gradient is first.
        first = sorted(tables, key=lambda i: i in dense, reverse=True)
        order = [i for i in learned["order"] if i not in tables]
        tail = int(self.bucket_bytes * TAIL_SHARE)
        groups = [[(i, self.params[i])] for i in first]
        groups += group_by_size(order, self.params, self.bucket_bytes, tail)
        buckets = [
            Bucket(g, self.replicas, row_of=g[0][1].shape[1] if g[0][0] in tables else 1)
            for g in groups
        ]
        self._set_buckets(buckets)
        self._shards = []
        for bucket in buckets:
            wire = self._wire if bucket.flat.dtype == torch.float32 else None
            params = [self.params[i] for i in bucket.indices]
            self._shards.append(
                Shard(bucket, params, rank, self._factory, wire or bucket.flat.dtype)
            )
        self._shard_of = {i: s for s in self._shards for i in s.bucket.indices}
        place = {i: k for k, i in enumerate(learned["needs"])}
        self._sends = sorted(self._shards, key=lambda s: min(place[i] for i in s.bucket.indices))
        self._tables = {
            i: Table(
                i,
                self._places[i][0],
                self._shard_of[i].rows,
                self._rows_group,
                self._shard_of[i].wire,
                dense=i in dense,
            )
            for i in first
        }
        self._reset()
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.load_optimizer_state(saved)

    @torch.no_grad()
    def _gather_state(
        self, shard: Shard, key: str, values: list[torch.Tensor | None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: one state of a bucket's parameters, whole."""
        names = [self.names[i] for i in shard.bucket.indices]
        if all(v is None or v.dim() == 0 for v in values):
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    yield f"{key}.{name}", value
            return
        row = torch.zeros_like(shard.master)
        for value, (at, _, _) in zip(values, shard.spans, strict=True):
            if value is not None:
                row[at : at + value.numel()] = value
        whole = row.new_empty(self.replicas * len(row))
        self._gathers.all_gather(whole, row).wait()
        for name, value, part in zip(names, values, shard.bucket.cut(whole), strict=True):
            if value is not None:
                yield f"{key}.{name}", part
