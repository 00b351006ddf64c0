"""The receipt: how well a run scaled, where its time went, and what to change. The parts sum to 100%.

Efficiency is what one replica alone would have needed for this replica's part of a step, over what
a step took: (alone_s x micro-batches + optimizer) / step. `alone_s` was measured at the start of
this very run, on rank 0 while the others stood still. Utilization (MFU, HFU) is counted operations over
what the devices' peak would have done in the time of the steps (observe/flops.py).
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unisono.clock import MEANING, PHASES, STEP_PHASES
from unisono.files import readable_bytes
from unisono.observe.advice import gain_without
from unisono.observe.blame import Blame
from unisono.observe.flops import Peak
from unisono.observe.screen import clock_time
from unisono.train.trial import Baseline

BETWEEN_REPLICAS = ("communication", "waiting", "imbalance")
WORTH_SAYING = 0.005
"""Gain from which on advice is shown; all of it is in receipt.json."""
MOST_ADVICE = 3


@dataclass(frozen=True)
class Utilization:
    """Of the devices' peak, in steps. Shares of 1, None without a known peak."""

    value: float | None
    """MFU: what the model asks for."""
    hfu: float | None
    """With what was computed twice."""
    model_flops_per_step: float
    """Of all replicas."""
    flops_per_second: float
    """Model FLOPs of one replica in a second of steps."""
    peak_flops: float | None
    """Of one replica's device."""
    source: str


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
    mfu: Utilization | None = None
    memory_by_rank: Sequence[int] = ()
    """Peak bytes: resident of the process, on a GPU allocated there."""
    goodput: Mapping[str, Any] | None = None
    """Over all sessions (observe/goodput.py); on rank 0, at the end."""
    blame: Sequence[Blame] = ()
    """Who slowed the run down, dearest first."""
    events: Sequence[str] = ()
    """Verdicts and jumps of loss or gradient norm, as they were said."""
    advice: Sequence[Mapping[str, Any]] = ()
    """Every line's counterfactual, and what to change (observe/advice.py)."""

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


def utilization(
    receipt: Receipt, model_flops: float, hardware_flops: float, peak: Peak
) -> Utilization:
    """`model_flops`, `hardware_flops`: of a step over all replicas."""
    rate = model_flops / receipt.replicas / max(1e-12, receipt.step_ms / 1e3)
    share = rate / peak.flops if peak.flops else None
    return Utilization(
        value=share,
        hfu=share * hardware_flops / model_flops if share is not None and model_flops else None,
        model_flops_per_step=model_flops,
        flops_per_second=rate,
        peak_flops=peak.flops,
        source=peak.source,
    )


def with_recomputation(seconds: Mapping[str, float], share: float) -> dict[str, float]:
    """Of what a GPU computed, the share of operations that were done again (the host cannot see it)."""
    again = (seconds["compute"] + seconds["recomputation"]) * share
    compute = seconds["compute"] + seconds["recomputation"] - again
    return {**seconds, "compute": compute, "recomputation": again}


# --- as it is shown


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
    table = Table(box=None, show_header=True, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, min_width=16)
    table.add_column("without", no_wrap=True, justify="right")
    table.add_column(no_wrap=True, style="dim")
    for phase in _shown(r):
        share, gain = r.shares[phase], gain_without(phase, r.shares)
        table.add_row(
            phase, f"{share:.1%}", _bar(share), "" if gain is None else f"{gain:+.1%}",
            MEANING[phase],
        )  # fmt: skip
    table.add_row("sum", f"{sum(r.shares.values()):.1%}", "", "", "", style="bold")
    verdicts = [Text(f"\u25b8 {b.line()}", "yellow") for b in r.blame]
    return Lines(head, table, *verdicts, *_advice(r.advice), Text("\n".join(_notes(r)), "dim"))


def _shown(r: Receipt) -> Iterable[str]:
    for phase, share in r.shares.items():
        if phase in ("recomputation", "generation") and share == 0:
            continue
        if phase in BETWEEN_REPLICAS and r.replicas == 1:
            continue
        yield phase


def _advice(advice: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    worth = [a for a in advice if a["gain"] >= WORTH_SAYING and not a["do"].startswith("see ")]
    if not worth:
        return []
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, justify="right", style="green")
    table.add_column()
    for a in worth[:MOST_ADVICE]:
        table.add_row(str(a["what"]), f"up to {a['gain']:+.1%}", escape(str(a["do"])))
    return [Text("What to change", "bold"), table]


def _notes(r: Receipt) -> list[str]:
    notes = [
        f"{r.step_ms:.1f} ms a step, {r.sent_bytes_per_step / 1e6:.2f} MB sent by each rank; {r.device}"
    ]
    if r.mfu:
        gflops = f"{r.mfu.flops_per_second / 1e9:,.1f} GFLOP/s a replica"
        if r.mfu.value is None:
            notes.append(f"{gflops}; MFU: {r.mfu.source}")
        else:
            again = f", HFU {r.mfu.hfu:.1%}" if r.mfu.hfu != r.mfu.value else ""
            notes.append(f"MFU {r.mfu.value:.1%}{again} ({gflops}; {r.mfu.source})")
    if r.memory_by_rank:
        peak = max(r.memory_by_rank)
        where = f" on rank {r.memory_by_rank.index(peak)}" if r.replicas > 1 else ""
        notes.append(f"memory: at most {readable_bytes(peak)}{where}")
    if r.goodput:
        g = r.goodput
        sessions = f" in {g['sessions']} sessions" if g["sessions"] > 1 else ""
        lost = f", {clock_time(g['lost_s'])} lost" if g["lost_s"] >= 0.5 else ""
        notes.append(
            f"goodput {g['value']:.1%}: {clock_time(g['committed_s'])} of {clock_time(g['wall_s'])}"
            f"{sessions} became committed steps{lost}"
        )
    if r.alone_ms and r.together_ms and r.replicas > 1:
        notes.append(
            f"a micro-batch took {r.alone_ms:.1f} ms alone and {r.together_ms:.1f} ms beside the "
            f"other replicas without communication ({r.together_ms / r.alone_ms - 1:+.1%}: shared "
            f"memory, caches, power)"
        )
    if r.skipped_steps:
        notes.append(f"steps skipped for a gradient that was not finite: {r.skipped_steps}")
    return [*notes, r.samples]


def _bar(share: float, width: int = 16) -> Text:
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    return Text(
        ("\u2588" * full + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[part]).rstrip() or "",
        "green",
    )
