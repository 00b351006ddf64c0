"""One optimizer step: what N devices compute, send, wait for, in seconds that add up.

A link carries one transfer at a time: bucket i starts when it is ready and the one before has ended,

    end_i = max(end_{i-1}, ready_i) + T_i      (Li 2020, arXiv 2006.15704; PyTorch DDP)

and what ends after the compute it can hide behind is exposed. K equal buckets of a backward pass of t
seconds are ready t/K apart, so max(T, t/K + K T - t) is exposed. Weights that return during the next
forward pass (our `exact`) are the mirror image: bucket i is needed when what lies before it has run.
FSDP gathers layer l+1 while l computes, and in the backward pass also scatters the gradients of l+1
(Zhao 2023, arXiv 2304.11277). What is hidden still costs `contention` of the time that it would take
at the rate inside a node.

`quantized` is `exact` with codes on the wire, and what coding costs (coding.py). With `streaming` a step is that
of a replica alone but for what outer steps add on average (rounds.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

from unisono.codes import wire_bytes_of
from unisono.forecast import coding
from unisono.forecast.architecture import Architecture
from unisono.forecast.compute import Recompute, Stack, Work, layer_work, optimizer_s
from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.hardware import DTYPE_BYTES, Device
from unisono.forecast.network import Fabric, Wire, wire
from unisono.forecast.overlap import Lane, Transfer
from unisono.forecast.rounds import OUTER_BYTES, average_step_s, sent_values

Strategy = Literal["ddp", "exact", "zero1", "zero2", "fsdp", "quantized", "streaming"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "exact", "zero1", "zero2", "fsdp")
"""Those that are equal to one process, but for the order of sums."""


@dataclass(frozen=True)
class Mesh:
    """Ranks by axis; tensor ranks are neighbours, then context, shard, replica, pipeline."""

    replica: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        return self.replica * self.shard * self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replica * self.shard

    @property
    def holders(self) -> int:
        """Ranks whose gradients of the same weights are summed: context ranks see other tokens."""
        return self.data * self.context


@dataclass(frozen=True)
class Run:
    """What is asked: a model, its batch, and how it is spread."""

    model: Architecture
    sequence: int
    micro_batch: int
    accumulation: int
    mesh: Mesh
    strategy: Strategy = "ddp"
    dtype: str = "bf16"
    gradient_bytes: int = 4
    """Of one gradient on the wire."""
    recompute: Recompute = "none"
    recompute_share: float = 1.0
    """Of the layers that `recompute` applies to."""
    bucket_bytes: float = 25 * 2**20
    stack: Stack = "fused"
    flash: bool = True
    weight_bytes: int = 0
    """Of one weight in memory, and where a strategy sends weights; 0: of `dtype`. Unisono keeps 4."""

    scatter_once: bool = False
    """fsdp: gradients stay whole until the last micro-batch (as in sync/sharded.py)."""
    wire: str = ""
    """quantized: bfloat16, int8 or int4; streaming: of deltas."""
    sync_every: int = 1
    """streaming: steps from one synchronization of everything to the next."""
    num_fragments: int = 1
    """streaming: parts that take turns; each has one step to arrive."""

    @property
    def weight_width(self) -> int:
        """Bytes of one weight in memory."""
        return self.weight_bytes or DTYPE_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Of one optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.mesh.data * self.sequence


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by where they go; they add up to `total`."""

    compute: float
    recompute: float
    communication: float
    """Of data-parallel axes, exposed, and what contention costs."""
    tensor: float
    """Of tensor and context parallelism, exposed."""
    bubble: float
    """Pipeline stages without work."""
    optimizer: float
    waiting: float
    """For the slowest rank."""
    other: float

    @property
    def total(self) -> float:
        return (
            self.compute + self.recompute + self.communication + self.tensor
            + self.bubble + self.optimizer + self.waiting + self.other
        )  # fmt: skip


def overlap(ready: Sequence[float], transfer: Sequence[float]) -> float:
    """When the last transfer ends, if number i may start at ready[i] and the link carries one."""
    end = 0.0
    for at, takes in zip(ready, transfer):
        end = max(end, at) + takes
    return end


def exposed_tail(compute: float, buckets: int, each: float) -> float:
    """Seconds after `compute` until `buckets` equal transfers of `each` end; ready as compute goes.

    Equal to overlap([k/K t for k in 1..K], [T] * K) - t.
    """
    return max(each, compute / buckets + buckets * each - compute)


def exposed_head(compute: float, buckets: int, each: float) -> float:
    """Seconds that `compute` loses if its part k needs transfer k, and all set off at its start."""
    return max(each, buckets * each - compute * (buckets - 1) / buckets)


@lru_cache(4096)
def slowest(ranks: int) -> float:
    """Expected maximum of `ranks` standard normal values (Blom 1958)."""
    if ranks == 1:
        return 0.0
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def step(run: Run, device: Device, fabric: Fabric, constants: Constants = DEFAULT) -> Step:
    """Forecast one optimizer step of `run` on `device`s linked by `fabric`."""
    mesh = run.mesh
    work = layer_work(
        run.model,
        device,
        tokens=run.micro_batch * run.sequence,
        sequence=run.sequence,
        dtype=run.dtype,
        recompute=run.recompute,
        stack=run.stack,
        flash=run.flash,
        tensor=mesh.tensor,
        context=mesh.context,
        constants=constants,
    )
    if run.recompute_share < 1:
        work = replace(work, again=work.again * run.recompute_share)
    return compose(run, work, device, fabric, constants)


def compose(
    run: Run, work: Work, device: Device, fabric: Fabric, constants: Constants = DEFAULT
) -> Step:
    """The step, given what one device computes by layer (counted, or measured by a probe)."""
    mesh, model, c = run.mesh, run.model, constants
    k = run.accumulation
    layers = math.ceil(model.layers / mesh.pipeline)
    held = trained_values(run)
    forward = layers * work.forward + work.head_forward
    backward = layers * (work.backward + work.again) + work.head_backward
    add_s = 0.0
    if k > 1:  # gradients of micro-batches are added: read, read, write
        add_s = 3 * run.gradient_bytes * held / device.memory_bytes_per_s
    compute = k * (forward + layers * work.backward + work.head_backward + add_s)
    again = k * layers * work.again

    across = _across(run, work, fabric, layers)
    bubble = 0.0
    if mesh.pipeline > 1:
        hop = wire(fabric, mesh.pipeline, mesh.size // mesh.pipeline).send(
            run.micro_batch * run.sequence * model.hidden * 2 / mesh.tensor / mesh.context
        )
        one = forward + backward + across / k
        bubble = (mesh.pipeline - 1) * (one + 2 * hop) + 2 * k * hop
    sent = _data_parallel(run, fabric, held, layers, forward, backward, work, c)

    owned = held / (1 if run.strategy in ("ddp", "streaming") else owners(run))
    update = optimizer_s(model, device, owned, run.stack, c)
    busy = compute + again + across + bubble + update
    if run.strategy == "streaming":
        sent = _rounds(run, fabric, held, busy, device, c)
    elif run.strategy == "quantized":
        sent += coding.step_s(run.wire, held, mesh.holders, device)
    waiting = slowest(mesh.size) * (c.jitter * (busy + sent) + c.jitter_s)
    return Step(compute, again, sent, across, bubble, update, waiting, c.step_s)


def owners(run: Run) -> int:
    """Ranks over which the optimizer's state is divided, unless by `ddp`, which divides nothing."""
    mesh = run.mesh
    return mesh.shard * mesh.context if run.strategy == "fsdp" or mesh.shard > 1 else mesh.holders


def held_values(run: Run) -> float:
    """Weights of the fullest pipeline stage on one tensor rank, before any sharding."""
    model, stages = run.model, run.mesh.pipeline
    layers = math.ceil(model.layers / stages)
    ends = model.embedding_parameters / (1 if stages == 1 or model.tied else 2)
    return (layers * model.layer_parameters + ends) / run.mesh.tensor


def trained_values(run: Run) -> float:
    """Of `held_values`, those that have gradients."""
    return run.model.adapters or held_values(run)


def _across(run: Run, work: Work, fabric: Fabric, layers: int) -> float:
    """Tensor and context parallelism of all micro-batches: seconds that nothing hides.

    Tensor: all-reduces of the layer's output, 2 forward and 2 backward (Megatron, arXiv 1909.08053),
    2 more where the forward pass is repeated. Context: keys and values go around while attention
    runs, twice as much backward (Ring Attention, arXiv 2310.01889).
    """
    mesh, model = run.mesh, run.model
    total = 0.0
    here = run.micro_batch * run.sequence / mesh.context
    if mesh.tensor > 1:
        t = wire(fabric, mesh.tensor)
        count = 6 if run.recompute == "full" else 4
        total += layers * count * t.all_reduce(here * model.hidden * 2)
    if mesh.context > 1:
        c = wire(fabric, mesh.context, mesh.tensor)
        kv = 2 * 2 * here * mesh.context * model.kv_heads * model.head_size / mesh.tensor
        takes = 3 * c.all_gather(kv)
        hides = (work.forward + work.backward) * 0.5
        total += layers * max(3 * c.all_gather(0), takes - hides)
    return total * run.accumulation


def _data_parallel(
    run: Run,
    fabric: Fabric,
    held: float,
    layers: int,
    forward: float,
    backward: float,
    work: Work,
    c: Constants,
) -> float:
    """Exposed seconds of gradients and weights in one step, with what contention costs."""
    mesh, k = run.mesh, run.accumulation
    if mesh.holders == 1:
        return 0.0
    if fabric.contention is not None:
        c = replace(c, contention=fabric.contention)
    shard = wire(fabric, mesh.shard * mesh.context, mesh.tensor)
    replica = wire(fabric, mesh.replica, mesh.tensor * shard.size)
    if run.strategy == "fsdp":
        return _fsdp(run, held, layers, work, shard, replica, c)
    if run.strategy == "quantized":
        return _quantized(run, fabric, held, forward, backward, c)
    if run.strategy == "streaming":  # needs to know the whole step
        return 0.0

    whole = wire(fabric, mesh.holders, mesh.tensor)
    table = run.model.vocab * run.model.hidden / mesh.tensor * run.gradient_bytes
    if run.model.adapters:  # nothing that is looked up is trained by itself
        table = 0.0
    grads = max(0.0, held * run.gradient_bytes - table)
    buckets = max(1, math.ceil(grads / run.bucket_bytes))
    each = grads / buckets
    if run.strategy == "ddp":
        busy = whole.busy(grads + table, "all_reduce")
        return _hide_behind(
            backward, buckets, whole.all_reduce(each), whole.all_reduce(table), c.contention * busy
        )
    inside = mesh.shard > 1 and mesh.replica > 1  # optimizer shards in a group, copies outside
    group = shard if inside else whole

    def out(size: float) -> float:
        copies = replica.all_reduce(size / shard.size) if inside else 0.0
        return group.reduce_scatter(size) + copies

    def busy_out(size: float) -> float:
        copies = replica.busy(size / shard.size, "all_reduce") if inside else 0.0
        return c.contention * (group.busy(size, "reduce_scatter") + copies)

    if run.strategy == "exact":
        # The table's gradient is early but for the rows that were looked up (sync/rows.py).
        rows = (
            min(run.model.vocab, run.micro_batch * run.sequence) * run.model.hidden * 4
            if table
            else 0
        )
        back = group.all_gather(each)  # weights travel as gradients do (sync/zero.py)
        lost = exposed_head(forward, buckets, back)
        lost += c.contention * group.busy(grads, "all_gather") * _hidden(buckets * back, lost)
        return lost + _hide_behind(
            backward,
            buckets,
            out(each + table / buckets),
            out(rows),
            busy_out(grads + table + rows),
        )
    back = group.all_gather((grads + table) * run.weight_width / run.gradient_bytes)
    reduces = k if run.strategy == "zero2" else 1
    return back + reduces * _hide_behind(
        backward, buckets, out(each), out(table), busy_out(grads + table)
    )


def _quantized(
    run: Run, fabric: Fabric, held: float, forward: float, backward: float, c: Constants
) -> float:
    """As `exact`, each value as `wire_bytes_of(run.wire)` bytes: codes to their owners, and of the sums back."""
    whole = wire(fabric, run.mesh.holders, run.mesh.tensor)
    width = wire_bytes_of(run.wire)
    table = 0.0 if run.model.adapters else run.model.vocab * run.model.hidden
    values = max(0.0, held - table)
    buckets = max(1, math.ceil(4 * values / run.bucket_bytes))
    each = width * values / buckets
    looked_up = min(run.model.vocab, run.micro_batch * run.sequence) * run.model.hidden
    rows = min(width, 4) * looked_up if table else 0.0
    back = whole.all_gather(each)
    lost = exposed_head(forward, buckets, back)
    lost += c.contention * whole.busy(width * values, "all_gather") * _hidden(buckets * back, lost)
    out = whole.all_to_all(each + width * table / buckets)
    busy = c.contention * whole.busy(width * (values + table) + rows, "all_to_all")
    return lost + _hide_behind(backward, buckets, out, whole.all_to_all(rows), busy)


def _rounds(
    run: Run, fabric: Fabric, held: float, step_s: float, device: Device, c: Constants
) -> float:
    """What coming together every `run.sync_every` steps adds to a step of `step_s`, on average."""
    n = run.mesh.holders
    if n == 1:
        return 0.0
    whole = wire(fabric, n)
    payload = held / run.num_fragments * wire_bytes_of(run.wire)
    seconds = whole.all_to_all(payload) + whole.all_gather(payload)
    if n == 2:  # each to the other
        seconds = whole.all_gather(2 * payload)
    contention = c.contention if fabric.contention is None else fabric.contention
    sent = sent_values(payload, n, False)
    beside_s = contention * sent / whole.inside_bytes_per_s
    lane = Lane(0.0, whole.bytes_per_s["all_gather"], 1 - min(0.95, beside_s / seconds))
    handling_s = coding.round_s(run.wire, held, n, device)
    average = average_step_s(
        step_s, Transfer(seconds, lane),
        every=run.sync_every, fragments=run.num_fragments, delay=1,
        vote_s=whole.latency_s["all_reduce"],
        handling_s=handling_s + OUTER_BYTES * held / device.memory_bytes_per_s,
    )  # fmt: skip
    return average - step_s


def _hidden(transfer: float, exposed: float) -> float:
    """Share of a transfer."""
    return max(0.0, 1 - exposed / transfer) if transfer else 0.0


def _hide_behind(compute: float, buckets: int, each: float, last: float, busy: float) -> float:
    """Exposed: equal buckets as the backward pass goes, and `last`, which is ready at its end.

    `busy`: what compute loses if all of it is hidden.
    """
    lost = max(0.0, exposed_tail(compute, buckets, each)) + last
    return lost + busy * _hidden(buckets * each + last, lost)


def _fsdp(
    run: Run, held: float, layers: int, work: Work, shard: Wire, replica: Wire, c: Constants
) -> float:
    """Exposed by all micro-batches: weights gathered for each pass, gradients scattered in backward.

    With prefetch of one layer the layer takes max(compute, transfer); what is gathered first and
    scattered last, the embeddings, stands alone. Copies (HSDP) are summed once a step, beside the last
    backward pass but for the embeddings'.
    """
    width = run.weight_width
    unit = run.model.layer_parameters / run.mesh.tensor
    root = max(0.0, held - layers * unit)
    gather = shard.all_gather(unit * width)
    scatter = shard.reduce_scatter(unit * run.gradient_bytes)
    scatter_root = shard.reduce_scatter(root * run.gradient_bytes)

    gather_busy = shard.busy(unit * width, "all_gather")
    scatter_busy = shard.busy(unit * run.gradient_bytes, "reduce_scatter")

    def copied(values: float) -> float:
        return values * run.gradient_bytes / shard.size if run.mesh.replica > 1 else 0.0

    def copies(values: float) -> float:
        return replica.all_reduce(copied(values)) if run.mesh.replica > 1 else 0.0

    def exposed(compute: float, transfer: float, busy: float) -> float:
        lost = max(0.0, transfer - compute)
        return lost + c.contention * busy * _hidden(transfer, lost)

    back = work.backward + work.again
    forward = layers * exposed(work.forward, gather, gather_busy) + shard.all_gather(root * width)
    behind = layers * exposed(back, gather, gather_busy)
    both, both_busy = gather + scatter, gather_busy + scatter_busy
    if not run.scatter_once:
        behind = layers * exposed(back, both, both_busy) + scatter_root
    copy_busy = replica.busy(copied(unit), "all_reduce")
    last = layers * exposed(back, both + copies(unit), both_busy + copy_busy)
    last += scatter_root + copies(root)
    return run.accumulation * forward + (run.accumulation - 1) * behind + last
