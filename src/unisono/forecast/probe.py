"""What `unisono probe` measured on the user's own machines, as one JSON file.

It replaces published hardware in a forecast: rates of products and memory, the links as a latency and a
bus bandwidth for each collective and mesh axis (T = latency + factor(n) S / B, as in `network`), and
how long the user's own model and micro-batch took. A forecast of the same model at the same micro-batch
takes that as it is; at another it is scaled as the counted work is.

Where collectives take cores from the compute (gloo's threads on a CPU, a collective's kernels on a GPU),
`sharing` says how much: both were timed alone and beside each other.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unisono.errors import ConfigError
from unisono.forecast.compute import Work
from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.cost import Run
from unisono.forecast.hardware import DTYPE_BYTES, Device
from unisono.forecast.network import COLLECTIVES, Fabric, Line, between

Positive = Field(gt=0, allow_inf_nan=False)

FACTOR: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
}
"""busbw / algbw, nccl-tests' doc/PERFORMANCE.md."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LinkFit(_Value):
    """One collective over one axis: T = latency_s + factor(ranks) bytes / bytes_per_s."""

    collective: Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
    axis: str
    """`world`, or the name of a mesh axis."""
    ranks: int = Field(ge=2)
    nodes: int = Field(ge=1)
    latency_s: float = Field(ge=0, allow_inf_nan=False)
    bytes_per_s: float = Positive
    """Bus bandwidth, as nccl-tests define it."""
    error: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Median relative difference between the fit and what was timed."""

    @property
    def knee_bytes(self) -> float:
        """Of a message: half of its time is latency."""
        return self.latency_s * self.bytes_per_s / FACTOR[self.collective](self.ranks)


class Timing(_Value):
    """One size of one collective over one axis, in the columns of nccl-tests.

    `bytes`: of the whole message: an all-gather's result, a reduce-scatter's input, what a rank hands
    in to an all-to-all. algbw = bytes / time; busbw = algbw factor(ranks).
    """

    operation: Literal["all-reduce", "reduce-scatter", "all-gather", "all-to-all"]
    axis: str
    ranks: int = Field(ge=2)
    bytes: int = Field(ge=1)
    seconds: float = Positive
    """The slowest rank's, median over repetitions."""
    algbw_GBps: float = Positive
    busbw_GBps: float = Positive


class Sharing(_Value):
    """A stream of collectives and the model's pass, each alone and one beside the other.

    While both run, compute goes at `compute_speed` of its own speed and the stream at
    `transfer_speed` of its own: on a core that both share they sum to about 1, with a core to spare
    both are 1. (On the way of a collective over a slow link little is computed, so 0.95 and 1.)
    """

    collective: Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
    ranks: int = Field(ge=2)
    message_bytes: int = Field(ge=1)
    bytes_per_s: float = Positive
    """Bus bandwidth of the stream alone, several messages under way at once."""
    compute_speed: float = Field(gt=0, le=1)
    transfer_speed: float = Field(gt=0, le=1)

    @property
    def busy(self) -> float:
        """Seconds of a core that a second of the stream (alone) takes from compute."""
        return (1 - self.compute_speed) / self.transfer_speed


class Pair(_Value):
    """Between two hosts, one direction, all hosts sending at once."""

    source: int = Field(ge=0)
    target: int = Field(ge=0)
    bytes_per_s: float = Positive


class ModelTimes(_Value):
    """The user's own model and micro-batch, all ranks at once, without communication; means over ranks."""

    model: str
    parameters: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    sequence: int = Field(ge=1)
    dtype: str
    gradient_checkpointing: bool = False
    forward_s: float = Positive
    backward_s: float = Positive
    optimizer_s: float = Field(ge=0, allow_inf_nan=False)
    pack_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    """To copy every gradient into a flat buffer, tensor by tensor, as buckets are filled."""
    pack_narrow_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Likewise into one of bfloat16."""
    peak_memory_bytes: int = Field(ge=0)
    """Of the process (GPU: of the device), weights, gradients and whole optimizer state included."""
    base_memory_bytes: int = Field(0, ge=0)
    """Of it, what the process held before it had the model."""
    waiting_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    """How much longer than this the slowest rank takes, median over steps: what others wait for it."""
    spread: float = Field(0.0, ge=0, allow_inf_nan=False)
    """(p90 - p50) / p50 of a rank's step times."""


class Probe(_Value):
    """Everything that was measured. Frozen; rates per second, sizes in bytes."""

    version: Literal[1] = 1
    device: str
    ranks: int = Field(ge=1)
    nodes: int = Field(ge=1)
    memory_bytes: float = Positive
    memory_bytes_per_s: float = Positive
    matmul_flops: dict[str, float] = Field(min_length=1)
    """The best matrix product found, by dtype (bf16, fp16, tf32, fp32)."""
    model: ModelTimes | None = None
    links: tuple[LinkFit, ...] = ()
    collectives: tuple[Timing, ...] = ()
    """What `links` were fitted to."""
    sharing: tuple[Sharing, ...] = ()
    burst_bytes: float = Field(0.0, ge=0, allow_inf_nan=False)
    """What a shaped link lets through at once after a pause."""
    pairs: tuple[Pair, ...] = ()
    threads: int = Field(1, ge=1)
    """Of one rank, on a CPU."""
    notes: tuple[str, ...] = ()
    """A slow rank or link by name, sizes that were left out."""
    measured_at: str = ""
    torch: str = ""

    @property
    def per_node(self) -> int:
        return max(1, self.ranks // self.nodes)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.model_dump(), indent=2) + "\n")


def read(path: Path) -> Probe:
    """The probe in a file. Raises ConfigError: no file, torn, of another program or version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--probe: {path} cannot be read ({error.strerror}); run unisono probe") from None  # fmt: skip
    except ValueError:
        raise ConfigError(f"--probe: {path} is torn or no JSON; run unisono probe again") from None
    try:
        probe = Probe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            f"--probe: {path} is no probe of this version: {where}: {first['msg'].lower()}; run "
            f"unisono probe again"
        ) from None
    unknown = sorted(set(probe.matmul_flops) - set(DTYPE_BYTES))
    bad = [name for name, rate in probe.matmul_flops.items() if not 0 < rate < 1e18]
    if unknown or bad:
        raise ConfigError(
            f"--probe: {path}: matmul_flops.{(unknown or bad)[0]} is no rate of a known dtype; run "
            f"unisono probe again"
        )
    return probe


def device_of(probe: Probe) -> Device:
    """The measured device; its rates are what was reached, so nothing is taken off them twice."""
    inside = [f.bytes_per_s for f in probe.links if f.nodes == 1]
    outside = [f.bytes_per_s for f in probe.links if f.nodes > 1]
    return Device(
        name=probe.device,
        vendor="",
        peak_flops=dict(probe.matmul_flops),
        achievable=1.0,
        memory_bytes=probe.memory_bytes,
        memory_bytes_per_s=probe.memory_bytes_per_s,
        power_w=None,
        per_node=probe.per_node,
        link_bytes_per_s=max(inside or outside or [1.0]),
        node_bytes_per_s=max(outside or [0.0]),
        source="measured",
        is_cpu="tf32" not in probe.matmul_flops,  # probe/rates.py tries it on GPUs
    )


def fabric_of(probe: Probe, node_bytes_per_s: float | None, constants: Constants = DEFAULT) -> Fabric:  # fmt: skip
    """The measured links; `node_bytes_per_s` (--link) stands for what was not measured.

    A collective without a fit takes the all-reduce's. A hop is the latency over a ring's hops. Where
    only one kind of link was measured it stands for both.
    """

    def lines(many_nodes: bool, stated: float | None) -> dict[str, Line]:
        found: dict[str, Line] = {}
        for fit in probe.links:
            if (fit.nodes > 1) == many_nodes and fit.axis in ("world", "node"):
                hops = (2 if fit.collective == "all_reduce" else 1) * (
                    fit.nodes if many_nodes else fit.ranks - 1
                )
                found[fit.collective] = Line(fit.latency_s / hops, fit.bytes_per_s)
        usual = found.get("all_reduce") or next(iter(found.values()), None)
        if stated is not None:
            usual = Line(usual.hop_s if usual else constants.node_hop_s, stated)
            return between(usual, probe.per_node)
        return {name: found.get(name) or usual for name in COLLECTIVES} if usual else {}

    inside, outside = lines(False, None), lines(True, node_bytes_per_s)
    hop_s = max([line.hop_s for line in outside.values()], default=constants.tree_hop_s)
    nothing = dict.fromkeys(
        COLLECTIVES, Line(0.0, math.inf)
    )  # one rank has no link, and needs none
    inside = inside or outside or nothing
    # Threads of a collective on the cores that compute: beside gloo nothing may be won by overlapping.
    busy = [min(1.0, s.busy) for s in probe.sharing]
    contention = sum(busy) / len(busy) if busy else None
    return Fabric(probe.per_node, inside, outside or inside, hop_s, contention)


def calibrated(probe: Probe, run: Run, counted: Work, at_probe: Work, layers: int) -> Work:
    """The counted work, scaled so that the probe's own run takes what it took.

    `at_probe`: the counted work of the probe's micro-batch, sequence and dtype.
    """
    measured = probe.model
    if measured is None or measured.dtype != run.dtype:
        return counted
    forward = layers * at_probe.forward + at_probe.head_forward
    backward = layers * at_probe.backward + at_probe.head_backward
    if measured.gradient_checkpointing:
        backward += layers * at_probe.again
    up, down = measured.forward_s / forward, measured.backward_s / backward
    return replace(
        counted,
        forward=counted.forward * up, head_forward=counted.head_forward * up,
        again=counted.again * up,
        backward=counted.backward * down, head_backward=counted.head_backward * down,
    )  # fmt: skip
