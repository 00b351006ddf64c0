"""Where the tokens of a sequence lie over the ranks of the `context` axis, and a batch cut that way.

Zigzag: the sequence is padded to a multiple of 2P and cut into 2P chunks; rank r holds chunks r and
2P-1-r. Under a causal mask every rank then sees the same number of pairs (Brandon 2023, striped
attention, arXiv 2311.09431; Llama 3, arXiv 2407.21783, section 3.3.2). Contiguous: rank r holds chunks
2r and 2r+1; the last rank then computes 2P-1 times what the first one does.

Everything that looks across tokens is done before the cut: the label of a token is its successor's,
positions count from the beginning of a document, and documents are numbered over the whole sequence.
Padding is a document of its own, without targets. Cost: numpy copies of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unisono.attention.mask import Documents
from unisono.data.blocks import NO_LABEL, Batch, Int64Array


@dataclass(frozen=True, slots=True)
class Placement:
    """Which positions of sequences of `length` tokens each of `size` ranks holds."""

    length: int
    size: int = 1
    zigzag: bool = True

    @property
    def padded(self) -> int:
        """Tokens of a sequence with its padding: the next multiple of 2 `size`."""
        return -(-self.length // (2 * self.size)) * 2 * self.size

    @property
    def held(self) -> int:
        """Tokens of a sequence that one rank holds."""
        return self.padded // self.size

    def segments(self, rank: int) -> tuple[range, ...]:
        """What `rank` holds, in its own order: ascending ranges of positions that do not touch."""
        n = self.padded // (2 * self.size)
        first, second = (
            (rank, 2 * self.size - 1 - rank) if self.zigzag else (2 * rank, 2 * rank + 1)
        )
        if second == first + 1:
            return (range(first * n, (second + 1) * n),)
        return range(first * n, (first + 1) * n), range(second * n, (second + 1) * n)

    def positions(self, rank: int) -> Int64Array:
        """The position in the whole sequence of each token that `rank` holds, [held]."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.segments(rank)])

    def take(self, whole: npt.NDArray[Any], rank: int, fill: int) -> npt.NDArray[Any]:
        """What `rank` holds of [..., length] or [..., padded]: [..., held], padded with `fill`."""
        missing = self.padded - whole.shape[-1]
        if missing:
            wide = [(0, 0)] * (whole.ndim - 1) + [(0, missing)]
            whole = np.pad(whole, wide, constant_values=fill)
        return np.ascontiguousarray(whole[..., self.positions(rank)])

    def join(self, parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The inverse of `take`: [..., length] from the [..., held] of all ranks in their order."""
        whole = np.empty((*parts[0].shape[:-1], self.padded), parts[0].dtype)
        for rank, part in enumerate(parts):
            whole[..., self.positions(rank)] = part
        return whole[..., : self.length]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank of the context axis computes of a batch; arrays [n, held] but for `documents`."""

    input_ids: Int64Array
    targets: Int64Array
    """The token to predict at each position, already shifted; -100 where none."""
    position_ids: Int64Array
    """Count from 0 in each document of the whole sequence."""
    documents: Documents | None
    """Of the whole sequences, [n, padded], alike on all ranks of the axis; None: each row is one."""
    target_tokens: int
    """Of the whole sequences. This rank's own are those of `targets` that are not -100."""


def shard(batch: Batch, placement: Placement, rank: int, padding: int = 0) -> Shard:
    """What `rank` of the context axis computes of `batch`, [n, placement.length]. Not collective.

    `padding`: a token id. Raises ValueError when the batch has another length.
    """
    if batch.input_ids.shape[-1] != placement.length:
        raise ValueError(
            f"placement: for sequences of {placement.length} tokens; found a batch of "
            f"{batch.input_ids.shape[-1]}"
        )
    none = np.full((len(batch.labels), 1), NO_LABEL, batch.labels.dtype)
    targets = np.concatenate([batch.labels[:, 1:], none], axis=1)
    missing = placement.padded - placement.length
    tail = np.broadcast_to(np.arange(missing), (len(targets), missing))
    positions = np.concatenate([batch.position_ids, tail], axis=1)
    return Shard(
        input_ids=placement.take(batch.input_ids, rank, padding),
        targets=placement.take(targets, rank, NO_LABEL),
        position_ids=placement.take(positions, rank, 0),
        documents=Documents.of_positions(torch.from_numpy(positions)),
        target_tokens=int((targets != NO_LABEL).sum()),
    )
