"""One optimizer step of a job: taken on all ranks, skipped on all ranks, or repeated on all ranks."""

import gc
from dataclasses import dataclass

import torch

from unisono.errors import EXIT_FAILED, Elsewhere, UnisonoError
from unisono.observe.arrival import Stamps
from unisono.plan import with_micro_batch
from unisono.train.job import Job, memory_advice
from unisono.train.schedule import factor
from unisono.train.step import find_culprit, take_step
from unisono.train.vote import OUT_OF_MEMORY, Outcome

SKIPS_IN_A_ROW = 10


@dataclass(frozen=True)
class Advanced:
    """A step that all ranks have taken."""

    outcome: Outcome
    learning_rate: float
    gradient_norm: float
    repeat: bool = False
    """Nothing was changed but the plan: take the same step again."""


def advance(job: Job, stamps: Stamps | None = None) -> Advanced | None:
    """Collective: gradients and update of the next step; None if given up for a signal.

    The caller counts the step, and keeps `stamps` from step to step. Raises on every rank when any rank failed.
    """
    config, plan, step = job.config, job.plan, job.progress.step
    if job.online:
        job.sync.settle()  # completions are drawn from whole weights
    taken = take_step(
        step,
        job.feed,
        job.measure,
        job.objective.metrics,
        job.sync,
        job.votes,
        stop=job.stop.is_asked,
        stamps=stamps or Stamps(job.ledger.clock),
        noise=job.noise,
    )
    if taken.outcome is None:
        return None
    if any(taken.outcome.trouble):
        _handle_trouble(job, taken.outcome, taken.error)
        return Advanced(taken.outcome, 0.0, 0.0, repeat=True)
    rate = plan.hyper.learning_rate * factor(
        config.lr_scheduler_type,
        step,
        plan.warmup_steps,
        plan.max_steps,
        config.min_lr_ratio,
        config.decay_ratio,
    )
    norm = _apply(job, taken.outcome, rate)
    squares, spent_s = job.sync.parts.end()
    sizes = job.sync.parts.sizes(taken.counts)
    job.noise.keep(squares, sizes, spent_s, norm, taken.outcome.count)
    return Advanced(taken.outcome, rate, norm)


def _apply(job: Job, outcome: Outcome, rate: float) -> float:
    """Update the weights, or skip the step on all ranks alike; returns the gradient norm."""
    with job.ledger.clock("optimizer"):
        done = job.sync.update(
            divide_by=max(1, outcome.count),
            max_norm=job.config.max_grad_norm,
            learning_rate=rate,
        )
    progress = job.progress
    if done.committed:
        progress.skipped_in_row = 0
        return done.gradient_norm
    progress.skipped += 1
    progress.skipped_in_row += 1
    culprit = find_culprit(progress.step, job.feed, job.measure, job.sync, job.votes)
    job.screen.warn(
        f"step {progress.step + 1}: gradient not finite on {culprit}; the step is skipped on all "
        f"replicas ({progress.skipped_in_row} of {SKIPS_IN_A_ROW} in a row)"
    )
    if progress.skipped_in_row >= SKIPS_IN_A_ROW:
        raise UnisonoError(
            f"step {progress.step + 1}: the gradient was not finite {SKIPS_IN_A_ROW} times in a "
            f"row, last on {culprit}; lower learning_rate or look at those samples"
        ).on_every_rank()
    return done.gradient_norm


def _handle_trouble(job: Job, outcome: Outcome, error: BaseException | None) -> None:
    """Out of memory anywhere: smaller micro-batches everywhere. Anything else: all ranks stop."""
    job.sync.discard()
    failed = [r for r, t in enumerate(outcome.trouble) if t and t != OUT_OF_MEMORY]
    if failed:
        if error is not None:
            raise error
        raise Elsewhere(failed[0], EXIT_FAILED)
    rank = outcome.trouble.index(OUT_OF_MEMORY)
    size = job.plan.micro_batch_size
    if size == 1 or job.config.determinism == "strict":
        raise UnisonoError(
            f"rank {rank} ran out of memory in step {job.progress.step + 1} with micro-batches of "
            f"{size}; {memory_advice()}"
        ).on_every_rank()
    job.plan = with_micro_batch(job.plan, job.config, -(-size // 2))
    job.screen.warn(
        f"step {job.progress.step + 1}: rank {rank} ran out of memory; micro-batches of "
        f"{job.plan.micro_batch_size} instead of {size} from here on, the global batch stays "
        f"{job.plan.global_batch_size}"
    )
    gc.collect()
    if job.world.device != "cpu":
        torch.cuda.empty_cache()
