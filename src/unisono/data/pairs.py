"""Preference pairs as batches: the rows 2i and 2i + 1 of a folder of blocks are the two answers to prompt i.

Contract: a sample is a pair, and both of its answers are in one batch. Rows hold one sequence each (prompt,
then answer, which is learned), padded on the right; a batch is cut to its longest row, up to a multiple
of 8, so its shape depends on its own pairs alone. A causal model never sees the padding behind a token, so it
changes no result.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from unisono.data.blocks import NO_LABEL, Blocks, Int64Array

MULTIPLE = 8
"""Of tokens, to which batches are padded."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """n pairs as arrays [2n, L]: first all chosen answers, then all rejected ones."""

    input_ids: Int64Array
    labels: Int64Array
    """The answers' tokens, aligned with input_ids; -100 elsewhere."""
    position_ids: Int64Array
    reference: npt.NDArray[np.float32]
    """log p(answer | prompt) under the reference model, [2n]; zero where there is none."""

    def blank(self) -> "PairBatch":
        """The same rows, of which nothing counts."""
        return replace(self, labels=np.full_like(self.labels, NO_LABEL))

    @property
    def counts(self) -> npt.NDArray[np.bool_]:
        """Which of the n pairs count."""
        half: npt.NDArray[np.bool_] = (self.labels != NO_LABEL).any(axis=1)[: len(self.labels) // 2]
        return half


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split, numbered from 0. `rows`: their answers, two a pair."""

    rows: Blocks
    reference: npt.NDArray[np.float64] | None = None
    """By row of the folder."""

    def __len__(self) -> int:
        return len(self.rows) // 2

    @property
    def sequence_length(self) -> int:
        return self.rows.sequence_length

    def read(self, indices: npt.ArrayLike) -> PairBatch:
        """The pairs `indices` in that order."""
        chosen = 2 * np.asarray(indices, np.int64)
        wanted = np.concatenate([chosen, chosen + 1])
        found = self.rows.read(wanted)
        length = -(-int(row_lengths(found.position_ids).max()) // MULTIPLE) * MULTIPLE
        length = min(length, self.sequence_length)
        if self.reference is None:
            reference = np.zeros(len(wanted), np.float32)
        else:
            reference = self.reference[self.rows.numbers(wanted)].astype(np.float32)
        positions = np.tile(np.arange(length), (len(wanted), 1))
        return PairBatch(
            found.input_ids[:, :length], found.labels[:, :length], positions, reference
        )


def row_lengths(position_ids: Int64Array) -> Int64Array:
    """Tokens of each row without its padding, which is a document of its own."""
    again = position_ids[:, 1:] == 0
    size = position_ids.shape[1]
    return np.where(again.any(axis=1), again.argmax(axis=1) + 1, size).astype(np.int64)


def rows_of(pairs: Int64Array) -> Int64Array:
    """The rows of these pairs, in the same order."""
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


Samples = Blocks | Pairs
"""What a run is trained or evaluated on."""
