"""Attention of one tile, forward and backward, behind one contract, on the best kernel there is.

Layouts: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; H a multiple of Hkv: query head h reads
key head h // (H / Hkv), keys are never repeated. Any strides with the last dimension dense.

    forward(q, k, v, *, scale, causal, mask, softcap) -> (out [B, H, Sq, Dv], lse [B, H, Sq])
    backward(dout, q, k, v, out, lse, *, ...)         -> (dq, dk, dv)

Scores are s = scale q k^T, with softcap c: c tanh(s / c); lse = log sum_k exp(s) in float32 (float64 for
float64), out = sum_k exp(s - lse) v. `causal`: key j <= query i, both counted within the tile. `mask`
broadcasts to [B, H, Sq, Sk]: bool (True is visible) or float (added to the scores: 0 or -inf). A query
that sees nothing has out 0 and lse -inf.

**Backward takes the out and lse of the whole row**, not of this tile: with p = exp(s - lse) and
delta = sum(dout out), the gradients ds = p (dout v^T - delta) of every tile are its true share. So keys
may be cut into tiles, chunks and ranks, forward results joined by `merge`, and gradients added.

CPU: torch's flash operator, which is private: it is tested at its first use, and where it is missing
or wrong, or for softcap, plain PyTorch (tiled.py) does the same. CUDA: cuda.py. Neither has a tensor of
more than a tile of scores.
"""

from functools import cache

import torch
import torch.nn.functional as F

from unisono.attention import cuda, tiled

Tensor = torch.Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out in q's type, lse) of one tile; see the module's contract."""
    if softcap is None and q.device.type == "cuda" and cuda.can(q, k, v, mask):
        return cuda.forward(q, k, v, scale=scale, causal=causal, mask=mask)
    if softcap is None and q.device.type == "cpu" and flash_works():
        return _flash(q, k, v, scale, causal, mask)
    return tiled.forward(q, k, v, scale=scale, causal=causal, mask=mask, softcap=softcap)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one tile, from `out` and `lse` of all keys of the row."""
    if softcap is None and q.device.type == "cuda" and cuda.can(q, k, v, mask):
        return cuda.backward(dout, q, k, v, out, lse, scale=scale, causal=causal, mask=mask)
    if softcap is None and q.device.type == "cpu" and flash_works():
        return _flash_backward(dout, q, k, v, out, lse, scale, causal, mask)
    return tiled.backward(
        dout, q, k, v, out, lse, scale=scale, causal=causal, mask=mask, softcap=softcap
    )


def merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over both sets of keys, from each set's, at least in float32.

    lse' = log(e^lse + e^lse2), out' = e^(lse - lse') out + e^(lse2 - lse') out2.
    """
    both = torch.logaddexp(lse, lse2)
    safe = both.masked_fill(both == -torch.inf, 0)  # nothing seen on either side: weights 0
    weight, weight2 = (lse - safe).exp()[..., None], (lse2 - safe).exp()[..., None]
    return out * weight + out2 * weight2, both


def additive(seen: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bool mask as what is added to scores; made once where tiles or layers share it."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) with a learned logit [H] beside the keys of each head, which has no value (gpt-oss).

    To be applied once, after every merge; `backward` takes what this returns.
    """
    both = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    return out * (lse - both).exp()[..., None], both


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient [H] of the sink logits, from what `with_sinks` returned: -sum e^(sink - lse) delta."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


# --- torch's flash operator for CPUs


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v, width = _same_width(q, k, v)
    bias = _bias(mask, q)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    if bias is not None:
        zero = lse == 0  # what the operator says of a query that sees nothing, and hardly ever else
        if zero.any():
            lse = lse.masked_fill(zero & (bias == -torch.inf).all(-1), -torch.inf)
    return out[..., :width], lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    score_width = q.shape[-1]
    q, k, v, width = _same_width(q, k, v)
    wide = q.shape[-1] - width
    dout, out = (x.to(q.dtype) for x in (dout, out))
    dout, out = (F.pad(x, (0, wide)) if wide else _dense(x) for x in (dout, out))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out,
        lse.masked_fill(lse == -torch.inf, torch.inf),  # exp(s - inf) is 0, as it should be
        0.0, causal, attn_mask=_bias(mask, q), scale=scale,
    )  # fmt: skip
    return dq[..., :score_width], dk[..., :score_width], dv[..., :width]


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The operator wants heads of q, k and v equally wide: zeros change neither scores nor sums."""
    width, wide = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else _dense(x) for x in (q, k, v))  # fmt: skip
    return q, k, v, width


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores: 0 or -inf, [B or 1, H or 1, Sq, Sk]."""
    if mask is None:
        return None
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        mask = additive(mask, kind)
    mask = mask.to(kind)
    return mask.expand(*(1,) * (4 - mask.dim()), *mask.shape) if mask.dim() < 4 else mask


@cache
def flash_works() -> bool:
    """torch's private operator exists and does what this file needs of it, as tried here once."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v, dout = some(2, 4, 5, 8), some(2, 2, 6, 8), some(2, 2, 6, 8), some(2, 4, 5, 8)
    seen = torch.arange(6) <= torch.arange(5)[:, None]
    seen[2] = False
    mask = torch.stack((seen, seen.roll(1, 1)))[:, None]
    k2, v2 = some(2, 2, 3, 8), some(2, 2, 3, 8)
    try:
        for asked in ({"causal": True}, {"mask": mask}, {}):
            scale, causal, tile = 0.3, bool(asked.get("causal")), asked.get("mask")
            tile = tile if isinstance(tile, Tensor) else None
            found = _flash(q, k, v, scale, causal, tile)
            wanted = tiled.forward(q, k, v, scale=scale, causal=causal, mask=tile)
            whole = merge(*found, *_flash(q, k2, v2, scale, False, None))
            grads = _flash_backward(dout, q, k, v, *whole, scale, causal, tile)
            same = tiled.backward(dout, q, k, v, *whole, scale=scale, causal=causal, mask=tile)
            for one, other in zip((*found, *grads), (*wanted, *same)):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, AssertionError):
        return False
    return True
