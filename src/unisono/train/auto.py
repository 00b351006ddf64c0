"""`sync: auto`: the rung of the ladder that the link asks for, and another one when the link changes.

Before the first step the link, a pass and the codecs are timed, every rung is foretold (forecast/ladder.py),
and the first that keeps the devices busy enough within `loss_budget` is taken. Later the link is looked at again:
at once when steps take longer than they did, and now and then, because a link that became faster shows in
nothing else; that costs LOOK_SHARE of the time at most. What ranks know alone is agreed on first, so all
take the same rung at the same step.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table

from unisono.codes import wire_bytes_of
from unisono.config import Config, parse
from unisono.data.prompts import Prompts
from unisono.forecast.ladder import (
    TARGET,
    WAYS,
    Rung,
    Situation,
    Way,
    accumulation_for,
    choose,
    ladder,
    table,
)
from unisono.mesh import Mesh
from unisono.observe.screen import Screen
from unisono.plan import SHARD_BYTES
from unisono.probe.rates import memory_bytes_per_s
from unisono.sync.codec import make_codec
from unisono.sync.ledger import Group
from unisono.sync.link import LARGE_BYTES, NARROW_BUSY_S, Link, measure_link
from unisono.train.facts import codec_s, lanes_on, quick_passes, tensors_of
from unisono.train.together import attempt
from unisono.train.trial import seconds_of_pass
from unisono.world import World, cores

CODECS = ("int8", "int4")
WIRES = ("float32", "bfloat16", *CODECS)
QUICK_BYTES = 16 << 20
"""To see how fast memory is."""
LOOK_SHARE = 0.005
LOOK_STEPS = 10
"""At least so many steps lie between two looks."""
WINDOW = 6
"""Steps whose median is what a step takes."""
SLOWER = 1.15
SLACK = 0.02
"""A rung is left only when it is so much below the target; and only for a better one."""


def begin(
    config: Config, world: World, mesh: Mesh, model: torch.nn.Module, blocks: Any, gradient_bytes: int,
    run_rows: Callable[[int], None], votes: Group, screen: Screen, kept: str | None,
) -> tuple[Config, "Climber | None"]:  # fmt: skip
    """Collective: the configuration with the rung to begin on, and who follows the link from there.

    `run_rows`: a forward and backward pass of so many rows. `kept`: the rung of the checkpoint.
    """
    fixed = _only_exact(config, mesh)
    if fixed:
        screen.say(f"sync: auto: exact, {fixed}", "dim")
        return settings_of(config, WAYS[0]), None
    largest = math.ceil(config.global_batch_size / mesh.data)
    given = config.micro_batch_size
    micro_batch = min(
        largest, given if isinstance(given, int) else min(8, -(-config.global_batch_size // 8))
    )
    accumulation = math.ceil(largest / micro_batch)
    timed = partial(seconds_of_pass, run_rows, micro_batch, model, world.device)
    pass_s = attempt(votes, timed)
    assert pass_s is not None
    link = measure_link(votes, world.device)
    assert link is not None
    whole = gradient_bytes < SHARD_BYTES or link.hides_whole(
        gradient_bytes, world.size, float(votes.each(pass_s * accumulation).min())
    )
    per_core = max(1.0, world.local_size * (world.threads or 1) / cores())
    situation = situation_of(
        model, link, votes, pass_s, accumulation=accumulation, rows=_rows_of(blocks, accumulation * micro_batch),
        whole=whole, device=world.device, per_core=per_core,
    )  # fmt: skip
    climber = Climber(
        situation,
        config.loss_budget,
        link,
        lambda seen: lanes_on(None, seen, world.size, world.device, per_core)[0],
    )
    rung = climber.start(kept)
    show(climber, screen)
    return settings_of(config, rung.way), climber


def _only_exact(config: Config, mesh: Mesh) -> str:
    """Why there is nothing to choose; "" where there is."""
    if mesh.size == 1:
        return "one replica"
    if config.determinism == "strict":
        return "determinism: strict"
    if mesh.inner > 1:
        return f"ranks share samples ({mesh})"
    if config.grpo is not None:
        return "completions are drawn from the weights that learn from them"
    if config.optim != "adamw":
        return f"optim: {config.optim} is not foretold"
    return ""


def show(climber: "Climber", screen: Screen) -> None:
    """The ladder, as it is foretold, with the rung that is taken."""
    assert climber.rung is not None
    shown = Table("", "sync: auto", "busy", "loss", "sent a step", box=None, padding=(0, 2, 0, 0))
    for row in table(climber.rungs, climber.rung):
        shown.add_row(*row, style="bold" if row[0] else "dim")
    screen.show(shown)
    gbit = climber.link.bytes_per_s * 8 / 1e9
    screen.say(f"{climber.rung.name}: {climber.why} (link of {gbit:.3g} Gbit/s)")
    if advice := climber.advice():
        screen.say(advice, "dim")


def situation_of(
    model: torch.nn.Module, link: Link, votes: Group, pass_s: float, *, accumulation: int, rows: int,
    whole: bool, device: str = "cpu", per_core: float = 1.0,
) -> Situation:  # fmt: skip
    """Collective: what rungs are foretold from. `pass_s`: of a micro-batch on this rank; `rows`: different
    tokens of its step; `whole`: exact would send whole gradients; `per_core`: ranks that share a core."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    rate = memory_bytes_per_s(device, QUICK_BYTES)
    tensors = tensors_of(model)
    table = votes.each(
        pass_s,
        rate,
        float(rows),
        *(sum(codec_s(make_codec(name), tensors.total, device)) for name in CODECS),
    )
    pass_s, rate, *_ = table.mean(dim=0).tolist()
    _, _, most, *worst = table.amax(dim=0).tolist()
    return Situation(
        tensors,
        quick_passes(pass_s, accumulation, tensors.total, "adamw", rate, votes.size),
        lanes_on(None, link, votes.size, device, per_core)[0],
        votes.size,
        _buckets(link, tensors.total),
        int(most),
        int(embedding.shape[-1]),
        whole,
        dict(zip(CODECS, worst, strict=True)),
        NARROW_BUSY_S if device == "cpu" else 0.0,
    )


def _buckets(link: Link, values: int) -> dict[str, float]:
    """Bytes of a bucket, by wire."""
    return {wire: link.bucket_mb(4 * values, wire_bytes_of(wire)) * 2**20 for wire in WIRES}


def _rows_of(blocks: Any, rows: int) -> int:
    """Different tokens of a rank's step: of those of the embedding that travel by themselves."""
    if isinstance(blocks, Prompts):
        return 0
    batch = blocks.read([k % len(blocks) for k in range(rows)])
    return len(np.unique(np.asarray(batch.input_ids)))


@dataclass
class Climber:
    """On which rung a run stands, and when to look around. The same on every rank."""

    situation: Situation
    loss_budget: float
    link: Link
    """As it was seen last."""
    lanes_of: Callable[[Link], Any]
    """The lanes of a link that has been measured anew."""
    rungs: list[Rung] = field(default_factory=list)
    rung: Rung | None = None
    why: str = ""
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _usual_s: float = 0.0
    _steps: int = 0
    """Since the last look."""

    def start(self, name: str | None = None) -> Rung:
        """Take the first rung; with a `name`, the one that a checkpoint was on."""
        self.rungs = ladder(self.situation)
        self.rung, self.why = choose(self.rungs, self.loss_budget, TARGET)
        kept = [r for r in self.rungs if r.name == name]
        if kept:
            self.rung, self.why = kept[0], "as in the checkpoint"
        return self.rung

    def advice(self) -> str:
        """What would help where no rung is busy enough; "" otherwise."""
        assert self.rung is not None
        if self.rung.utilization >= TARGET:
            return ""
        factor = accumulation_for(self.situation, self.rung.way, TARGET)
        if factor is None:
            return ""
        return f"a global batch {factor} times as large would reach {TARGET:.0%} on this rung"

    def due(self, step_s: float) -> bool:
        """After each step, with the slowest rank's time: is it time to look at the link?"""
        self._steps += 1
        if step_s > 0:
            self._times.append(step_s)
        if len(self._times) < WINDOW or self._steps < LOOK_STEPS:
            return False
        now = statistics.median(self._times)
        self._usual_s = self._usual_s or now
        slower = now > SLOWER * self._usual_s
        cost_s = 6 * LARGE_BYTES / self.link.bytes_per_s + 20 * self.link.latency_s
        return slower or self._steps * now * LOOK_SHARE > cost_s

    def look(self, link: Link) -> Rung | None:
        """The rung to change to on the link as it is now, or None."""
        assert self.rung is not None
        self.link = link
        self._steps, self._usual_s = 0, statistics.median(self._times) if self._times else 0.0
        self.situation = replace(
            self.situation,
            lanes=self.lanes_of(link),
            bucket_bytes=_buckets(link, self.situation.tensors.total),
        )
        self.rungs = ladder(self.situation)
        here = next(r for r in self.rungs if r.name == self.rung.name)
        self.rung = here
        best, why = choose(self.rungs, self.loss_budget, TARGET)
        if best.name == here.name:
            return None
        lower = self.rungs.index(best) < self.rungs.index(here)
        # Towards exact only with room to spare; away from it only when it pays.
        enough = best.utilization >= TARGET + SLACK / 2 or best.utilization > here.utilization
        worth = here.utilization < TARGET - SLACK and best.utilization > here.utilization + SLACK
        if not (enough if lower else worth):
            return None
        self.why = why
        return best

    def moved(self, rung: Rung) -> None:
        """The change is made."""
        self.rung = rung
        self._times.clear()
        self._usual_s, self._steps = 0.0, 0


def settings_of(config: Config, way: Way) -> Config:
    """The configuration with the rung's fields; what the user wrote in a section of it stays."""
    raw = config.model_dump(mode="json")
    for name, value in way.settings.items():
        raw[name] = {**(raw.get(name) or {}), **value} if isinstance(value, dict) else value
    return parse(raw, origin="sync: auto")
