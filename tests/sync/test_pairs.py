"""The look at the links, on real ranks: rounds pair up, and even links have no slow one."""

import pytest

from ranks import run_ranks


def look(world, slow: int | None):
    import time

    from unisono.sync import pairs
    from unisono.sync.ledger import Group, Ledger

    group = Group("votes", Ledger(), 60)
    original = pairs._round

    def as_if(group, shift, odd, device):
        """Rates as they were, but a tenth of that over the slow rank's link."""
        rates = []
        for sender, rate in original(group, shift, odd, device):
            assert rate > 0
            on_it = slow in (sender, (sender + shift) % group.size)
            rates.append((sender, 1e8 if on_it else 1e9))
        return rates

    pairs._round = as_if
    found = pairs.find_slow_link(group, "cpu")
    senders = {s for shift in pairs.shifts(group.size) for odd in (0, 1) for s, _ in original(group, shift, odd, "cpu")}  # fmt: skip
    assert senders == set(range(group.size)), time.time()
    return found


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("slow", [None, 1])
def test_every_rank_finds_the_same(size: int, slow: int | None) -> None:
    found = run_ranks(look, size, slow)
    assert all(f == found[0] for f in found)
    assert (found[0] and found[0].rank) == slow


def alone(world):
    from unisono.sync.ledger import Group, Ledger
    from unisono.sync.pairs import find_slow_link

    return find_slow_link(Group("votes", Ledger(), 60), "cpu")


def test_one_rank_has_no_link() -> None:
    assert run_ranks(alone, 1) == [None]
