"""Attention of one layer whose sequence lies over the ranks of the `context` axis.

Contract: `attention` takes this rank's tokens [B, H, n, D], placed as `Context.placement` says, and a mask
over positions of the whole sequence; it returns what one device would for the same tokens, within
float32 rounding of sums. Every rank of the axis calls it for every layer in the same order, forward and
backward; recomputation under gradient checkpointing repeats it alike. Gradients of weights are this
rank's tokens' share: the caller adds them over the axis, as over replicas.

ring.py, halo.py and allgather.py are three ways for keys to reach queries, ulysses.py trades tokens for
heads around any of them, schemes.py chooses. All bytes pass through the ledger.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from unisono.attention import allgather, halo, ring
from unisono.attention.kernel import sinks_gradient, with_sinks
from unisono.attention.local import attend
from unisono.attention.mask import Documents, Mask
from unisono.attention.schemes import Choice, Layer, Scheme, Speeds, choose
from unisono.attention.segments import Axis, Output, Pairs, Spec
from unisono.attention.shard import Placement
from unisono.attention.ulysses import ToHeads, ToTokens, places, repeats
from unisono.errors import ConfigError
from unisono.sync.ledger import Group


@dataclass(frozen=True, eq=False)
class Context:
    """What attention must know of the context axis. A value: a new one for each batch's documents."""

    group: Group
    """The ranks that hold a sequence together."""
    placement: Placement
    scheme: Scheme | Literal["auto"] = "auto"
    speeds: Speeds | None = None
    """For `auto`: the same on every rank (schemes.measure_speeds)."""
    inner: Group | None = None
    """For usp: U neighbours of `group`, ranks k U to (k+1) U - 1 of it."""
    outer: Group | None = None
    """For usp: every U-th rank of `group`."""
    documents: Documents | None = None
    """Of the whole sequences of this batch, [B, padded]."""

    def choice(self, layer: Layer) -> Choice:
        """How a layer is computed, and why; the same on every rank.

        Raises ConfigError where the scheme that was asked for cannot do it.
        """
        inner = self.inner.size if self.inner is not None else None
        if self.scheme == "auto":
            return choose(layer, self.placement, self.speeds or _GUESSED, inner)
        if self.scheme == "usp" and inner is None:
            raise ConfigError(
                "context.scheme: found usp without context.ulysses; write context.ulysses: 2"
            )
        ranks = self.placement.size if self.scheme == "ulysses" else inner
        if self.scheme in ("ulysses", "usp"):
            repeats(layer.heads, layer.kv_heads, ranks or 1)
            if layer.mask.pattern is not None and layer.mask.pattern.by_head:
                raise ConfigError(
                    f"context.scheme: found {self.scheme}, but pattern {layer.mask.pattern.name} "
                    f"differs by head; write ring"
                )
        return Choice(self.scheme, "as asked", {})


_GUESSED = Speeds(latency_s=1e-4, bytes_per_s=1e9, flops_per_s=5e10)
"""Of a CPU on loopback; the choice between window and full layers does not depend on it."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    context: Context,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Collective: this rank's output [B, Hq, n, Dv]; q [B, Hq, n, D], k [B, Hkv, n, D], v [.., Dv].

    n is `context.placement.held`; `sinks`: a learned logit [Hq] beside the keys (gpt-oss). Raises
    ConfigError where the scheme cannot do it, LostReplicas when a peer is gone.
    """
    placement, group = context.placement, context.group
    assert group.size == placement.size, (group.size, placement.size)
    assert q.shape[2] == k.shape[2] == placement.held, (q.shape, k.shape, placement)
    if placement.size == 1:
        return attend(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    spec = Spec(mask, scale, softcap)
    scheme = context.choice(Layer.of(q, k, v, mask)).scheme
    if scheme not in ("ulysses", "usp"):
        return _Across.apply(q, k, v, sinks, scheme, Axis(group, placement), spec)

    inner, outer = (group, None) if scheme == "ulysses" else (context.inner, context.outer)
    assert inner is not None
    ring_rank = group.rank // inner.size
    together = Placement(placement.padded, placement.size // inner.size, placement.zigzag)
    at = places(placement, together, ring_rank)
    repeat = repeats(q.shape[1], k.shape[1], inner.size)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if sinks is not None:
        sinks = sinks.view(inner.size, -1)[inner.rank]
    q, k, v = ToHeads.apply(inner, at, q, k, v)
    if together.size == 1:
        out = attend(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    else:
        assert outer is not None
        out = _Across.apply(q, k, v, sinks, "ring", Axis(outer, together), spec)
    return ToTokens.apply(inner, at, out)[0]


class _Across(torch.autograd.Function):
    """Collective, forward and backward: ring, halo or all-gather, with sinks around it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        scheme: Scheme,
        axis: Axis,
        spec: Spec,
    ) -> torch.Tensor:
        own, came = Pairs.of(k, v), list[Pairs]()
        if scheme == "halo":
            found, came = halo.forward(q, own, axis, spec)
        else:
            found = (ring if scheme == "ring" else allgather).forward(q, own, axis, spec)
        out, lse = found.out, found.lse
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own.flat, out, lse, sinks, *(x.flat for x in came))
        ctx.own, ctx.came = own.shape, [x.shape for x in came]
        ctx.scheme, ctx.axis, ctx.spec = scheme, axis, spec
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, flat, out, lse, sinks, *flats = ctx.saved_tensors
        own, axis, spec, found = Pairs(flat, ctx.own), ctx.axis, ctx.spec, Output(out, lse)
        if ctx.scheme == "halo":
            came = [Pairs(x, shape) for x, shape in zip(flats, ctx.came)]
            dq, dkv = halo.backward(dout, q, own, came, found, axis, spec)
        else:
            way = ring if ctx.scheme == "ring" else allgather
            dq, dkv = way.backward(dout, q, own, found, axis, spec)
        dsinks = None if sinks is None else sinks_gradient(dout, out, lse, sinks)
        return dq.to(q.dtype), dkv.k.to(flat.dtype), dkv.v.to(flat.dtype), dsinks, None, None, None
