"""The order is a permutation an epoch, looks random, and never changes."""

import numpy as np
import pytest

from unisono.data.order import ROUNDS, Order

# These are part of the interface: runs that were begun must go on in the same order.
GOLDEN = {
    (10, 0, 0): [1, 3, 5, 0, 8, 9, 2, 6, 7, 4],
    (10, 0, 10): [8, 4, 9, 3, 5, 1, 7, 6, 2, 0],
    (1, 7, 0): [0, 0, 0],
    (1000, 42, 0): [535, 831, 803, 211, 24, 847, 986, 344, 614, 266],
    (1000, 42, 995): [759, 701, 117, 90, 4, 929, 237, 51, 261, 802],
    (5000000000, 9223372036854775807, 12345678901): [
        4211153111,
        1010233743,
        146863106,
        1291141144,
        995188949,
        3459913997,
        4553070581,
        2398687583,
        3456390570,
        2479205999,
    ],
}


def plain(num_samples, seed, position):
    """The definition again, with Python's integers and no arrays."""
    mask = 2**64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    epoch, value = divmod(position, num_samples)
    epoch_key = mix(mix(seed) ^ mix(epoch))
    keys = [mix((epoch_key + i + 1) & mask) for i in range(ROUNDS)]
    bits = max((num_samples - 1).bit_length(), 6)
    low_bits = bits // 2
    while True:
        high, low = value >> low_bits, value & (2**low_bits - 1)
        for i, key in enumerate(keys):
            if i % 2 == 0:
                high ^= mix(low ^ key) & (2 ** (bits - low_bits) - 1)
            else:
                low ^= mix(high ^ key) & (2**low_bits - 1)
        value = high << low_bits | low
        if value < num_samples:
            return value


def test_golden_values():
    for (num_samples, seed, first), expected in GOLDEN.items():
        positions = np.arange(first, first + len(expected))
        assert Order(num_samples, seed).at(positions).tolist() == expected


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 65, 1000, 2**33 + 5])
@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
def test_equals_the_plain_definition(num_samples, seed):
    positions = [0, 1, 2, num_samples - 1, num_samples, 3 * num_samples + 1]
    expected = [plain(num_samples, seed, p) for p in positions]
    assert Order(num_samples, seed).at(positions).tolist() == expected


def test_small_sizes_are_permutations_and_epochs_differ():
    for n in range(1, 51):
        for seed in (0, 1):
            epochs = Order(n, seed).at(np.arange(5 * n)).reshape(5, n)
            assert (np.sort(epochs, axis=1) == np.arange(n)).all()
            if n >= 8:
                assert len({tuple(e) for e in epochs.tolist()}) == 5


@pytest.mark.parametrize("n", [1023, 1024, 1025, 100_003])
def test_large_sizes_are_permutations(n):
    assert (np.sort(Order(n, 3).at(np.arange(n, 2 * n))) == np.arange(n)).all()


def test_any_division_of_the_positions_gives_the_same():
    order = Order(1000, 5)
    whole = order.at(np.arange(2500))
    assert np.array_equal(
        whole, np.concatenate([order.at(np.arange(i, i + 100)) for i in range(0, 2500, 100)])
    )
    assert order.at(1234).shape == () and order.at(1234) == whole[1234]
    assert order.at([]).tolist() == []
    assert order.at(np.arange(6).reshape(2, 3)).tolist() == whole[:6].reshape(2, 3).tolist()


def test_small_permutations_are_equally_likely():
    table = Order(3, 0).at(np.arange(3 * 6000)).reshape(-1, 3)
    _, counts = np.unique(table, axis=0, return_counts=True)
    assert len(counts) == 6
    chi2 = sum((c - 1000) ** 2 / 1000 for c in counts)
    assert chi2 < 20.5, counts  # 5 degrees of freedom, p = 0.001


def test_positions_are_uniform_over_epochs():
    n, epochs = 100, 4000
    places = np.argsort(Order(n, 1).at(np.arange(n * epochs)).reshape(epochs, n), axis=1)
    mean, spread = places.mean(axis=0), np.sqrt((n**2 - 1) / 12 / epochs)
    assert np.abs(mean - (n - 1) / 2).max() < 4.5 * spread
    counts = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    # (n - 1)^2 degrees of freedom for a doubly stochastic table.
    assert abs(chi2 - (n - 1) ** 2) < 5 * np.sqrt(2 * (n - 1) ** 2)


def test_neighbours_and_fixed_points_are_as_in_random_permutations():
    n, epochs = 97, 3000
    table = Order(n, 2).at(np.arange(n * epochs)).reshape(epochs, n)
    fixed = (table == np.arange(n)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 4.5 / np.sqrt(epochs)
    successors = (np.diff(table, axis=1) == 1).sum(axis=1)  # expected (n - 1) / n a permutation
    assert abs(successors.mean() - (n - 1) / n) < 4.5 / np.sqrt(epochs)
    rising = (np.diff(table, axis=1) > 0).mean()
    assert abs(rising - 0.5) < 4.5 * np.sqrt(1 / 12 / n / epochs)


def test_seeds_give_unrelated_orders():
    first, second = (Order(10_000, seed).at(np.arange(10_000)) for seed in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (first == second).sum() < 10


@pytest.mark.parametrize(
    ("num_samples", "seed"), [(0, 0), (-1, 0), (2**62, 0), (5, -1), (5, 2**64)]
)
def test_refuses_what_has_no_order(num_samples, seed):
    with pytest.raises(ValueError, match="found"):
        Order(num_samples, seed)
    with pytest.raises(ValueError, match="from 0"):
        Order(5, 0).at([-1])
