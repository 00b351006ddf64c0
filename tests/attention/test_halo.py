"""Which keys travel: all that the mask lets be seen, and for what is regular not one more."""

import exact
import numpy as np
import pytest
import torch

from unisono.attention.halo import elsewhere, needed, seen
from unisono.attention.mask import Documents, Mask
from unisono.attention.pattern import Pattern
from unisono.attention.shard import Placement

LENGTH = 96
DOCUMENTS = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.06).cumsum(1)
MASKS = {
    "causal": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "sinks": {"window": 7, "sinks": 3},
    "chunk": {"chunk": 20},
    "chunk and window": {"chunk": 20, "window": 7},
    "prefix": {"prefix": 30},
    "prefix and window": {"prefix": 9, "window": 5},
}
STRIDED = Pattern("strided", 8, lambda q, k: (q - k) % 3 == 0)


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_what_travels_is_what_is_seen(name: str, packed: bool, size: int, zigzag: bool) -> None:
    ids = DOCUMENTS if packed else None
    mask = Mask(**MASKS[name], documents=Documents.of_ids(ids) if packed else None)
    right = exact.pairs(LENGTH, documents=ids, **MASKS[name])[:, 0].any(0)
    placement = Placement(LENGTH, size, zigzag)
    for reader in range(size):
        queries = placement.positions(reader)
        for owner in range(size):
            keys = placement.positions(owner)
            wanted = set(keys[right[queries][:, keys].any(0).numpy()].tolist())
            found = {p for span in needed(mask, placement, reader, owner) for p in span}
            assert wanted <= found
            if not packed:  # of several rows, what lies between what they see may come along
                assert found == wanted


@pytest.mark.parametrize("size", [2, 4])
def test_a_pattern_sends_its_blocks(size: int) -> None:
    placement, mask = Placement(LENGTH, size), Mask(pattern=STRIDED)
    blocks = np.arange(LENGTH) // STRIDED.block
    right = STRIDED.blocks(blocks[:, None], blocks[None, :]) & np.tri(LENGTH, dtype=bool)
    for reader in range(size):
        for owner in range(size):
            queries, keys = placement.positions(reader), placement.positions(owner)
            wanted = set(keys[right[np.ix_(queries, keys)].any(0)].tolist())
            found = {p for span in needed(mask, placement, reader, owner) for p in span}
            assert wanted <= found


def test_without_causality_all_of_a_document_is_seen() -> None:
    ids = torch.tensor([[0] * 10 + [1] * 6 + [2] * 16])
    mask = Mask(causal=False, documents=Documents.of_ids(ids))
    assert seen(mask, range(12, 14), 32) == [range(10, 16)]
    assert seen(Mask(causal=False), range(12, 14), 32) == [range(32)]
    assert seen(Mask(causal=False, chunk=8), range(12, 14), 32) == [range(8, 16)]


def test_a_rank_takes_a_window_twice_whatever_the_length() -> None:
    for length in (256, 4096, 2**20):
        for size in (4, 8):
            assert elsewhere(Mask(window=17), Placement(length, size)) == (32, 32)
        assert elsewhere(Mask(window=17), Placement(length, 2)) == (16, 16)
