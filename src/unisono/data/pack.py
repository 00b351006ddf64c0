"""A stream of documents becomes blocks of `sequence_length` tokens.

Contract: input is the encoder's ids and flags in chunks of any size, cut anywhere; output depends
on the stream and not on its chunks. In a block every document, or piece of one, is on its own:
`starts` marks where one begins, positions count from there, and its first token is never a target,
because nothing before it may be seen. So is padding.

- `concat`: the stream cut every S tokens; only the last block is padded. No token is lost.
- `best_fit`: documents stay whole (one longer than S becomes several pieces); within a window of
  documents the longest goes first, each into the fullest block that still has room (best fit
  decreasing). Pieces in which nothing is learned are dropped. Both are counted.

- `one_a_row`: every document a block of its own, in order; for answers that are compared.

Cost: concat copies; best_fit 0.5 us a document. Memory: one window, about 50 bytes a token.
"""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unisono.data.encode import ENDS, LEARNED

Chunk = tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.uint8]]
WINDOW_TOKENS = 2**21
ROWS = 1024
"""That one_a_row writes at once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some blocks, all arrays [n, S]."""

    tokens: npt.NDArray[np.unsignedinteger]
    starts: npt.NDArray[np.bool_]
    targets: npt.NDArray[np.bool_]


@dataclass(slots=True)
class Losses:
    """What best_fit did to documents that do not fit."""

    cut_documents: int = 0
    dropped_pieces: int = 0
    dropped_tokens: int = 0


def concat(chunks: Iterable[Chunk], sequence_length: int, padding: int) -> Iterator[Rows]:
    """The stream cut every `sequence_length` tokens."""
    ends_before = True  # the stream begins a document
    rest: Chunk | None = None
    for chunk in chunks:
        tokens, flags = chunk if rest is None else _join(rest, chunk)
        whole = len(tokens) // sequence_length * sequence_length
        if whole:
            rows = _rows(tokens[:whole], flags[:whole], ends_before, sequence_length)
            ends_before = bool(flags[whole - 1] & ENDS)
            yield rows
        rest = (tokens[whole:], flags[whole:])
    if rest is not None and len(rest[0]):
        tokens, flags = rest
        missing = sequence_length - len(tokens)
        flags = np.append(flags, np.zeros(missing, np.uint8))
        flags[-missing - 1] |= ENDS  # padding is a document of its own
        tokens = np.append(tokens, np.full(missing, padding, tokens.dtype))
        yield _rows(tokens, flags, ends_before, sequence_length)


def best_fit(
    chunks: Iterable[Chunk], sequence_length: int, padding: int, losses: Losses
) -> Iterator[Rows]:
    """Documents whole, best fit decreasing within windows; `losses` counts what that cost."""
    window = max(WINDOW_TOKENS, 16 * sequence_length)
    pending: list[Chunk] = []
    size = 0
    begins = True
    for chunk in _limited(chunks, window):
        pending.append(chunk)
        size += len(chunk[0])
        if size >= window:
            tokens, flags = _join(*pending)
            used, continues = _window(tokens, flags, begins, sequence_length, losses, last=False)
            yield from _fit(tokens, flags, used, sequence_length, padding, losses)
            begin = int(used[-1])
            pending, size, begins = (
                [(tokens[begin:], flags[begin:])],
                len(tokens) - begin,
                not continues,
            )
    if size:
        tokens, flags = _join(*pending)
        used, _ = _window(tokens, flags, begins, sequence_length, losses, last=True)
        yield from _fit(tokens, flags, used, sequence_length, padding, losses)


def one_a_row(chunks: Iterable[Chunk], sequence_length: int, padding: int) -> Iterator[Rows]:
    """A block for each document. Chunks hold whole documents of at most `sequence_length` tokens."""
    for tokens, flags in chunks:
        ends = np.flatnonzero(flags & ENDS) + 1
        begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        for some in range(0, len(ends), ROWS):
            begin, end = begins[some : some + ROWS], ends[some : some + ROWS]
            lengths = end - begin
            columns = np.arange(sequence_length)
            inside = columns < lengths[:, None]
            packed = np.full(inside.shape, padding, tokens.dtype)
            packed[inside] = tokens[begin[0] : end[-1]]
            starts = (columns == 0) | (columns == lengths[:, None])
            targets = np.zeros(inside.shape, np.bool_)
            targets[inside] = (flags[begin[0] : end[-1]] & LEARNED) != 0
            yield Rows(packed, starts, targets & ~starts)


def _rows(
    tokens: npt.NDArray[np.unsignedinteger],
    flags: npt.NDArray[np.uint8],
    ends_before: bool,
    sequence_length: int,
) -> Rows:
    begins = np.empty(len(flags), np.bool_)
    begins[0] = ends_before
    begins[1:] = (flags[:-1] & ENDS) != 0
    starts = begins.reshape(-1, sequence_length)
    starts[:, 0] = True  # in a block nothing stands before its first token
    targets = ((flags & LEARNED) != 0).reshape(-1, sequence_length) & ~starts
    return Rows(tokens.reshape(-1, sequence_length), starts, targets)


def _join(*chunks: Chunk) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])


def _limited(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """The same stream in chunks of exactly `size`, so that windows do not depend on its chunks."""
    rest: Chunk | None = None
    for chunk in chunks:
        tokens, flags = chunk if rest is None else _join(rest, chunk)
        while len(tokens) >= size:
            yield tokens[:size], flags[:size]
            tokens, flags = tokens[size:], flags[size:]
        rest = tokens, flags
    if rest is not None and len(rest[0]):
        yield rest


def _window(
    tokens: npt.NDArray[np.unsignedinteger],
    flags: npt.NDArray[np.uint8],
    begins: bool,
    sequence_length: int,
    losses: Losses,
    last: bool,
) -> tuple[npt.NDArray[np.int64], bool]:
    """Where the pieces of a window begin, and its end; and whether a document goes on beyond it.

    The last piece stays for the next window unless this is the last one: it may not be complete.
    """
    ends = np.flatnonzero(flags & ENDS) + 1
    begin_of = np.concatenate([[0], ends])
    begin_of = begin_of[begin_of < len(tokens)]
    lengths = np.diff(np.append(begin_of, len(tokens)))
    counts = -(-lengths // sequence_length)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    within = np.arange(counts.sum()) - first
    pieces = np.repeat(begin_of, counts) + within * sequence_length
    original = within == 0
    original[0] = begins
    losses.cut_documents += int(np.count_nonzero(original[:-1] & ~original[1:]))
    bounds = np.append(pieces, len(tokens)) if last else pieces
    return bounds.astype(np.int64), not bool(original[-1])


def _fit(
    tokens: npt.NDArray[np.unsignedinteger],
    flags: npt.NDArray[np.uint8],
    bounds: npt.NDArray[np.int64],
    sequence_length: int,
    padding: int,
    losses: Losses,
) -> Iterator[Rows]:
    """Best fit decreasing of the pieces between `bounds`."""
    begins, lengths = bounds[:-1], np.diff(bounds)
    learned = np.concatenate([[0], np.cumsum((flags & LEARNED) != 0)])
    # A piece's first token is never a target.
    useful = learned[bounds[1:]] - learned[np.minimum(begins + 1, bounds[1:])] > 0
    losses.dropped_pieces += int(np.count_nonzero(~useful))
    losses.dropped_tokens += int(lengths[~useful].sum())
    begins, lengths = begins[useful], lengths[useful]
    if not len(begins):
        return
    block, offset, num_blocks = _best_fit_decreasing(lengths, sequence_length)

    # Token i of the pieces, laid end to end, goes from source[i] to goal[i].
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    source = np.arange(total) + np.repeat(begins - before, lengths)
    goal_begins = block * sequence_length + offset
    goal = np.arange(total) + np.repeat(goal_begins - before, lengths)
    packed = np.full(num_blocks * sequence_length, padding, tokens.dtype)
    packed[goal] = tokens[source]
    targets = np.zeros(len(packed), np.bool_)
    targets[goal] = (flags[source] & LEARNED) != 0
    starts = np.zeros(len(packed), np.bool_)
    starts[goal_begins] = True
    filled = np.bincount(block, weights=lengths, minlength=num_blocks).astype(np.int64)
    short = np.flatnonzero(filled < sequence_length)
    starts[short * sequence_length + filled[short]] = True
    targets &= ~starts
    shape = (num_blocks, sequence_length)
    yield Rows(packed.reshape(shape), starts.reshape(shape), targets.reshape(shape))


def _best_fit_decreasing(
    lengths: npt.NDArray[np.int64], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """For each length its block and its offset there, and the number of blocks."""
    block = np.empty(len(lengths), np.int64)
    offset = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[int]] = {}  # blocks by the room they have left
    rooms: list[int] = []  # the keys of with_room, sorted
    num_blocks = 0
    # Stable: equal lengths keep the order of the stream, so the result is one and the same anywhere.
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            found = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, found = capacity, num_blocks
            num_blocks += 1
        block[i], offset[i] = found, capacity - room
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(found)
    return block, offset, num_blocks
