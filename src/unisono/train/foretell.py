"""A run's own forecast, made before its first step, and what became of it: forecast.json.

Of strategies that do not send in every step what is foretold is a step on average over the run: time by
forecast/rounds.py, bytes counted over all steps that are left. What codecs, Muon and PowerSGD's products cost is
timed here, on this run's own shapes.

Known at the start are the plan, the link (a probe's, or the quick look that chose the buckets), and
the pass: a probe of this very model and micro-batch, or the baseline that every run times without
communication (then what ranks wait for the slowest is the cost model's jitter). forecast/replay.py
makes a step of them. At the end the measurement is written beside it; the forecast itself is never
touched again.
"""

import statistics
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from unisono.clock import STEP_PHASES
from unisono.codes import wire_bytes_of
from unisono.forecast.overlap import Lane, Segment, Transfer, play
from unisono.forecast.probe import Probe
from unisono.forecast.replay import Foretold, Passes, System, Tensors, foretell
from unisono.forecast.rounds import OUTER_BYTES, average_step_s
from unisono.observe.environment import memory_bytes, peak_memory_bytes
from unisono.observe.noise import Meter
from unisono.observe.receipt import Receipt
from unisono.probe.rates import memory_bytes_per_s, synchronize
from unisono.sync.codec import make_codec
from unisono.sync.link import NARROW_BUSY_S, measure_link
from unisono.sync.outer import gathers, sent_bytes
from unisono.sync.powersgd import PowerSGD
from unisono.sync.streaming import Streaming
from unisono.sync.zero import TABLE_BYTES, TABLE_SHARE
from unisono.train.facts import codec_s, lanes_on, muon_s, quick_passes, tensors_of
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
    extra = _extra(job, tensors)
    peak = int(votes.each(_peak_bytes(job, tensors)).max())
    probe = job.probe
    mesh, system, across_s = plan.mesh, _system(job), 0.0
    holders = mesh.shard * mesh.context if system == "sharded" else mesh.holders
    passes, passes_from = None, ""
    if mesh.inner == 1:
        passes, passes_from = _passes(job, baseline, probe, tensors, rate)
    apart = passes is None and (mesh.inner > 1 or system == "sharded")
    if apart and job.config.baseline_steps:
        # Ranks that share samples or weights: what one alone would take is not to be had.
        compute_s, across_s = _shared_pass(job)
        baseline, probe = Baseline(compute_s, compute_s), None
        passes, _ = _passes(job, baseline, probe, tensors, rate)
        passes_from = "micro-batches timed at the start, over the ranks that share them"
    if passes is None:
        return passes_from or _passes(job, None, None, tensors, rate)[1]
    per_core = max(1.0, world.local_size * (world.threads or 1) / cores())
    if probe:  # what it measured was shared already
        per_core /= max(1.0, probe.per_node * probe.threads / cores())
    lanes, lanes_from = lanes_on(probe, link, max(2, holders), world.device, per_core)
    if system == "sharded" and mesh.replica > 1:
        sums = lanes_on(probe, link, mesh.replica, world.device, per_core)[0]
        lanes = {**lanes, "all_reduce": sums["all_reduce"]}
    if job.config.optim == "muon":
        passes = replace(passes, optimizer_s=passes.optimizer_s * _by_adamw(job) + extra.muon_s)
    votes_told = len(pack(Ballot(), 0, world.size, plan.micro_batches, 0)) + Meter.TOLD
    if isinstance(job.sync, Streaming):
        step = _rounds(job, job.sync, passes, lanes, extra, votes_told)
    else:
        found = partial(
            foretell, tensors=tensors, passes=passes, lanes=lanes, ranks=holders,
            bucket_bytes=plan.bucket_mb * 2**20, rows=rows, width=width, votes=votes_told,
        )  # fmt: skip
        step = found(
            system, wire_bytes=wire_bytes_of(job.config.wire), codec_s=extra.encode_s + extra.decode_s,
            bucket_s=NARROW_BUSY_S if world.device == "cpu" else 0.0,
            replicas=mesh.replica if system == "sharded" else 1, gathered=apart,
            everyone=world.size if system == "sharded" else holders,
        )  # fmt: skip
        if system == "shards" and not job.progress.step:
            # Gradients of the first step are whole (sync/exact.py), and then the weights return as ever.
            returned = wire_bytes_of(job.config.wire) * sum(tensors.sizes) * (holders - 1) / holders
            more = found("whole").sent_bytes + returned - step.sent_bytes
            step = replace(step, sent_bytes=step.sent_bytes + more / plan.max_steps)
    if isinstance(job.sync, PowerSGD) and holders > 1:
        step = _low_rank(job, job.sync, passes, lanes, extra, votes_told, step)
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
        peak,
        {"pass": passes_from, "link": lanes_from, **extra.sources},
    )


@dataclass(frozen=True)
class Extra:
    """Seconds of what only some strategies and optimizers compute; means over ranks."""

    encode_s: float = 0.0
    decode_s: float = 0.0
    """Of as many values as the model trains."""
    muon_s: float = 0.0
    products_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """PowerSGD: M Q; orthonormal P and M^T P; P Q^T."""
    sources: dict[str, str] = field(default_factory=dict)


def _extra(job: Job, tensors: Tensors) -> Extra:
    """Collective: timed here, on shapes of this run."""
    sync, device, sources = job.sync, job.world.device, {}
    encode_s = decode_s = muon = 0.0
    products_s = (0.0, 0.0, 0.0)
    codec = sync.outer.codec if isinstance(sync, Streaming) else None
    if job.config.sync == "quantized":
        codec = make_codec(job.config.wire)
    if codec is not None and job.world.size > 1:
        encode_s, decode_s = codec_s(codec, tensors.total, device)
        sources["codec"] = f"{codec.name}, timed at the start"
    if job.config.optim == "muon":
        muon = muon_s(job.model, device)
        sources["optimizer"] = "a step of Muon on a matrix of each shape, timed at the start"
    if isinstance(sync, PowerSGD) and job.world.size > 1:

        def clock() -> float:
            synchronize(device)
            return time.perf_counter()

        sync.rehearse(clock)  # warms up
        products_s = sync.rehearse(clock)
        sources["products"] = "PowerSGD's, timed at the start"
    own = job.votes.each(encode_s, decode_s, muon, *products_s).mean(dim=0).tolist()
    return Extra(own[0], own[1], own[2], (own[3], own[4], own[5]), sources)


def _by_adamw(job: Job) -> float:
    """Of what is trained, the share that Muon leaves to AdamW."""
    assert job.facts is not None
    return 1 - job.facts.orthogonal / max(1, job.facts.trainable)


def _rounds(
    job: Job, sync: Streaming, passes: Passes, lanes: dict[str, Lane], extra: Extra, votes: int
) -> Foretold:
    """A step on average where replicas step alone and come together every so many steps."""
    rule, n = sync.outer, sync.replicas
    compute_s = passes.accumulation * (passes.forward_s + passes.backward_s)
    alone_s = compute_s + passes.optimizer_s + passes.waiting_s
    steps = job.plan.max_steps - job.progress.step
    sent = steps * _all_reduced(8 * (votes + 1), n)
    handling_s = OUTER_BYTES / 8 * passes.pack_s
    total_s, parts = 0.0, sync.fragment_values
    for k, values in enumerate(parts):
        if n == 1:
            total_s += alone_s + handling_s / rule.sync_every
            continue
        nbytes = sent_bytes(values, n, rule.codec, rule.only_gather)
        sent += nbytes * rule.times(k)
        at_once = gathers(values, n, rule.codec, rule.only_gather)
        lane = lanes["all_gather"]
        seconds = lane.seconds(nbytes)
        if not at_once:
            seconds = lanes["all_to_all"].seconds(nbytes / 2) + lane.seconds(nbytes / 2)
        encodes, decodes = (1.0, n) if at_once else (1 + 1 / n, 2)
        share = values / sum(parts) * len(parts)  # of the mean fragment
        total_s += average_step_s(
            alone_s, Transfer(seconds, lane),
            every=rule.sync_every, fragments=len(parts), delay=rule.fragment_sync_delay,
            vote_s=lanes["all_reduce"].latency_s,
            handling_s=share * (encodes * extra.encode_s + decodes * extra.decode_s + handling_s),
        )  # fmt: skip
    return Foretold(
        compute_s,
        total_s / len(parts) - alone_s,
        passes.waiting_s,
        passes.optimizer_s,
        sent / steps,
    )


def _low_rank(
    job: Job, sync: PowerSGD, passes: Passes, lanes: dict[str, Lane], extra: Extra, votes: int,
    exact: Foretold,
) -> Foretold:  # fmt: skip
    """A step on average over those that are left: the first ones are `exact`, in the others thin products
    travel one after the other behind the backward pass, and what travels whole beside the first of them."""
    n, (whole, _, p, q) = sync.replicas, sync.values
    lane = lanes["all_reduce"]
    rest, lefts, rights = (
        Transfer(lane.seconds(_all_reduced(4 * v, n)), lane) for v in (whole, p, q)
    )
    left_s, right_s, sum_s = extra.products_s
    compute_s = passes.accumulation * (passes.forward_s + passes.backward_s)
    copies_s = 2 * passes.pack_s  # norms; into flat memory and back, or added to what is left
    segments = [
        Segment(compute_s + copies_s, sends=(0,)), Segment(left_s, sends=(1,)), Segment(0.0, needs=(1,)),
        Segment(right_s, sends=(2,)), Segment(0.0, needs=(2,)), Segment(sum_s),
    ]  # fmt: skip
    lost_s = play(segments, [rest, lefts, rights]) - compute_s
    scalars = 8 * (votes + len(sync.params))
    sent = sum(_all_reduced(b, n) for b in (scalars, 4 * whole, 4 * p, 4 * q))
    steps = job.plan.max_steps - job.progress.step
    first = min(1.0, sync.exact_steps / steps)
    return Foretold(
        compute_s,
        first * exact.communication + (1 - first) * lost_s,
        passes.waiting_s,
        passes.optimizer_s,
        first * exact.sent_bytes + (1 - first) * sent,
    )


def _all_reduced(nbytes: int, ranks: int) -> int:
    """Bytes that a rank sends, as the ledger counts them."""
    return 2 * nbytes * (ranks - 1) // ranks


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
    if sync in ("streaming", "sparse", "powersgd"):
        return "whole"
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


def _peak_bytes(job: Job, tensors: Tensors) -> float:
    """Of this process. A pass has been made without communicating, and what the strategy keeps is there: the
    peak so far and what is new in a step, or what is there now and all that the update needs at once."""
    device, new = job.world.device, _state_bytes(job, tensors, _system(job))
    under_way, at_once = _passing_bytes(job, tensors)
    return max(peak_memory_bytes(device) + new + under_way, memory_bytes(device) + new + at_once)


def _passing_bytes(job: Job, tensors: Tensors) -> tuple[int, int]:
    """(beside a forward and backward pass, in the update) what a strategy holds for a while."""
    sync = job.sync
    if isinstance(sync, Streaming):
        n, rule, largest = sync.replicas, sync.outer, max(sync.fragment_values)
        if n == 1:
            return 0, 8 * largest
        codes = 2 * n * rule.codec.encoded_bytes(-(-largest // n))
        if gathers(largest, n, rule.codec, rule.only_gather):
            codes = (n + 1) * rule.codec.encoded_bytes(largest)
        return codes * bool(rule.fragment_sync_delay), codes + 8 * largest
    if isinstance(sync, PowerSGD) and sync.replicas > 1:
        whole, m, *_ = sync.values
        return 0, 4 * (tensors.total + whole + 2 * m)  # gradients, those that go whole, M, the sums
    return 0, 0


def _state_bytes(job: Job, tensors: Tensors, system: System) -> int:
    """What comes on top in the first steps: the optimizer's state, and masters of bfloat16 weights."""
    if job.progress.step:  # resumed: it is there
        return 0
    moments = {"adamw": 2, "sgd": int(job.config.momentum > 0), "muon": 2}[job.config.optim]
    mesh = job.plan.mesh
    owners = {"whole": 1, "ddp": 1, "sharded": mesh.shard * mesh.context}.get(system, mesh.holders)
    own = 1 / owners
    narrow = system == "shards" and job.config.wire != "float32"
    sharded = sum(tensors.sizes) + (0 if system == "shards" else tensors.table)
    whole = tensors.table if system == "shards" else 0
    feedback = (1 - own) * tensors.total if system == "shards" and job.config.wire == "int4" else 0
    once = job.facts.orthogonal if job.facts else 0  # Muon has one moment
    return int(4 * ((moments + narrow) * own * sharded + moments * whole + feedback - once))


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
