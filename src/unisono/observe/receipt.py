"""The receipt: how well a run scaled, and where its time went. The parts sum to 100%.

Efficiency is what one replica alone would have needed for this replica's part of a step, over what
a step took: (alone_s x micro-batches + optimizer) / step. `alone_s` was measured at the start of
this very run, on rank 0 while the others stood still.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from unisono.clock import PHASES
from unisono.observe.screen import clock_time
from unisono.train.trial import Baseline

STEP_PHASES = ("compute", "communication", "waiting", "data", "optimizer", "other")
"""The phases of a step; evaluation and checkpoint come between steps."""
MEANING = {
    "compute": "forward and backward",
    "communication": "exposed, not hidden",
    "waiting": "for a slower replica",
    "data": "reading batches",
    "optimizer": "clip and update",
    "checkpoint": "writing to disk",
    "evaluation": "on the held-out split",
    "other": "logging, checks, the loop",
}


@dataclass(frozen=True)
class Receipt:
    """What a run (since its start or last resume) did. Seconds are means over ranks."""

    replicas: int
    device: str
    steps: int
    tokens: int
    wall_s: float
    tokens_per_second: float
    """In steps: evaluation and checkpoints are not counted."""
    step_ms: float
    efficiency: float | None
    """None when no baseline was measured."""
    alone_ms: float | None
    together_ms: float | None
    shares: Mapping[str, float]
    """Of the wall time, by phase; they sum to 1."""
    seconds_by_rank: Sequence[Mapping[str, float]]
    sent_bytes_per_step: float
    final_loss: float | None
    eval_loss: float | None
    skipped_steps: int
    machine: str
    samples: str = ""
    """What the sample ledger says; on rank 0, at the end."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_receipt(
    seconds_by_rank: Sequence[Mapping[str, float]],
    *,
    device: str,
    steps: int,
    tokens: int,
    accumulation: int,
    baseline: Baseline | None,
    sent_bytes: int,
    final_loss: float | None,
    eval_loss: float | None,
    skipped_steps: int,
) -> Receipt:
    """`tokens`: processed by all replicas. `seconds_by_rank`: of the clock's phases."""
    n = len(seconds_by_rank)
    mean = {p: sum(s.get(p, 0.0) for s in seconds_by_rank) / n for p in PHASES}
    wall = sum(mean.values())
    stepping = sum(mean[p] for p in STEP_PHASES)
    efficiency = None
    if baseline and steps:
        ideal = baseline.alone_s * accumulation * steps + mean["optimizer"]
        efficiency = ideal / stepping
    return Receipt(
        replicas=n,
        device=device,
        steps=steps,
        tokens=tokens,
        wall_s=wall,
        tokens_per_second=tokens / stepping if stepping else 0.0,
        step_ms=1e3 * stepping / max(1, steps),
        efficiency=efficiency,
        alone_ms=baseline.alone_s * 1e3 if baseline else None,
        together_ms=baseline.together_s * 1e3 if baseline else None,
        shares={p: mean[p] / wall if wall else 0.0 for p in PHASES},
        seconds_by_rank=[dict(s) for s in seconds_by_rank],
        sent_bytes_per_step=sent_bytes / max(1, steps),
        final_loss=final_loss,
        eval_loss=eval_loss,
        skipped_steps=skipped_steps,
        machine=f"{platform.machine()}, {platform.system()} {platform.release()}",
    )


def render(receipt: Receipt) -> RenderableType:
    """The receipt as it is shown at the end of a run."""
    r = receipt
    head = Text()
    head.append("Receipt", "bold")
    head.append(
        f"   {r.steps:,} steps, {r.tokens:,} tokens in {clock_time(r.wall_s)} "
        f"on {r.replicas} {'replica' if r.replicas == 1 else 'replicas'}\n"
    )
    head.append(f"{r.tokens_per_second:,.0f} tokens/s", "bold green")
    if r.efficiency is not None:
        head.append(", scaling efficiency ")
        head.append(f"{r.efficiency:.1%}", "bold green" if r.efficiency >= 0.85 else "bold yellow")
        head.append(f" of {r.replicas} x one replica alone")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), min_width=66)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    for phase, share in r.shares.items():
        table.add_row(phase, f"{share:.1%}", _bar(share), MEANING[phase])
    table.add_row("sum", f"{sum(r.shares.values()):.1%}", "", "", style="bold")
    notes = [
        f"{r.step_ms:.1f} ms a step, {r.sent_bytes_per_step / 1e6:.2f} MB sent by each rank; {r.device}"
    ]
    if r.alone_ms and r.together_ms and r.replicas > 1:
        notes.append(
            f"a micro-batch took {r.alone_ms:.1f} ms alone and {r.together_ms:.1f} ms beside the "
            f"other replicas without communication ({r.together_ms / r.alone_ms - 1:+.1%}: shared "
            f"memory, caches, power)"
        )
    if r.skipped_steps:
        notes.append(f"steps skipped for a gradient that was not finite: {r.skipped_steps}")
    notes.append(r.samples)
    return Lines(head, table, Text("\n".join(notes), "dim"))


def _bar(share: float, width: int = 20) -> Text:
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    return Text(
        ("\u2588" * full + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[part]).rstrip() or "",
        "green",
    )
