"""Halo exchange: only keys that some query of another rank may see travel, straight to that rank.

For window layers these are the W - 1 tokens before each of a rank's two chunks, and sink tokens; for
packed documents the part of a document that lies before a chunk. `seen` tells from the mask which keys
a range of queries may see, so every rank knows what every other one needs without asking. The exchange
hides behind the attention of a rank's own keys; backward, gradients for the keys of others are computed
first, in float32, and go home behind the rest.

Bytes that a rank sends for window W on zigzag shards, W - 1 <= S / 2P, b bytes a value, B sequences:
t B (W-1) Hkv (D + Dv) b forward and the same with 4 for b backward; t is the number of its chunks that
have a successor elsewhere: 2, or 1 on the first and the last rank. Independent of S and P. Memory
besides a rank's own: the keys received, which are kept for the backward pass.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from unisono.attention.mask import Mask
from unisono.attention.segments import (
    Axis,
    Gradients,
    Output,
    Pairs,
    Segments,
    Spec,
    pass_on,
    where,
    wide,
)
from unisono.attention.shard import Placement


def forward(q: torch.Tensor, own: Pairs, axis: Axis, spec: Spec) -> tuple[Output, list[Pairs]]:
    """Collective: this rank's queries [B, Hq, n, D] against all keys; and the keys that came."""
    coming = []
    for by in range(1, axis.size):
        given, taken = _exchange(spec.mask, axis, by)
        coming.append(pass_on(axis, own.take(where(axis.own, given)), by, sum(map(len, taken))))
    found = Output.empty(q, own.v)
    found.add(q, own, axis.own, axis.own, spec)
    came = [c.wait() for c in coming]
    for by, keys in enumerate(came, 1):
        found.add(q, keys, axis.own, _exchange(spec.mask, axis, by)[1], spec)
    return found, came


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    own: Pairs,
    came: Sequence[Pairs],
    found: Output,
    axis: Axis,
    spec: Spec,
) -> tuple[torch.Tensor, Pairs]:
    """Collective: gradients of this rank's queries and of its own keys and values, in float32.

    `came`, `found`: what `forward` returned.
    """
    total = Gradients(torch.zeros_like(q, dtype=wide(q)), own.zeros())
    homing = []
    for by, keys in enumerate(came, 1):
        given, taken = _exchange(spec.mask, axis, by)
        part = keys.zeros()
        Gradients(total.dq, part).add(dout, q, keys, found, axis.own, taken, spec)
        coming = pass_on(axis, part, -by, sum(map(len, given)))
        homing.append((where(axis.own, given), coming))
    total.add(dout, q, own, found, axis.own, axis.own, spec)
    for places, coming in homing:
        total.dkv.put(places, coming.wait())
    return total.dq, total.dkv


def _exchange(mask: Mask, axis: Axis, by: int) -> tuple[Segments, Segments]:
    """What this rank gives to the one `by` places on, and takes from the one as far behind."""
    rank, size = axis.rank, axis.size
    given = needed(mask, axis.placement, (rank + by) % size, rank)
    return given, needed(mask, axis.placement, rank, (rank - by) % size)


def needed(mask: Mask, placement: Placement, reader: int, owner: int) -> tuple[range, ...]:
    """Positions of `owner`'s keys that some query of `reader` may see: ascending, disjoint.

    Asked for by every layer, forward and backward, so it is remembered with the mask, like its plans.
    """
    key = ("needed", placement, reader, owner)
    if key not in mask.plans:
        rows = placement.segments(reader)
        spans = _union(x for part in rows for x in seen(mask, part, placement.padded))
        mask.plans[key] = tuple(_common(spans, placement.segments(owner)))
    found: tuple[range, ...] = mask.plans[key]
    return found


def elsewhere(mask: Mask, placement: Placement) -> tuple[int, int]:
    """Keys of others that a rank needs, and its own that others need: on the rank with most of each."""
    ranks = range(placement.size)
    table = [
        [sum(map(len, needed(mask, placement, r, o))) if r != o else 0 for o in ranks]
        for r in ranks
    ]
    return max(map(sum, table)), max(map(sum, zip(*table)))


def seen(mask: Mask, rows: range, length: int) -> list[range]:
    """Ranges that hold all keys that queries at `rows` may see, of [0, length); they may overlap.

    O(1), with a pattern O(blocks of queries x blocks of keys). With the documents of several rows of
    a batch, what any of them sees.
    """
    first, last = rows.start, rows.stop - 1
    found = []
    for begin, begin_last, end in _documents(mask, first, last, length):
        low, high = begin, rows.stop if mask.causal else end
        if mask.chunk is not None:  # chunks are counted in their document
            begin += (first - begin) // mask.chunk * mask.chunk
            end = min(end, begin_last + ((last - begin_last) // mask.chunk + 1) * mask.chunk)
        spans = [(low, high)]
        if mask.window is not None:
            spans = [(first - mask.window + 1, high), (low, min(low + mask.sinks, high))]
        spans += [(b, b + mask.prefix) for b in (low, begin_last)]
        found += _common([range(a, b) for a, b in spans], [range(begin, end)])
    if mask.pattern is None or mask.pattern.blocks is None:
        return found
    size = mask.pattern.block
    blocks = np.arange(first // size, last // size + 1), np.arange(-(-length // size))
    some = mask.pattern.blocks(blocks[0][:, None], blocks[1][None, :]).any(axis=0)
    edges = np.flatnonzero(np.diff(some, prepend=False, append=False)) * size
    return _common(found, [range(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])])


def _documents(mask: Mask, first: int, last: int, length: int) -> set[tuple[int, int, int]]:
    """By rows of the batch: where the documents of `first` and of `last` begin, and where that ends."""
    if mask.documents is None:
        return {(mask.origin, mask.origin, length)}
    return {
        (int(row[first]), int(row[last]), int(np.searchsorted(row, row[last], side="right")))
        for row in mask.documents.starts
    }


def _common(some: Iterable[range], others: Sequence[range]) -> list[range]:
    """What lies in a range of both."""
    both = (range(max(a.start, b.start), min(a.stop, b.stop)) for a in some for b in others)
    return [x for x in both if x]


def _union(spans: Iterable[range]) -> list[range]:
    """The same positions, each once, ascending."""
    merged: list[range] = []
    for s in sorted(spans, key=lambda s: s.start):
        if merged and s.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, s.stop))
        else:
            merged.append(s)
    return merged
