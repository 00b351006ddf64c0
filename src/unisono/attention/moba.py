"""Mixture of block attention (MoBA, Lu et al. 2025): each query chooses the blocks of keys that it sees.

A query of head h sees its own block up to itself, and of the blocks before it the `top` - 1 whose mean key
has the largest product with it. The choice has no parameters and no gradient; what is chosen trains.
It depends on the data, so it is no Mask: for each block of keys the queries that chose it are gathered
into one rectangle, the queries of all heads of a group together, and merged (kernel.py).

Cost: O(S top block) products of D, S^2 / block for choosing, and as memory `top` numbers a query.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unisono.attention import kernel, pair
from unisono.attention.mask import Documents, Mask

Tensor = torch.Tensor
ROWS = 1024
"""Queries whose products with all blocks are held at once."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    top: int,
    scale: float,
    softcap: float | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """[B, H, S, Dv] of q's type; layouts as kernel.py. Each document is a sequence of its own."""
    how = (block, top, scale, softcap)
    if documents is None:
        found: Tensor = _Moba.apply(q, k, v, *how)
        return found
    rows = []
    for row in range(q.shape[0]):
        of_row = row if len(documents.starts) > 1 else 0
        parts = [
            _Moba.apply(*(x[row : row + 1, :, a:b] for x in (q, k, v)), *how)
            for _, a, b in documents.segments(of_row, 0, q.shape[2])
        ]
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def choose(q: Tensor, k: Tensor, block: int, top: int) -> Tensor:
    """The earlier blocks that each query sees: int64 [B, H, S, top - 1], -1 where there are fewer."""
    num = q.shape[2] // block  # the last, unfinished one is never earlier
    most = min(top - 1, num)
    if not most:
        return q.new_empty(*q.shape[:3], 0, dtype=torch.int64)
    means = k[:, :, : num * block].unflatten(2, (num, block)).mean(3, dtype=pair.wide(k))
    means = means.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = []
    for start in range(0, q.shape[2], ROWS):
        some = q[:, :, start : start + ROWS]
        own = torch.arange(start, start + some.shape[2], device=q.device) // block
        later = torch.arange(num, device=q.device) >= own[:, None]
        value, index = (some.to(means.dtype) @ means.mT).masked_fill_(later, -torch.inf).topk(most)
        found.append(index.masked_fill_(value == -torch.inf, -1))
    return torch.cat(found, 2)


def _rectangles(
    chosen: Tensor, kv_heads: int, block: int
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """(row, key head, keys, queries of the group as numbers of its H / Hkv S) of each block chosen."""
    flat = chosen.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, Hkv, H / Hkv S, top - 1]
    for row in range(flat.shape[0]):
        for head in range(kv_heads):
            one = flat[row, head]
            for number in one.unique().tolist():
                if number >= 0:
                    queries = (one == number).any(1).nonzero()[:, 0]
                    yield row, head, slice(number * block, number * block + block), queries


class _Moba(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block: int,
        top: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        how: dict[str, Any] = {"scale": scale, "softcap": softcap}
        own, chosen = Mask(chunk=block), choose(q, k, block, top)
        out, lse = pair.forward(q, k, v, own, **how)
        for row, head, keys, some in _rectangles(chosen, k.shape[1], block):
            of_q, of_out, of_lse = (_group(x, row, head, k) for x in (q, out, lse))
            tile = kernel.forward(of_q[some][None, None], *_keys(k, v, row, head, keys), **how)
            merged = kernel.merge(of_out[some], of_lse[some], tile[0][0, 0], tile[1][0, 0])
            of_out[some], of_lse[some] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, chosen)
        ctx.own, ctx.block, ctx.how = own, block, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, chosen = ctx.saved_tensors
        dq, dk, dv = pair.backward(dout, q, k, v, out, lse, ctx.own, **ctx.how)
        dout = dout.contiguous()
        for row, head, keys, some in _rectangles(chosen, k.shape[1], ctx.block):
            of_q, of_dout, of_out, of_lse, of_dq = (
                _group(x, row, head, k) for x in (q, dout, out, lse, dq)
            )
            of_k, of_v = _keys(k, v, row, head, keys)
            tile = kernel.backward(
                of_dout[some][None, None], of_q[some][None, None], of_k, of_v,
                of_out[some][None, None], of_lse[some][None, None], **ctx.how,
            )  # fmt: skip
            of_dq[some] += tile[0][0, 0]
            dk[row, head, keys] += tile[1][0, 0]
            dv[row, head, keys] += tile[2][0, 0]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None,) * 4


def _group(x: Tensor, row: int, head: int, k: Tensor) -> Tensor:
    """[H / Hkv S, ...] of x [B, H, S, ...]: the queries of a key head; a view where x is contiguous."""
    return x.unflatten(1, (k.shape[1], -1))[row, head].flatten(0, 1)


def _keys(k: Tensor, v: Tensor, row: int, head: int, keys: slice) -> tuple[Tensor, Tensor]:
    return k[row : row + 1, head : head + 1, keys], v[row : row + 1, head : head + 1, keys]
