"""Micro-batches that are tried, not trained: what size fits and is fast, and what one replica does alone.

A trial runs forward and backward passes whose gradients are thrown away; weights, optimizer and
buffers are as before.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from unisono.sync import Strategy
from unisono.sync.ledger import Group

Pass = Callable[[int], None]
"""Forward and backward pass of a micro-batch of so many rows."""

GAIN = 0.97
"""A larger micro-batch is taken when a row costs at most this much of what it cost before."""


def is_out_of_memory(error: BaseException) -> bool:
    """GPU or host memory ran out. torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


def try_pass(run: Pass, rows: int, sync: Strategy, device: str) -> float | None:
    """Seconds of one micro-batch, or None when memory ran out. Leaves no gradient behind."""
    began = time.perf_counter()
    try:
        with sync.micro_batch(last=False):
            run(rows)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        sync.discard()
        if device != "cpu":
            torch.cuda.empty_cache()


def find_micro_batch(run: Pass, largest: int, sync: Strategy, group: Group, device: str) -> int:
    """Collective: the micro-batch size with the cheapest row among 1, 2, 4, ... `largest`.

    Sizes grow until memory runs out on any rank, the next one would not fit into the host's free
    memory, or rows get no cheaper. 0 when not even one row fits. Not for a strategy in `lockstep`:
    a rank whose memory runs out would leave the others waiting.
    """
    assert not sync.lockstep
    best, best_cost = 0, float("inf")
    for rows in _sizes(largest):
        before = psutil.virtual_memory().available
        seconds = [try_pass(run, rows, sync, device) for _ in range(3)]
        grown = max(0, before - psutil.virtual_memory().available)
        failed = any(s is None for s in seconds)
        fastest = min((s for s in seconds if s is not None), default=0.0)
        tight = device == "cpu" and psutil.virtual_memory().available < 3 * grown
        table = group.each(float(failed), fastest, float(tight))
        if table[:, 0].any():
            break
        cost = float(table[:, 1].max()) / rows
        if cost < best_cost * GAIN:
            best, best_cost = rows, cost
        elif cost > best_cost * 1.1:
            break
        if table[:, 2].any():
            break
    return best


def _sizes(largest: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == largest else [*sizes, largest]


def seconds_of_pass(run: Pass, rows: int, model: nn.Module, device: str) -> float:
    """Of a micro-batch on a model that no strategy has yet; infinite when memory ran out."""
    took = math.inf
    try:
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            run(rows)
            if device != "cpu":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            model.zero_grad()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        took = math.inf
    model.zero_grad()
    return took


@dataclass(frozen=True)
class Baseline:
    """Median seconds of one micro-batch without communication."""

    alone_s: float
    """Rank 0 while all other replicas stand still: what one replica would do."""
    together_s: float
    """All replicas at once: they share memory bandwidth, caches and power."""


def measure_baseline(
    run: Pass, rows: int, repeats: int, sync: Strategy, group: Group, device: str
) -> Baseline | None:
    """Collective: time `repeats` micro-batches of `rows`, first on rank 0 alone, then on all.

    None when `repeats` is 0, memory ran out, or no rank can run alone.
    """
    if repeats == 0 or sync.lockstep:
        return None

    def timed() -> float:
        samples = [try_pass(run, rows, sync, device) for _ in range(repeats + 1)][1:]
        seconds = [s for s in samples if s is not None]
        return statistics.median(seconds) if len(seconds) == repeats else math.nan

    alone = timed() if group.rank == 0 else 0.0
    alone = group.sum(alone)[0]
    together = float(group.each(timed()).mean()) if group.size > 1 else alone
    return None if math.isnan(alone + together) else Baseline(alone, together)
