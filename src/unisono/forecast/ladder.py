"""The ladder of strategies, from exact to rare: what each would cost in time and in loss on this link.

`sync: auto` takes the first rung whose devices are busy enough at a loss within the budget. Rungs are in the
order of how far they leave exact synchronization; time comes from forecast/replay.py for those that
synchronize in every step, loss from forecast/penalty.py. Utilization is what a step takes alone over what
it takes with all others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from unisono.codes import wire_bytes_of
from unisono.forecast import penalty
from unisono.forecast.overlap import Lane, Transfer
from unisono.forecast.replay import Passes, System, Tensors, foretell
from unisono.forecast.rounds import OUTER_BYTES, average_step_s, sent_values

TARGET = 0.95
SPARSE_BYTES = 116 / 4096
"""sync/topk.py: 64 of 4,096 values with 12 bits of place and 2 of value, and two levels in bfloat16."""


@dataclass(frozen=True)
class Way:
    """A rung as it can be asked for."""

    name: str
    settings: Mapping[str, Any]
    """Fields of the configuration."""
    wire: str = "float32"
    every: int = 1
    fragments: int = 1
    delay: int = 0
    """Steps that a fragment's transfer may take."""


def _streaming(every: int) -> Way:
    section = {"sync_every": every, "num_fragments": 5, "fragment_sync_delay": 1}
    return Way(
        f"streaming, every {every}",
        {"sync": "streaming", "wire": "int4", "streaming": section},
        "int4", every, 5, 1,
    )  # fmt: skip


WAYS = (
    Way("exact", {"sync": "exact", "wire": "float32"}),
    Way("exact, bfloat16", {"sync": "exact", "wire": "bfloat16"}, "bfloat16"),
    Way("quantized, int8", {"sync": "quantized", "wire": "int8"}, "int8"),
    Way("quantized, int4", {"sync": "quantized", "wire": "int4"}, "int4"),
    _streaming(10),
    _streaming(30),
    _streaming(100),
    Way("sparse, every 30", {"sync": "sparse"}, "sparse", 30),
)


@dataclass(frozen=True)
class Situation:
    """What the time of a rung depends on, alike on all ranks."""

    tensors: Tensors
    passes: Passes
    lanes: Mapping[str, Lane]
    ranks: int
    bucket_bytes: Mapping[str, float]
    """By wire, as the link would have them."""
    rows: int = 0
    width: int = 0
    whole: bool = False
    """exact in float32 would send whole gradients (sync/exact.py)."""
    codec_s: Mapping[str, float] = field(default_factory=dict)
    """By wire: to encode and to decode as many values as the model has."""
    bucket_s: float = 0.0
    """What a bucket costs that is rounded or encoded, beside its values."""


@dataclass(frozen=True)
class Rung:
    """A way, foretold."""

    way: Way
    step_s: float
    utilization: float
    loss_cost: float
    """Relative to exact at equal tokens."""
    sent_bytes: float
    """By each rank, a step on average."""

    @property
    def name(self) -> str:
        return self.way.name


def ladder(situation: Situation, ways: Sequence[Way] = WAYS) -> list[Rung]:
    """Every way, foretold."""
    return [_rung(situation, way) for way in ways]


class Choice(Protocol):
    """What there is to choose among, as `choose` sees it."""

    @property
    def name(self) -> str: ...

    @property
    def utilization(self) -> float: ...

    @property
    def loss_cost(self) -> float: ...


C = TypeVar("C", bound=Choice)


def choose(rungs: Sequence[C], loss_budget: float, target: float = TARGET) -> tuple[C, str]:
    """The first rung that is busy enough within the budget, or the busiest within it; and why."""
    allowed = [r for r in rungs if r.loss_cost <= loss_budget]
    for rung in allowed:
        if rung.utilization >= target:
            return (
                rung,
                f"the first that keeps {target:.0%} busy within a loss of {loss_budget:.2%}",
            )
    best = max(allowed, key=lambda r: r.utilization)
    missed = f"no rung keeps {target:.0%} busy within a loss of {loss_budget:.2%}; this one {best.utilization:.0%}"
    further = [r for r in rungs if r.utilization >= target]
    if further:
        cheapest = min(further, key=lambda r: r.loss_cost)
        missed += f"; {cheapest.name} would, at a loss of {cheapest.loss_cost:.2%}"
    return best, missed


def accumulation_for(situation: Situation, way: Way, target: float = TARGET) -> int | None:
    """By how much a larger global batch would have to be accumulated for `way` to reach `target`."""
    for factor in (2, 4, 8, 16, 32, 64):
        passes = replace(situation.passes, accumulation=situation.passes.accumulation * factor)
        if _rung(replace(situation, passes=passes), way).utilization >= target:
            return factor
    return None


def _rung(situation: Situation, way: Way) -> Rung:
    s, p = situation, situation.passes
    alone_s = p.accumulation * (p.forward_s + p.backward_s) + p.optimizer_s
    if way.every > 1:
        step_s, sent = _outer(s, way)
        cost = penalty.of_interval(s.ranks, s.tensors.total, way.every)  # sparse: not known apart
    else:
        system: System = "whole" if s.whole and way.wire == "float32" else "shards"
        bucket_bytes = s.bucket_bytes[way.wire]
        found = foretell(
            system, s.tensors, p, s.lanes, s.ranks,
            wire_bytes=wire_bytes_of(way.wire), bucket_bytes=bucket_bytes, rows=s.rows, width=s.width,
            codec_s=s.codec_s.get(way.wire, 0.0), bucket_s=s.bucket_s,
        )  # fmt: skip
        step_s, sent = found.total, found.sent_bytes
        cost = penalty.of_rounding(way.wire)
    return Rung(way, step_s, min(1.0, alone_s / step_s), cost, sent)


def _outer(s: Situation, way: Way) -> tuple[float, float]:
    """(seconds, bytes) of a step on average, where outer steps are taken every `way.every` steps.

    forecast/rounds.py has how.
    """
    p, n = s.passes, s.ranks
    step_s = p.accumulation * (p.forward_s + p.backward_s) + p.optimizer_s + p.waiting_s
    width = SPARSE_BYTES if way.wire == "sparse" else wire_bytes_of(way.wire)
    payload = s.tensors.total / way.fragments * width
    sent = sent_values(payload, n, way.wire == "sparse")
    lane = s.lanes["all_gather"]
    codec_s = s.codec_s.get(way.wire, s.codec_s.get("int4", 0.0))
    average_s = average_step_s(
        step_s, Transfer(lane.seconds(sent), lane),
        every=way.every, fragments=way.fragments, delay=way.delay,
        vote_s=s.lanes["all_reduce"].latency_s, handling_s=codec_s + OUTER_BYTES / 8 * p.pack_s,
    )  # fmt: skip
    return average_s, sent / max(1, way.every // way.fragments)


def table(rungs: Sequence[Rung], chosen: Rung) -> list[tuple[str, str, str, str, str]]:
    """(mark, name, utilization, loss, MB a step) rows to be shown."""
    return [
        (
            "->" if rung is chosen else "",
            rung.name,
            f"{math.floor(1000 * rung.utilization) / 10:.1f}%",
            "0" if not rung.loss_cost else f"+{rung.loss_cost:.2%}",
            f"{rung.sent_bytes / 1e6:.3g} MB",
        )
        for rung in rungs
    ]
