"""Masks as a description: which query position sees which key position. Never an S x S tensor.

Position i (query) sees position j (key) of the same batch row where all of these hold:

- documents: i and j lie in the same document;
- chunk C:   both in one chunk of C tokens (Llama 4), counted in the document;
- pattern:   a block pattern says so (pattern.py);
- and one of: j <= i, without `causal` always, and (window W) i - W < j, or j is one of the first
  `sinks` tokens of its document; or j is one of the first `prefix` tokens of its document.

Positions are *global*, counted from the start of the row, so that any chunk of queries can be asked
against any chunk of keys, on whichever rank they lie. Sinks, prefix and chunks are counted in the
document (without documents: from `origin`), so that a packed document is masked as if it were alone.

Cost: `classify` takes O(1) a tile by interval arithmetic; only a tile that is partial is ever
spelled out, as booleans of its own size.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from unisono.attention.pattern import Pattern

SKIP, FULL, CAUSAL, PARTIAL = range(4)
"""What a tile is: nothing visible; everything; j <= i with both ranges the same; anything else."""
UNIQUE = -1
"""Key of a partial tile whose mask no other tile shares."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Packed documents: `starts[b, i]` is the position at which the document of token i begins."""

    starts: np.ndarray

    @staticmethod
    def of_ids(ids: torch.Tensor) -> "Documents | None":
        """From ids [B, S]: a document is a run of equal ids. None where every row is one document."""
        return Documents._of_breaks(ids[:, 1:] != ids[:, :-1])

    @staticmethod
    def of_positions(position_ids: torch.Tensor) -> "Documents | None":
        """From position ids [B, S]: a document ends where they do not go on by one."""
        return Documents._of_breaks(position_ids[:, 1:] != position_ids[:, :-1] + 1)

    @staticmethod
    def _of_breaks(breaks: torch.Tensor) -> "Documents | None":
        if not bool(breaks.any()):
            return None
        new = np.pad(breaks.cpu().numpy(), ((0, 0), (1, 0)))
        where = np.where(new, np.arange(new.shape[1], dtype=np.int32), np.int32(0))
        return Documents(np.maximum.accumulate(where, axis=1))

    def cut(self, other: "Documents") -> "Documents":
        """Documents that end where those of either end."""
        return Documents(np.maximum(self.starts, other.starts))

    def segments(self, row: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(document's start, from, to) of each document that has tokens in [start, stop) of a row."""
        starts = self.starts[row, start:stop]
        cuts = np.flatnonzero(np.diff(starts)) + 1
        edges = [0, *cuts.tolist(), len(starts)]
        return [(int(starts[a]), start + a, start + b) for a, b in pairwise(edges)]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which query sees which key; see the module's text. Raises ValueError: contradicting fields."""

    causal: bool = True
    window: int | None = None
    """A query sees itself and the window - 1 keys before it."""
    sinks: int = 0
    """First tokens that stay visible beyond the window."""
    chunk: int | None = None
    prefix: int = 0
    """First tokens that everyone sees, whatever the order."""
    pattern: Pattern | None = None
    documents: Documents | None = None
    origin: int = 0
    """Where the only document begins, for sinks, prefix and chunk; unused with `documents`."""
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What was worked out of this mask once, for all layers that share it (pair.py)."""

    def __post_init__(self) -> None:
        for name in ("window", "chunk"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: found {size}; write at least 1")
        if self.sinks < 0 or self.prefix < 0:
            raise ValueError("sinks and prefix: write at least 0")
        if not self.causal and (self.window or self.prefix):
            raise ValueError("window and prefix need causal=True")

    @property
    def is_causal_only(self) -> bool:
        """Nothing but j <= i."""
        return self.causal and not (
            self.window or self.chunk or self.prefix or self.pattern or self.documents
        )

    @property
    def is_full(self) -> bool:
        """Everything sees everything."""
        return not (self.causal or self.chunk or self.pattern or self.documents)

    def alone(self, start: int) -> "Mask":
        """The mask within the document that begins at `start`."""
        return replace(self, documents=None, origin=start)

    # --- tiles

    def tile(
        self, q0: int, q1: int, k0: int, k1: int, *, heads: int = 1, row: int | None = None
    ) -> tuple[int, torch.Tensor | None]:
        """(kind, mask) of queries [q0, q1) against keys [k0, k1).

        `row` None asks for all rows of the batch at once. The mask, of a PARTIAL tile only, is bool
        [B or 1, heads or 1, q1 - q0, k1 - k0]: True is visible.
        """
        if row is not None or self.num_rows == 1:
            spans = (np.array([x]) for x in (q0, q1, k0, k1))
            kind = int(self.classify(*spans, row=row or 0)[0][0, 0])
            if kind != PARTIAL:
                return kind, None
        seen = self.spell(q0, q1, k0, k1, heads=heads, row=row)
        if not seen.any():
            return SKIP, None
        return (FULL, None) if seen.all() else (PARTIAL, seen)

    @property
    def num_rows(self) -> int:
        """Rows of the batch that the mask tells apart: 1 if all are alike."""
        return 1 if self.documents is None else len(self.documents.starts)

    def spell(
        self, q0: int, q1: int, k0: int, k1: int, *, heads: int = 1, row: int | None = None
    ) -> torch.Tensor:
        """Every pair of a tile: bool [B or 1, heads or 1, q1 - q0, k1 - k0], True is visible."""
        of_q: int | torch.Tensor = self.origin
        of_k: int | torch.Tensor = self.origin
        if self.documents is not None:
            starts = self.documents.starts[slice(None) if row is None else slice(row, row + 1)]
            of_q = torch.from_numpy(starts[:, q0:q1])[:, None, :, None]
            of_k = torch.from_numpy(starts[:, k0:k1])[:, None, None, :]
        i, j = torch.arange(q0, q1)[:, None], torch.arange(k0, k1)
        seen = self._seen(i, j, of_q, of_k, heads)
        seen = seen.expand(*torch.broadcast_shapes(seen.shape, (len(i), len(j))))
        return seen.expand(*(1,) * (4 - seen.dim()), *seen.shape) if seen.dim() < 4 else seen

    def sees(self, row: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether query i sees key j, pair by pair: bool [N] of three LongTensors [N]."""
        of_q: int | torch.Tensor = self.origin
        of_k: int | torch.Tensor = self.origin
        if self.documents is not None:
            starts = torch.from_numpy(self.documents.starts)
            row = row if self.num_rows > 1 else torch.zeros_like(row)
            of_q, of_k = starts[row, i], starts[row, j]
        return self._seen(i, j, of_q, of_k, 1).expand(len(i))

    def _seen(
        self,
        i: torch.Tensor,
        j: torch.Tensor,
        of_q: int | torch.Tensor,
        of_k: int | torch.Tensor,
        heads: int,
    ) -> torch.Tensor:
        """The rule itself, of positions and the starts of their documents, which all broadcast."""
        offset = j - of_k
        seen = i >= j if self.causal else torch.ones((), dtype=torch.bool)
        if self.window is not None:
            near = i - j < self.window
            seen = seen & (near | (offset < self.sinks) if self.sinks else near)
        if self.prefix:
            seen = seen | (offset < self.prefix)
        if self.chunk is not None:
            seen = seen & ((i - of_q) // self.chunk == offset // self.chunk)
        if isinstance(of_q, torch.Tensor):
            seen = seen & (of_q == of_k)
        if self.pattern is not None:
            seen = seen & self._seen_by_pattern(self.pattern, i, j, heads)
        return seen

    @staticmethod
    def _seen_by_pattern(
        pattern: Pattern, i: torch.Tensor, j: torch.Tensor, heads: int
    ) -> torch.Tensor:
        seen = torch.ones((), dtype=torch.bool)
        if pattern.blocks is not None:
            near = pattern.blocks((i // pattern.block).numpy(), (j // pattern.block).numpy())
            seen = torch.from_numpy(np.asarray(near))
        if pattern.visible is not None:
            head = torch.arange(heads)[:, None, None] if pattern.by_head else torch.zeros_like(j)
            seen = seen & pattern.visible(i, j, head)
        return seen

    # --- many tiles at once, by interval arithmetic

    def classify(
        self, q0: np.ndarray, q1: np.ndarray, k0: np.ndarray, k1: np.ndarray, *, row: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(kind, key), int [nq, nk], of query ranges [q0, q1) against key ranges [k0, k1).

        PARTIAL is said where it cannot be known quickly that nothing or everything is visible.
        Partial tiles of one shape with the same key other than UNIQUE have the same mask.
        """
        a, b = q0[:, None].astype(np.int64), q1[:, None].astype(np.int64) - 1  # first and last
        c, d = k0[None, :].astype(np.int64), k1[None, :].astype(np.int64) - 1
        nothing, everything = np.False_, np.True_
        begin, low, high, apart, together = self._documents(q0, q1, k0, k1, row)
        past = Known(a >= d, b < c) if self.causal else Known(everything, nothing)
        near = Known(everything, nothing)
        if self.window is not None:
            near = Known(b - c < self.window, a - d >= self.window)
        first = Known(high < self.sinks, low >= self.sinks)
        prefix = Known(high < self.prefix, low >= self.prefix)
        chunk = Known(everything, nothing)
        if (size := self.chunk) is not None:
            w, x, y, z = ((p - begin) // size for p in (a, b, c, d))
            chunk = Known(together & (w == x) & (y == z) & (w == y), together & ((x < y) | (z < w)))
        documents = Known(together, apart)
        pattern = self._pattern(a, b, c, d)
        fixed = chunk & documents & pattern
        seen = ((past & (near | first)) | prefix) & fixed
        kind = np.select([seen.none, seen.all], [SKIP, FULL], PARTIAL) + np.zeros_like(a - c)
        square = (a == c) & (b == d) & self.causal
        only_causal = ((near | first).all) & prefix.none & fixed.all
        kind = np.where((kind == PARTIAL) & square & only_causal, CAUSAL, kind)
        relative = fixed
        if self.pattern is not None and self.pattern.relative:
            relative = chunk & documents
        shared = relative.known & first.known & prefix.known
        key = np.where(shared, ((a - c) * 2 + first.all) * 2 + prefix.all, UNIQUE)
        # Negative differences would collide with UNIQUE.
        key = np.where(shared & (key < 0), key - 1, key)
        return kind.astype(np.int8), np.broadcast_to(key, kind.shape)

    def _documents(
        self, q0: np.ndarray, q1: np.ndarray, k0: np.ndarray, k1: np.ndarray, row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(first query's document, least and largest offset of a key in its own, surely in other
        documents, surely in one)."""
        if self.documents is None:
            none = np.zeros((1, 1), dtype=bool)
            begin = np.full((1, 1), self.origin)
            return begin, k0[None, :] - self.origin, k1[None, :] - 1 - self.origin, none, ~none
        starts = self.documents.starts[row]
        q_first, q_last = starts[q0][:, None], starts[q1 - 1][:, None]
        k_first, k_last = starts[k0][None, :], starts[k1 - 1][None, :]
        one = k_first == k_last
        low = np.where(one, k0[None, :] - k_first, 0)
        high = np.where(one, k1[None, :] - 1 - k_first, np.iinfo(np.int32).max)
        apart = (q_last < k_first) | (k_last < q_first)
        return q_first, low, high, apart, one & (q_first == q_last) & (q_first == k_first)

    def _pattern(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> "Known":
        """What a block pattern says of tiles, from the blocks that they touch."""
        true, false = np.True_, np.False_
        if self.pattern is None:
            return Known(true, false)
        if (rule := self.pattern.blocks) is None:
            return Known(false, false)
        size = self.pattern.block
        qs, ks = a // size, c // size
        some = every = None
        for i in range(int((b // size - qs).max(initial=0)) + 1):
            for j in range(int((d // size - ks).max(initial=0)) + 1):
                seen = rule(np.minimum(qs + i, b // size), np.minimum(ks + j, d // size))
                some = seen if some is None else some | seen
                every = seen if every is None else every & seen
        assert some is not None and every is not None
        return Known(every if self.pattern.visible is None else false & every, ~some)


@dataclass(frozen=True)
class Known:
    """Three-valued truth about tiles: surely all of it, surely none of it, or neither is known."""

    all: np.ndarray | np.bool_
    none: np.ndarray | np.bool_

    @cached_property
    def known(self) -> np.ndarray | np.bool_:
        return self.all | self.none

    def __and__(self, other: "Known") -> "Known":
        return Known(self.all & other.all, self.none | other.none)

    def __or__(self, other: "Known") -> "Known":
        return Known(self.all | other.all, self.none & other.none)
