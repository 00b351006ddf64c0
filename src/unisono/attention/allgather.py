"""All-gather: every rank gets all keys and values, then computes its queries against them at once.

What Llama 3 trains with (arXiv 2407.21783, section 3.3.2): one collective instead of P - 1 messages,
for any mask, but nothing hides behind compute, and a rank holds the keys and values of the
whole sequence while it works on a layer. They are not kept: the backward pass gathers them again, as
memory is what context parallelism is for. dK and dV go home in float32 by all-to-all and are added in
rank order.

Bytes that a rank sends, with n = B (S / P) Hkv (D + Dv) keys and values of its own and b bytes a value:
forward (P-1) n b, backward (P-1) n (b + 4).
"""

import torch

from unisono.attention.segments import Axis, Gradients, Output, Pairs, Spec, wide


def forward(q: torch.Tensor, own: Pairs, axis: Axis, spec: Spec) -> Output:
    """Collective: this rank's queries [B, Hq, n, D] against the keys of all ranks."""
    found = Output.empty(q, own.v)
    whole = _gathered(own, axis)
    found.add(q, whole, axis.own, [range(axis.placement.padded)], spec)
    return found


def backward(
    dout: torch.Tensor, q: torch.Tensor, own: Pairs, found: Output, axis: Axis, spec: Spec
) -> tuple[torch.Tensor, Pairs]:
    """Collective: gradients of this rank's queries and of its own keys and values, in float32.

    `found`: what `forward` returned.
    """
    size, placement = axis.size, axis.placement
    whole = _gathered(own, axis)
    total = Gradients(torch.zeros_like(q, dtype=wide(q)), whole.zeros())
    total.add(dout, q, whole, found, axis.own, [range(placement.padded)], spec)
    del whole
    sent = own.flat.new_empty(size, own.flat.numel(), dtype=wide(own.flat))
    for rank in range(size):
        places = [slice(s.start, s.stop) for s in placement.segments(rank)]
        sent[rank] = total.dkv.take(places).flat
    received = torch.empty_like(sent)
    axis.group.all_to_all(received, sent).wait()
    return total.dq, Pairs(received.sum(0), own.shape)


def _gathered(own: Pairs, axis: Axis) -> Pairs:
    """Collective: keys and values of the whole sequence, in its order."""
    rows = own.flat.new_empty(axis.size, own.flat.numel())
    axis.group.all_gather(rows, own.flat).wait()
    whole = own.empty(axis.placement.padded)
    k, v = whole.k, whole.v
    for rank, row in enumerate(rows):
        part, at = Pairs(row, own.shape), 0
        for s in axis.placement.segments(rank):
            k[:, :, s.start : s.stop] = part.k[:, :, at : at + len(s)]
            v[:, :, s.start : s.stop] = part.v[:, :, at : at + len(s)]
            at += len(s)
    return whole
