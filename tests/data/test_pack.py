"""Packing: nothing is lost, documents are on their own, and the result depends on the stream alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.data import pack
from unisono.data.encode import ENDS, LEARNED
from unisono.data.pack import Losses, best_fit, concat

PAD = 9999


def stream(lengths, learned=None):
    """Documents of these lengths, every token its own number; all learned unless told."""
    total = sum(lengths)
    tokens = np.arange(total, dtype=np.uint16)
    flags = np.full(total, LEARNED, np.uint8)
    if learned is not None:
        flags[~np.asarray(learned, bool)] = 0
    flags[np.cumsum(lengths) - 1] |= ENDS
    return tokens, flags


def cut(tokens, flags, size):
    for i in range(0, len(tokens), size):
        yield tokens[i : i + size], flags[i : i + size]


def together(rows):
    rows = list(rows)
    return (
        np.concatenate([r.tokens for r in rows]),
        np.concatenate([r.starts for r in rows]),
        np.concatenate([r.targets for r in rows]),
    )


def pieces(tokens, starts):
    """The documents of all blocks, without padding."""
    found = []
    for row, begins in zip(tokens.tolist(), starts):
        bounds = [*np.flatnonzero(begins).tolist(), len(row)]
        found += [row[a:b] for a, b in itertools.pairwise(bounds) if row[a] != PAD]
    return found


def test_concat_by_hand():
    tokens, starts, targets = together(concat([stream([3, 4, 2])], 4, PAD))
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, PAD, PAD, PAD]]
    assert starts.astype(int).tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert targets.astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_best_fit_by_hand():
    losses = Losses()
    tokens, starts, targets = together(best_fit([stream([3, 2, 5, 2, 6])], 8, PAD, losses))
    assert tokens.tolist() == [
        [12, 13, 14, 15, 16, 17, 3, 4],
        [5, 6, 7, 8, 9, 0, 1, 2],
        [10, 11, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert starts.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
    ]
    assert targets.astype(int).tolist() == [
        [0, 1, 1, 1, 1, 1, 0, 1],
        [0, 1, 1, 1, 1, 0, 1, 1],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert losses == Losses()


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(2, 12), st.integers(1, 50))
def test_concat_keeps_every_token_once_and_in_order(lengths, block, chunk):
    tokens, starts, targets = together(concat(cut(*stream(lengths), chunk), block, PAD))
    flat = tokens.reshape(-1)
    total = sum(lengths)
    assert flat[:total].tolist() == list(range(total)) and (flat[total:] == PAD).all()
    assert len(flat) - total < block
    begins = np.zeros(len(flat), bool)
    begins[np.cumsum([0, *lengths])[: len(lengths)]] = True
    begins[::block] = True
    if total < len(flat):
        begins[total] = True
    assert np.array_equal(starts.reshape(-1), begins)
    assert np.array_equal(targets.reshape(-1), ~begins & (np.arange(len(flat)) < total))


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(2, 12), st.integers(1, 50), st.sampled_from([20, 64, 10**6]))
def test_best_fit_keeps_documents_whole(lengths, block, chunk, window):
    before, pack.WINDOW_TOKENS = pack.WINDOW_TOKENS, window
    try:
        losses = Losses()
        tokens, starts, targets = together(
            best_fit(cut(*stream(lengths), chunk), block, PAD, losses)
        )
    except ValueError:
        assert all(n == 1 for n in lengths)  # nothing to learn: no block
        return
    finally:
        pack.WINDOW_TOKENS = before
    begin = np.cumsum([0, *lengths])
    expected = [
        list(range(a, min(a + block, end)))
        for first, end in itertools.pairwise(begin)
        for a in range(first, end, block)
        if min(a + block, end) - a > 1  # one token alone has no target
    ]
    assert sorted(pieces(tokens, starts)) == sorted(expected)
    assert losses.cut_documents == sum(n > block for n in lengths)
    assert losses.dropped_tokens == sum(lengths) - sum(map(len, expected))
    assert targets.sum() == sum(len(p) - 1 for p in expected)
    assert not targets[starts].any() and not targets[tokens == PAD].any()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_chunks_do_not_matter(packing, monkeypatch):
    monkeypatch.setattr(pack, "WINDOW_TOKENS", 100)
    rng = np.random.default_rng(0)
    tokens, flags = stream(rng.integers(1, 30, 60).tolist())

    def packed(size):
        chunks = cut(tokens, flags, size)
        return together(
            concat(chunks, 8, PAD) if packing == "concat" else best_fit(chunks, 8, PAD, Losses())
        )

    whole = packed(10**6)
    for size in (1, 7, 100):
        assert all(np.array_equal(a, b) for a, b in zip(packed(size), whole))


def test_best_fit_wastes_little():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 200, 3000)
    tokens, _, _ = together(best_fit([stream([int(n) for n in lengths[:600]])], 256, PAD, Losses()))
    used = lengths[:600].sum()
    assert tokens.size < 1.01 * used + 256


def test_best_fit_decreasing_equals_the_plain_definition():
    lengths = np.random.default_rng(2).integers(1, 40, 1500)
    rooms: list[list[int]] = []  # [room, when it was last filled]
    block, offset = [0] * len(lengths), [0] * len(lengths)
    for when, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        # The fullest block with room; of equally full ones the one filled last.
        fits = [(room, -then, b) for b, (room, then) in enumerate(rooms) if room >= lengths[i]]
        block[i] = min(fits)[2] if fits else len(rooms)
        if not fits:
            rooms.append([64, 0])
        offset[i] = 64 - rooms[block[i]][0]
        rooms[block[i]] = [rooms[block[i]][0] - int(lengths[i]), when]
    found = pack._best_fit_decreasing(lengths, 64)
    assert (found[0].tolist(), found[1].tolist(), found[2]) == (block, offset, len(rooms))


def test_pieces_without_anything_to_learn_are_dropped_and_counted():
    learned = [0] * 20 + [1] * 4 + [0, 1]  # a prompt of 20 with an answer of 4; a short one
    losses = Losses()
    tokens, starts, targets = together(best_fit([stream([24, 2], learned)], 8, PAD, losses))
    assert sorted(pieces(tokens, starts)) == [list(range(16, 24)), [24, 25]]
    assert (losses.cut_documents, losses.dropped_pieces, losses.dropped_tokens) == (1, 2, 16)
    assert targets.sum() == 5
