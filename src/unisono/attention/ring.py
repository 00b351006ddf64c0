"""Ring attention: keys and values go around the ranks, each visit hidden behind a block of attention.

In step t a rank holds the keys and values of the rank t before it, passes them to the next rank and
takes those of step t + 1 from the one before, while it computes (Liu 2023, arXiv 2310.01889). Backward
they go around again. With them go dK and dV in float32, one step behind: each rank adds its part and
passes the sum on, and the last one passes it home. A rank's part for its own keys never travels; half
of it is computed first, while the first keys come, and half last, while the gradients come home.

Bytes that a rank sends, for B sequences of S tokens over P ranks and b bytes a value, with
n = B (S / P) Hkv (D + Dv) keys and values: forward (P-1) n b, backward (P-1) n (b + 4). Gradients are
not rounded on the way. Memory besides a rank's own: one or two blocks of keys and values, and backward
three blocks of their gradients.
"""

import torch

from unisono.attention.segments import (
    Axis,
    Coming,
    Gradients,
    Output,
    Pairs,
    Segments,
    Spec,
    cut,
    pass_on,
    wide,
)


def forward(q: torch.Tensor, own: Pairs, axis: Axis, spec: Spec) -> Output:
    """Collective: this rank's queries [B, Hq, n, D] against the keys of all ranks."""
    found, held = Output.empty(q, own.v), own
    for step in range(axis.size):
        coming = pass_on(axis, held) if step + 1 < axis.size else None
        found.add(q, held, axis.own, axis.behind(step), spec)
        if coming is not None:
            held = coming.wait()
    return found


def backward(
    dout: torch.Tensor, q: torch.Tensor, own: Pairs, found: Output, axis: Axis, spec: Spec
) -> tuple[torch.Tensor, Pairs]:
    """Collective: gradients of this rank's queries and of its own keys and values, in float32.

    `found`: what `forward` returned.
    """
    total = Gradients(torch.zeros_like(q, dtype=wide(q)), own.zeros())
    middle = q.shape[2] // 2
    first, second = cut(axis.own, middle)

    def own_keys(part: slice, positions: Segments) -> None:
        # Keys are cut where queries are, so that what lies on the diagonal is a causal square.
        keys = (*first, *second)
        total.rows(part).add(
            dout[:, :, part], q[:, :, part], own, found.rows(part), positions, keys, spec
        )

    coming = pass_on(axis, own) if axis.size > 1 else None
    sums: Coming | None = None
    own_keys(slice(0, middle), first)
    for step in range(1, axis.size):
        assert coming is not None
        held = coming.wait()
        coming = pass_on(axis, held) if step + 1 < axis.size else None
        part = own.zeros()
        Gradients(total.dq, part).add(dout, q, held, found, axis.own, axis.behind(step), spec)
        if sums is not None:
            part.flat.add_(sums.wait().flat)
        sums = pass_on(axis, part)
    own_keys(slice(middle, None), second)
    if sums is not None:
        total.dkv.flat.add_(sums.wait().flat)
    return total.dq, total.dkv
