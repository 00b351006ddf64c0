"""Attention of queries in some segments of a sequence against keys in others, piece by piece.

What the schemes of context parallelism share. A rank holds segments (shard.py) of queries; keys and
values come a few segments at a time. Each pair of segments is attention by itself (pair.py) with an
output and a log-sum-exp; pieces of output are merged by their log-sum-exps in float32 (Milakov 2018,
arXiv 1805.02867), so that the order in which keys come moves only the last bits. Backward, every piece gets
the *whole* output's log-sum-exp, and gradients add up in float32 (Liu 2023, arXiv 2310.01889).

Cost: what the visible pairs cost, and a pass over the output for each piece.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from unisono.attention import pair
from unisono.attention.mask import Mask
from unisono.attention.pair import wide
from unisono.attention.shard import Placement
from unisono.sync.ledger import Group, Handle

Segments = Sequence[range]
"""Positions in the whole sequence; a tensor's rows follow them in order."""


@dataclass(frozen=True)
class Axis:
    """The ranks that hold a sequence together, and which holds what."""

    group: Group
    placement: Placement

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def own(self) -> Segments:
        return self.placement.segments(self.rank)

    def behind(self, by: int) -> Segments:
        """What the rank `by` places before this one holds."""
        return self.placement.segments((self.rank - by) % self.size)


@dataclass(frozen=True, eq=False)
class Spec:
    """What one layer's attention computes."""

    mask: Mask
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class Shape:
    """Of keys [B, Hkv, m, D] and values [B, Hkv, m, Dv]."""

    rows: int
    heads: int
    tokens: int
    width: int
    value_width: int

    @property
    def k(self) -> tuple[int, ...]:
        return self.rows, self.heads, self.tokens, self.width

    @property
    def v(self) -> tuple[int, ...]:
        return self.rows, self.heads, self.tokens, self.value_width


@dataclass(frozen=True, eq=False)
class Pairs:
    """Keys and values, or their gradients, in one piece of memory, as they travel."""

    flat: torch.Tensor
    shape: Shape

    @staticmethod
    def of(k: torch.Tensor, v: torch.Tensor) -> "Pairs":
        rows, heads, tokens, width = k.shape
        shape = Shape(rows, heads, tokens, width, v.shape[-1])
        packed = Pairs(k.new_empty(k.numel() + v.numel()), shape)
        packed.k.copy_(k)
        packed.v.copy_(v)
        return packed

    @property
    def k(self) -> torch.Tensor:
        return self.flat[: math.prod(self.shape.k)].view(self.shape.k)

    @property
    def v(self) -> torch.Tensor:
        return self.flat[math.prod(self.shape.k) :].view(self.shape.v)

    def empty(self, tokens: int | None = None, dtype: torch.dtype | None = None) -> "Pairs":
        """Room for as much of `dtype`, or for as many `tokens`."""
        shape = self.shape if tokens is None else replace(self.shape, tokens=tokens)
        count = math.prod(shape.k) + math.prod(shape.v)
        return Pairs(self.flat.new_empty(count, dtype=dtype), shape)

    def zeros(self) -> "Pairs":
        """Room for gradients of these to add up in: zeros of float32 or wider."""
        room = self.empty(dtype=wide(self.flat))
        room.flat.zero_()
        return room

    def take(self, places: Sequence[slice]) -> "Pairs":
        """A copy of the tokens at `places`."""
        taken = self.empty(sum(s.stop - s.start for s in places))
        for whole, part in ((self.k, taken.k), (self.v, taken.v)):
            for s, t in _places(places):
                part[:, :, t] = whole[:, :, s]
        return taken

    def put(self, places: Sequence[slice], taken: "Pairs") -> None:
        """Add to the tokens at `places`."""
        for whole, part in ((self.k, taken.k), (self.v, taken.v)):
            for s, t in _places(places):
                whole[:, :, s] += part[:, :, t]


@dataclass(frozen=True, eq=False)
class Coming:
    """Keys and values, or gradients, on their way to this rank, while its own are on theirs."""

    room: Pairs
    sent: Pairs
    handle: Handle

    def wait(self) -> Pairs:
        """What has come. Raises LostReplicas as Handle.wait."""
        self.handle.wait()
        return self.room


def pass_on(axis: Axis, sent: Pairs, by: int = 1, tokens: int | None = None) -> Coming:
    """Collective: `sent` goes `by` ranks on; as much comes from as far behind, or `tokens`."""
    room = sent.empty(tokens)
    return Coming(room, sent, axis.group.shift(room.flat, sent.flat, by))


@dataclass(frozen=True, eq=False)
class Output:
    """Attention so far: out [B, Hq, n, Dv] and lse [B, Hq, n], float32 or wider."""

    out: torch.Tensor
    lse: torch.Tensor

    @staticmethod
    def empty(q: torch.Tensor, v: torch.Tensor) -> "Output":
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide(q))
        return Output(out, q.new_full(q.shape[:3], -torch.inf, dtype=wide(q)))

    def rows(self, part: slice) -> "Output":
        """Of some queries: the same memory."""
        return Output(self.out[:, :, part], self.lse[:, :, part])

    def add(
        self, q: torch.Tensor, kv: Pairs, rows: Segments, columns: Segments, spec: Spec
    ) -> None:
        """Queries [B, Hq, n, D] at the positions `rows` see keys at `columns`."""
        k, v = kv.k, kv.v
        kind = _kernel_type(q)
        for q_part, q0 in _parts(rows):
            for k_part, k0 in _parts(columns):
                some, of_k, of_v = q[:, :, q_part], k[:, :, k_part], v[:, :, k_part]
                if pair.plan(spec.mask, some, of_k, q0, k0):
                    piece = pair.forward(
                        some.to(kind), of_k.to(kind), of_v.to(kind), spec.mask, q_start=q0, k_start=k0,
                        scale=spec.scale, softcap=spec.softcap,
                    )  # fmt: skip
                    _merge(self.out[:, :, q_part], self.lse[:, :, q_part], *piece)


@dataclass(frozen=True, eq=False)
class Gradients:
    """dq [B, Hq, n, D] and those of keys and values so far, float32 or wider."""

    dq: torch.Tensor
    dkv: Pairs

    def rows(self, part: slice) -> "Gradients":
        """Of some queries: the same memory."""
        return Gradients(self.dq[:, :, part], self.dkv)

    def add(
        self, dout: torch.Tensor, q: torch.Tensor, kv: Pairs, found: Output, rows: Segments,
        columns: Segments, spec: Spec,
    ) -> None:  # fmt: skip
        """What the pairs of `rows` and `columns` add; `found` is of all keys."""
        k, v, dk, dv = kv.k, kv.v, self.dkv.k, self.dkv.v
        kind = _kernel_type(q)
        for q_part, q0 in _parts(rows):
            for k_part, k0 in _parts(columns):
                some, of_k, of_v = q[:, :, q_part], k[:, :, k_part], v[:, :, k_part]
                if pair.plan(spec.mask, some, of_k, q0, k0):
                    pieces = pair.backward(
                        dout[:, :, q_part].to(kind), some.to(kind), of_k.to(kind), of_v.to(kind),
                        found.out[:, :, q_part].to(kind), found.lse[:, :, q_part], spec.mask,
                        q_start=q0, k_start=k0, scale=spec.scale, softcap=spec.softcap,
                    )  # fmt: skip
                    self.dq[:, :, q_part] += pieces[0]
                    dk[:, :, k_part] += pieces[1]
                    dv[:, :, k_part] += pieces[2]


def cut(segments: Segments, tokens: int) -> tuple[Segments, Segments]:
    """The first `tokens` of what segments hold, and the others."""
    first: list[range] = []
    second: list[range] = []
    for s in segments:
        here = min(len(s), max(0, tokens))
        first += [s[:here]] if here else []
        second += [s[here:]] if here < len(s) else []
        tokens -= here
    return first, second


def where(segments: Segments, ranges: Segments) -> list[slice]:
    """Where `ranges`, each inside of one of `segments`, lie in the tensor that follows those."""
    found, at = [], 0
    for s in segments:
        found += [
            slice(at + r.start - s.start, at + r.stop - s.start)
            for r in ranges
            if s.start <= r.start < s.stop
        ]
        at += len(s)
    return found


def _kernel_type(q: torch.Tensor) -> torch.dtype:
    """What pieces are computed in.

    Kernels round what they return to their inputs' type, here every piece before it is added, which
    adds up to a fifth to the error of bfloat16. A CPU without matrix units for it takes as long in float32 forward
    (36 to 30 ms for 1,024 tokens of 4 heads), 1.7 times as long backward.
    """
    return wide(q) if q.device.type == "cpu" else q.dtype


def _merge(out: torch.Tensor, lse: torch.Tensor, out2: torch.Tensor, lse2: torch.Tensor) -> None:
    """kernel.merge in place: the largest temporary is one piece of output."""
    both = torch.logaddexp(lse, lse2)
    safe = both.masked_fill(both == -torch.inf, 0)
    out.mul_((lse - safe).exp_()[..., None]).addcmul_(
        out2.to(out.dtype), (lse2 - safe).exp_()[..., None]
    )
    lse.copy_(both)


def _parts(segments: Segments) -> Iterator[tuple[slice, int]]:
    """(where in the tensor, first position) of each segment."""
    at = 0
    for s in segments:
        yield slice(at, at + len(s)), s.start
        at += len(s)


def _places(places: Sequence[slice]) -> Iterator[tuple[slice, slice]]:
    """(where in the whole, where among what is taken from it)."""
    at = 0
    for s in places:
        yield s, slice(at, at + s.stop - s.start)
        at += s.stop - s.start
