"""The definition: attention in float64 by whole matrices, and masks by a loop over pairs."""

from collections.abc import Sequence

import torch

from unisono.attention.mask import Mask

SCALE = 0.25


def visible(mask: Mask, i: int, j: int, starts: Sequence[int] | None = None) -> bool:
    """Whether query i sees key j, word by word as mask.py says; patterns aside."""
    of_i, of_j = (starts[i], starts[j]) if starts is not None else (mask.origin, mask.origin)
    if of_i != of_j:
        return False
    if mask.chunk and (i - of_i) // mask.chunk != (j - of_j) // mask.chunk:
        return False
    if j - of_j < mask.prefix:
        return True
    if mask.causal and j > i:
        return False
    return mask.window is None or i - mask.window < j or j - of_j < mask.sinks


def attention(q, k, v, seen, *, scale=SCALE, softcap=None, sinks=None):
    """(out, lse) in float64, differentiable."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[None, :, None])
    p = (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return p @ v.repeat_interleave(group, 1), lse


def gradients(dout, leaves, seen, **how):
    """[out, lse, one gradient for each leaf (q, k, v and perhaps sinks)]."""
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    sinks = leaves[3] if len(leaves) > 3 else None
    out, lse = attention(*leaves[:3], seen, sinks=sinks, **how)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(rows=2, heads=4, kv_heads=2, length=64, keys=None, width=16, v_width=None, seed=0):
    """q, k, v and an upstream gradient, unit normal."""
    keys = keys or length
    return (
        some(rows, heads, length, width, seed=seed),
        some(rows, kv_heads, keys, width, seed=seed + 1),
        some(rows, kv_heads, keys, v_width or width, seed=seed + 2),
        some(rows, heads, length, v_width or width, seed=seed + 3),
    )


def worst(found, wanted) -> float:
    """Largest difference where both are finite; infinite if they are not in the same places."""
    found, wanted = found.double(), wanted.double()
    finite = found.isfinite()
    if not torch.equal(finite, wanted.isfinite()):
        return float("inf")
    return float((found - wanted)[finite].abs().max()) if finite.any() else 0.0
