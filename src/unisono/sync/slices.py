"""What a rank's model holds of each parameter, where matrices are divided along the `tensor` axis.

To a strategy (exact, sharded) every tensor rank's model is whole: its parameters are slices, and gradients
are summed over the ranks that hold the same ones. This is what strategies need to know besides: the
norm over all slices, whole tensors for a checkpoint and back, and what can be compared between ranks.
Parameters that are not divided are the same on all tensor ranks, and counted on the first.

Without a `tensor` axis nothing is divided and nothing is communicated.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from unisono.sync.digest import fingerprint
from unisono.sync.ledger import Group
from unisono.sync.update import global_norm


@dataclass(frozen=True)
class Cut:
    """How a parameter is divided: along `dim`, in `packs` stacked matrices of which each is."""

    dim: int
    packs: int = 1

    def part(self, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Slice `rank` of `ranks`; a copy."""
        dim = self.dim % whole.dim()
        packed = whole.unflatten(dim, (self.packs, ranks, -1)).select(dim + 1, rank)
        return packed.flatten(dim, dim + 1).clone(memory_format=torch.contiguous_format)

    def whole(self, parts: torch.Tensor) -> torch.Tensor:
        """Of the slices [ranks, ...] of all ranks, in order."""
        dim = self.dim % (parts.dim() - 1)
        packed = parts.unflatten(dim + 1, (self.packs, -1))
        return packed.movedim(0, dim + 1).flatten(dim, dim + 2)

    def shape(self, part: torch.Size, ranks: int) -> torch.Size:
        """Of the whole, from that of a slice."""
        dim = self.dim % len(part)
        return torch.Size([n * ranks if k == dim else n for k, n in enumerate(part)])


class Slices:
    """The slices of one rank. `cuts`: of the divided parameters, by every name that they have."""

    def __init__(self, group: Group | None = None, cuts: Mapping[str, Cut] | None = None) -> None:
        """`group`: along the `tensor` axis; None where it has one rank."""
        self.group, self.cuts = group, dict(cuts or {})
        self.ranks = group.size if group else 1

    def counts(self, name: str) -> bool:
        """Whether this rank counts a parameter where all tensor ranks are added up."""
        return self.group is None or self.group.rank == 0 or name in self.cuts

    def norm(self, gradients: Iterable[tuple[str, torch.Tensor]]) -> float:
        """Collective: the norm over all slices; the same bits on all tensor ranks."""
        mine = global_norm([g for name, g in gradients if self.counts(name)])
        if self.group is None:
            return mine
        return math.sqrt(sum(self.group.each(mine * mine)[:, 0].tolist()))

    def part(self, key: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a parameter, or of a state of it (`exp_avg.NAME`)."""
        cut = self._cut(key, whole)
        if cut is None or self.group is None:
            return whole
        return cut.part(whole, self.group.rank, self.ranks)

    def whole(self, key: str, part: torch.Tensor) -> torch.Tensor:
        """Collective: what all slices make together."""
        cut = self._cut(key, part)
        if cut is None or self.group is None:
            return part
        every = part.new_empty(self.ranks, *part.shape)
        self.group.all_gather(every, part.detach().contiguous()).wait()
        return cut.whole(every)

    def shape(self, name: str, part: torch.Size) -> torch.Size:
        """Of the whole parameter."""
        cut = self.cuts.get(name)
        return cut.shape(part, self.ranks) if cut else part

    def state_dict(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collective: whole tensors on the first tensor rank, tied ones as one; slices elsewhere."""
        if self.group is None:
            return dict(state)
        seen: dict[tuple[int, torch.Size], torch.Tensor] = {}
        result = {}
        for name, part in state.items():
            key = part.data_ptr(), part.shape
            if key not in seen:
                whole = self.whole(name, part)
                seen[key] = whole if self.group.rank == 0 else part
            result[name] = seen[key]
        return result

    def alike(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: what must be equal on all ranks: tensors, and fingerprints of all slices."""
        divided = []
        for key, tensor in tensors:
            if self._cut(key, tensor) is None:
                yield key, tensor
            else:
                divided.append((key, fingerprint(tensor)))
        if self.group is not None and divided:
            mine = torch.stack([f for _, f in divided])
            every = mine.new_empty(self.ranks, *mine.shape)
            self.group.all_gather(every, mine).wait()
            for i, (key, _) in enumerate(divided):
                yield key, every[:, i]

    def _cut(self, key: str, tensor: torch.Tensor) -> Cut | None:
        """None for what is whole on every rank, a count of the optimizer's among it."""
        if not tensor.dim():
            return None
        return self.cuts.get(key) or self.cuts.get(key.partition(".")[2])

    def close(self) -> None:
        """Collective: end the process group."""
        if self.group is not None:
            self.group.close()
