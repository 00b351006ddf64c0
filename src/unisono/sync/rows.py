"""Embeddings: the gradient of a lookup, which touches few rows, travels as rows.

A tied embedding is the worst parameter to synchronize: its gradient is complete only when the
backward pass ends, and the forward pass needs its weights first of all. But both is true of its
input half alone, the lookup. So the lookup gets a leaf of its own, the rows of this micro-batch, and
their gradients go to all replicas when the backward pass has ended. The other half (the output
layer) is a dense and early gradient, whose sum returns to all replicas while the backward pass goes
on. Then every replica steps the whole table itself, and nothing of it need return in the forward
pass. The price is that its optimizer state is on every replica.

Bytes sent by each rank for k rows of d values: k d (n-1) values and k (n-1) row numbers, padded to the
k of the rank that has most; of the dense half 2 V d (n-1)/n values for a table of V rows.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from unisono.sync.ledger import Group, Handle
from unisono.sync.shard import Shard


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
class Rows:
    """Gradients of all replicas' rows, under way."""

    counts: list[int]
    ids: torch.Tensor
    """int32 [replicas, most]."""
    gradients: torch.Tensor
    """[replicas, most, d]."""
    handles: list[Handle]


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
            used, (ids, total) = self.used, self._own()
            self.lookups = [Lookup(ids, summed=total)] if used else []

    @torch.no_grad()
    def send(self, group: Group) -> Rows:
        """Collective: start the way of this rank's rows to all others, and of theirs here."""
        ids, gradients = self._own()
        self.lookups.clear()
        counts = [int(c) for c in group.each(float(len(ids)))[:, 0].tolist()]
        most, dim = max(counts), gradients.shape[1]
        mine = gradients.new_zeros(most, dim, dtype=self.shard.wire)
        mine[: len(ids)] = gradients
        numbers = torch.zeros(most, dtype=torch.int32)
        numbers[: len(ids)] = ids
        rows = Rows(
            counts, numbers.new_empty(group.size, most), mine.new_empty(group.size, most, dim), []
        )
        if most:
            rows.handles = [
                group.all_gather(rows.ids, numbers),
                group.all_gather(rows.gradients, mine),
            ]
        return rows

    @torch.no_grad()
    def add(self, rows: Rows) -> int | None:
        """Wait, and add all replicas' rows to the table's sum, in rank order on every replica.

        Returns the first rank whose rows are not finite.
        """
        for handle in rows.handles:
            handle.wait()
        total = self.shard.whole_sum()
        culprit = None
        for rank, count in enumerate(rows.counts):
            gradients = rows.gradients[rank, :count].to(total.dtype)
            # Each row once: any order of additions is one.
            total.index_add_(0, rows.ids[rank, :count].long(), gradients)
            if culprit is None and not torch.isfinite(gradients).all():
                culprit = rank
        return culprit

    def _own(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = [(x.ids, g) for x in self.lookups if (g := x.gradient) is not None]
        if len(found) == 1:
            return found[0]
        dim = self.shard.layout.shapes[0][1]
        dtype = self.shard.layout.dtype
        if not found:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dim, dtype=dtype)
        ids, inverse = torch.unique(torch.cat([i for i, _ in found]), return_inverse=True)
        total = torch.zeros(len(ids), dim, dtype=dtype)
        total.index_add_(0, inverse, torch.cat([g for _, g in found]))
        return ids, total
