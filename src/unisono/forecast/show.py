"""An outlook on the terminal: the curve, where it bends, and for one number of devices every option."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from unisono.forecast.outlook import SHOWN, Knee, Outlook, Point, knee, runs_here
from unisono.forecast.search import Machine, Option, overrides


def show(outlook: Outlook, detail: int | None = None) -> RenderableType:
    """All of it; `detail` is the number of devices whose options are listed, by default the knee."""
    bend = knee(outlook)
    chosen = next((p for p in outlook.points if p.devices == detail), None) or at_knee(
        outlook, bend
    )
    return Group(
        Text(head(outlook)), Text(), curve(outlook), Text(),
        *[Text(line) for line in bends(outlook, bend)], Text(),
        *[Text(line) for line in recommended(chosen, outlook.machine)], Text(), options(chosen),
        *other_mathematics(outlook, chosen),
        *[Text(f"does not fit: {line}", style="dim") for line in misfits(chosen)],
    )  # fmt: skip


def head(outlook: Outlook) -> str:
    job, device = outlook.job, outlook.machine.device
    source = "measured by the probe" if outlook.machine.probe else "published hardware"
    money = f"${outlook.price:.2f} a device-hour ({outlook.price_from})" if outlook.price else "no price (--price)"  # fmt: skip
    trained = f" ({count(job.model.adapters)} trained)" if job.model.adapters else ""
    return (
        f"{job.model.name}, {count(job.model.parameters)} parameters{trained}, sequences of {job.sequence:,}, "
        f"{job.dtype}, on {device.name} ({source})\n{count(outlook.tokens)} tokens, {money}; "
        f"critical batch {count(outlook.critical_tokens)} tokens"
    )


def curve(outlook: Outlook) -> Table:
    """A row for each number of devices."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    names = ("devices", "strategy", "batch", "tokens/s", "±", "step", "effic.", "exposed", "memory",
             "hours", "money", "kWh")  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for p in outlook.points:
        o, step = p.option, p.option.step
        exposed = step.communication + step.tensor + step.bubble
        table.add_row(
            f"{p.devices:,}", o.name + ("" if runs_here(o.run) else " *"),
            f"{o.batch:,}" + ("!" if p.critical_share > 1 else ""),
            count(o.tokens_per_s), f"{p.high / o.tokens_per_s - 1:.0%}", seconds(step.total),
            f"{p.efficiency:.1%}", f"{exposed / step.total:.1%}", size(o.memory.total),
            f"{p.hours:,.1f}", "" if p.usd is None else f"${p.usd:,.0f}",
            "" if p.kwh is None else f"{p.kwh:,.0f}",
        )  # fmt: skip
    return table


def bends(outlook: Outlook, bend: Knee) -> list[str]:
    """The knee in words."""
    lines = []
    most = outlook.points[-1].devices
    for limit, devices in bend.efficiency.items():
        if devices == 0:
            lines.append(f"none of them has {limit} efficiency: fewer devices get more from each")
            continue
        lines.append(f"{limit} efficiency up to {plural(devices or most)}" + ("" if devices else ", the most asked for"))  # fmt: skip
        if devices is None:
            break
    if bend.batch_passes_critical:
        lines.append(f"from {plural(bend.batch_passes_critical)} the batch (!) is past the critical batch: more tokens for the same loss")  # fmt: skip
    if bend.money_doubles:
        lines.append(f"from {plural(bend.money_doubles)} a token costs twice the least")
    if outlook.impossible:
        numbers = ", ".join(str(f.devices) for f in outlook.impossible)
        lines.append(f"nothing fits on: {numbers}")
    if any(not runs_here(p.option.run) for p in outlook.points):
        lines.append(
            "* unisono train does not do this: pipelines, selective recomputation, other ZeRO stages"
        )
    return lines


def recommended(point: Point, machine: Machine) -> list[str]:
    """What to do on this many devices."""
    o = point.option
    lines = [f"on {plural(point.devices)}: {o.name}, micro-batch {o.run.micro_batch} x {o.run.accumulation}, recompute {o.run.recompute}"]  # fmt: skip
    if runs_here(o.run):
        lines.append(f"  unisono train CONFIG {overrides(o)}")
    if point.link_bytes_per_s is None:
        lines.append("  no link between nodes gives 95%: those inside, or latency, already cost more")  # fmt: skip
    elif point.link_bytes_per_s:
        inside = point.devices <= machine.fabric.per_node
        here = (machine.fabric.link if inside else machine.fabric.node)["all_reduce"].bytes_per_s
        place = "devices of a node" if inside else "nodes"
        lines.append(f"  95% of a perfect network needs {gbit(point.link_bytes_per_s)} between {place}, where there are {gbit(here)}")  # fmt: skip
    if point.best.tokens_per_s > 1.03 * o.tokens_per_s:
        gain = point.best.tokens_per_s / o.tokens_per_s - 1
        lines.append(f"  {point.best.name} would be {gain:.0%} faster, with another trainer")
    return lines


def options(point: Point) -> Table:
    """The best of each strategy, ranked."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("rank", "strategy", "micro-batch", "recompute", "tokens/s", "compute", "recomputed",
                 "exposed", "bubble", "optimizer", "waiting", "memory"):  # fmt: skip
        left = name in ("strategy", "recompute")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for rank, o in enumerate(point.found.options[:SHOWN], 1):
        s = o.step
        parts = (s.compute + s.other, s.recompute, s.communication + s.tensor, s.bubble, s.optimizer, s.waiting)  # fmt: skip
        table.add_row(
            str(rank), o.name + ("" if runs_here(o.run) else " *"), str(o.run.micro_batch),
            o.run.recompute, count(o.tokens_per_s), *[f"{part / s.total:.1%}" for part in parts],
            size(o.memory.total),
        )  # fmt: skip
    return table


OTHER_COLUMNS = (
    "devices", "strategy", "tokens/s", "x exact", "effic.", "busy", "loss", "memory",
)  # fmt: skip
NOT_EXACT = "not equal to one process; loss is against exact at equal tokens"


def other_mathematics(outlook: Outlook, chosen: Point) -> list[RenderableType]:
    """What `sync: auto` would take where exact does not keep the devices busy, and all of it for one number."""
    shown: list[RenderableType] = []
    within = within_budget(outlook)
    if within:
        shown += [
            Text(),
            Text(
                f"with other mathematics, within {budget(outlook)} as sync: auto chooses ({NOT_EXACT})"
            ),
        ]
        shown.append(_others([(p, p.within) for p in within]))
        best = max(within, key=lambda p: p.within.tokens_per_s)
        shown.append(
            Text(f"  on {plural(best.devices)}: unisono train CONFIG {overrides(best.within)}")
        )
    point = with_others(outlook, chosen)
    if point is not None:
        shown += [
            Text(),
            Text(
                f"on {plural(point.devices)} with other mathematics, whatever its loss ({NOT_EXACT})"
            ),
        ]
        shown.append(_others([(point, o) for o in point.found.others]))
        shown.append(Text(f"  {point.within.name}: {point.within_why}"))
    return shown


def within_budget(outlook: Outlook) -> list[Point]:
    """Where other mathematics within the loss budget is faster, and exact is not busy enough."""
    return [p for p in outlook.points if p.within is not p.option]


def with_others(outlook: Outlook, chosen: Point) -> Point | None:
    """`chosen`, or where it has no other mathematics (one device) the point at which it gives most."""
    if chosen.found.others:
        return chosen
    having = within_budget(outlook) or [p for p in outlook.points if p.found.others]
    return max(having, key=lambda p: p.within.tokens_per_s, default=None)


def _others(rows: Sequence[tuple[Point, Option]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in OTHER_COLUMNS:
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*other_cells(*row))
    return table


def other_cells(point: Point, other: Option) -> tuple[str, ...]:
    """As OTHER_COLUMNS."""
    gain = other.tokens_per_s / point.option.tokens_per_s
    return (
        f"{point.devices:,}", other.name, count(other.tokens_per_s),
        f"{gain:.2f}", f"{gain * point.efficiency:.1%}", f"{other.utilization:.1%}", loss(other.loss_cost), size(other.memory.total),
    )  # fmt: skip


def loss(cost: float) -> str:
    return "0" if not cost else f"+{cost:.2%}" if cost < 1 else "over +100%"


def budget(outlook: Outlook) -> str:
    return f"a loss of {outlook.job.loss_budget or 0.0:.2%}"


def misfits(point: Point) -> list[str]:
    """What does not fit, and why."""
    shown = [f"{m.name} {m.reason}" for m in point.found.misfits[:SHOWN]]
    more = len(point.found.misfits) - len(shown)
    return [*shown, *([f"and {more} more"] if more > 0 else [])]


def at_knee(outlook: Outlook, bend: Knee) -> Point:
    """The most devices at 85% efficiency; the fewest where none have it."""
    last = bend.efficiency["85%"]
    if last is None:
        return outlook.points[-1]
    return next((p for p in outlook.points if p.devices == last), outlook.points[0])


def plural(devices: int) -> str:
    return f"{devices:,} device" + ("s" if devices > 1 else "")


def count(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            digits = max(0, 2 - int(math.log10(value / limit)))
            return f"{value / limit:.{digits}f}{unit}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def gbit(value: float) -> str:
    bits = value * 8
    for limit, unit in ((1e12, "T"), (1e9, "G")):
        if bits >= limit:
            return f"{bits / limit:.3g} {unit}bit/s"
    return f"{bits / 1e6:.3g} Mbit/s"
