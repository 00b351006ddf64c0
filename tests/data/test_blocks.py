import numpy as np
import pytest

from unisono.data.blocks import Blocks, write_blocks
from unisono.data.encode import ENDS, LEARNED
from unisono.data.pack import concat
from unisono.data.split import held_out
from unisono.errors import DataError

PAD, S = 7, 10  # a length that is no multiple of 8


@pytest.fixture
def folder(tmp_path):
    """Documents of 4, 13 and 26 tokens, the second one half learned."""
    tokens = np.arange(100, 143, dtype=np.uint16)
    flags = np.full(43, LEARNED, np.uint8)
    flags[6:10] = 0
    flags[[3, 16, 42]] |= ENDS
    write_blocks(tmp_path, concat([(tokens, flags)], S, PAD), S, np.dtype(np.uint16), 43)
    return tmp_path


def test_a_batch_by_hand(folder):
    blocks = Blocks(folder)
    assert len(blocks) == 5 and blocks.sequence_length == S
    batch = blocks.read([4, 0])
    assert batch.input_ids.tolist() == [[140, 141, 142, *[PAD] * 7], list(range(100, 110))]
    assert batch.labels.tolist() == [
        [-100, 141, 142, *[-100] * 7],
        [-100, 101, 102, 103, -100, 105, -100, -100, -100, -100],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 5],
    ]
    assert batch.packed
    assert {a.dtype for a in (batch.input_ids, batch.labels, batch.position_ids)} == {
        np.dtype(np.int64)
    }


def test_a_row_of_one_document_is_not_packed(folder):
    blocks = Blocks(folder)
    assert not blocks.read([2]).packed
    assert blocks.read([2, 0]).packed


def test_target_tokens_are_the_labels_that_count(folder):
    blocks = Blocks(folder)
    labels = blocks.read(range(5)).labels
    assert blocks.target_tokens(range(5)).tolist() == (labels != -100).sum(axis=1).tolist()
    assert (labels[:, 0] == -100).all()  # so the shift loses none
    assert blocks.index.num_target_tokens == (labels != -100).sum()
    assert blocks.index.num_tokens == 43 and blocks.index.max_token_id == 142


def test_large_ids_take_four_bytes(tmp_path):
    tokens = np.array([70_000, 2, 3], np.uint32)
    rows = concat([(tokens, np.array([1, 1, 3], np.uint8))], 3, PAD)
    write_blocks(tmp_path, rows, 3, np.dtype(np.uint32), 3)
    assert Blocks(tmp_path).read([0]).input_ids.tolist() == [[70_000, 2, 3]]
    assert Blocks(tmp_path).index.sizes["tokens.bin"] == 12


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9])
def test_splits_are_disjoint_and_complete(folder, fraction):
    out = held_out(5, fraction, seed=1)
    train, evaluation = Blocks(folder, out), Blocks(folder, out, inside=True)
    first, second = (
        train.numbers(range(len(train))).tolist(),
        evaluation.numbers(range(len(evaluation))).tolist(),
    )
    assert sorted(first + second) == list(range(5)) and second == out.tolist()
    assert first == sorted(first)


def test_numbers_outside_are_refused(folder):
    out = held_out(5, 0.2, seed=1)
    for wanted in ([4], [-1]):
        with pytest.raises(IndexError, match="0 to 3"):
            Blocks(folder, out).read(wanted)


def test_an_empty_request(folder):
    assert Blocks(folder).read([]).input_ids.shape == (0, S)


@pytest.mark.parametrize(
    "name", ["tokens.bin", "starts.bin", "targets.bin", "counts.bin", "index.json"]
)
@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_folder_is_refused(folder, name, damage):
    path = folder / name
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    if (name, damage) == ("index.json", "shorter"):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="delete the folder"):
        Blocks(folder)
