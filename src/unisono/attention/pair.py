"""Attention of one chunk of queries against one chunk of keys, wherever in the sequence they lie.

    forward(q, k, v, mask, q_start=, k_start=, scale=, softcap=) -> (out, lse)
    backward(dout, q, k, v, out, lse, mask, ...)                 -> (dq, dk, dv)

Layouts and meaning are the kernel's (kernel.py): lse is this pair's alone in forward, and in backward
out and lse are those of whole rows. q[:, :, 0] is global position `q_start`, k[:, :, 0] `k_start`. What
comes back is float32 at least, to be merged and added without losing bits.

The mask becomes a plan, once for all layers that share it. Documents and Llama 4's chunks are cut apart,
so that each is a problem of its own. What is left is cut into tiles on a grid of global positions, and
of the tiles that are not skipped three kinds of steps are made:

- a rectangle, for everything at once or a run of keys that consecutive tiles of queries see alike;
- a band, a batch of equal rectangles along a diagonal, which read overlapping keys in place: this is
  the folded sliding window, of cost O(S (W + tile));
- a gather: tiles of queries that see equally many scattered tiles of keys, which are copied together.

Results of steps on the same queries are merged; nothing is ever larger than a chunk of q or k, but
for the scores inside of the kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from unisono.attention import kernel
from unisono.attention.mask import CAUSAL, FULL, PARTIAL, SKIP, UNIQUE, Mask

Tensor = torch.Tensor

SMALL = 256
"""A pair of chunks up to this long is one tile: cutting would cost more than it spares."""
SHORT = 128
"""Documents that are shorter on average are not worth calls of their own: they are masked in tiles."""
LONG = 8
"""Full tiles in a run beyond which they are split from the partial ones, whose mask costs time."""
BATCH_TOKENS = 2048
"""Queries of a band or gather that are computed at once: it bounds what is copied."""


@dataclass(frozen=True)
class Step:
    """`num` tiles of `tile` queries, each against keys of its own. Positions are within the chunks."""

    row: int | None
    """Of the batch; None: all rows alike."""
    q0: int
    tile: int
    num: int
    """Consecutive tiles of queries from q0; of a gather, `len(queries)` that `queries` numbers."""
    k0: int
    length: int
    """Keys that each tile of queries sees from k0 on; the next tile's begin `tile` later."""
    causal: bool = False
    mask: Tensor | None = None
    queries: Tensor | None = None
    """Of a gather: [num] tiles of queries, counted from q0 ..."""
    keys: Tensor | None = None
    """... and [num, m] tiles of `tile` keys, counted from k0."""
    fresh: bool = False
    """The first to touch its queries."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    q_start: int = 0,
    k_start: int = 0,
    scale: float,
    softcap: float | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq]) of these keys alone.

    float32 or wider; `whole`: there are no other keys, so out may be of q's type if nothing was merged.
    """
    steps = plan(mask, q, k, q_start, k_start)
    run = partial(kernel.forward, scale=scale, softcap=softcap)
    q, k, v = _precise(steps, whole, q, k, v)
    kind = q.dtype if whole and all(s.fresh for s in steps) else wide(q)
    if (step := _whole(steps, q, k)) is not None:
        out, lse = run(q, k, v, causal=step.causal, mask=step.mask)
        return out.to(kind), lse
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=kind, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide(q), device=q.device)
    for step in steps:
        for some in _batches(step, q.shape[0]):
            tiles = run(*_read(some, q, k, v), causal=some.causal, mask=some.mask)
            if not some.fresh:
                tiles = kernel.merge(_queries(some, out), _queries(some, lse), *tiles)
            _write(some, out, tiles[0])
            _write(some, lse, tiles[1])
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    *,
    q_start: int = 0,
    k_start: int = 0,
    scale: float,
    softcap: float | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): the share of these keys, by out and lse of whole rows.

    float32 or wider; `whole`: there are no other keys, so what was not added up may be of q's type.
    """
    steps = plan(mask, q, k, q_start, k_start)
    run = partial(kernel.backward, scale=scale, softcap=softcap)
    kind = wide(q)
    q, k, v, dout, out = _precise(steps, whole, q, k, v, dout, out)
    if (step := _whole(steps, q, k)) is not None:
        dq, dk, dv = run(dout, q, k, v, out, lse, causal=step.causal, mask=step.mask)
        return (dq, dk, dv) if whole else (dq.to(kind), dk.to(kind), dv.to(kind))
    dq, dk, dv = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (q, k, v))
    for step in steps:
        for some in _batches(step, q.shape[0]):
            of_q, of_k, of_v = _read(some, q, k, v)
            tiles = run(
                _queries(some, dout), of_q, of_k, of_v, _queries(some, out), _queries(some, lse),
                causal=some.causal, mask=some.mask,
            )  # fmt: skip
            _write(some, dq, tiles[0] if some.fresh else _queries(some, dq) + tiles[0])
            _add_keys(some, dk, tiles[1])
            _add_keys(some, dv, tiles[2])
    return dq, dk, dv


def wide(x: Tensor) -> torch.dtype:
    """The type in which partial results of x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _precise(steps: list[Step], whole: bool, q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """On a CPU, half precision that will be merged is computed in float32: pieces that are rounded
    one by one had 1.25 to 1.37 times the error of one call of the kernel (2026-11-23). A GPU is several
    times faster in half precision, and keeps it."""
    one = whole and len(steps) == 1 and _whole(steps, q, others[0]) is not None
    if one or q.device.type != "cpu":
        return q, *others
    return tuple(x.to(wide(x)) for x in (q, *others))


# --- what a step reads and writes


def _whole(steps: list[Step], q: Tensor, k: Tensor) -> Step | None:
    """The only step, if it is of everything."""
    if len(steps) != 1:
        return None
    step = steps[0]
    whole = step.row is None and step.num == 1 and step.tile == q.shape[2]
    return step if whole and step.keys is None and step.length == k.shape[2] else None


def _batches(step: Step, rows: int) -> Iterator[Step]:
    """A step in pieces of bounded size: of one row of the batch each, unless it is one rectangle."""
    if step.num == 1 and step.keys is None:
        yield step
        return
    most = max(1, BATCH_TOKENS // step.tile)
    for row in range(rows) if step.row is None else (step.row,):
        for first in range(0, step.num, most):
            num = min(most, step.num - first)
            if step.queries is not None and step.keys is not None:
                part = slice(first, first + num)
                yield replace(
                    step, row=row, num=num, queries=step.queries[part], keys=step.keys[part]
                )
            else:
                move = first * step.tile
                yield replace(step, row=row, num=num, q0=step.q0 + move, k0=step.k0 + move)


def _queries(step: Step, x: Tensor) -> Tensor:
    """[num or rows, H, tile, ...] of x [B, H, Sq, ...]: a view, but for a gather."""
    if step.keys is None and step.num == 1:
        x = x if step.row is None else x[step.row : step.row + 1]
        return x[:, :, step.q0 : step.q0 + step.tile]
    tiles = _tiles(step, x, step.q0)
    return (tiles[:, : step.num] if step.queries is None else tiles.index_select(1, step.queries)).transpose(0, 1)  # fmt: skip


def _write(step: Step, x: Tensor, tiles: Tensor) -> None:
    if step.queries is None:
        _queries(step, x).copy_(tiles)
    else:
        _tiles(step, x, step.q0).index_copy_(1, step.queries, tiles.transpose(0, 1).to(x.dtype))


def _tiles(step: Step, x: Tensor, start: int) -> Tensor:
    """Whole tiles of one row from `start` on: a view [H, tiles, tile, ...]."""
    num = (x.shape[2] - start) // step.tile
    return x[step.row, :, start : start + num * step.tile].unflatten(1, (num, step.tile))


def _read(step: Step, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _queries(step, q), _keys(step, k), _keys(step, v)


def _keys(step: Step, x: Tensor) -> Tensor:
    """[num or rows, Hkv, length, D] of x [B, Hkv, Sk, D]: a view, but for a gather."""
    if step.keys is not None:
        tiles = _tiles(step, x, step.k0).index_select(1, step.keys.flatten())
        return tiles.unflatten(1, step.keys.shape).flatten(2, 3).transpose(0, 1)
    if step.num == 1:
        x = x if step.row is None else x[step.row : step.row + 1]
        return x[:, :, step.k0 : step.k0 + step.length]
    stop = step.k0 + (step.num - 1) * step.tile + step.length
    windows = x[step.row, :, step.k0 : stop].unfold(1, step.length, step.tile)
    return windows.permute(1, 0, 3, 2)


def _add_keys(step: Step, x: Tensor, tiles: Tensor) -> None:
    """Add gradients of what `_keys` gave. Where rectangles of a band overlap, both count."""
    if step.keys is not None:
        tiles = tiles.transpose(0, 1).unflatten(2, (-1, step.tile)).flatten(1, 2)
        _tiles(step, x, step.k0).index_add_(1, step.keys.flatten(), tiles.to(x.dtype))
    elif step.num == 1:
        _keys(step, x).add_(tiles)
    else:
        for start in range(0, step.length, step.tile):
            part = tiles[:, :, start : start + step.tile].transpose(0, 1)
            size = part.shape[2]  # the last one of a band may be shorter than a tile
            stop = step.k0 + start + (step.num - 1) * step.tile + size
            windows = x[step.row, :, step.k0 + start : stop].unfold(1, size, step.tile)
            windows.transpose(2, 3).add_(part)  # these do not overlap


# --- from a mask to steps


def plan(mask: Mask, q: Tensor, k: Tensor, q_start: int, k_start: int) -> list[Step]:
    """The steps of this pair, from the mask's memory if they were asked for before."""
    heads, rows = q.shape[1], mask.num_rows
    if rows > 1 and rows != q.shape[0]:
        raise ValueError(f"documents: found {rows} rows, but the batch has {q.shape[0]}")
    at = (q_start, q.shape[2], k_start, k.shape[2], heads, q.device)
    if at not in mask.plans:
        span = Span(q_start, q_start + q.shape[2], k_start, k_start + k.shape[2])
        steps = [_moved(s, q_start, k_start, q.device) for s in _steps(mask, span, heads)]
        mask.plans[at] = _freshness(steps, rows, q.shape[2])
    steps_: list[Step] = mask.plans[at]
    return steps_


@dataclass(frozen=True)
class Span:
    """Queries [q0, q1) against keys [k0, k1), global positions; of a row of the batch or of all."""

    q0: int
    q1: int
    k0: int
    k1: int
    row: int | None = None


def _steps(mask: Mask, span: Span, heads: int) -> Iterator[Step]:
    """Steps of a span, in global positions."""
    if span.q1 <= span.q0 or span.k1 <= span.k0:
        return
    if max(span.q1 - span.q0, span.k1 - span.k0) <= SMALL:
        kind, seen = mask.tile(*_ends(span), heads=heads, row=span.row)
        if kind != SKIP:
            yield _rectangle(span, kind == CAUSAL, None if seen is None else kernel.additive(seen))
    elif mask.documents is not None:
        alone = mask.num_rows > 1 and span.row is None
        for row in range(mask.num_rows) if alone else (span.row,):
            yield from _row_steps(mask, replace(span, row=row), heads)
    elif mask.chunk is not None:
        for cut in _chunks(span, mask.chunk, mask.origin):
            yield from _steps(replace(mask, chunk=None), cut, heads)
    elif mask.pattern is None and (kind := _kind(mask, span)) != PARTIAL:
        if kind != SKIP:
            yield _rectangle(span, kind == CAUSAL)
    else:
        yield from _tiled(mask, span, heads)


def _kind(mask: Mask, span: Span) -> int:
    return int(mask.classify(*(np.array([x]) for x in _ends(span)))[0][0, 0])


def _row_steps(mask: Mask, span: Span, heads: int) -> Iterator[Step]:
    """A row's documents, each by itself, or masked in tiles if they are short."""
    assert mask.documents is not None
    row = span.row or 0  # of a mask with one row that is all rows': None
    of_q = mask.documents.segments(row, span.q0, span.q1)
    of_k = {s: (a, b) for s, a, b in mask.documents.segments(row, span.k0, span.k1)}
    if (span.q1 - span.q0) < SHORT * len(of_q):
        yield from _tiled(mask, span, heads)
        return
    for start, a, b in of_q:
        if start in of_k:
            yield from _steps(mask.alone(start), Span(a, b, *of_k[start], span.row), heads)


def _chunks(span: Span, size: int, origin: int) -> Iterator[Span]:
    for c in range((span.q0 - origin) // size * size + origin, span.q1, size):
        q0, q1 = max(c, span.q0), min(c + size, span.q1)
        k0, k1 = max(c, span.k0), min(c + size, span.k1)
        if k0 < k1:
            yield Span(q0, q1, k0, k1, span.row)


def _rectangle(span: Span, causal: bool = False, mask: Tensor | None = None) -> Step:
    return Step(span.row, span.q0, span.q1 - span.q0, 1, span.k0, span.k1 - span.k0, causal, mask)


def _ends(span: Span) -> tuple[int, int, int, int]:
    return span.q0, span.q1, span.k0, span.k1


def tile_of(mask: Mask) -> int:
    """Tokens of a tile: the pattern's block; less than a window, so that little beyond it is computed."""
    if mask.pattern is not None and not mask.pattern.relative:
        block = mask.pattern.block
        return block * -(-64 // block)
    if mask.window is not None:
        return 128 if mask.window <= 1024 else 256
    return 256


@dataclass(frozen=True)
class Run:
    """Adjacent tiles of keys that a tile of queries sees: [k0, k1), all of it if `full`."""

    q0: int
    q1: int
    k0: int
    k1: int
    full: bool
    keys: tuple[int, ...]
    """Of its tiles' masks; UNIQUE ones have no equal."""


def _tiled(mask: Mask, span: Span, heads: int) -> Iterator[Step]:
    """Steps of a span that is cut into tiles."""
    tile = tile_of(mask)
    runs = [r for row in _rows_of_tiles(mask, span, tile, heads) for r in row]
    bands: dict[tuple[int, ...], list[Run]] = {}
    for number, run in enumerate(r for r in runs if not r.full):
        bands.setdefault(_diagonal(run, number, tile), []).append(run)
    for alike in bands.values():
        for some in _adjacent(alike):
            a, num = some[0], len(some)
            seen = mask.spell(a.q0, a.q1, a.k0, a.k1, heads=heads, row=span.row)
            seen_or_bias = _bias(seen, shared=num > 1)
            yield Step(span.row, a.q0, a.q1 - a.q0, num, a.k0, a.k1 - a.k0, mask=seen_or_bias)
    yield from _full_steps([r for r in runs if r.full], span, tile)


def _diagonal(run: Run, number: int, tile: int) -> tuple[int, ...]:
    """Equal for runs that form a band: the same shape at the same distance, with the same masks."""
    if UNIQUE in run.keys or run.q1 - run.q0 != tile:
        return (number,)
    return (-1, run.k0 - run.q0, run.k1 - run.k0, *run.keys)


def _bias(seen: Tensor, shared: bool) -> Tensor | None:
    """What is all visible needs no mask; one that many tiles share is made additive."""
    if seen.all():
        return None
    return kernel.additive(seen) if shared else seen


def _full_steps(runs: list[Run], span: Span, tile: int) -> Iterator[Step]:
    """Runs without a mask: what neighbours see alike is a rectangle, what is long is a band, and the
    rest is gathered by the number of tiles."""
    alike: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.k0, run.k1), []).append(run)
    left: list[Run] = []
    for (k0, k1), same in alike.items():
        for some in _adjacent(same):
            ragged = (k1 - k0) % tile or k0 % tile or any(r.q1 - r.q0 != tile for r in some)
            if ragged or len(some) > LONG:
                yield _rectangle(Span(some[0].q0, some[-1].q1, k0, k1, span.row))
            else:
                left += some
    bands: dict[tuple[int, int], list[Run]] = {}
    tiles: dict[int, list[int]] = {}
    for run in sorted(left, key=lambda r: (r.q0, r.k0)):
        if run.k1 - run.k0 > LONG * tile:
            bands.setdefault((run.k0 - run.q0, run.k1 - run.k0), []).append(run)
        else:
            tiles.setdefault(run.q0, []).extend(range(run.k0, run.k1, tile))
    for (_, length), same in bands.items():
        for some in _adjacent(same):
            yield Step(span.row, some[0].q0, tile, len(some), some[0].k0, length)
    by_count: dict[int, list[int]] = {}
    for q0 in sorted(tiles):
        by_count.setdefault(len(tiles[q0]), []).append(q0)
    q0, k0 = -(-span.q0 // tile) * tile, -(-span.k0 // tile) * tile
    for count, starts in by_count.items():
        queries = (torch.tensor(starts) - q0) // tile
        keys = (torch.tensor([tiles[s] for s in starts]) - k0) // tile
        yield Step(
            span.row, q0, tile, len(starts), k0, count * tile, queries=queries, keys=keys
        )  # fmt: skip


def _adjacent(runs: list[Run]) -> Iterator[list[Run]]:
    some: list[Run] = []
    for run in runs:
        if some and run.q0 != some[-1].q1:
            yield some
            some = []
        some.append(run)
    yield some


def _rows_of_tiles(mask: Mask, span: Span, tile: int, heads: int) -> Iterator[list[Run]]:
    """For each tile of queries its runs of keys, of a grid that begins at position 0."""
    q_edges = np.unique([span.q0, *range(-(-span.q0 // tile) * tile, span.q1, tile), span.q1])
    cuts = [span.k0, *range(-(-span.k0 // tile) * tile, span.k1, tile), span.k1]
    for count in (mask.sinks, mask.prefix):  # so that what all see is a rectangle of its own
        edge = mask.origin + count
        if count and mask.documents is None and span.k0 < edge < span.k1:
            cuts.append(edge)
    k_edges = np.unique(cuts)
    q0, q1, all_k0, all_k1 = q_edges[:-1], q_edges[1:], k_edges[:-1], k_edges[1:]
    strip = 64  # rows of tiles at once, so that what is known of tiles stays small
    for first in range(0, len(q0), strip):
        part = slice(first, first + strip)
        near = _within_reach(mask, int(q0[first]), int(q1[part][-1]), all_k0, all_k1)
        k0, k1 = all_k0[near], all_k1[near]
        kinds, keys = mask.classify(q0[part], q1[part], k0, k1, row=span.row or 0)
        for i in range(len(kinds)):
            a, b = int(q0[first + i]), int(q1[first + i])
            kind, key = kinds[i], keys[i]
            if (
                mask.pattern is not None
                and mask.pattern.visible is not None
                and not mask.pattern.relative
            ):
                kind = kind.copy()
                for j in np.flatnonzero(kind == PARTIAL):
                    kind[j], _ = mask.tile(a, b, int(k0[j]), int(k1[j]), heads=heads, row=span.row)
            # What is full of a scattered pattern is gathered, so that only what is partial forms bands.
            long = LONG if mask.pattern is None else 0
            yield list(_runs(a, b, k0, k1, kind, key, long))


def _within_reach(mask: Mask, q0: int, q1: int, k0: np.ndarray, k1: np.ndarray) -> np.ndarray:
    """Tiles of keys that queries [q0, q1) may see by their order and window: few of very many."""
    near = k0 < q1 if mask.causal else np.ones(len(k0), dtype=bool)
    if mask.window is not None and (mask.documents is None or not mask.sinks):
        near &= (k1 > q0 - mask.window + 1) | (k0 < mask.origin + mask.sinks)
    if mask.prefix:
        near |= k0 < mask.origin + mask.prefix if mask.documents is None else True
    return near


def _runs(
    q0: int,
    q1: int,
    k0: np.ndarray,
    k1: np.ndarray,
    kinds: np.ndarray,
    keys: np.ndarray,
    long: int,
) -> Iterator[Run]:
    """Maximal runs of tiles that are not skipped; more than `long` full ones stand alone."""
    seen = np.flatnonzero(kinds != SKIP)
    if not len(seen):
        return
    for piece in np.split(seen, np.flatnonzero(k0[seen[1:]] > k1[seen[:-1]]) + 1):
        full = kinds[piece] == FULL
        if full.all():
            yield Run(q0, q1, int(k0[piece[0]]), int(k1[piece[-1]]), True, ())
            continue
        cuts = np.flatnonzero(np.diff(full)) + 1
        joined: list[list[int]] = []
        for part in (p.tolist() for p in np.split(piece, cuts)):
            if joined and not (
                _long_full(kinds, part, long) or _long_full(kinds, joined[-1], long)
            ):
                joined[-1].extend(part)
            else:
                joined.append(part)
        for part in joined:
            whole = bool((kinds[part] == FULL).all())
            marks = tuple(int(x) for x in np.where(kinds[part] == FULL, -(10**9), keys[part]))
            yield Run(q0, q1, int(k0[part[0]]), int(k1[part[-1]]), whole, () if whole else marks)


def _long_full(kinds: np.ndarray, part: list[int], long: int) -> bool:
    return len(part) > long and bool((kinds[part] == FULL).all())


# --- steps made ready


def _moved(step: Step, q_start: int, k_start: int, device: torch.device) -> Step:
    """In positions within the chunks, and with its tensors on the device."""
    mask, queries, keys = (
        None if x is None else x.to(device) for x in (step.mask, step.queries, step.keys)
    )
    q0, k0 = step.q0 - q_start, step.k0 - k_start
    return replace(step, q0=q0, k0=k0, mask=mask, queries=queries, keys=keys)


def _freshness(steps: list[Step], rows: int, length: int) -> list[Step]:
    """Marks the steps whose queries no earlier step has touched."""
    touched = np.zeros((rows, length), dtype=bool)
    marked = []
    for step in steps:
        row = slice(None) if step.row is None else step.row
        if step.queries is None:
            spans = [(step.q0, step.q0 + step.num * step.tile)]
        else:
            starts = (step.q0 + step.queries * step.tile).tolist()
            spans = [(s, s + step.tile) for s in starts]
        fresh = not any(touched[row, a:b].any() for a, b in spans)
        for a, b in spans:
            touched[row, a:b] = True
        marked.append(replace(step, fresh=fresh))
    return marked
