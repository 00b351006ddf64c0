"""Prepared blocks on disk, memory-mapped, and what a batch of them holds.

Contract: a folder of `write_blocks` is immutable; `Blocks` checks the size of every file before it
maps them and raises DataError where one is damaged. Any set of blocks reads the same on every rank.

The folder: tokens.bin [n, S] uint16 or uint32 (by the vocabulary) in little-endian order; starts.bin
and targets.bin [n, ceil(S / 8)] one bit a token; counts.bin [n] int32 targets of a block; index.json.
Cost: 2.25 bytes a token on disk up to 65,536 ids, else 4.25; reading costs 10 ns a token from
the page cache.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unisono.data.cache import read_json
from unisono.data.pack import Rows
from unisono.errors import DataError

FORMAT = 1
NO_LABEL = -100
"""Hugging Face's label of a position that does not count."""

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Index:
    """What is in a folder of blocks (index.json)."""

    num_blocks: int
    sequence_length: int
    dtype: str
    num_tokens: int
    """Without padding."""
    num_target_tokens: int
    max_token_id: int
    sizes: dict[str, int]
    """Bytes of each file."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks as arrays [n, S]."""

    input_ids: Int64Array
    labels: Int64Array
    """Hugging Face's convention: aligned with input_ids (the loss shifts), -100 where none."""
    position_ids: Int64Array
    """Count from 0 in each document: this is what isolates packed documents in attention."""
    packed: bool
    """A row holds more than one document, or padding."""

    def blank(self) -> "Batch":
        """The same rows, of which nothing counts."""
        return replace(self, labels=np.full_like(self.labels, NO_LABEL))


class Blocks:
    """The blocks of one split, numbered from 0; read-only.

    `held_out` lists block numbers (sorted): this object is all others, or with `inside` only those.
    """

    def __init__(
        self, folder: Path, held_out: Int64Array | None = None, inside: bool = False
    ) -> None:
        self.folder = folder
        self.index = read_index(folder)
        n, width = self.index.num_blocks, -(-self.index.sequence_length // 8)
        little = np.dtype(self.index.dtype).newbyteorder("<")
        shape = (n, self.index.sequence_length)
        self._tokens = np.memmap(folder / "tokens.bin", little, mode="r", shape=shape)
        self._starts = np.memmap(folder / "starts.bin", np.uint8, mode="r", shape=(n, width))
        self._targets = np.memmap(folder / "targets.bin", np.uint8, mode="r", shape=(n, width))
        self._counts = np.memmap(folder / "counts.bin", "<i4", mode="r", shape=(n,))
        self._held_out = np.empty(0, np.int64) if held_out is None else held_out
        self._inside = inside

    def __len__(self) -> int:
        held_out = len(self._held_out)
        return held_out if self._inside else self.index.num_blocks - held_out

    @property
    def sequence_length(self) -> int:
        return self.index.sequence_length

    def numbers(self, indices: npt.ArrayLike) -> Int64Array:
        """The numbers in the folder of this split's blocks `indices`."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"blocks are numbered 0 to {len(self) - 1}, asked for {wanted}")
        if self._inside:
            return self._held_out[wanted]
        # Block number b is sample b - (held-out numbers below b): count those and add them.
        below = self._held_out - np.arange(len(self._held_out))
        return wanted + np.searchsorted(below, wanted, side="right")

    def read(self, indices: npt.ArrayLike) -> Batch:
        """The blocks `indices` in that order."""
        rows = self.numbers(indices)
        starts = self._bits(self._starts[rows])
        targets = self._bits(self._targets[rows])
        input_ids = self._tokens[rows].astype(np.int64)
        labels = np.where(targets, input_ids, NO_LABEL)
        columns = np.arange(self.sequence_length)
        position_ids = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        return Batch(input_ids, labels, position_ids, bool(starts[:, 1:].any()))

    def target_tokens(self, indices: npt.ArrayLike) -> Int64Array:
        """How many labels of each block count. Reads no tokens."""
        return self._counts[self.numbers(indices)].astype(np.int64)

    def _bits(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        return np.unpackbits(packed, axis=1, count=self.sequence_length).view(np.bool_)


def write_blocks(
    folder: Path, rows: Iterable[Rows], sequence_length: int, dtype: np.dtype[Any], num_tokens: int
) -> Index:
    """Write rows as they come. The folder must not be used before the caller publishes it."""
    num_blocks = num_targets = max_token_id = 0
    names = ("tokens.bin", "starts.bin", "targets.bin", "counts.bin")
    with (
        open(folder / names[0], "wb") as tokens,
        open(folder / names[1], "wb") as starts,
        open(folder / names[2], "wb") as targets,
        open(folder / names[3], "wb") as counts,
    ):
        for some in rows:
            per_block = some.targets.sum(axis=1)
            tokens.write(np.ascontiguousarray(some.tokens, dtype.newbyteorder("<")).data)
            starts.write(np.packbits(some.starts, axis=1).data)
            targets.write(np.packbits(some.targets, axis=1).data)
            counts.write(per_block.astype("<i4").data)
            num_blocks += len(per_block)
            num_targets += int(per_block.sum())
            max_token_id = max(max_token_id, int(some.tokens.max()))
    index = Index(
        num_blocks=num_blocks,
        sequence_length=sequence_length,
        dtype=dtype.name,
        num_tokens=num_tokens,
        num_target_tokens=num_targets,
        max_token_id=max_token_id,
        sizes={name: (folder / name).stat().st_size for name in names},
    )
    (folder / "index.json").write_text(json.dumps(asdict(index), indent=1) + "\n")
    return index


def read_index(folder: Path) -> Index:
    """Raises DataError where the folder is incomplete or damaged."""
    raw = read_json(folder / "index.json")
    try:
        index = Index(**raw)
    except TypeError:
        raise DataError(
            f"{folder}: no readable index.json: delete the folder, it is made anew"
        ) from None
    for name, size in index.sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else -1
        if found != size or index.format != FORMAT:
            raise DataError(
                f"{path}: found {max(found, 0):,} bytes, its index says {size:,}:"
                " delete the folder, it is made anew"
            )
    return index
