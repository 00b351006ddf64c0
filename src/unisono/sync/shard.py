"""One bucket of sync/zero.py on one rank: gradients out, their sum in, the optimizer, weights back.

Weights are a flat matrix of one row for each rank; the model's parameters are views of it.
Of the gradients there is only what travels: the other ranks' parts leave as soon as autograd has
them, this rank's own part stays where autograd put it and is added to what arrives.

A `whole` shard is the exception: its sum returns to all ranks as soon as it is there, each steps the
whole optimizer, and the weights need not travel.

Error feedback (Seide et al., 2014; Karimireddy et al., 2019, arXiv:1901.09847): what coding took from what
this rank sent, gradients to other ranks' rows and the sum of its own row, is added when the same leaves the
next time. It counts from `step` on: a step that is dropped leaves it as it was.
"""

from collections.abc import Sequence

import torch
from torch.nn import Parameter

from unisono.sync.bucket import Layout
from unisono.sync.codec import BLOCK, mix
from unisono.sync.ledger import Group, Handle
from unisono.sync.tree import HALF, tree_sum
from unisono.sync.update import OptimizerFactory, by_dimension, step
from unisono.sync.wire import Cast, Wires

CHUNK_BYTES = 1 << 20
"""A row that is longer travels in chunks of about this size, or of half a bucket if that is more: so that
a sum that returns leaves gaps for gradients, and because directions that share a connection (of more than
two ranks) take turns with large messages: 6 MB at 40 to 60 MB/s where the link has 62."""


class Shard:
    """This rank's view of a bucket. `layout` says where what lies, `wires` how it travels."""

    def __init__(
        self,
        layout: Layout,
        params: Sequence[Parameter],
        rank: int,
        factory: OptimizerFactory,
        wires: Wires,
        whole: bool = False,
        bucket_bytes: int = 0,
    ) -> None:
        self.layout, self.wires, self.rank, self.whole = layout, wires, rank, whole
        self.sends_gradients = True
        # NCCL's own reduce-scatter adds in its own order, on all ranks' rows.
        as_they_are = wires.gradients == Cast(layout.dtype)
        self._native = layout.device.type == "cuda" and as_they_are and layout.dtype not in HALF
        self._others = [r for r in range(layout.replicas) if r != rank or self._native]
        pieces = [layout.pieces(r) for r in self._others]
        block_bytes = wires.gradients.length(BLOCK) * wires.gradients.dtype.itemsize
        size = -(-max(CHUNK_BYTES, bucket_bytes // 2) * BLOCK // block_bytes)
        self._chunks = [
            (a, min(a + size, layout.row_length)) for a in range(0, layout.row_length, size)
        ]
        if self._native or (layout.replicas == 2 and not whole):
            self._chunks = [(0, layout.row_length)]
        self._parts = [
            [(slot, *part) for slot, piece in enumerate(pieces) for part in self._cut(*piece[k])]
            for k in range(len(layout.indices))
        ]
        self._gaps = [
            (slot, chunk, at, at + end - begin)
            for slot, piece in enumerate(pieces)
            for a, b in self._gaps_of(piece)
            for chunk, at, begin, end in self._cut(a, 0, b - a)
        ]
        self.spans = layout.pieces(rank)
        self.gather: Handle | None = None
        self._changes: torch.Tensor | None = None
        self._left: list[torch.Tensor] | None = None
        """As `_outgoing`: what gradients lost on the way in earlier steps."""
        self._left_of_sum: torch.Tensor | None = None
        """[row_length], what this rank's row of the sum lost."""
        if wires.keeps_left:
            self._left = [torch.zeros_like(rows) for rows in self._empty()]
        if whole and wires.keeps_left_of_sums:
            self._left_of_sum = torch.zeros(layout.row_length, device=layout.device)
        self.begin()
        self.drop()
        if whole:
            self.pieces = list(params)
            self.optimizer = factory(*by_dimension(self.pieces))
        else:
            self._take_weights(params, factory)

    def _take_weights(self, params: Sequence[Parameter], factory: OptimizerFactory) -> None:
        layout = self.layout
        flat = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
        for p, view in zip(params, layout.cut(flat), strict=True):
            view.copy_(p.detach())
            p.data = view
        self.weights = flat.view(layout.replicas, layout.row_length)
        self.row = self.weights[self.rank]
        self.master = self.row.clone() if self.wires.rounds else self.row
        """What the optimizer steps: the row itself, or a copy that no wire has rounded."""
        self.pieces = [Parameter(self.master[at : at + e - b]) for at, b, e in self.spans]
        dims = [len(shape) for shape in layout.shapes]
        self.optimizer = factory(
            [x for x, d in zip(self.pieces, dims, strict=True) if d >= 2],
            [x for x, d in zip(self.pieces, dims, strict=True) if d < 2],
        )

    def begin(self) -> None:
        """Before the backward passes of a step."""
        self.missing = set(range(len(self.layout.indices)))
        """Places of the parameters that have no gradient on this rank yet."""
        self.pending = len(self.layout.indices) if self.sends_gradients else 0
        """Parameters that the communicating backward pass has yet to reach."""
        self._scatters: list[Handle] = []
        self._outgoing: list[torch.Tensor] = []
        """By chunk, [rows that travel, length of the chunk]."""
        self._sent: list[torch.Tensor] = []
        """The same as on the wire."""
        self._received: list[torch.Tensor] = []
        self._row: torch.Tensor | None = None
        self._returning: list[Handle] = []
        self._returned: list[torch.Tensor] = []

    def drop(self) -> None:
        """Forget what a step has come to."""
        self.total: torch.Tensor | None = None
        """[row_length], the sum over ranks of this rank's part, once it is there."""
        self.sums: torch.Tensor | None = None
        """[replicas, row_length], where the shard is whole."""
        self.norm = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        """Of this rank's part of the sum."""
        self._leaves: list[torch.Tensor] | None = None
        self._leaves_of_sum: torch.Tensor | None = None
        """What `_left` and `_left_of_sum` become if the step counts."""

    # --- gradients

    def pack(self, place: int, gradient: torch.Tensor) -> None:
        """Put the other ranks' parts of a complete gradient where they leave from."""
        outgoing = self._outgoing = self._outgoing or self._empty()
        flat = gradient.reshape(-1)
        for slot, chunk, at, begin, end in self._parts[place]:
            target = outgoing[chunk][slot, at : at + end - begin]
            if self._left:
                left = self._left[chunk][slot, at : at + end - begin]
                torch.add(flat[begin:end], left, out=target)
            else:
                target.copy_(flat[begin:end])
        self.missing.discard(place)

    def send(self, group: Group, seed: int) -> None:
        """Collective: start the way of all packed gradients; those that are missing are zeros.

        `seed`: of stochastic rounding.
        """
        if not self.sends_gradients:
            return
        outgoing = self._outgoing = self._outgoing or self._empty()
        wire = self.wires.gradients
        for place in self.missing:
            for slot, chunk, at, begin, end in self._parts[place]:
                target = outgoing[chunk][slot, at : at + end - begin]
                if self._left:
                    target.copy_(self._left[chunk][slot, at : at + end - begin])
                else:
                    target.zero_()
        self._sent = [
            wire.encode(
                rows,
                [mix(seed, k, self.rank, r) for r in self._others],
                rows if self.wires.keeps_left else None,
            )
            for k, rows in enumerate(outgoing)
        ]
        if self.wires.keeps_left:
            self._leaves = outgoing
        if self.layout.replicas == 2 or self._native:  # what comes is one row
            lengths = [wire.length(b - a) for a, b in self._chunks]
            self._row = torch.empty(sum(lengths), dtype=wire.dtype, device=self.layout.device)
            self._received = [part.unsqueeze(0) for part in self._row.split(lengths)]
        else:
            self._received = [torch.empty_like(rows) for rows in self._sent]
        # All memory is there before anything leaves: a rank that has none begins again in `finish`, and
        # what it had sent already would travel twice.
        for received, rows in zip(self._received, self._sent, strict=True):
            if self._native:
                self._scatters.append(group.reduce_scatter(received, rows))
            else:
                lengths = [0 if r == self.rank else rows.shape[1] for r in range(group.size)]
                self._scatters.append(
                    group.all_to_all_rows(received.view(-1), rows.view(-1), lengths, lengths)
                )

    def arrived(self) -> bool:
        return all(handle.done() for handle in self._scatters)

    def add_up(self, gradients: Sequence[torch.Tensor | None]) -> int | None:
        """Wait, and add this rank's part of its own `gradients` in the order of the fixed tree.

        Returns the rank whose contribution is not finite, where the sum is not and it is known.
        """
        for handle in self._scatters:
            handle.wait()
        received, row = self._received, self._row
        self._scatters, self._received, self._row = [], [], None
        self._outgoing, self._sent = [], []
        layout, wire = self.layout, self.wires.gradients
        chunks = list(zip(self._chunks if received else [], received, strict=True))
        if row is not None:
            self.total = row
            if wire.dtype != layout.dtype:
                self.total = row.new_empty(layout.row_length, dtype=layout.dtype)
                for (a, b), rows in chunks:
                    wire.decode(rows, self.total[a:b].unsqueeze(0))
            if not self._native:
                self._add_own(self.total, gradients)
        else:
            self.total = torch.zeros(layout.row_length, dtype=layout.dtype, device=layout.device)
            self._add_own(self.total, gradients)
            for (a, b), rows in chunks:
                own, wide = self.total[a:b], wire.wide(rows, b - a)
                pieces = [*wide[: self.rank], own.to(wide.dtype), *wide[self.rank :]]
                own.copy_(tree_sum(pieces))
        self.look()
        if self.norm.is_cuda or self.is_finite:  # on a GPU, looking would wait for it
            return None
        if any(g is not None and not torch.isfinite(g).all() for g in gradients):
            return self.rank
        # The tree adds into its first rows; the last ones are, or contain, single ranks' own.
        for (a, b), rows in chunks:
            wide = wire.wide(rows, b - a)
            for r, other in reversed(list(zip(self._others, wide, strict=True))):
                if not torch.isfinite(other).all():
                    return r
        return None

    def return_next(self, group: Group, wait: bool) -> bool:
        """Collective: start the way of the next chunk of a whole shard's sum to all ranks.

        Rounded for all alike. Does nothing, and says so with False, when all are on their way or,
        unless `wait`, while the one before is.
        """
        assert self.total is not None
        if self.sums is None:
            self.sums = self.total.new_zeros(self.layout.replicas, self.layout.row_length)
        done = len(self._returning)
        if done == len(self._chunks) or not self.sends_gradients:
            return False
        if done and not wait and not self._returning[-1].done():
            return False
        a, b = self._chunks[done]
        mine, left = self.total[a:b].unsqueeze(0), None
        if self._left_of_sum is not None:
            mine = left = mine + self._left_of_sum[a:b]
        sent = self.wires.sums.encode(mine, [0], left)
        if left is not None:
            if self._leaves_of_sum is None:
                self._leaves_of_sum = torch.empty_like(self.total)
            self._leaves_of_sum[a:b] = left[0]
        chunk = sent.new_empty(self.layout.replicas, sent.shape[1])
        self._returning.append(group.all_gather(chunk, sent))
        self._returned.append(chunk)
        return True

    @property
    def is_returning(self) -> bool:
        """Whether a chunk is still to be sent."""
        return self.sends_gradients and len(self._returning) < len(self._chunks)

    def take_sum(self) -> None:
        """Wait for all of it."""
        assert self.sums is not None
        for (a, b), handle, chunk in zip(
            self._chunks if self._returning else [], self._returning, self._returned, strict=True
        ):
            handle.wait()
            self.wires.sums.decode(chunk, self.sums[:, a:b])
        self._returning, self._returned = [], []

    def whole_sum(self) -> torch.Tensor:
        """The sum of the only parameter of a whole shard, in its shape."""
        assert self.sums is not None
        return self.layout.cut(self.sums.view(-1))[0]

    def take(self, sums: Sequence[torch.Tensor | None]) -> None:
        """This rank's part of gradients that are summed already."""
        layout = self.layout
        self.total = torch.zeros(layout.row_length, dtype=layout.dtype, device=layout.device)
        self._add_own(self.total, sums)
        if self.whole:
            self.sums = self.total.new_zeros(layout.replicas, layout.row_length)
            for view, g in zip(layout.cut(self.sums.view(-1)), sums, strict=True):
                if g is not None:
                    view.copy_(g)
        self.look()

    def look(self) -> None:
        """Take the norm of this rank's part of the sum."""
        part = self.total if self.sums is None else self.sums[self.rank]
        assert part is not None
        wide = torch.float64 if part.dtype == torch.float64 else torch.float32
        self.norm = torch.linalg.vector_norm(part, dtype=wide).double()

    def sum_of(self, place: int) -> torch.Tensor:
        """This rank's part of the sum of one parameter."""
        part = self.total if self.sums is None else self.sums[self.rank]
        assert part is not None
        at, begin, end = self.spans[place]
        return part[at : at + end - begin]

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.norm))

    def first_not_finite(self) -> int | None:
        """Index of the parameter of the first sum that is not finite."""
        part = self.total if self.sums is None else self.sums[self.rank]
        assert part is not None
        at = (~torch.isfinite(part)).nonzero()
        start = self.rank * self.layout.row_length
        return self.layout.index_at(start + int(at[0])) if len(at) else None

    def _add_own(self, row: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> None:
        for (at, begin, end), g in zip(self.spans, gradients, strict=True):
            if g is not None and begin < end:
                row[at : at + end - begin].add_(g.reshape(-1)[begin:end])

    def _empty(self) -> list[torch.Tensor]:
        dtype = self.wires.gradients.staged
        result = [
            torch.empty(len(self._others), b - a, dtype=dtype, device=self.layout.device)
            for a, b in self._chunks
        ]
        for slot, chunk, begin, end in self._gaps:
            result[chunk][slot, begin:end].zero_()
        return result

    def _cut(self, at: int, begin: int, end: int) -> list[tuple[int, int, int, int]]:
        """(chunk, at, begin, end) for each chunk in which elements `begin` to `end`, from `at`, lie."""
        result = []
        for k, (a, b) in enumerate(self._chunks):
            low, high = max(a, at), min(b, at + end - begin)
            if low < high:
                result.append((k, low - a, begin + low - at, begin + high - at))
        return result

    def _gaps_of(self, pieces: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """What lies between and behind the parameters of a row."""
        gaps, at = [], 0
        for start, begin, end in pieces:
            if begin < end:
                gaps.append((at, start))
                at = start + end - begin
        gaps.append((at, self.layout.row_length))
        return [(a, b) for a, b in gaps if a < b]

    # --- weights

    def step(self, used: Sequence[bool], factor: float, learning_rate: float) -> None:
        """Scale the sums by `factor` and step the optimizer; `used` by parameter index."""
        total = self.total if self.sums is None else self.sums.view(-1)
        assert total is not None
        total.mul_(factor)
        if self.whole:
            gradients = self.layout.cut(total)
        else:
            gradients = [total[at : at + end - begin] for at, begin, end in self.spans]
        for i, piece, gradient in zip(self.layout.indices, self.pieces, gradients, strict=True):
            piece.grad = gradient if used[i] else None
        step(self.optimizer, learning_rate)
        for piece in self.pieces:
            piece.grad = None
        self._left = self._leaves or self._left
        if self._leaves_of_sum is not None:
            self._left_of_sum = self._leaves_of_sum
            for a, b in self._gaps_of(self.spans):  # no parameter's, and in no checkpoint
                self._left_of_sum[a:b].zero_()
        self.drop()

    def send_weights(self, group: Group) -> None:
        """Collective: start the way of this rank's new weights to the others, and of theirs here."""
        if self.master is self.row:
            if group.size == 2:
                self.gather = group.exchange(self.weights[1 - self.rank], self.row)
            else:
                self.gather = group.all_gather(self.weights, self.row.clone())
            return
        wire = self.wires.weights
        change = wire.encode((self.master - self.row).unsqueeze(0), [0])
        wire.decode(change, self.row.unsqueeze(0), add=True)
        self._changes = change.new_empty(self.layout.replicas, change.shape[1])
        if group.size == 2:
            self.gather = group.exchange(self._changes[1 - self.rank], change[0])
        else:
            self.gather = group.all_gather(self._changes, change[0])

    def receive_weights(self) -> bool:
        """Wait for the other ranks' weights; False if none were under way."""
        if self.gather is None:
            return False
        self.gather.wait()
        self.gather = None
        if self._changes is not None:
            for r, change in enumerate(self._changes.split(1)):
                if r != self.rank:
                    self.wires.weights.decode(change, self.weights[r : r + 1], add=True)
            self._changes = None
        return True

    # --- error feedback

    @property
    def has_feedback(self) -> bool:
        return self._left is not None or self._left_of_sum is not None

    def feedback(self) -> torch.Tensor:
        """[size], laid out as the bucket: what this rank has yet to send of other ranks' rows, and of
        its own, where the shard is whole, what has yet to return."""
        result = torch.zeros(self.layout.size, device=self.layout.device)
        rows = result.view(self.layout.replicas, -1)
        for (a, b), left in zip(self._chunks, self._left or (), strict=False):
            rows[self._others, a:b] = left
        if self._left_of_sum is not None:
            rows[self.rank] = self._left_of_sum
        return result

    def take_feedback(self, place: int, by_replica: torch.Tensor) -> None:
        """`by_replica` [replicas, values]: what each replica has yet to send of a parameter.

        What nobody here sends (parts of an owner's own row, once they lie in other rows) is divided
        among those who do.
        """
        senders = self.layout.replicas - 1
        if self._left is not None:
            for slot, chunk, at, begin, end in self._parts[place]:
                mine, owners = (by_replica[r, begin:end] for r in (self.rank, self._others[slot]))
                if self._left_of_sum is None:
                    mine = mine + owners / senders
                self._left[chunk][slot, at : at + end - begin] = mine
        if self._left_of_sum is not None:
            at, begin, end = self.spans[place]
            part = by_replica[:, begin:end]
            own = part.sum(0) if self._left is None else part[self.rank]
            self._left_of_sum[at : at + end - begin] = own
