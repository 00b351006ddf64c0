"""The mesh: along which axes the ranks are laid out, and who stands beside whom.

    replica   copies of the model, on different samples
    shard     ranks that share the weights of one copy (FSDP2), on different samples
    context   ranks that hold different parts of the same sequences
    tensor    ranks that hold different parts of the same weight matrices, and compute on the same tokens

Rank = ((replica S + shard) C + context) T + tensor: what talks most stands closest. Data ranks, replica x
shard, divide the samples of a step; holders, all but tensor, add up gradients of the same weights. FSDP
shards over shard x context as one axis. Nothing here communicates.
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["replica", "shard", "context", "tensor"]
AXES: tuple[Axis, ...] = ("replica", "shard", "context", "tensor")
HOLDERS: tuple[Axis, ...] = ("replica", "shard", "context")


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis."""

    replica: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        return self.data * self.inner

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replica * self.shard

    @property
    def inner(self) -> int:
        """Ranks that see the same samples. More than one: forward passes communicate."""
        return self.context * self.tensor

    @property
    def holders(self) -> int:
        """Ranks whose gradients of the same weights are summed."""
        return self.data * self.context

    def data_rank(self, rank: int) -> int:
        return rank // self.inner

    def context_rank(self, rank: int) -> int:
        return rank // self.tensor % self.context

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor

    def leads(self, rank: int) -> bool:
        """Of the ranks that see the same samples, the one that tells of them."""
        return rank % self.inner == 0

    def groups(self, *axes: Axis) -> list[list[int]]:
        """The ranks that differ along `axes` only, in order; every rank is in one of the lists."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            place = self._place(rank)
            rest = tuple(place[k] for k, axis in enumerate(AXES) if axis not in axes)
            found.setdefault(rest, []).append(rank)
        return list(found.values())

    def _place(self, rank: int) -> tuple[int, int, int, int]:
        inner, over = rank % self.inner, rank // self.inner
        return over // self.shard, over % self.shard, inner // self.tensor, inner % self.tensor

    def __str__(self) -> str:
        """`replica 2 x tensor 2`; axes of one rank are left out."""
        named = [f"{axis} {n}" for axis in AXES if (n := getattr(self, axis)) > 1]
        return " x ".join(named) or "one rank"


@dataclass(frozen=True)
class Divided:
    """What tensor parallelism divides of a model, and sends for it."""

    values: int = 0
    """Trained ones that are divided, whole."""
    sent: int = 0
    """Values that cross for a token in a forward and backward pass: an all-reduce counts twice."""
    again: int = 0
    """Those of the layers' forward pass, which recomputation sends again, at most: it ends where nothing
    more is needed."""
    calls: int = 0
    """Collectives of a forward and backward pass."""
    shared: int = 0
    """float32 values all-reduced in each backward pass, whatever the tokens."""

    def sent_bytes(
        self, tokens: int, *, passes: int, width: int, ranks: int, recompute: bool
    ) -> int:
        """By each rank for `tokens` in `passes` micro-batches; `width`: bytes of an activation."""
        values = tokens * (self.sent + (self.again if recompute else 0))
        return (values * width + 8 * passes * self.shared) * (ranks - 1) // ranks
