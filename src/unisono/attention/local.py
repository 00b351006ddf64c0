"""Attention over whole sequences on one device, for autograd: `attend(q, k, v, mask, scale=...)`.

Full causal attention is one call of the kernel; windows are folded (O(S W)), packed documents cut apart,
sparse patterns gathered (pair.py). Memory: q, k, v, out and one number a query are kept for the backward
pass; nothing grows with the square of the sequence.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from unisono.attention import kernel, pair
from unisono.attention.mask import Mask

Tensor = torch.Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int = 0,
    k_start: int = 0,
) -> Tensor:
    """softmax(scale q k^T, masked) v: [B, H, Sq, Dv] of q's type, from the kernel's layouts (kernel.py).

    `sinks` [H]: a learned logit beside the keys of each head (gpt-oss's s_aux), gets its gradient.
    `q_start`, `k_start`: global positions of the first query and key, if earlier ones are cached.
    """
    out: Tensor = _Attention.apply(q, k, v, sinks, mask, scale, softcap, q_start, k_start)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        mask: Mask,
        scale: float,
        softcap: float | None,
        q_start: int,
        k_start: int,
    ) -> Tensor:
        ctx.mask = mask
        ctx.how = {"scale": scale, "softcap": softcap, "q_start": q_start, "k_start": k_start}
        out, lse = pair.forward(q, k, v, mask, **ctx.how, whole=True)
        if sinks is not None:
            out, lse = kernel.with_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dsinks = None if sinks is None else kernel.sinks_gradient(dout, out, lse, sinks)
        dq, dk, dv = pair.backward(dout, q, k, v, out, lse, ctx.mask, **ctx.how, whole=True)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, *(None,) * 5
