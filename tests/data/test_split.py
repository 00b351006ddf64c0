import numpy as np
import pytest

from unisono.data.split import held_out


@pytest.mark.parametrize(
    ("num_blocks", "fraction", "expected"),
    [
        (100, 0.05, 5),
        (100, 0.001, 1),
        (2, 0.01, 1),
        (2, 0.99, 1),
        (1, 0.5, 0),
        (100, 0, 0),
        (10, 0.99, 9),
    ],
)
def test_how_many(num_blocks, fraction, expected):
    found = held_out(num_blocks, fraction, seed=3)
    assert len(found) == expected == len(set(found.tolist()))
    assert (np.diff(found) > 0).all() and (found < num_blocks).all()


def test_chosen_by_seed():
    assert held_out(1000, 0.1, 1).tolist() == held_out(1000, 0.1, 1).tolist()
    assert held_out(1000, 0.1, 1).tolist() != held_out(1000, 0.1, 2).tolist()
