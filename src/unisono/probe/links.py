"""Collectives over message sizes from 4 KB to 64 MB, their fit, and every pair of hosts.

Definitions are nccl-tests' (doc/PERFORMANCE.md): S is an all-reduce's buffer, a reduce-scatter's
input, an all-gather's result, what a rank hands in to an all-to-all; algbw = S / t, busbw = algbw
times 2 (n-1)/n for an all-reduce and (n-1)/n for the others. t is the slowest rank's time, the median
of repetitions that each begin at a barrier. (nccl-tests averages repetitions that follow each other.)

The fit is T = latency + factor(n) S / B by least absolute relative deviations, since sizes span four
orders of magnitude. A size is left out once the one before says that it would take MOST_S.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from unisono.forecast.probe import FACTOR, LinkFit, Pair, Timing
from unisono.probe.rates import synchronize
from unisono.sync.ledger import Group, Handle

SIZES = tuple(4096 * 4**k for k in range(8))
"""4 KiB to 64 MiB."""
MOST_S = 1.5
"""What one collective may take."""
BUDGET_S = 0.35
"""For the repetitions of one size."""
REPEATS = 9
ROUNDS = 20
PAIR_BYTES = 4 << 20
BURST_MESSAGE_BYTES = 1 << 20
PAUSE_S = 0.1
SHAPED = 0.9
"""A message after a pause that takes less than this of one right behind another: the link is shaped."""
SLOW = 0.7
"""Of the median: below it a pair of hosts or a rank is named."""


def start(group: Group, collective: str, nbytes: int, device: str) -> Callable[[], Handle]:
    """A function that sets one collective of `nbytes`, as nccl-tests count them, on its way.

    Collective is what it returns: every rank must call it alike.
    """
    n = group.size
    count = max(1, nbytes // 4 // n)
    whole = torch.zeros(n * count, device=device)
    other = torch.zeros(n * count if collective == "all_to_all" else count, device=device)
    calls: dict[str, Callable[[], Handle]] = {
        "all_reduce": lambda: group.all_reduce(whole),
        "reduce_scatter": lambda: group.reduce_scatter(other, whole),
        "all_gather": lambda: group.all_gather(whole, other),
        "all_to_all": lambda: group.all_to_all(other, whole),
    }
    return calls[collective]


def time_collectives(
    group: Group, axis: str, world: Group, device: str
) -> tuple[list[Timing], list[str]]:
    """Collective over `world`: all groups of `axis` at once, as a mesh uses them; and what was left out.

    Times are the slowest rank's of the whole world.
    """
    found: list[Timing] = []
    left_out: dict[str, str] = {}
    for collective, factor in FACTOR.items():
        last_s = 0.0
        for size in SIZES:
            if 4 * last_s > MOST_S:  # four times the bytes
                left_out[_dashed(collective)] = f"{found[-1].bytes >> 20} MiB"
                break
            last_s = _seconds(start(group, collective, size, device), world, device)
            algbw = size / last_s
            found.append(
                Timing(
                    operation=_dashed(collective), axis=axis, ranks=group.size, bytes=size,  # type: ignore[arg-type]
                    seconds=last_s, algbw_GBps=algbw / 1e9, busbw_GBps=algbw * factor(group.size) / 1e9,
                )
            )  # fmt: skip
    sizes = ", ".join(f"{name} at {size}" for name, size in left_out.items())
    return found, [
        f"{axis}: sizes end where the link is too slow for more: {sizes}"
    ] if sizes else []


def _seconds(begin: Callable[[], Handle], world: Group, device: str) -> float:
    """Collective: median over repetitions of the slowest rank's seconds."""
    times: list[float] = []
    spent_s = 0.0
    while len(times) <= REPEATS and (len(times) < 2 or spent_s < BUDGET_S):
        world.barrier()
        began = time.perf_counter()
        begin().wait()
        synchronize(device)
        mine = time.perf_counter() - began
        times.append(float(world.each(mine).max()))
        spent_s += times[-1]
    return statistics.median(times[1:])


def burst_bytes(group: Group, device: str) -> float:
    """Collective: what a shaped link lets through at once after a pause; 0 where nothing shapes it."""
    begin = start(group, "all_reduce", BURST_MESSAGE_BYTES, device)
    sent = FACTOR["all_reduce"](group.size) * BURST_MESSAGE_BYTES
    shares: list[float] = []
    for _ in range(REPEATS):
        time.sleep(PAUSE_S)  # a bucket of tokens fills
        times = []
        for _ in range(2):
            group.barrier()
            began = time.perf_counter()
            begin().wait()
            synchronize(device)
            times.append(time.perf_counter() - began)
        first, second = group.each(*times).amax(dim=0).tolist()
        shares.append(first / second)
    share = statistics.median(shares)
    return sent * (1 - share) if share < SHAPED else 0.0


def fit(timings: Sequence[Timing], nodes: int, burst: float = 0.0) -> list[LinkFit]:
    """A latency and a bus bandwidth for each collective and axis among `timings`.

    `burst`: bytes that a shaped link lets through at once.
    """
    groups: dict[tuple[str, str], list[Timing]] = {}
    for t in timings:
        groups.setdefault((t.axis, t.operation), []).append(t)
    return [
        _fit_one(operation.replace("-", "_"), axis, rows, 1 if axis == "node" else nodes, burst)
        for (axis, operation), rows in groups.items()
    ]


def _fit_one(
    collective: str, axis: str, rows: Sequence[Timing], nodes: int, burst: float
) -> LinkFit:
    """Least absolute relative deviations of T = a + b S, by least squares that are weighted anew.

    A single disturbed size then does not move the line. What passes in a burst shows the latency alone,
    and what does not the bandwidth.
    """
    x = [t.bytes * FACTOR[collective](t.ranks) for t in rows]
    y = [t.seconds for t in rows]
    at_once = [b for a, b in zip(x, y) if a < burst]
    behind = [(a, b) for a, b in zip(x, y) if a >= burst]
    if at_once and behind:
        latency = min(at_once)
        slope = statistics.median(max(b - latency, 0.01 * b) / a for a, b in behind)
        error = statistics.median(abs(latency + slope * a - b) / b for a, b in behind)
        return LinkFit(
            collective=collective, axis=axis, ranks=rows[0].ranks, nodes=nodes,  # type: ignore[arg-type]
            latency_s=latency, bytes_per_s=1 / slope, error=error,
        )  # fmt: skip
    weights = [1 / t**2 for t in y]
    for _ in range(ROUNDS):
        latency, slope = _line(weights, x, y)
        off = [abs(latency + slope * a - b) / b for a, b in zip(x, y)]
        weights = [1 / b**2 / max(d, 0.01) for b, d in zip(y, off)]
    return LinkFit(
        collective=collective, axis=axis, ranks=rows[0].ranks, nodes=nodes,  # type: ignore[arg-type]
        latency_s=latency, bytes_per_s=1 / slope, error=statistics.median(off),
    )  # fmt: skip


def _line(w: Sequence[float], x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Weighted least squares: (latency, slope), both at least 0."""
    total, sx, sy = sum(w), _dot(w, x), _dot(w, y)
    sxx, sxy = sum(c * a * a for c, a in zip(w, x)), sum(c * a * b for c, a, b in zip(w, x, y))
    spread = total * sxx - sx * sx
    slope = (total * sxy - sx * sy) / spread if spread > 0 else 0.0
    latency = (sy - slope * sx) / total
    if slope > 0 and latency >= 0:
        return latency, slope
    return 0.0, sxy / sxx  # too noisy, or no latency to see


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def time_pairs(world: Group, nodes: Sequence[int], device: str) -> list[Pair]:
    """Collective: bytes/s from every host to every other; in round k host h sends to host h + k.

    The first rank of each host sends PAIR_BYTES, all hosts at once, so that a slow one shows.
    """
    count = max(nodes) + 1
    firsts = [nodes.index(node) for node in range(count)]
    mine = firsts.index(world.rank) if world.rank in firsts else None
    block = torch.zeros(PAIR_BYTES // 4, device=device)
    into = torch.empty_like(block)
    pairs = []
    for k in range(1, count):
        target = source = None
        if mine is not None:
            target, source = firsts[(mine + k) % count], firsts[(mine - k) % count]
        sends = [len(block) if r == target else 0 for r in range(world.size)]
        receives = [len(block) if r == source else 0 for r in range(world.size)]
        took: list[float] = []
        for _ in range(3):
            world.barrier()
            began = time.perf_counter()
            world.all_to_all_rows(
                into[: sum(receives)], block[: sum(sends)], receives, sends
            ).wait()
            synchronize(device)
            took.append(time.perf_counter() - began)
        best = world.each(min(took))[:, 0].tolist()
        pairs += [
            Pair(source=h, target=(h + k) % count, bytes_per_s=PAIR_BYTES / best[firsts[(h + k) % count]])
            for h in range(count)
        ]  # fmt: skip
    return pairs


def slow_pairs(pairs: Sequence[Pair]) -> list[str]:
    """One line for each pair of hosts below SLOW of the median."""
    if len(pairs) < 2:
        return []
    middle = statistics.median(p.bytes_per_s for p in pairs)
    return [
        f"slow link: host {p.source} to host {p.target}, {_rate(p.bytes_per_s)} where the median pair has "
        f"{_rate(middle)}"
        for p in pairs
        if p.bytes_per_s < SLOW * middle
    ]


def slow_ranks(what: str, rates: Sequence[float]) -> list[str]:
    """One line for each rank whose rate is below SLOW of the median, or with two ranks of the other's."""
    middle = statistics.median(rates) if len(rates) > 2 else max(rates, default=0.0)
    return [
        f"slow rank: rank {r} reaches {rate / middle:.0%} of the usual {what}"
        for r, rate in enumerate(rates)
        if rate < SLOW * middle
    ]


def _rate(bytes_per_s: float) -> str:
    bits = 8 * bytes_per_s
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def _dashed(collective: str) -> str:
    return collective.replace("_", "-")
