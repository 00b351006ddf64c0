"""An embedding whose looked-up rows travel by themselves.

A tied embedding is the worst parameter to synchronize: its gradient is complete only when the
backward pass ends, and the forward pass needs its weights first of all. But that is true of its
input half alone, the lookup, which touches few rows. So the lookup gets a leaf of its own, the rows
of this micro-batch; the other half (the output layer) is an ordinary, early gradient.

    forward:  rows that this replica looks up  <- from the ranks that own them, freshly updated
    backward: gradients of those rows          -> to the ranks that own them, added in rank order

Bytes sent for k rows of d values at n replicas: about k d (n-1)/n values each way and k row numbers,
instead of V d (n-1)/n values for a table of V rows at the worst time.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from unisono.sync.ledger import Group
from unisono.sync.shard import Shard


@dataclass
class Lookup:
    """One use of the table in a micro-batch."""

    ids: torch.Tensor
    """int64 [k], ascending, each once."""
    rows: torch.Tensor
    """[k, d], the leaf whose gradient is this replica's."""


@dataclass
class Table:
    """An embedding with a bucket of its own, in which each rank owns whole rows of the table.

    Gradients of rows are rounded to the wire's type, rows of weights travel as they are.
    """

    shard: Shard
    group: Group
    stale: bool = False
    """This replica's copies of the others' rows have not been asked for since the last update."""
    lookups: list[Lookup] = field(default_factory=list)

    @property
    def dim(self) -> int:
        return int(self.shard.layout.shapes[0][1])

    @property
    def rows_per_rank(self) -> int:
        return self.shard.layout.row_length // self.dim

    def look_up(
        self, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None
    ) -> torch.Tensor:
        """`F.embedding(ids, weight, padding_idx)`, with a leaf of its own. Collective when stale."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < len(weight):
            raise IndexError(
                f"embedding of {len(weight)} rows: found row {int(unique[0])} to {int(unique[-1])}"
            )
        rows = self.fetch(unique) if self.stale else weight.detach()[unique]
        leaf = rows.requires_grad_()
        self.lookups.append(Lookup(unique, leaf))
        padding = None
        if padding_idx is not None:
            at = (unique == padding_idx % len(weight)).nonzero()
            padding = int(at[0]) if len(at) else None
        return F.embedding(inverse, leaf, padding)

    @torch.no_grad()
    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        """Collective: current rows `ids` (ascending, each once) from the ranks that own them."""
        self.stale = False
        counts, asked, asked_counts = self._ask(ids)
        served = self.shard.row.view(-1, self.dim)[asked - self.group.rank * self.rows_per_rank]
        rows = served.new_empty(len(ids), self.dim)
        self.group.all_to_all_rows(rows, served, counts, asked_counts).wait()
        return rows

    def _ask(self, ids: torch.Tensor) -> tuple[list[int], torch.Tensor, list[int]]:
        """Collective: tell each owner which rows are meant.

        Returns how many of each owner, the rows that this rank is asked for, how many by each rank.
        """
        counts = torch.bincount(ids // self.rows_per_rank, minlength=self.group.size)
        asked_counts = torch.empty_like(counts)
        self.group.all_to_all(asked_counts, counts).wait()
        outgoing, incoming = counts.tolist(), asked_counts.tolist()
        sent = ids.to(torch.int32)
        asked = sent.new_empty(sum(incoming))
        self.group.all_to_all_rows(asked, sent, incoming, outgoing).wait()
        return outgoing, asked.long(), incoming

    @torch.no_grad()
    def send_gradients(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Collective: gradients of the looked-up rows to their owners.

        Returns rows and gradients that were received, rank after rank, and how many of each rank.
        """
        ids, gradients = self._own_gradients()
        outgoing, asked, incoming = self._ask(ids)
        wire = self.shard.wire
        received = gradients.new_empty(len(asked), self.dim, dtype=wire)
        self.group.all_to_all_rows(received, gradients.to(wire), incoming, outgoing).wait()
        self.lookups.clear()
        return asked, received, incoming

    @torch.no_grad()
    def add(self, asked: torch.Tensor, received: torch.Tensor, counts: list[int]) -> None:
        """Add what `send_gradients` returned to this rank's sum, in rank order."""
        assert self.shard.total is not None
        mine = self.shard.total.view(-1, self.dim)
        at = asked - self.group.rank * self.rows_per_rank
        for rows, gradients in zip(at.split(counts), received.split(counts), strict=True):
            mine.index_add_(0, rows, gradients.to(mine.dtype))  # each row once: any order is one

    @property
    def used(self) -> bool:
        """Whether this rank has gradients to send."""
        return any(x.rows.grad is not None for x in self.lookups)

    def _own_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = [(x.ids, x.rows.grad) for x in self.lookups if x.rows.grad is not None]
        if len(found) == 1:
            return found[0]
        like = self.shard.row
        if not found:
            return torch.empty(0, dtype=torch.int64), like.new_empty(0, self.dim)
        ids, inverse = torch.unique(torch.cat([i for i, _ in found]), return_inverse=True)
        total = like.new_zeros(len(ids), self.dim)
        total.index_add_(0, inverse, torch.cat([g for _, g in found]))
        return ids, total
