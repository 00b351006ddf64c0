"""Shards of a batch, put together, are the batch; labels and documents are those of the whole."""

import numpy as np
import pytest

from unisono.attention.shard import Placement, shard
from unisono.data.blocks import NO_LABEL, Batch


def batch(rows: int, length: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 50, (rows, length))
    starts = rng.random((rows, length)) < 0.2
    starts[:, 0] = True
    labels = np.where(starts | (rng.random((rows, length)) < 0.3), NO_LABEL, ids)
    columns = np.arange(length)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Batch(ids, labels, positions, bool(starts[:, 1:].any()))


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 5, 16, 48, 61])
def test_shards_together_are_the_batch(length: int, size: int, zigzag: bool) -> None:
    whole, placement = batch(3, length), Placement(length, size, zigzag)
    shards = [shard(whole, placement, r) for r in range(size)]
    assert np.array_equal(placement.join([s.input_ids for s in shards]), whole.input_ids)
    assert np.array_equal(placement.join([s.position_ids for s in shards]), whole.position_ids)
    targets = placement.join([s.targets for s in shards])
    assert np.array_equal(targets[:, :-1], whole.labels[:, 1:])
    assert (targets[:, -1] == NO_LABEL).all()
    own = sum(int((s.targets != NO_LABEL).sum()) for s in shards)
    assert own == shards[0].target_tokens == int((whole.labels[:, 1:] != NO_LABEL).sum())
    held = np.concatenate([placement.positions(r) for r in range(size)])
    assert np.array_equal(np.sort(held), np.arange(placement.padded))
    assert {s.input_ids.shape for s in shards} == {(3, placement.held)}


def test_zigzag_gives_every_rank_the_same_pairs_and_contiguous_does_not() -> None:
    def pairs(zigzag: bool) -> list[int]:
        placement = Placement(4096, 4, zigzag)
        return [int((placement.positions(r) + 1).sum()) for r in range(4)]

    assert len(set(pairs(True))) == 1
    assert max(pairs(False)) > 6 * min(pairs(False))


def test_segments_are_ascending_and_do_not_touch() -> None:
    assert Placement(16, 2).segments(0) == (range(4), range(12, 16))
    assert Placement(16, 2).segments(1) == (range(4, 12),)
    assert Placement(16, 1).segments(0) == (range(16),)
    assert Placement(16, 2, zigzag=False).segments(1) == (range(8, 16),)


def test_padding_is_a_document_without_targets() -> None:
    whole, placement = batch(2, 13), Placement(13, 4)
    shards = [shard(whole, placement, r, padding=7) for r in range(4)]
    for s in shards:
        assert s.documents is not None
        assert s.documents.starts.shape == (2, 16)
        assert (s.documents.starts[:, 13:] == 13).all()
        assert (s.documents.starts[:, :13] == np.arange(13) - whole.position_ids).all()
        assert s.position_ids.max() < 13
    first = shards[0]  # holds chunks 0 and 7: positions 0, 1 and 14, 15
    assert first.input_ids[:, 2:].tolist() == [[7, 7]] * 2
    assert first.position_ids[:, 2:].tolist() == [[1, 2]] * 2
    assert (first.targets[:, 2:] == NO_LABEL).all()


def test_one_document_without_padding_needs_no_numbers() -> None:
    ids = np.arange(16)[None]
    whole = Batch(ids, ids, ids, packed=False)
    assert shard(whole, Placement(16, 4), 1).documents is None
    assert shard(whole, Placement(16, 3), 1, 0).documents is not None


def test_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="of 16 tokens; found a batch of 13"):
        shard(batch(2, 13), Placement(16, 2), 0)
