"""Ulysses: ranks trade tokens for heads, so that each computes a few heads over many tokens.

One all-to-all turns this rank's tokens of all heads into all U ranks' tokens of H / U heads, a second
one brings the output back (Jacobs 2023, arXiv 2309.14509). In between is any attention: one device's
own kernels, or for Ulysses x ring a ring over the ranks that hold the same heads (Fang 2024, arXiv
2405.07719). U neighbours of a placement over U R ranks hold together exactly what one rank of R would
hold, so every scheme uses the same shards.

Key heads are repeated where U does not divide them, L = lcm(Hkv, U) of them in all. Bytes that a rank
sends, for B sequences of S tokens over P ranks and b bytes a value, forward and backward alike:
B (S / P) (Hq + L) (D + Dv) b (U-1) / U. Nothing hides behind compute.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from unisono.attention.segments import where
from unisono.attention.shard import Placement
from unisono.errors import ConfigError
from unisono.sync.ledger import Group

Places = tuple[tuple[tuple[slice, slice], ...], ...]
"""For each rank of the group: (where in its tensor, where in the tokens of all)."""


def repeats(heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key head is repeated for `ranks`. Raises ConfigError: heads do not divide."""
    if heads % ranks:
        raise ConfigError(
            f"context.scheme: ulysses over {ranks} ranks needs a multiple of {ranks} query heads, found "
            f"{heads}; write ring"
        )
    return math.lcm(kv_heads, ranks) // kv_heads


def places(placement: Placement, together: Placement, ring_rank: int) -> Places:
    """Where the tokens of U neighbours of `placement` go in those of `ring_rank` of `together`."""
    ranks = placement.size // together.size
    whole = together.segments(ring_rank)
    found = []
    for rank in range(ring_rank * ranks, (ring_rank + 1) * ranks):
        own = placement.segments(rank)
        found.append(tuple((where(own, [s])[0], where(whole, [s])[0]) for s in own))
    return tuple(found)


class ToHeads(torch.autograd.Function):
    """Collective, forward and backward: each of `inputs` [B, H, n, D] becomes [B, H / U, U n, D].

    All in one message. H may differ between inputs.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, at: Places, *inputs: torch.Tensor) -> Any:
        ctx.group, ctx.at = group, at
        return _to_heads(group, at, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, None, *_to_tokens(ctx.group, ctx.at, gradients)


class ToTokens(torch.autograd.Function):
    """Collective, forward and backward: the inverse of ToHeads."""

    @staticmethod
    def forward(ctx: Any, group: Group, at: Places, *inputs: torch.Tensor) -> Any:
        ctx.group, ctx.at = group, at
        return _to_tokens(group, at, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, None, *_to_heads(ctx.group, ctx.at, gradients)


def _to_heads(group: Group, at: Places, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    ranks = group.size
    rows = [x.unflatten(1, (ranks, -1)).transpose(0, 1).reshape(ranks, -1) for x in inputs]
    shapes = [(x.shape[0], x.shape[1] // ranks, x.shape[2], x.shape[3]) for x in inputs]
    outputs = tuple(x.new_empty(b, h, n * ranks, d) for x, (b, h, n, d) in zip(inputs, shapes))
    for rank, parts in enumerate(_traded(group, rows, shapes)):
        for output, part in zip(outputs, parts):
            for here, there in at[rank]:
                output[:, :, there] = part[:, :, here]
    return outputs


def _to_tokens(
    group: Group, at: Places, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    ranks = group.size
    rows, shapes, outputs = [], [], []
    for x in inputs:
        b, h, n, d = x.shape
        row = x.new_empty(ranks, b, h, n // ranks, d)
        for rank in range(ranks):
            for here, there in at[rank]:
                row[rank][:, :, here] = x[:, :, there]
        rows.append(row.flatten(1))
        shapes.append((b, h, n // ranks, d))
        outputs.append(x.new_empty(b, ranks, h, n // ranks, d))
    for rank, parts in enumerate(_traded(group, rows, shapes)):
        for output, part in zip(outputs, parts):
            output[:, rank] = part
    return tuple(output.flatten(1, 2) for output in outputs)


def _traded(
    group: Group, rows: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
) -> Iterator[list[torch.Tensor]]:
    """Collective: what each rank has sent, in the order of the inputs."""
    sent = torch.cat(list(rows), dim=1)
    received = torch.empty_like(sent)
    group.all_to_all(received, sent).wait()
    sizes = [row.shape[1] for row in rows]
    for row in received:
        yield [part.view(shape) for part, shape in zip(row.split(sizes), shapes)]
