"""Whose link is slow: what travels between pairs of ranks, one direction at a time.

In each of a few rounds every rank has one partner, at another distance in every round; first the even
ranks send, then the odd ones. A rank's link is as fast as the fastest of its transfers, because the
partner of the others may be the slow one. Two ranks share one link, whose two directions are compared;
the sender is named.

Cost: up to SHIFTS x 2 rounds of transfers of CHUNK_BYTES, 50 ms or one transfer each: 0.1 to 0.3 s,
half a second at 100 Mbit/s. Asked only when communication that nothing hides costs enough (observe/blame.py).
"""

import time
from dataclasses import dataclass
from statistics import median_low

import torch

from unisono.sync.ledger import Group

CHUNK_BYTES = 1 << 20
"""More than a traffic shaper lets through at once."""
SHIFTS, REPEATS = 3, 12
SLOW = 0.6
"""Of the others' bandwidth. notes of operators name a link below 0.7 of the median; this is apart from noise."""
LONG_S = 0.05
"""Transfers are repeated for so long, REPEATS times at most: on a busy machine many are late."""


@dataclass(frozen=True)
class SlowLink:
    """The slowest rank's link beside the others'."""

    rank: int
    bytes_per_s: float
    others: float
    """Median of the others' bytes/s."""

    @property
    def detail(self) -> str:
        return (
            f"moves {_gbit(self.bytes_per_s)} Gbit/s, the other ranks {_gbit(self.others)} Gbit/s"
        )


def find_slow_link(group: Group, device: str) -> SlowLink | None:
    """Collective: the same on every rank; None where no link is much slower than the others."""
    if group.size < 2:
        return None
    table = torch.zeros(group.size, group.size)  # [sender, receiver], bytes/s
    for shift in shifts(group.size):
        for odd in (0, 1):
            for sender, rate in _round(group, shift, odd, device):
                table[sender, (sender + shift) % group.size] = rate
    return slowest(table.tolist())


def shifts(size: int) -> list[int]:
    """Distances of partners, spread over the ranks so that they lie on several hosts."""
    step = max(1, (size - 1) // SHIFTS)
    return sorted({1 + k * step for k in range(SHIFTS) if 1 + k * step < size})


def slowest(table: list[list[float]]) -> SlowLink | None:
    """From bytes/s by sender and receiver, 0 where nothing was measured."""
    size = len(table)
    if size == 2:
        best = [table[0][1], table[1][0]]
    else:
        # Both directions of a rank pass its link; which one is slow is told by the better of each.
        out = [max(row) for row in table]
        into = [max(row[k] for row in table) for k in range(size)]
        best = [min(pair) for pair in zip(out, into, strict=True)]
    rank = min(range(size), key=best.__getitem__)
    others = median_low(b for k, b in enumerate(best) if k != rank)
    return SlowLink(rank, best[rank], others) if 0 < best[rank] < SLOW * others else None


def _round(group: Group, shift: int, odd: int, device: str) -> list[tuple[int, float]]:
    """Collective: (sender, bytes/s) of the ranks that sent; the best of a few times."""
    size, rank = group.size, group.rank
    to, source = (rank + shift) % size, (rank - shift) % size
    sends, receives = rank % 2 == odd, source % 2 == odd
    count = CHUNK_BYTES // 4
    sent = torch.zeros(count if sends else 0, device=device)
    received = torch.zeros(count if receives else 0, device=device)
    sent_rows, received_rows = [0] * size, [0] * size
    sent_rows[to], received_rows[source] = sent.numel(), received.numel()
    best = float("inf")
    began_all = time.perf_counter()
    for _ in range(REPEATS):
        group.barrier()
        began = time.perf_counter()
        group.all_to_all_rows(received, sent, received_rows, sent_rows).wait()
        if device != "cpu":
            torch.cuda.synchronize()
        # What comes back says that all of it has come: a sender's own end does not.
        took = max(group.each(time.perf_counter() - began if receives else 0.0)[to].item(), 0.0)
        best = min(best, took or best)
        if group.sum(float(time.perf_counter() - began_all > LONG_S))[0]:
            break
    rates = group.each(CHUNK_BYTES / best if sends and best < float("inf") else 0.0)
    return [(r, rate) for r, rate in enumerate(rates[:, 0].tolist()) if rate > 0]


def _gbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.3g}"
