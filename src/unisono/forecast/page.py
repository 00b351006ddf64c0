"""An outlook as one HTML file: curves drawn as SVG, no script, no network; light, dark, phone, print."""

import math
from collections.abc import Callable, Sequence
from html import escape

from unisono.forecast.outlook import Outlook, Point, knee, runs_here
from unisono.forecast.search import overrides
from unisono.forecast.show import (
    NOT_EXACT,
    OTHER_COLUMNS,
    at_knee,
    bends,
    budget,
    count,
    gbit,
    head,
    misfits,
    other_cells,
    plural,
    recommended,
    seconds,
    size,
    with_others,
    within_budget,
)

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34

PARTS = (
    ("compute", "compute"), ("recompute", "recomputed"), ("communication", "exposed communication"),
    ("tensor", "tensor, context"), ("bubble", "pipeline bubble"), ("optimizer", "optimizer"),
    ("waiting", "waiting for the slowest"), ("other", "other"),
)  # fmt: skip

STYLE = """
:root{--ink:#1c2430;--dim:#667085;--paper:#fff;--card:#f6f7f9;--line:#dfe3e8;--main:#2f6fde;
--band:#2f6fde22;--good:#2a9d6f1f;--warn:#d9822b;--p0:#2f6fde;--p1:#7aa6ef;--p2:#d9534f;--p3:#e58f65;
--p4:#c9a227;--p5:#5aa469;--p6:#9b7fd1;--p7:#a8b0bb}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#98a2b3;--paper:#12161c;--card:#1a2029;
--line:#2c3541;--main:#6ea0f5;--band:#6ea0f530;--good:#2a9d6f33;--p0:#5b8fe8;--p1:#9dbcf2}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1200px;padding:28px 20px 60px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:15px;margin:0 0 10px}p{margin:2px 0}
.dim{color:var(--dim)}.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));
gap:16px;margin:20px 0}.grid.one{grid-template-columns:minmax(0,1fr)}section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:16px 18px;min-width:0}svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:11px}
.axis{stroke:var(--line);stroke-width:1}.curve{fill:none;stroke:var(--main);stroke-width:2.2}
.ideal{fill:none;stroke:var(--dim);stroke-dasharray:4 4}.band{fill:var(--band)}.zone{fill:var(--good)}
.dot{fill:var(--main);stroke:var(--card);stroke-width:1.5}.dot:hover{r:6}.mark{stroke:var(--warn);
stroke-dasharray:2 3}.warn{fill:var(--warn)!important}ul{margin:6px 0;padding-left:18px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:500}td.l,th.l{text-align:left}tr.knee td{font-weight:600}
code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}.key{display:inline-block;width:10px;height:10px;
border-radius:2px;margin:0 5px 0 12px}@media print{section{break-inside:avoid}body{padding:0}}
"""


def render(outlook: Outlook) -> str:
    """The whole page."""
    points, bend = outlook.points, knee(outlook)
    best = at_knee(outlook, bend)
    title, line = head(outlook).split("\n")
    money = [p.usd if p.usd is not None else p.devices * p.hours for p in points]
    charts = [
        ("Throughput, tokens a second", speed_chart(points)),
        ("Scaling efficiency", efficiency_chart(points)),
        ("Where a step goes", parts_chart(points)),
        (
            f"{'US dollars' if outlook.price else 'Device-hours'} for {count(outlook.tokens)} tokens",
            chart(points, money, low=0.0, label=lambda v: f"{v:,.0f}", marks=_marks(outlook)),
        ),
        ("Hours", chart(points, [p.hours for p in points], label=_short, log=True)),
        (
            "Memory of a device",
            chart(
                points, [p.option.memory.total for p in points], low=0.0, label=size,
                limit=outlook.machine.device.memory_bytes,
            ),
        ),
    ]  # fmt: skip
    sections = "".join(f"<section><h2>{escape(name)}</h2>{svg}</section>" for name, svg in charts)
    knees = "".join(f"<li>{escape(text)}</li>" for text in bends(outlook, bend))
    advice = "".join(f"<p>{_code(text)}</p>" for text in recommended(best, outlook.machine))
    lacks = "".join(f"<li>{escape(text)}</li>" for text in misfits(best))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>Unisono: forecast of '
        f"{escape(outlook.job.model.name)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="dim">{escape(line)}</p>'
        f'<div class="grid"><section><h2>Where it bends</h2><ul>{knees}</ul></section>'
        f"<section><h2>Recommended</h2>{advice}</section></div>"
        f'<div class="grid">{sections}</div>'
        f"<section><h2>Every number of devices</h2>{_table(points, best)}</section>"
        f"{_other_mathematics(outlook, best)}"
        f'<div class="grid one"><section><h2>Ranked, {escape(plural(best.devices))}</h2>{_ranked(best)}'
        f"</section>{f'<section><h2>What does not fit</h2><ul>{lacks}</ul></section>' if lacks else ''}"
        "</div></body></html>\n"
    )


def speed_chart(points: Sequence[Point]) -> str:
    """Throughput with its error band beside the ideal line."""
    base = points[0]
    ideal = [base.option.tokens_per_s * p.devices / base.devices for p in points]
    speed = [p.option.tokens_per_s for p in points]
    return chart(
        points, speed, label=count, log=True, ideal=ideal,
        band=([p.low for p in points], [p.high for p in points]),
    )  # fmt: skip


def efficiency_chart(points: Sequence[Point]) -> str:
    """With the zone of 85 to 95% shaded."""
    return chart(
        points, [p.efficiency for p in points], low=0.0, high=1.0, label=lambda v: f"{v:.0%}",
        zone=(0.85, 0.95),
    )  # fmt: skip


def parts_chart(points: Sequence[Point]) -> str:
    """A stacked bar for each number of devices."""
    step = (WIDTH - LEFT - RIGHT) / len(points)
    bars = []
    for i, point in enumerate(points):
        bottom = float(HEIGHT - BOTTOM)
        for k, (name, words) in enumerate(PARTS):
            share = getattr(point.option.step, name) / point.option.step.total
            high = share * (HEIGHT - TOP - BOTTOM)
            bottom -= high
            if high > 0.05:
                bars.append(
                    f'<rect x="{LEFT + i * step + 2:.1f}" y="{bottom:.2f}" width="{step - 4:.1f}" '
                    f'height="{high:.2f}" style="fill:var(--p{k})"><title>{plural(point.devices)}: '
                    f"{words} {share:.1%}</title></rect>"
                )
    used = [k for k, (n, _) in enumerate(PARTS) if any(getattr(p.option.step, n) for p in points)]
    keys = "".join(
        f'<span class="key" style="background:var(--p{k})"></span>{PARTS[k][1]}' for k in used
    )
    labels = _below([(LEFT + (i + 0.5) * step, p.devices) for i, p in enumerate(points)])
    return _svg("".join(bars) + labels) + f'<p class="dim">{keys}</p>'


def chart(
    points: Sequence[Point],
    values: Sequence[float],
    *,
    label: Callable[[float], str],
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    ideal: Sequence[float] | None = None,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    zone: tuple[float, float] | None = None,
    limit: float | None = None,
    marks: Sequence[tuple[int, str]] = (),
) -> str:
    """A line over the number of devices (logarithmic), with a tooltip on every point."""
    seen = [*values, *(ideal or ()), *(band[0] if band else ()), *(band[1] if band else ())]
    bottom = min(seen) if low is None else low
    top = max([*seen, *([limit] if limit else [])]) * (1 if log else 1.08) if high is None else high
    if log:
        bottom, top = math.log(bottom * 0.8), math.log(top * 1.2)
    first, last = math.log2(points[0].devices), math.log2(points[-1].devices)

    def x(devices: float) -> float:
        share = (math.log2(devices) - first) / (last - first) if last > first else 0.5
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)

    def y(value: float) -> float:
        at = math.log(max(value, 1e-300)) if log else value
        return HEIGHT - BOTTOM - (at - bottom) / max(1e-12, top - bottom) * (HEIGHT - TOP - BOTTOM)

    def path(these: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(p.devices):.1f},{y(v):.1f}" for p, v in zip(points, these))

    drawn = []
    if zone:
        drawn.append(f'<rect class="zone" x="{LEFT}" y="{y(zone[1]):.1f}" width="{WIDTH - LEFT - RIGHT}" height="{y(zone[0]) - y(zone[1]):.1f}"/>')  # fmt: skip
    for k in range(5):
        at = bottom + (top - bottom) * k / 4
        value = math.exp(at) if log else at
        drawn.append(f'<path class="axis" d="M{LEFT},{y(value):.1f}H{WIDTH - RIGHT}"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(label(value))}</text>')  # fmt: skip
    if band:
        back = "L".join(f"{x(p.devices):.1f},{y(v):.1f}" for p, v in reversed(list(zip(points, band[0]))))  # fmt: skip
        drawn.append(f'<path class="band" d="{path(band[1])}L{back}Z"/>')
    if ideal:
        drawn.append(f'<path class="ideal" d="{path(ideal)}"/>')
    if limit:
        drawn.append(f'<path class="mark" d="M{LEFT},{y(limit):.1f}H{WIDTH - RIGHT}"/>')
    for devices, words in marks:
        at = x(devices)
        side = (at - 4, "end") if at > WIDTH / 2 else (at + 4, "start")
        drawn.append(f'<path class="mark" d="M{at:.1f},{TOP}V{HEIGHT - BOTTOM}"/><text class="warn" x="{side[0]:.1f}" y="{TOP + 10}" text-anchor="{side[1]}">{escape(words)}</text>')  # fmt: skip
    drawn.append(f'<path class="curve" d="{path(values)}"/>')
    for p, value in zip(points, values):
        text = f"{plural(p.devices)}: {label(value)}, {p.option.name}"
        drawn.append(f'<circle class="dot" cx="{x(p.devices):.1f}" cy="{y(value):.1f}" r="4"><title>{escape(text)}</title></circle>')  # fmt: skip
    drawn.append(_below([(x(p.devices), p.devices) for p in points]))
    return _svg("".join(drawn))


def _below(places: Sequence[tuple[float, int]]) -> str:
    """Numbers of devices under the axis, as many as have room."""
    drawn, free = [], -math.inf
    for at, devices in places:
        if at >= free:
            drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{devices:,}</text>')  # fmt: skip
            free = at + 14 + 7 * len(f"{devices:,}")
    return "".join(drawn)


def _svg(inside: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{inside}</svg>'


def _marks(outlook: Outlook) -> list[tuple[int, str]]:
    bend = knee(outlook)
    marks = []
    if bend.money_doubles:
        marks.append((bend.money_doubles, "twice the least"))
    if bend.batch_passes_critical:
        marks.append((bend.batch_passes_critical, "critical batch"))
    return marks


def _table(points: Sequence[Point], best: Point) -> str:
    names = ("devices", "strategy", "batch", "micro-batch", "recompute", "tokens/s", "range", "step",
             "efficiency", "memory", "hours", "US$", "kWh", "link for 95%")  # fmt: skip
    heads = "".join(f'<th class="{"l" if n == "strategy" else ""}">{n}</th>' for n in names)
    rows = []
    for p in points:
        o = p.option
        link = "none" if p.link_bytes_per_s is None else gbit(p.link_bytes_per_s)
        cells = (
            f"{p.devices:,}", o.name + ("" if runs_here(o.run) else " *"),
            f"{o.batch:,}{'!' if p.critical_share > 1 else ''}", f"{o.run.micro_batch} x {o.run.accumulation}",
            o.run.recompute, count(o.tokens_per_s), f"{count(p.low)} to {count(p.high)}",
            seconds(o.step.total), f"{p.efficiency:.1%}", size(o.memory.total), f"{p.hours:,.1f}",
            "" if p.usd is None else f"{p.usd:,.0f}", "" if p.kwh is None else f"{p.kwh:,.0f}", link,
        )  # fmt: skip
        kind = ' class="knee"' if p is best else ""
        rows.append(f"<tr{kind}>" + _cells(cells, 1) + "</tr>")
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _ranked(point: Point) -> str:
    rows = []
    for rank, o in enumerate(point.found.options[:8], 1):
        name = o.name + ("" if runs_here(o.run) else " *")
        title = f' title="{escape(overrides(o))}"' if runs_here(o.run) else ""
        cells = (str(rank), name, str(o.run.micro_batch), o.run.recompute, count(o.tokens_per_s), size(o.memory.total))  # fmt: skip
        rows.append(f"<tr{title}>" + _cells(cells, 1) + "</tr>")
    heads = "<th></th><th class=l>strategy</th><th>micro-batch</th><th>recompute</th><th>tokens/s</th><th>memory</th>"  # fmt: skip
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _other_mathematics(outlook: Outlook, best: Point) -> str:
    """Apart from what is ranked: what is faster within the loss budget, and everything for one number."""
    parts = []
    if within := [(p, p.within) for p in within_budget(outlook)]:
        parts.append((f"Within {budget(outlook)}, as sync: auto chooses", within))
    if point := with_others(outlook, best):
        every = [(point, o) for o in point.found.others]
        parts.append((f"On {plural(point.devices)}, whatever its loss", every))
    tables = []
    for title, found in parts:
        heads = "".join(f'<th class="{"l" if n == "strategy" else ""}">{n}</th>' for n in OTHER_COLUMNS)  # fmt: skip
        rows = "".join(
            f'<tr title="{escape(overrides(o))}">{_cells(other_cells(p, o), 1)}</tr>'
            for p, o in found
        )
        tables.append(f'<p>{escape(title)}</p><div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>')  # fmt: skip
    if not tables:
        return ""
    about = f'<p class="dim">{escape(NOT_EXACT[0].upper() + NOT_EXACT[1:])}.</p>'
    return f'<div class="grid one"><section><h2>With other mathematics</h2>{about}{"".join(tables)}</section></div>'  # fmt: skip


def _cells(cells: Sequence[str], left: int) -> str:
    return "".join(
        f'<td class="{"l" if i == left else ""}">{escape(cell)}</td>'
        for i, cell in enumerate(cells)
    )


def _code(text: str) -> str:
    text = text.strip()
    inner = escape(text)
    return f"<code>{inner}</code>" if text.startswith("unisono ") else inner


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
