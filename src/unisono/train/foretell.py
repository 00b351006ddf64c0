"""A run's own forecast, made before its first step, and what became of it: forecast.json.

Known at the start are the plan, the link (a probe's, or the quick look that chose the buckets), and
the pass: a probe of this very model and micro-batch, or the baseline that every run times without
communication (then what ranks wait for the slowest is the cost model's jitter). forecast/replay.py
makes a step of them. At the end the measurement is written beside it; the forecast itself is never
touched again.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from unisono.clock import STEP_PHASES
from unisono.codes import wire_bytes_of
from unisono.forecast.probe import Probe
from unisono.forecast.replay import Foretold, Passes, System, Tensors, foretell
from unisono.observe.environment import peak_memory_bytes
from unisono.observe.noise import Meter
from unisono.observe.receipt import Receipt
from unisono.plan import LOCAL
from unisono.probe.rates import memory_bytes_per_s
from unisono.sync.link import NARROW_BUSY_S, measure_link
from unisono.sync.zero import TABLE_BYTES, TABLE_SHARE
from unisono.train.facts import lanes_on, quick_passes, tensors_of
from unisono.train.job import Job
from unisono.train.trial import Baseline
from unisono.train.vote import Ballot, pack
from unisono.world import cores

FILE = "forecast.json"
QUICK_BYTES = 16 << 20
"""To see how fast memory is; more would raise the peak that is foretold."""
LOOKED_AT = 3
"""Steps whose rows of the embedding are counted."""


@dataclass(frozen=True)
class Forecast:
    """Of a step in full swing, as it was known before the first one."""

    step: Foretold
    tokens_per_second: float
    efficiency: float
    memory_bytes: int
    """Peak of the process (GPU: of the device)."""
    sources: dict[str, str]
    """What each part was made of."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by the receipt's phases."""
        s = self.step
        return {
            "compute": s.compute, "communication": s.communication, "waiting": s.waiting,
            "optimizer": s.optimizer,
        }  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        return {
            "step_s": self.step.total,
            "parts": self.parts,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.efficiency,
            "sent_bytes_per_step": self.step.sent_bytes,
            "memory_bytes": self.memory_bytes,
            "sources": self.sources,
        }


def make_forecast(job: Job, baseline: Baseline | None) -> Forecast | str:
    """Collective: before the first step; or why there is none, in a few words.

    Only rank 0 has the probe, so only its answer is the run's.
    """
    if job.online:
        return "how long completions will be is not known"
    if job.config.sync in LOCAL:
        return f"{job.config.sync} sends in some steps and not in others, which is not foretold"
    if job.config.optim == "muon":
        return "what Muon costs is not known"
    if job.config.sync == "powersgd":
        return "powersgd is not foretold"
    plan, votes, world = job.plan, job.votes, job.world
    link = job.link
    if link is None and world.size > 1:
        link = measure_link(votes, world.device)
    tensors = _tensors(job)
    rate = memory_bytes_per_s(world.device, QUICK_BYTES)
    rows = _rows_looked_up(job)
    if rows is None:
        return "a batch could not be read"
    width = job.model.get_input_embeddings().weight.shape[-1]
    peak = int(votes.each(float(peak_memory_bytes(world.device))).max())
    probe = job.probe
    mesh, system, across_s = plan.mesh, _system(job), 0.0
    holders = mesh.holders
    if system == "sharded":
        if mesh.replica * mesh.tensor > 1 or mesh.context > 1:
            return "sharded on a mesh of several axes is not foretold"
        holders = mesh.shard
    if mesh.inner > 1 and job.config.baseline_steps:
        # Ranks that share samples: what one alone would take is not to be had.
        compute_s, across_s = _shared_pass(job)
        baseline, probe = Baseline(compute_s, compute_s), None
    passes, passes_from = _passes(job, baseline, probe, tensors, rate)
    if passes is None:
        return passes_from
    if mesh.inner > 1:
        passes_from = "micro-batches timed at the start, over the ranks that share them"
    per_core = max(1.0, world.local_size * (world.threads or 1) / cores())
    if probe:  # what it measured was shared already
        per_core /= max(1.0, probe.per_node * probe.threads / cores())
    lanes, lanes_from = lanes_on(probe, link, holders, world.device, per_core)
    step = foretell(
        system, tensors, passes, lanes, holders,
        wire_bytes=wire_bytes_of(job.config.wire), bucket_bytes=plan.bucket_mb * 2**20,
        rows=rows, width=width, votes=len(pack(Ballot(), 0, world.size, plan.micro_batches, 0)) + Meter.TOLD,
        bucket_s=NARROW_BUSY_S if world.device == "cpu" else 0.0,
    )  # fmt: skip
    step = replace(
        step,
        communication=step.communication + plan.accumulation * across_s,
        sent_bytes=step.sent_bytes + plan.across_bytes_per_step,
    )
    alone_s = plan.accumulation * (passes.forward_s + passes.backward_s) + passes.optimizer_s
    if baseline:
        alone_s = plan.accumulation * baseline.alone_s + step.optimizer
    tokens = plan.global_batch_size * plan.sample_tokens
    return Forecast(
        step,
        tokens / step.total,
        alone_s / step.total,
        peak + _state_bytes(job, tensors, system),
        {"pass": passes_from, "link": lanes_from},
    )


def _shared_pass(job: Job) -> tuple[float, float]:
    """Collective: (compute, exposed communication) seconds of a micro-batch, mean over ranks."""
    rows = [k % len(job.train_blocks) for k in range(job.plan.micro_batch_size)]
    batch, clock = job.train_blocks.read(rows), job.ledger.clock
    found: list[tuple[float, float]] = []
    for _ in range(job.config.baseline_steps + 1):
        before = clock.read()
        with clock("compute"), job.sync.micro_batch(last=False):
            job.measure(batch).loss.backward()
        job.sync.discard()
        after = clock.read()
        spent = [after.get(p, 0.0) - before.get(p, 0.0) for p in ("compute", "communication")]
        found.append((spent[0], spent[1]))
    warm = found[1:]
    compute_s, across_s = (statistics.median(times) for times in zip(*warm, strict=True))
    means = job.votes.each(compute_s, across_s).mean(dim=0).tolist()
    return means[0], means[1]


def _system(job: Job) -> System:
    sync = job.config.sync
    if sync in ("exact", "quantized"):
        return "shards" if job.plan.shard_optimizer else "whole"
    return "sharded" if sync == "sharded" else "ddp"


def _passes(
    job: Job, baseline: Baseline | None, probe: Probe | None, tensors: Tensors, rate: float
) -> tuple[Passes | None, str]:
    """What one rank computes; or None and why that is not known."""
    plan, config = job.plan, job.config
    seen = probe.model if probe else None
    if probe and seen and (
        (seen.micro_batch, seen.sequence, seen.dtype, seen.gradient_checkpointing, probe.ranks)
        == (plan.micro_batch_size, plan.sequence_length, "bf16" if config.bf16 else "fp32",
            config.gradient_checkpointing, job.world.size)
        and seen.parameters == sum(p.numel() for p in job.model.parameters())
    ):  # fmt: skip
        passes = Passes(
            seen.forward_s, seen.backward_s, seen.optimizer_s, plan.accumulation, seen.waiting_s,
            seen.pack_s, seen.pack_narrow_s,
        )  # fmt: skip
        return passes, "the probe of this model and micro-batch"
    if baseline is None:
        return None, "nothing timed a pass alone; run unisono probe first, or set baseline_steps"
    passes = quick_passes(
        baseline.together_s, plan.accumulation, tensors.total, config.optim, rate, job.world.size
    )
    return passes, "micro-batches timed without communication at the start"


def _tensors(job: Job) -> Tensors:
    system, embedding = _system(job), job.model.get_input_embeddings().weight
    # FSDP fills rows up to multiples of its ranks.
    over = job.plan.mesh.shard * job.plan.mesh.context if system == "sharded" else 1
    by_rows = system != "shards" or _is_table(job, embedding)
    return tensors_of(job.model, over, by_rows, blocks=system == "sharded")


def _is_table(job: Job, weight: torch.Tensor) -> bool:
    """Whether its rows travel by themselves, as sync/zero.py decides in its first step."""
    touched = min(weight.shape[0], job.plan.micro_batch_size * job.plan.sequence_length)
    return bool(
        job.config.shard_optimizer is not True
        and not weight.is_cuda
        and weight.numel() * weight.element_size() >= TABLE_BYTES
        and touched * (job.world.size - 1) <= TABLE_SHARE * weight.shape[0]
    )


def _rows_looked_up(job: Job) -> int | None:
    """Collective: different tokens of a step on the rank that has most, mean over the next steps.

    None where a rank could not read them: the step itself will say so.
    """
    feed = job.feed
    first, last = job.progress.step, min(job.plan.max_steps, job.progress.step + LOOKED_AT)
    leaves = job.plan.leaves(job.world.rank)
    counts = [0.0] * (last - first)
    failed = False
    try:
        for k in range(last - first):
            ids = [feed.batch(first + k, leaf).input_ids.reshape(-1) for leaf in leaves]
            counts[k] = float(len(np.unique(np.concatenate(ids))))
    except Exception:
        failed = True
    table = job.votes.each(float(failed), *counts)
    return None if table[:, 0].any() else round(float(table[:, 1:].amax(dim=0).mean()))


def _state_bytes(job: Job, tensors: Tensors, system: System) -> int:
    """What comes on top in the first steps: the optimizer's state, and masters of bfloat16 weights."""
    moments = {"adamw": 2, "sgd": int(job.config.momentum > 0)}[job.config.optim]
    if job.progress.step:  # resumed: it is there
        return 0
    mesh = job.plan.mesh
    owners = {"whole": 1, "ddp": 1, "sharded": mesh.shard * mesh.context}.get(system, mesh.holders)
    own = 1 / owners
    narrow = system == "shards" and job.config.wire != "float32"
    sharded = sum(tensors.sizes) + (0 if system == "shards" else tensors.table)
    whole = tensors.table if system == "shards" else 0
    feedback = (1 - own) * tensors.total if job.config.wire == "int4" else 0.0
    return int(4 * ((moments + narrow) * own * sharded + moments * whole + feedback))


# --- afterwards


def beside(forecast: Forecast, receipt: Receipt, ddp: bool) -> dict[str, Any]:
    """forecast.json of a finished run; `ddp`: its traffic passes no ledger."""
    peak_bytes = max(receipt.memory_by_rank, default=0)
    stepping_s = receipt.step_ms / 1e3
    mean = {
        phase: sum(rank.get(phase, 0.0) for rank in receipt.seconds_by_rank)
        / receipt.replicas / max(1, receipt.steps)
        for phase in STEP_PHASES
    }  # fmt: skip
    sent = None if ddp else receipt.sent_bytes_per_step
    return {
        **forecast.as_json(),
        "error": forecast.step.total / stepping_s - 1,
        "measured": {
            "step_s": stepping_s,
            "parts": mean,
            "tokens_per_second": receipt.tokens_per_second,
            "efficiency": receipt.efficiency,
            "sent_bytes_per_step": sent,
            "memory_bytes": peak_bytes,
        },
        "errors": {
            "step_s": forecast.step.total / stepping_s - 1,
            "sent_bytes_per_step": forecast.step.sent_bytes / sent - 1 if sent else None,
            "memory_bytes": forecast.memory_bytes / peak_bytes - 1 if peak_bytes else None,
        },
    }


def in_words(facts: dict[str, Any]) -> str:
    """One line for the end of a run."""
    seen, off = facts["measured"], facts["errors"]
    line = (
        f"forecast: {facts['step_s'] * 1e3:.4g} ms a step, measured {seen['step_s'] * 1e3:.4g} "
        f"({off['step_s']:+.1%})"
    )
    if off["sent_bytes_per_step"] is not None:
        line += f"; bytes {off['sent_bytes_per_step']:+.2%}"
    if off["memory_bytes"] is not None:
        line += f"; peak memory {off['memory_bytes']:+.1%}"
    return line
