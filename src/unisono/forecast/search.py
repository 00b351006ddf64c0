"""The best way to run on every number of devices: all strategies, meshes, micro-batches, recomputation.

For each number of devices every mesh (tensor x pipeline x context x shard x replica) that divides the
model and the machine is tried with every strategy. Memory falls with the micro-batch and with
recomputation, so for each of them only the largest micro-batch that fits and the next smaller are timed:
some thousand steps of 20 us for a thousand devices. What does not fit is kept with its reason.

Beside them, and never ranked among them, stand ways of other mathematics (OTHERS): codes on the wire, and
replicas that come together every H steps. What they cost in loss is forecast/penalty.py's.

The global batch stays what the configuration says while every replica has a sequence; beyond, it grows
by one sequence a replica. Buckets begin at sqrt(S c B) as in a run (sync/link.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unisono.codes import wire_bytes_of
from unisono.forecast import penalty
from unisono.forecast.architecture import Architecture
from unisono.forecast.compute import Recompute, Stack, Work, layer_work
from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.cost import STRATEGIES, Mesh, Run, Step, Strategy, compose, trained_values
from unisono.forecast.hardware import Device
from unisono.forecast.memory import Memory, memory
from unisono.forecast.network import Fabric, Line, wire
from unisono.forecast.probe import Probe, calibrated

RECOMPUTE: list[Recompute] = ["none", "selective", "full"]
OURS: list[Recompute] = ["none", "full"]
"""Of them, those of `unisono train`."""
OTHERS: tuple[dict[str, Any], ...] = (
    {"strategy": "quantized", "wire": "bfloat16"},
    {"strategy": "quantized", "wire": "int8"},
    {"strategy": "quantized", "wire": "int4"},
    *(
        {"strategy": "streaming", "wire": "int4", "sync_every": every, "num_fragments": 5}
        for every in (10, 30, 100)
    ),
)
"""Of other mathematics, by how far they leave one process: what `sync: auto` has (forecast/ladder.py)."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, and with what."""

    model: Architecture
    sequence: int
    global_batch: int
    """Sequences of a step."""
    per_device: int | None = None
    """Sequences a device; the global batch then grows with the devices."""
    micro_batch: int | None = None
    dtype: str = "bf16"
    gradient_bytes: int = 4
    weight_bytes: int = 4
    recompute: Recompute | None = None
    """None: whatever is best."""
    stack: Stack = "eager"
    bucket_bytes: float | None = None
    loss_budget: float | None = 0.005
    """Within which other mathematics may be taken; None: not at all."""


@dataclass(frozen=True)
class Machine:
    """Devices, links, and what a probe saw."""

    device: Device
    fabric: Fabric
    probe: Probe | None = None


@dataclass(frozen=True)
class Option:
    """One way to run on `run.mesh.size` devices."""

    run: Run
    step: Step
    memory: Memory
    batch: int
    """Sequences of a step."""

    @property
    def devices(self) -> int:
        return self.run.mesh.size

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.batch * self.run.sequence / self.step.total

    @property
    def name(self) -> str:
        return name_of(self.run)

    @property
    def is_exact(self) -> bool:
        """Equal to one process, but for the order of sums."""
        return self.run.strategy in STRATEGIES

    @property
    def utilization(self) -> float:
        """What a step takes without its data-parallel synchronization over what it takes with it."""
        return 1 - self.step.communication / self.step.total

    @property
    def loss_cost(self) -> float:
        """Relative to exact at equal tokens; 0 for what is equal to one process."""
        run = self.run
        if run.strategy == "streaming":
            return penalty.of_interval(run.mesh.data, run.model.parameters, run.sync_every)
        return penalty.of_rounding(run.wire) if run.strategy == "quantized" else 0.0


@dataclass(frozen=True)
class Misfit:
    """A strategy that no micro-batch and no recomputation fits."""

    name: str
    needs_bytes: float
    """At the least."""
    room_bytes: float

    @property
    def reason(self) -> str:
        return f"needs {self.needs_bytes / 1e9:.1f} GB of {self.room_bytes / 1e9:.1f} GB usable at the least"  # fmt: skip


@dataclass(frozen=True)
class Found:
    """For one number of devices: the best option of each strategy and mesh, best first."""

    devices: int
    options: tuple[Option, ...]
    """Of exact mathematics."""
    misfits: tuple[Misfit, ...]
    evaluated: int
    """Steps that were timed."""
    others: tuple[Option, ...] = ()
    """The best of each other mathematics, in the order of OTHERS."""


def name_of(run: Run) -> str:
    """`fsdp 2 x 8, tensor 4`."""
    mesh = run.mesh
    base: str = run.strategy
    if run.strategy == "fsdp":
        base = f"hsdp {mesh.replica} x {mesh.shard}" if mesh.replica > 1 else f"fsdp {mesh.shard}"
    elif mesh.data > 1:
        base = f"{_method(run)} {mesh.data}"
    axes = (("tensor", mesh.tensor), ("pipeline", mesh.pipeline), ("context", mesh.context))
    extra = "".join(f", {label} {size}" for label, size in axes if size > 1)
    return "one device" if mesh.size == 1 else base + extra


def _method(run: Run) -> str:
    """`quantized int8`, `streaming every 30`."""
    if run.strategy == "streaming":
        return f"streaming every {run.sync_every}"
    if run.strategy == "quantized":
        return f"exact {run.wire}" if run.wire == "bfloat16" else f"quantized {run.wire}"
    return run.strategy


def runs_here(run: Run) -> bool:
    """Whether `unisono train` does this itself."""
    mesh = run.mesh
    known = {"exact", "fsdp"}
    if mesh.tensor == 1:
        known |= {"quantized"}
    if mesh.tensor * mesh.context == 1:
        known |= {"ddp", "streaming"}
    return mesh.pipeline == 1 and run.strategy in known and run.recompute != "selective"


def overrides(option: Option) -> str:
    """What to write behind `unisono train CONFIG`."""
    run = option.run
    words = [f"global_batch_size={option.batch}", f"micro_batch_size={run.micro_batch}"]
    words.append(f"gradient_checkpointing={'true' if run.recompute == 'full' else 'false'}")
    axes = {"context": run.mesh.context, "tensor": run.mesh.tensor}
    axes = {axis: size for axis, size in axes.items() if size > 1}
    if run.strategy == "fsdp":
        words.append("sync=sharded")
        axes = {"replica": run.mesh.replica, "shard": run.mesh.shard, **axes}
    elif run.strategy == "streaming":
        words += [f"sync=streaming wire={run.wire} streaming.sync_every={run.sync_every}"]
        words += [f"streaming.num_fragments={run.num_fragments} streaming.fragment_sync_delay=1"]
    elif run.strategy == "quantized":
        sync = "exact shard_optimizer=true" if run.wire == "bfloat16" else "quantized"
        words += [f"sync={sync} wire={run.wire} bucket_mb={run.bucket_bytes / 2**20:.3g}"]
    else:
        words += [f"sync={run.strategy}", f"bucket_mb={run.bucket_bytes / 2**20:.3g}"]
    words += [f"mesh.{axis}={size}" for axis, size in axes.items()]
    return " ".join(words)


def counts(low: int, high: int) -> list[int]:
    """Numbers of devices to try: powers of two and the middles between them, and both ends."""
    inside = {2**k for k in range(high.bit_length())} | {3 * 2**k for k in range(high.bit_length())}
    return sorted({n for n in inside if low <= n <= high} | {low, high})


def search(job: Job, machine: Machine, devices: int, constants: Constants = DEFAULT) -> Found:
    """Every strategy on `devices` devices; the fastest first, by tokens a second."""
    options: dict[str, Option] = {}
    others: dict[str, Option] = {}
    misfits: list[Misfit] = []
    evaluated = 0
    room = constants.usable_memory * machine.device.memory_bytes
    works: dict[tuple[object, ...], Work] = {}
    for mesh in meshes(job, machine.device, devices):
        batch = job.per_device * devices if job.per_device else max(job.global_batch, mesh.data)
        rows = math.ceil(batch / mesh.data)
        plain = Run(
            job.model, job.sequence, 1, rows, mesh, "exact", job.dtype, job.gradient_bytes,
            bucket_bytes=job.bucket_bytes or 25 * 2**20, stack=job.stack,
            weight_bytes=job.weight_bytes, scatter_once=True,
        )  # fmt: skip
        ways = [{"strategy": strategy} for strategy in strategies(mesh, job.model)]
        for base in [replace(plain, **way) for way in (*ways, *_others(job, mesh))]:
            exact = base.strategy in STRATEGIES
            kinds, known_by = (RECOMPUTE, options) if exact else (OURS, others)
            if job.bucket_bytes is None:
                base = replace(base, bucket_bytes=_bucket(base, machine.fabric))
            fitted = False
            least = math.inf
            for recompute in [job.recompute] if job.recompute else kinds:
                tried = 0
                for micro in [job.micro_batch] if job.micro_batch else _halves(rows, mesh):
                    run = replace(
                        base, micro_batch=min(micro, rows), recompute=recompute,
                        accumulation=math.ceil(rows / min(micro, rows)),
                    )  # fmt: skip
                    held = memory(run)
                    least = min(least, held.total)
                    if held.total > room:
                        continue
                    key = (run.micro_batch, recompute, mesh.tensor, mesh.context)
                    if key not in works:
                        works[key] = _work(run, machine, constants)
                    step = compose(run, works[key], machine.device, machine.fabric, constants)
                    evaluated += 1
                    tried += 1
                    fitted = True
                    option = Option(run, step, held, batch)
                    known = known_by.get(option.name if exact else _method(run))
                    if known is None or option.tokens_per_s > known.tokens_per_s:
                        known_by[option.name if exact else _method(run)] = option
                    if tried == 2:
                        break
            if not fitted and exact:
                misfits.append(Misfit(name_of(base), least, room))
    ranked = sorted(options.values(), key=lambda o: (-o.tokens_per_s, o.memory.total))
    return Found(devices, tuple(ranked), tuple(misfits), evaluated, tuple(others.values()))


def strategies(mesh: Mesh, model: Architecture) -> Sequence[Strategy]:
    """Those that differ on this mesh; adapters leave little to divide."""
    if mesh.data == 1:
        return ("exact",)
    if model.adapters:
        return ("exact", "ddp")
    if mesh.shard > 1:
        return ("fsdp",)
    return ("exact", "ddp", "zero1", "zero2")


def _others(job: Job, mesh: Mesh) -> Sequence[dict[str, Any]]:
    """Of OTHERS, those that run on this mesh; adapters have little to send."""
    apart = mesh.shard * mesh.tensor * mesh.pipeline > 1 or mesh.data == 1
    if job.loss_budget is None or apart or job.model.adapters:
        return ()
    narrow = job.gradient_bytes < 4  # asked for
    return [
        way
        for way in OTHERS
        if (mesh.context == 1 or way["strategy"] == "quantized")
        and not (narrow and way["wire"] == "bfloat16")
    ]


def meshes(job: Job, device: Device, devices: int) -> Iterator[Mesh]:
    """Every way to divide `devices` that the model's shape and the node allow.

    Tensor ranks stay inside a node and divide heads; stages divide layers; context ranks come with
    8,192 tokens and divide them. Shards are all ranks, a node, or a few nodes. Adapters stand beside a
    model that every rank holds whole.
    """
    model, node = job.model, device.per_node
    if model.adapters:
        for context in _powers(8 if job.sequence >= 8192 else 1):
            if not (devices % context or job.sequence % context):
                yield Mesh(devices // context, context=context)
        return
    for tensor in _powers(min(node, model.kv_heads, model.heads, 16)):
        if model.heads % tensor or model.kv_heads % tensor or model.ffn % tensor:
            continue
        for context in _powers(8 if job.sequence >= 8192 else 1):
            for stages in _powers(min(model.layers, 64)):
                inner = tensor * context * stages
                if devices % inner or model.layers % stages or job.sequence % context:
                    continue
                data = devices // inner
                yield Mesh(data, 1, tensor, stages, context)
                for shard in sorted({data, *(s for s in (2, 4, node, 2 * node, 4 * node, 8 * node) if s > 1)}):  # fmt: skip
                    if 1 < shard <= data and data % shard == 0 and stages == 1:
                        yield Mesh(data // shard, shard, tensor, stages, context)


def required_link(
    option: Option, machine: Machine, efficiency: float = 0.95, constants: Constants = DEFAULT
) -> float | None:
    """Bytes/s a node has to send (a device, inside one node) so that the step without its
    data-parallel communication is `efficiency` of the step with it.

    None where no link suffices: latency alone costs more. 0 for one device.
    """
    if option.run.mesh.holders == 1:
        return 0.0
    work = _work(option.run, machine, constants)
    outside = option.devices > machine.fabric.per_node

    def share(rate: float) -> float:
        lines = machine.fabric.node if outside else machine.fabric.link
        other = {name: Line(line.hop_s, rate) for name, line in lines.items()}
        link, node = machine.fabric.link, machine.fabric.node
        fabric = replace(
            machine.fabric, link=link if outside else other, node=other if outside else node
        )
        step = compose(option.run, work, machine.device, fabric, constants)
        return 1 - step.communication / step.total

    low, high = 1e5, 1e14
    if share(high) < efficiency:
        return None
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if share(middle) >= efficiency else (middle, high)
    return high


def _work(run: Run, machine: Machine, constants: Constants) -> Work:
    def counted(one: Run) -> Work:
        return layer_work(
            one.model, machine.device, tokens=one.micro_batch * one.sequence, sequence=one.sequence,
            dtype=one.dtype, recompute=one.recompute, stack=one.stack, flash=one.flash,
            tensor=one.mesh.tensor, context=one.mesh.context, constants=constants,
        )  # fmt: skip

    seen = machine.probe.model if machine.probe else None
    if machine.probe is None or seen is None:
        return counted(run)
    there = replace(
        run, micro_batch=seen.micro_batch, sequence=seen.sequence, mesh=Mesh(),
        recompute="full" if seen.gradient_checkpointing else "none",
    )  # fmt: skip
    return calibrated(machine.probe, run, counted(run), counted(there), run.model.layers)


def _bucket(run: Run, fabric: Fabric) -> float:
    """sqrt(S c B), between 1 and 64 MiB: as in sync/link.py. Of codes B is that of the values they stand for."""
    w = wire(fabric, run.mesh.holders, run.mesh.tensor)
    held = trained_values(run) * run.gradient_bytes
    if run.strategy == "quantized":
        held = trained_values(run) * 4 * 4 / wire_bytes_of(run.wire)
    best = math.sqrt(held * w.latency_s["all_reduce"] * w.bytes_per_s["all_reduce"])
    return min(64.0, max(1.0, best / 2**20)) * 2**20


def _halves(rows: int, mesh: Mesh) -> list[int]:
    """Micro-batch sizes, the largest first; a pipeline needs at least as many as stages."""
    most = max(1, rows // mesh.pipeline) if mesh.pipeline > 1 else rows
    return sorted({math.ceil(most / 2**k) for k in range(most.bit_length() + 1)}, reverse=True)


def _powers(high: int) -> list[int]:
    return [2**k for k in range(max(1, high).bit_length()) if 2**k <= max(1, high)]
