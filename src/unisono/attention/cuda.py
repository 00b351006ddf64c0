"""The kernel's contract (kernel.py) on CUDA, by torch's own operators; what they lack, tiled.py does.

FlashAttention-2 (Dao 2023) for float16 and bfloat16 without a mask; grouped heads natively. With a mask,
or in float32, torch's memory-efficient kernel (Rabe and Staats 2021), which knows no grouped heads: the
keys of the *tile* are repeated, and their gradients added over the group.
"""

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)
WIDEST = 256
"""Head dimension up to which FlashAttention-2 is compiled."""


def can(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether an operator here takes these; head dimensions must be multiples of 16 bytes."""
    widths = {q.shape[-1], v.shape[-1]}
    if any(w * q.element_size() % 16 for w in widths) or not q.shape[2] or not k.shape[2]:
        return False
    if _flash(q, v, mask):
        return max(widths) <= WIDEST
    return q.dtype in (*HALF, torch.float32)


def _flash(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q.dtype in HALF and q.shape[-1] == v.shape[-1]


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse), as kernel.forward."""
    if _flash(q, v, mask):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse
    bias, heads = _bias(mask, q, k), q.shape[1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, _repeat(k, heads), _repeat(v, heads), bias, True, 0.0, causal, scale=scale
    )
    lse = lse[..., : q.shape[2]]  # the kernel pads it
    if mask is None:
        return out, lse
    blind = ~_seen(mask).any(-1)
    return out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), as kernel.backward."""
    dout, out = dout.to(q.dtype).contiguous(), out.to(q.dtype).contiguous()
    lse = lse.float().masked_fill(lse == -torch.inf, torch.inf).contiguous()
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout: none
    offset = torch.zeros((), dtype=torch.uint64, device=q.device)
    if _flash(q, v, mask):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal,
            seed, offset, scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    heads = q.shape[1]
    # The kernel reads the log-sum-exp in rows of 32 numbers.
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    signed = offset.to(torch.int64)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, _repeat(k, heads), _repeat(v, heads), _bias(mask, q, k), out, lse,
        signed, signed, 0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _added(dk, k), _added(dv, v)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x


def _added(gradient: Tensor, like: Tensor) -> Tensor:
    grouped = gradient.unflatten(1, (like.shape[1], -1))
    return grouped.sum(2, dtype=torch.float32).to(like.dtype) if grouped.shape[2] > 1 else gradient


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > -torch.inf


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Additive, of q's type and full shape, in rows that begin at multiples of 16 bytes."""
    if mask is None:
        return None
    length = k.shape[2]
    rows = torch.zeros(*mask.shape[:-1], -(-length // 8) * 8, dtype=q.dtype, device=q.device)
    bias = rows[..., :length].masked_fill_(~_seen(mask), -torch.inf)
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], length)
