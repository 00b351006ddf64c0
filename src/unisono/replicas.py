"""Data parallelism for a training loop of one's own, for any nn.Module.

    world = unisono.join()
    sync = unisono.replicate(model)
    for x, y in batches:
        x, y = world.share(x, y)
        loss_function(model(x), y, reduction="sum").backward()
        sync.finish(len(y))
        optimizer.step(); optimizer.zero_grad()

Gradients leave while the backward pass runs (sync/exact.py); after `finish` they are the gradients
of the mean over the whole global batch, equal on every replica. A rank that hangs, fails or does
something else than the others is named on standard error and in what they raise (observe/watch.py); one that
is slow, was given more, or is behind a slow link, with what it costs (observe/blame.py). What is read under
`with sync.ledger.clock("data"):` is told apart from computing.
"""

import atexit
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from unisono.errors import UnisonoError
from unisono.observe.account import Account
from unisono.observe.arrival import Stamps, gathered, spread
from unisono.observe.noise import Meter, NoiseScale
from unisono.observe.watch import Watch
from unisono.sync import broadcast_model
from unisono.sync.digest import check_replicas
from unisono.sync.exact import Exact
from unisono.sync.ledger import Group, Ledger
from unisono.sync.update import global_norm


class Replicas:
    """A model's replicas. `ledger` says what was sent and how long it was waited for."""

    def __init__(self, model: nn.Module, bucket_mb: float = 4.0, timeout_s: float = 600.0) -> None:
        self.ledger = Ledger()
        self._watch = Watch.begin(self.ledger)
        atexit.register(self._watch.end_with_program)  # which does not hold the model
        self._model = model
        self._group = Group("replicas", self.ledger, timeout_s)
        broadcast_model(model, self._group)
        self._exact = Exact(model, self.ledger, bucket_mb=bucket_mb, timeout_s=timeout_s)
        self._noise = Meter()
        self._exact.parts.begin(measure=self._noise.due())
        self._steps = 0
        self._stamps = Stamps(self.ledger.clock)
        params = self._exact.params
        sent_bytes = (
            2 * sum(p.numel() * p.element_size() for p in params) * (1 - 1 / self._group.size)
        )
        self._device = "cuda" if any(p.is_cuda for p in params) else "cpu"
        self._account = Account(
            self._group, self._stamps, socket.gethostname(), self._device, sent_bytes
        )
        self._stamps.began()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around each backward pass but the last of a step, to communicate once a step."""
        with self._exact.micro_batch(last=False):
            yield

    @torch.no_grad()
    def finish(self, count: float = 1.0) -> float:
        """Collective: make every parameter's `.grad` the global one; returns the global count.

        The sum of the gradients over replicas (and accumulated passes) is divided by the sum of
        `count` over replicas. With losses that are sums over samples or tokens, `count` is how many
        this replica summed, and may differ among replicas or be 0. With losses that are means over
        equal shares, leave it at 1.
        """
        size, own = self._group.size, self._stamps.period
        if size > 1 and self._device == "cuda":  # until then it computes, and is no arrival
            torch.cuda.current_stream().synchronize()
        # What a loop does between its calls is not known better than that it is this rank's own.
        own = replace(own, compute=own.compute + own.other, other=0.0)
        self._stamps.arrived(count)
        told = self._noise.told()
        total, *sums = self._exact.finish(count, *told, *spread(own, self._group.rank, size))
        self._stamps.left()
        self._noise.hear(sums[: len(told)])
        if size > 1:
            self._follow(sums[len(told) :])
        if total <= 0:
            raise UnisonoError(f"finish(count={count}): the counts of all replicas sum to {total}")
        grads = [p.grad for p in self._exact.params if p.grad is not None]
        if grads:
            torch._foreach_div_(grads, total)
        self._measure(grads, count, total)
        return total

    def verdicts(self) -> list[str]:
        """What was said about slow ranks, uneven counts and slow links so far; equal on all replicas."""
        return list(self._account.events)

    def _follow(self, sums: Sequence[float]) -> None:
        """Collective now and then: the time of all ranks in the step before, and what there is to say."""
        periods = gathered(sums, self._group.size)
        self._stamps.settle(periods, self._group.rank)
        self._steps += 1
        for line in self._account.step(self._steps, periods):
            if self._group.rank == 0:
                print(f"unisono: {line}", file=sys.stderr, flush=True)

    def noise_scale(self) -> NoiseScale | None:
        """The gradient noise scale, in what `count` counts; equal on all replicas. Not collective.

        None with one replica and before enough steps were measured, which takes 0.1% of the time.
        """
        return self._noise.scale()

    def _measure(self, grads: list[torch.Tensor], count: float, total: float) -> None:
        """After a step: keep what was measured, and say whether the next one is."""
        squares, spent_s = self._exact.parts.end()
        if squares:
            began = time.perf_counter()
            norm = global_norm(grads)
            self._noise.keep(squares, [count], spent_s + time.perf_counter() - began, norm, total)
        self._exact.parts.begin(measure=self._noise.due())

    def check(self, step: int = 0) -> None:
        """Collective: raise ReplicaError, naming tensor and rank, if parameters are not equal."""
        check_replicas(self._model.named_parameters(), self._group, step)

    def close(self) -> None:
        """Remove the hooks; the model is an ordinary one again."""
        self._exact.close()
        atexit.unregister(self._watch.end_with_program)
        self._watch.end()


def replicate(model: nn.Module, bucket_mb: float = 4.0, timeout_s: float = 600.0) -> Replicas:
    """Collective: make `model` a replica of rank 0's; call it after `unisono.join()`.

    Parameters and buffers are copied from rank 0. Parameters that need no gradient, tied and unused
    ones are fine; what no replica uses keeps `.grad` None. `bucket_mb`: MiB that travel together.
    """
    if not dist.is_initialized():
        raise UnisonoError("replicate(model): call unisono.join() first")
    return Replicas(model, bucket_mb, timeout_s)
