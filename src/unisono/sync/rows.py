"""Embeddings: the gradient of a lookup, which touches few rows, travels as rows.

A tied embedding is the worst parameter to synchronize: its gradient is complete only when the
backward pass ends, and the forward pass needs its weights first of all. But both is true of its
input half alone, the lookup. So the lookup gets a leaf of its own, the rows of this micro-batch, and
their gradients go to all replicas when the backward pass has ended; which rows they are is told while
it runs. The other half (the output layer) is a dense and early gradient, whose sum returns to all
replicas while the backward pass goes on. Then every replica steps the whole table itself, and nothing
of it need return in the forward pass. The price is that its optimizer state is on every replica.

Bytes sent by each rank for k rows of d values: k d (n-1) values and k (n-1) row numbers, padded to the
k of the rank that has most; of the dense half 2 V d (n-1)/n values for a table of V rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from unisono.sync.codec import mix
from unisono.sync.ledger import Group, Handle
from unisono.sync.shard import Shard
from unisono.sync.tree import HALF


@dataclass
class Lookup:
    """One use of the table in a micro-batch, or what is left of those that are over."""

    ids: torch.Tensor
    """int64 [k], ascending, each once."""
    leaf: torch.Tensor | None = None
    """[k, d], whose gradient is this replica's."""
    summed: torch.Tensor | None = None
    """[k, d]: gradients of micro-batches that are over."""

    @property
    def gradient(self) -> torch.Tensor | None:
        return self.leaf.grad if self.leaf is not None else self.summed


@dataclass
class Table:
    """A looked-up embedding [V, d] in a shard of its own, which is `whole`."""

    shard: Shard
    lookups: list[Lookup] = field(default_factory=list)

    def look_up(
        self, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None
    ) -> torch.Tensor:
        """`F.embedding(ids, weight, padding_idx)`, with a leaf of its own."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < len(weight):
            bad = int(unique[0]) if int(unique[0]) < 0 else int(unique[-1])
            raise IndexError(f"index out of range: an embedding of {len(weight)} rows has no {bad}")
        leaf = F.embedding(unique, weight.detach()).requires_grad_()
        self.lookups.append(Lookup(unique, leaf))
        padding = None
        if padding_idx is not None:
            at = (unique == padding_idx % len(weight)).nonzero()
            padding = int(at[0]) if len(at) else None
        return F.embedding(inverse, leaf, padding)

    @property
    def used(self) -> bool:
        """Whether this rank has gradients to send."""
        return any(x.gradient is not None for x in self.lookups)

    @torch.no_grad()
    def merge(self) -> None:
        """After a micro-batch: keep its gradients alone, each row once, so that more cost nothing."""
        if any(x.leaf is not None for x in self.lookups):
            used, (ids, total) = self.used, self.own()
            self.lookups = [Lookup(ids, summed=total)] if used else []

    @torch.no_grad()
    def numbers(self) -> torch.Tensor:
        """int64 [k]: the rows that this rank has looked up in this step, ascending, each once."""
        ids = [x.ids for x in self.lookups]
        return ids[0] if len(ids) == 1 else torch.unique(torch.cat(ids or [torch.empty(0).long()]))

    def gradients(self, numbers: torch.Tensor, most: int, seed: int) -> torch.Tensor:
        """As on the wire: [most, d], those of the rows `numbers`, then zeros. Forgets them here."""
        wire = self.shard.wires.rows
        result = torch.zeros(most, self.dim, dtype=wire.staged)
        ids, total = self.own()
        result[torch.searchsorted(numbers, ids)] = total.to(result.dtype)
        self.lookups.clear()
        return wire.encode(result.view(1, -1), [seed])[0]

    @property
    def dim(self) -> int:
        """Values of a row."""
        return self.shard.layout.shapes[0][1]

    @torch.no_grad()
    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [k], [k, d]): this rank's rows that have gradients, each once."""
        found = [(x.ids, g) for x in self.lookups if (g := x.gradient) is not None]
        if len(found) == 1:
            return found[0]
        dim, dtype = self.dim, self.shard.layout.dtype
        if not found:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dim, dtype=dtype)
        ids, inverse = torch.unique(torch.cat([i for i, _ in found]), return_inverse=True)
        total = torch.zeros(len(ids), dim, dtype=dtype)
        total.index_add_(0, inverse, torch.cat([g for _, g in found]))
        return ids, total


class Rows:
    """What was looked up by all replicas in one step, on its way: counts, then numbers, then gradients.

    The first two travel while the backward pass runs. No lookup may follow once it is made.
    """

    def __init__(self, tables: Sequence[Table], group: Group) -> None:
        """Collective: tell the others how many rows of each table this rank has."""
        self._tables, self._group = tables, group
        self._mine = [table.numbers() for table in tables]
        counts = torch.tensor([len(ids) for ids in self._mine], dtype=torch.int64)
        self._counts = counts.new_empty(group.size, len(tables))
        self._told = group.all_gather(self._counts, counts)
        self._numbers: list[torch.Tensor] = []
        """By table, int32 [replicas, most]."""
        self._gradients: list[torch.Tensor] = []
        self._handles: list[Handle] = []

    def advance(self, wait: bool = False) -> None:
        """Collective: send the numbers off once all counts are there."""
        if self._numbers or not (wait or self._told.done()):
            return
        self._told.wait()
        for mine, most in zip(self._mine, self._counts.amax(dim=0).tolist(), strict=True):
            padded = torch.zeros(most, dtype=torch.int32)
            padded[: len(mine)] = mine
            self._numbers.append(padded.new_empty(self._group.size, most))
            if most:
                self._handles.append(self._group.all_gather(self._numbers[-1], padded))

    def send(self, seed: int) -> None:
        """Collective: the gradients follow, once the backward pass is over. `seed`: of their rounding."""
        self.advance(wait=True)
        group = self._group
        for k, table in enumerate(self._tables):
            noise = mix(seed, k, group.rank)
            gradients = table.gradients(self._mine[k], self._numbers[k].shape[1], noise)
            self._gradients.append(gradients.new_empty(group.size, len(gradients)))
            if gradients.numel():
                self._handles.append(group.all_gather(self._gradients[-1], gradients))

    def add(self) -> tuple[int, Table] | None:
        """Wait, and add all replicas' rows to the tables' sums, in rank order on every replica.

        Returns the first rank whose rows are not finite, and where.
        """
        for handle in self._handles:
            handle.wait()
        culprit = None
        for k, table in enumerate(self._tables):
            total = table.shard.whole_sum()
            counts = self._counts[:, k].tolist()
            numbers = [self._numbers[k][rank, :count].long() for rank, count in enumerate(counts)]
            touched, wide = None, total
            if total.dtype in HALF:  # rounded once, after all ranks' rows
                touched, places = torch.unique(torch.cat(numbers), return_inverse=True)
                wide, numbers = total[touched].float(), list(places.split(counts))
            most = self._numbers[k].shape[1]
            for rank, sent in enumerate(self._gradients[k].split(1)):
                gradients = table.shard.wires.rows.wide(sent, most * table.dim)
                gradients = gradients.view(most, table.dim)[: counts[rank]].to(wide.dtype)
                # Each row once: any order of additions is one.
                wide.index_add_(0, numbers[rank], gradients)
                if culprit is None and not torch.isfinite(gradients).all():
                    culprit = rank, table
            if touched is not None:
                total[touched] = wide.to(total.dtype)
            table.shard.look()
        return culprit
