"""The fixed tree in which gradients are summed.

Floating-point addition is not associative, so "the same sum" needs the same brackets. The leaves
are the micro-batches of a global batch in the order of their rows. An even number of leaves is the
sum of its two halves; an odd number is summed from left to right. A power of two of ranks that
divides the leaves evenly therefore cuts the tree at whole subtrees: each rank sums its own leaves
as they come (`TreeSum`), and the ranks' sums are joined by the levels above (`tree_sum`).

Cost: one addition a leaf, as for a plain running sum, and at most log2(leaves) extra buffers.
"""

from collections.abc import Sequence

import torch

HALF = (torch.bfloat16, torch.float16)


def tree_sum(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape, in the fixed tree. Overwrites the pieces.

    Half-precision pieces are added in float32; the result then is a new float32 tensor, and
    otherwise it is the first piece.
    """
    if pieces[0].dtype in HALF:
        pieces = [p.float() for p in pieces]
    if len(pieces) == 1:
        return pieces[0]
    if len(pieces) % 2:
        for piece in pieces[1:]:
            pieces[0].add_(piece)
        return pieces[0]
    half = len(pieces) // 2
    return tree_sum(pieces[:half]).add_(tree_sum(pieces[half:]))


class TreeSum:
    """The same tree over leaves that come one after another, equal to `tree_sum` bit for bit."""

    def __init__(self, leaves: int) -> None:
        self.run = leaves
        while self.run % 2 == 0:
            self.run //= 2
        self.leaves = leaves
        self._seen = 0
        self._partial: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []

    def add(self, leaf: torch.Tensor) -> None:
        """Take a leaf that is not the last; `leaf` may be overwritten afterwards."""
        if self._seen % self.run == 0:
            self._partial.append(self._buffer(leaf).copy_(leaf))
        else:
            self._partial[-1].add_(leaf)
        self._seen += 1
        self._merge()

    @property
    def complete_but_one(self) -> bool:
        return self._seen == self.leaves - 1

    def finish(self, leaf: torch.Tensor) -> None:
        """Take the last leaf and leave the whole sum in it."""
        assert self.complete_but_one, "a leaf is missing"
        self.add(leaf)
        leaf.copy_(self._partial[0])
        self.reset()

    def reset(self) -> None:
        """Forget the leaves seen so far."""
        self._free += self._partial
        self._partial, self._seen = [], 0

    def _merge(self) -> None:
        runs, odd = divmod(self._seen, self.run)
        if odd:
            return
        # Like carrying in a binary counter: as many merges as `runs` ends in zeros.
        while runs % 2 == 0:
            right = self._partial.pop()
            self._partial[-1].add_(right)
            self._free.append(right)
            runs //= 2

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        return self._free.pop() if self._free else torch.empty_like(like)
