"""What communication takes from the compute, and compute from the communication.

gloo's threads run on the cores that compute: a hidden transfer is not free. Both activities are timed
alone, P seconds of passes and X seconds of a stream of collectives, then together, from one barrier.
Where the passes end after p seconds and the stream after x, both ran for m = min(p, x), and what was
left of the longer one went at its own speed, so that

    compute speed  = (P - (p - m)) / m       transfer speed = (X - (x - m)) / m

On one core that both need all the time they sum to 1; beside a slow link compute loses little.
"""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from unisono.errors import UnisonoError
from unisono.forecast.probe import FACTOR, Sharing
from unisono.probe.links import start
from unisono.probe.rates import synchronize
from unisono.sync.ledger import Group, Handle

MESSAGES = {"all_reduce": 4 << 20, "all_gather": 1 << 20, "all_to_all": 1 << 20}
"""Bytes that a rank owns of a message, near those of training's buckets and chunks."""
LEAST_MESSAGES, MOST_MESSAGES = 8, 64
FIRST = 2
"""Messages before the clock of the stream's own rate: they go through a shaper's burst (2 MiB at 100 Mbit/s
seem to travel at 106)."""
REPEATS = 3
SHARE = 0.7
"""Of the passes' time that the stream shall take."""


def measure_sharing(
    run: Callable[[], None], pass_s: float, group: Group, device: str
) -> list[Sharing]:
    """Collective: for each collective of MESSAGES; `run` is one pass, which takes `pass_s` alone."""
    found = []
    for collective, own in MESSAGES.items():
        nbytes = own if collective == "all_reduce" else own * group.size
        messages = [start(group, collective, nbytes, device) for _ in range(4)]

        def stream(count: int, messages: list[Callable[[], Handle]] = messages) -> list[Handle]:
            return [messages[i % len(messages)]() for i in range(count)]

        one_s = _alone(stream, 4, group, device)[0] / 4
        count = max(LEAST_MESSAGES, min(MOST_MESSAGES, round(SHARE * pass_s / one_s)))
        passes = max(1, round(count * one_s / SHARE / pass_s))
        pairs, steady = [], []
        for _ in range(REPEATS):
            stream_s, steady_s = _alone(stream, count, group, device)
            steady.append(steady_s)
            compute_s = _compute(run, passes, group, device)
            pairs.append(_together(run, passes, compute_s, stream, count, stream_s, group, device))
        compute, transfer = (statistics.median(p) for p in zip(*pairs, strict=True))
        sent = (count - FIRST) * nbytes * FACTOR[collective](group.size)
        found.append(
            Sharing(
                collective=collective, ranks=group.size, message_bytes=nbytes,  # type: ignore[arg-type]
                bytes_per_s=sent / statistics.median(steady), compute_speed=_share(compute), transfer_speed=_share(transfer),
            )
        )  # fmt: skip
    return found


def _share(speed: float) -> float:
    """Noise may say that one thing is faster beside another."""
    return min(1.0, max(0.01, speed))


def _alone(
    stream: Callable[[int], list[Handle]], count: int, group: Group, device: str
) -> tuple[float, float]:
    """Collective: seconds of `count` messages, and of those after the FIRST, on the slowest rank."""
    group.barrier()
    began = steady = time.perf_counter()
    for k, handle in enumerate(stream(count), 1):
        handle.wait()
        if k == FIRST:
            synchronize(device)
            steady = time.perf_counter()
    synchronize(device)
    ended = time.perf_counter()
    whole_s, steady_s = group.each(ended - began, ended - steady).amax(dim=0).tolist()
    return whole_s, steady_s


def _compute(run: Callable[[], None], passes: int, group: Group, device: str) -> float:
    """Collective: seconds of `passes` on all ranks at once, on this one."""
    group.barrier()
    began = time.perf_counter()
    for _ in range(passes):
        run()
    synchronize(device)
    return time.perf_counter() - began


def _together(
    run: Callable[[], None], passes: int, compute_s: float,
    stream: Callable[[int], list[Handle]], count: int, stream_s: float, group: Group, device: str,
) -> tuple[float, float]:  # fmt: skip
    """Collective: (compute speed, transfer speed) while both run, the mean over ranks.

    A thread waits for the stream, so that its end is known while the passes go on.
    """
    ended: list[float] = []
    failed: list[UnisonoError] = []
    # On a GPU waiting makes a stream wait: not the one that computes.
    own = nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream())
    group.barrier()
    began = time.perf_counter()
    handles = stream(count)

    def wait() -> None:
        try:
            with own:
                for handle in handles:
                    handle.wait()
                if device != "cpu":
                    torch.cuda.current_stream().synchronize()
        except UnisonoError as error:
            failed.append(error)
        ended.append(time.perf_counter() - began)

    waiter = threading.Thread(target=wait)
    waiter.start()
    for _ in range(passes):
        run()
    synchronize(device)
    compute_end = time.perf_counter() - began
    waiter.join()
    if failed:
        raise failed[0]
    mean = group.each(*speeds(compute_s, compute_end, stream_s, ended[0])).mean(dim=0)
    return float(mean[0]), float(mean[1])


def speeds(
    compute_s: float, compute_end: float, stream_s: float, stream_end: float
) -> tuple[float, float]:
    """(compute, transfer) while both ran: what takes `_s` alone ended at `_end` beside the other."""
    both = min(compute_end, stream_end)
    compute = (compute_s - (compute_end - both)) / both
    transfer = (stream_s - (stream_end - both)) / both
    return compute, transfer
