"""The user's own model and batch: forward, backward and optimizer of a plain loop, all ranks at once.

Nothing is communicated between barriers, so this is what one rank computes while it shares memory,
caches and power with its neighbours. The weights are thrown away.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unisono.config import Config
from unisono.forecast.probe import ModelTimes
from unisono.observe.environment import (
    give_back_memory,
    memory_bytes,
    peak_memory_bytes,
    reset_peak_memory,
)
from unisono.observe.screen import Quiet
from unisono.probe.rates import synchronize
from unisono.sync.ledger import Group, Ledger
from unisono.sync.update import by_dimension, clip_factor, global_norm, step
from unisono.train.job import set_up
from unisono.train.state import optimizer_factory
from unisono.train.stopping import Stop
from unisono.world import World

LEAST_STEPS, MOST_STEPS, MOST_S = 6, 20, 10.0


@dataclass(frozen=True)
class Own:
    """The user's model on this rank, ready to be run."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    name: str
    micro_batch: int
    sequence: int
    dtype: str
    gradient_checkpointing: bool = False
    base_memory_bytes: int = 0
    """What this process held before it had the model."""


def own(config: Config, world: World, votes: Group) -> Own:
    """Collective: the model, the micro-batch that `train` would take, and one batch of the data.

    Set up as a run is, in a scratch folder. Raises UnisonoError as `train` does.
    """
    base_bytes = held_bytes(world.device)
    with tempfile.TemporaryDirectory(prefix="unisono-probe-") as scratch:
        plain = config.model_copy(
            update={
                "output_dir": scratch, "resume": "never", "sync": "exact", "mesh": None,
                "shard_optimizer": False, "wire": "float32", "bucket_mb": 4.0, "probe": "none", "report_to": (),
            }
        )  # fmt: skip
        job = set_up(plain, world, Quiet(), Stop(), Ledger(), votes)
        batch = job.train_blocks.read(job.feed.samples(0, votes.rank * job.plan.accumulation))
    job.sync.close()
    factory = optimizer_factory(config, job.plan.hyper, job.model)
    params = [p for p in job.model.parameters() if p.requires_grad]
    kind = config.model if isinstance(config.model, str) else str(config.model["model_type"])
    return Own(
        job.model,
        lambda: job.objective.measure(job.model, batch, world.device, config.bf16).loss,
        factory(*by_dimension(params)),
        Path(kind).name,
        job.plan.micro_batch_size,
        config.sequence_length,
        "bf16" if config.bf16 else "fp32",
        config.gradient_checkpointing,
        base_bytes,
    )


def time_model(mine: Own, group: Group, device: str) -> ModelTimes:
    """Collective: seconds of a pass, mean over ranks of each one's median; and the peak of memory."""
    params = [p for p in mine.model.parameters() if p.requires_grad]
    rows: list[tuple[float, float, float]] = []
    spent_s = 0.0
    for k in range(MOST_STEPS + 2):
        group.barrier()
        times = [time.perf_counter()]
        loss = mine.loss()
        synchronize(device)
        times.append(time.perf_counter())
        loss.backward()
        del loss  # and the graph with it, before the next one is made
        synchronize(device)
        times.append(time.perf_counter())
        _update(params, mine.optimizer)
        synchronize(device)
        times.append(time.perf_counter())
        if k == 1:  # two to warm up: the first makes the optimizer's state
            reset_peak_memory(device)  # trials of larger micro-batches have left theirs
        if k < 2:
            continue
        rows.append((times[1] - times[0], times[2] - times[1], times[3] - times[2]))
        spent_s += float(group.each(times[3] - times[0]).max())
        if len(rows) >= LEAST_STEPS and spent_s > MOST_S:
            break
    peak = peak_memory_bytes(device)
    mine.loss().backward()
    grads = [p.grad for p in params if p.grad is not None]
    pack_s, narrow_s = (_pack_s(grads, dtype, device) for dtype in (None, torch.bfloat16))
    mine.model.zero_grad()
    forward, backward, optimizer = (statistics.median(c) for c in zip(*rows, strict=True))
    whole = [sum(row) for row in rows]
    middle = statistics.median(whole)
    spread = (statistics.quantiles(whole, n=10)[-1] - middle) / middle
    every = group.each(forward, backward, optimizer, spread, float(peak), pack_s, narrow_s)
    mean = every.mean(dim=0).tolist()
    slowest = group.each(*whole).amax(dim=0)
    return ModelTimes(
        model=mine.name,
        parameters=sum(p.numel() for p in mine.model.parameters()),
        micro_batch=mine.micro_batch,
        sequence=mine.sequence,
        dtype=mine.dtype,
        gradient_checkpointing=mine.gradient_checkpointing,
        forward_s=mean[0],
        backward_s=mean[1],
        optimizer_s=mean[2],
        pack_s=mean[5],
        pack_narrow_s=mean[6],
        peak_memory_bytes=int(every[:, 4].max()),
        base_memory_bytes=mine.base_memory_bytes,
        waiting_s=max(0.0, float(slowest.median()) - sum(mean[:3])),
        spread=max(0.0, mean[3]),
    )


def _pack_s(gradients: list[torch.Tensor], dtype: torch.dtype | None, device: str) -> float:
    """Median seconds to copy them all into flat memory of `dtype` (None: their own)."""
    flats = [torch.empty(g.numel(), dtype=dtype or g.dtype, device=device) for g in gradients]
    times = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        for flat, gradient in zip(flats, gradients, strict=True):
            flat.copy_(gradient.reshape(-1))
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def pass_of(mine: Own, device: str) -> Callable[[], None]:
    """Forward and backward pass, for what is timed beside it."""

    def run() -> None:
        mine.loss().backward()
        mine.model.zero_grad()
        synchronize(device)

    return run


def held_bytes(device: str) -> int:
    """Of this process at present (GPU: of what it has allocated there)."""
    gc.collect()
    give_back_memory()
    return memory_bytes(device)


def _update(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """As sync/whole.py does it, at a rate of 0."""
    with torch.no_grad():
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_mul_(grads, clip_factor(global_norm(grads), 1.0, 1.0))
        step(optimizer, 0.0)
        for p in params:
            p.grad = None


def stand_in(device: str) -> Callable[[], None]:
    """Products that take a tenth of a second or so, where no model is given."""
    a = torch.randn(1024, 1024, device=device)
    out: Any = torch.empty_like(a)

    def run() -> None:
        for _ in range(5 if device == "cpu" else 50):
            torch.mm(a, a, out=out)
        synchronize(device)

    return run
