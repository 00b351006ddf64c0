"""A mask says of any tile what a loop over its pairs says."""

import numpy as np
import pytest
import torch
from dense import visible

from unisono.attention.mask import CAUSAL, FULL, PARTIAL, SKIP, UNIQUE, Documents, Mask
from unisono.attention.pattern import Pattern, bigbird, dilated, function, strided

LENGTH = 60
IDS = torch.tensor([[0] * 9 + [1] * 30 + [2] * 20 + [3], [5] * LENGTH])
DOCUMENTS = Documents.of_ids(IDS)
PLAIN = {
    "causal": Mask(),
    "all": Mask(causal=False),
    "window": Mask(window=7),
    "window of one": Mask(window=1),
    "sinks": Mask(window=7, sinks=3),
    "chunk": Mask(chunk=11),
    "prefix": Mask(prefix=13),
    "window and prefix": Mask(window=5, prefix=4),
    "chunk and window": Mask(chunk=16, window=5),
    "origin": Mask(window=7, sinks=3, prefix=2, chunk=9, origin=4),
}
PATTERNS = {
    "bigbird": Mask(pattern=bigbird(4)),
    "strided": Mask(pattern=strided(4, 3)),
    "dilated": Mask(pattern=dilated(4, 3)),
    "function": Mask(pattern=function(lambda i, j, h: (i + j) % 5 != 0)),
    "by head": Mask(pattern=function(lambda i, j, h: i - j < 9 * (h + 1), by_head=True)),
    "with a rule": Mask(pattern=function(lambda i, j, h: i - j < 9, block=4, blocks=lambda q, k: q - k < 4)),
}  # fmt: skip
PACKED = {f"packed {n}": Mask(**_) for n, _ in {
    "causal": {"documents": DOCUMENTS},
    "window": {"documents": DOCUMENTS, "window": 6},
    "sinks": {"documents": DOCUMENTS, "window": 6, "sinks": 2},
    "chunk": {"documents": DOCUMENTS, "chunk": 8},
    "prefix": {"documents": DOCUMENTS, "prefix": 5},
    "bigbird": {"documents": DOCUMENTS, "pattern": bigbird(4)},
}.items()}  # fmt: skip


def by_loop(mask: Mask, row: int) -> torch.Tensor:
    starts = None if mask.documents is None else mask.documents.starts[row].tolist()
    return torch.tensor(
        [[visible(mask, i, j, starts) for j in range(LENGTH)] for i in range(LENGTH)]
    )


@pytest.mark.parametrize("name", [*PLAIN, *(n for n in PACKED if "bigbird" not in n)])
def test_spelled_out_it_is_the_definition(name: str) -> None:
    mask = {**PLAIN, **PACKED}[name]
    spelled = mask.spell(0, LENGTH, 0, LENGTH)[:, 0]
    for row in range(len(spelled)):
        assert torch.equal(spelled[row], by_loop(mask, row))


@pytest.mark.parametrize("name", [*PLAIN, *PATTERNS, *PACKED])
def test_every_tile_is_what_it_is_said_to_be(name: str) -> None:
    mask = {**PLAIN, **PATTERNS, **PACKED}[name]
    spelled = mask.spell(0, LENGTH, 0, LENGTH, heads=3)
    edges = np.unique(np.random.default_rng(0).integers(0, LENGTH, 12))
    for tile in (edges, np.arange(0, LENGTH + 1, 4), np.arange(0, LENGTH + 1, 10)):
        first, last = tile[:-1], tile[1:]
        for row in range(mask.num_rows):
            kinds, keys = mask.classify(first, last, first, last, row=row)
            by_key: dict = {}
            for (x, y), kind in np.ndenumerate(kinds):
                q0, q1, k0, k1 = (int(n) for n in (first[x], last[x], first[y], last[y]))
                part = spelled[row if len(spelled) > 1 else 0, :, q0:q1, k0:k1]
                assert kind != SKIP or not part.any()
                assert kind != FULL or part.all()
                if kind == CAUSAL:
                    assert (q0, q1) == (k0, k1)
                    assert torch.equal(part[0], torch.ones(q1 - q0, q1 - q0).tril().bool())
                if kind == PARTIAL and keys[x, y] != UNIQUE:
                    same = by_key.setdefault((int(keys[x, y]), part.shape), part)
                    assert torch.equal(same, part)
                said, seen = mask.tile(q0, q1, k0, k1, heads=3, row=row)
                assert (seen is not None) == (said == PARTIAL)
                if seen is not None:
                    assert torch.equal(seen[0].expand(3, -1, -1), part.expand(3, -1, -1))
                    assert seen.any()
                    assert not seen.all()


@pytest.mark.parametrize("name", [*PLAIN, *PACKED, "bigbird", "dilated"])
def test_pair_by_pair_it_says_the_same(name: str) -> None:
    mask = {**PLAIN, **PATTERNS, **PACKED}[name]
    row, i, j = (torch.randint(0, n, (500,), generator=torch.Generator().manual_seed(1)) for n in (2, LENGTH, LENGTH))  # fmt: skip
    spelled = mask.spell(0, LENGTH, 0, LENGTH).expand(2, -1, -1, -1)
    assert torch.equal(mask.sees(row, i, j), spelled[row, 0, i, j])


def test_a_window_that_is_off_by_one_is_another_mask() -> None:
    """The control of the tests above: they tell W from W + 1, and a leak from none."""
    wide = Mask(window=8).spell(0, LENGTH, 0, LENGTH)[0, 0]
    assert not torch.equal(wide, by_loop(PLAIN["window"], 0))
    assert not torch.equal(Mask().spell(0, LENGTH, 0, LENGTH)[0, 0], by_loop(PACKED["packed causal"], 0))  # fmt: skip


def test_most_tiles_of_a_window_are_skipped_and_most_of_causal_are_full() -> None:
    starts = np.arange(0, 4096, 64)
    kinds, _ = Mask(window=128).classify(starts, starts + 64, starts, starts + 64)
    assert (kinds != SKIP).sum() <= 3 * 64
    kinds, _ = Mask().classify(starts, starts + 64, starts, starts + 64)
    assert (kinds == FULL).sum() == 64 * 63 // 2
    assert (np.diag(kinds) == CAUSAL).all()


def test_documents_come_from_ids_and_from_restarts() -> None:
    positions = torch.cat([torch.arange(n) for n in (9, 30, 20, 1)])[None]
    found = Documents.of_positions(positions)
    assert found is not None
    assert DOCUMENTS is not None
    assert (found.starts[0] == DOCUMENTS.starts[0]).all()
    assert found.segments(0, 5, 45) == [(0, 5, 9), (9, 9, 39), (39, 39, 45)]
    assert Documents.of_positions(torch.arange(9)[None]) is None
    assert Documents.of_positions(torch.arange(7, 16)[None]) is None  # a chunk of one document
    assert Documents.of_ids(torch.zeros(3, 5)) is None


def test_bigbird_is_the_same_everywhere_and_for_each_seed() -> None:
    def seen(seed: int) -> torch.Tensor:
        return Mask(pattern=bigbird(4, seed=seed)).spell(0, LENGTH, 0, LENGTH)

    assert torch.equal(seen(0), seen(0))
    assert not torch.equal(seen(0), seen(1))
    blocks = seen(0)[0, 0, 3::4, ::4].sum(1)  # of the last query of each block
    assert blocks.max() <= 3 + 1 + 3
    assert (blocks[4:] > 4).any()
    assert not torch.triu(seen(0)[0, 0], 1).any()


def test_a_part_of_a_tile_can_be_asked_anywhere() -> None:
    whole = Mask(window=5, sinks=2).spell(0, 2000, 0, 2000)[0, 0]
    part = Mask(window=5, sinks=2).spell(1777, 1801, 1750, 1799)[0, 0]
    assert torch.equal(part, whole[1777:1801, 1750:1799])


@pytest.mark.parametrize("fields", [{"window": 0}, {"chunk": 0}, {"sinks": -1}, {"causal": False, "window": 4}])  # fmt: skip
def test_contradictions_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError):
        Mask(**fields)


def test_a_pattern_needs_no_rule() -> None:
    assert Pattern("own", 4, visible=lambda i, j, h: i >= j).blocks is None
