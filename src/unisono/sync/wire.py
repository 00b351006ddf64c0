"""What values are on the wire: themselves, rounded to a narrower type, or what a codec makes of them.

Matrices of one row for each peer, since rows go different ways: [rows, n] here, [rows, length(n)] there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from unisono.sync.codec import BLOCK, Codec, make_codec
from unisono.sync.tree import HALF


class Wire(Protocol):
    """One way."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what travels."""
        ...

    @property
    def staged(self) -> torch.dtype:
        """Of what `encode` wants."""
        ...

    def length(self, n: int) -> int:
        """Elements on the wire of a row of n values."""
        ...

    def encode(
        self, rows: torch.Tensor, seeds: Sequence[int], left: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`left`, perhaps `rows` itself, becomes what was not sent."""
        ...

    def decode(self, sent: torch.Tensor, out: torch.Tensor, add: bool = False) -> None: ...

    def wide(self, sent: torch.Tensor, n: int) -> torch.Tensor:
        """[rows, n] in float32 or wider; where they are that already, `sent` itself."""
        ...


@dataclass(frozen=True)
class Cast:
    """Values travel in this type."""

    dtype: torch.dtype

    @property
    def staged(self) -> torch.dtype:
        return self.dtype

    def length(self, n: int) -> int:
        return n

    def encode(
        self, rows: torch.Tensor, seeds: Sequence[int] = (), left: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert left is None, "what a cast leaves is not kept"
        return rows.to(self.dtype)

    def decode(self, sent: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        if add:
            out.add_(sent)
        else:
            out.copy_(sent)

    def wide(self, sent: torch.Tensor, n: int) -> torch.Tensor:
        return sent.float() if self.dtype in HALF else sent


@dataclass(frozen=True)
class Coded:
    """Rows travel as a codec's bytes."""

    codec: Codec
    dtype = torch.uint8
    staged = torch.float32

    def length(self, n: int) -> int:
        return self.codec.encoded_bytes(n)

    def encode(
        self, rows: torch.Tensor, seeds: Sequence[int], left: torch.Tensor | None = None
    ) -> torch.Tensor:
        codes = [
            self.codec.encode(row, seed, None if left is None else left[k])
            for k, (row, seed) in enumerate(zip(rows, seeds, strict=True))
        ]
        return codes[0].unsqueeze(0) if len(codes) == 1 else torch.stack(codes)

    def decode(self, sent: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        for code, row in zip(sent, out, strict=True):
            self.codec.decode(code, row, add)

    def wide(self, sent: torch.Tensor, n: int) -> torch.Tensor:
        out = torch.empty(len(sent), n, dtype=self.staged, device=sent.device)
        self.decode(sent, out)
        return out


@dataclass(frozen=True)
class Wires:
    """How a bucket's values travel."""

    gradients: Wire
    sums: Wire
    """Of gradients, where they return to all ranks."""
    weights: Wire
    """Where it rounds, their changes."""
    rows: Wire
    """Gradients of lookups."""
    rounds: bool
    """Owners of weights have masters, which the replicas' copies follow."""
    block: int = 1
    """Values that share a scale: those of one parameter only, since others' may be much larger."""
    keeps_left: bool = False
    """What gradients lost on the way is added to the next step's, by who sent them."""
    keeps_left_of_sums: bool = False
    """The same of sums."""


def make_wires(name: str, dtype: torch.dtype) -> Wires:
    """For values of `dtype`; only those in float32 are rounded.

    int8: gradients rounded without bias; what a sum loses, its owner keeps. int4: to nearest, and what
    is lost is kept by everyone; the rows of lookups, which are few and other ones in the next step, as int8.
    Changes of weights keep theirs by what they are: the distance to the master.
    """
    if name == "float32" or dtype != torch.float32:
        same = Cast(dtype)
        return Wires(same, same, same, same, rounds=False)
    if name == "bfloat16":
        half = Cast(torch.bfloat16)
        return Wires(half, half, half, half, rounds=True)
    narrow = name == "int4"
    return Wires(
        gradients=Coded(make_codec(name, stochastic=not narrow)),
        sums=Coded(make_codec(name)),
        weights=Coded(make_codec(name, rotated=False)),
        rows=Coded(make_codec("int8", stochastic=True)),
        rounds=True,
        block=BLOCK,
        keeps_left=narrow,
        keeps_left_of_sums=True,
    )
