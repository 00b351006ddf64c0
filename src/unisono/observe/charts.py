"""The charts of a run: series over steps, as the page draws them, short and without losing a spike.

Of more than MOST_POINTS rows, neighbours become one bin with its mean, least and greatest value.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from unisono.clock import PHASES, STEP_PHASES
from unisono.observe.folder import Folder, Row, number, numbers, objects, short

MOST_POINTS = 400
MOST_MARKS = 40
STILL = ("communication", "waiting", "imbalance", "data")
"""What keeps a rank from computing in a step."""


def series(rows: Iterable[Row], name: str, scale: float = 1.0) -> list[list[float]]:
    """[step, value] or, of more than MOST_POINTS, [middle step, mean, least, greatest] of each bin."""
    points = [(r["step"], v * scale) for r in rows if (v := number(r.get(name))) is not None]
    points.sort(key=lambda p: p[0])
    if len(points) <= MOST_POINTS:
        return [[x, short(y)] for x, y in points]
    first, last = points[0][0], points[-1][0]
    width = (last - first + 1) / MOST_POINTS
    bins: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for x, y in points:
        bins[int((x - first) / width)].append((x, y))
    return [
        [
            short(statistics.fmean(x for x, _ in b)),
            *map(short, (statistics.fmean(y for _, y in b), min(y for _, y in b), max(y for _, y in b))),
        ]
        for b in bins.values()
    ]  # fmt: skip


def chart(
    name: str, title: str, unit: str, lines: Sequence[Row], *, log: bool = False,
    rules: Sequence[tuple[str, float | None]] = (), note: str = "", zero: bool = False,
    low: bool = False, marks: Sequence[Sequence[Any]] = (),
) -> Row | None:  # fmt: skip
    """What the script needs to draw lines over steps; None without a point.

    `rules`: levels, left out where there is none. `marks`: (step, what happened there).
    """
    drawn = [line for line in lines if line["points"]]
    if not drawn:
        return None
    return {
        "id": name, "title": title, "unit": unit, "lines": drawn, "log": log, "zero": zero,
        "rules": [[label, value] for label, value in rules if value], "note": note, "low": low,
        "marks": list(marks)[-MOST_MARKS:],
    }  # fmt: skip


def line(
    name: str, points: Sequence[Sequence[float]], colour: str = "a", dots: bool = False
) -> Row:
    return {"name": name, "points": points, "colour": colour, "dots": dots}


# --- what they show of a run


def so_far(rows: list[Row]) -> list[dict[str, float]]:
    """Seconds by phase of every rank, all rows of `ranks.jsonl` added up."""
    total: list[dict[str, float]] = []
    for row in rows:
        for rank, seconds in enumerate(objects(row.get("seconds"))):
            if rank == len(total):
                total.append(defaultdict(float))
            for phase, s in numbers(seconds).items():
                total[rank][phase] += s
    return total


def own_times(row: Row) -> Row:
    """Rank 0's own times, of a row of metrics, as `ranks.jsonl` has them."""
    seconds = {p: s for p in PHASES if (s := number(row.get(f"time/{p}_s")))}
    return {"step": row["step"], "seconds": [seconds] if seconds else []}


def _noise(rows: list[Row]) -> list[list[float]]:
    """[step, noise scale, low, high], only where the interval has both ends: else it is not known."""
    names = [f"batch/noise_scale_{end}tokens" for end in ("", "low_", "high_")]
    points = [[r["step"], *(number(r.get(n)) for n in names)] for r in rows]
    known = sorted((p for p in points if None not in p), key=lambda p: p[0])
    return [[x, *map(short, y)] for x, *y in known[:: math.ceil(len(known) / MOST_POINTS) or 1]]


def run_charts(
    rows: list[Row], ranks: list[Row], config: Row, plan: Row, receipt: Row, forecast: Row,
    folder: Folder,
) -> list[Row]:  # fmt: skip
    """Those that there is something to draw for, in order; what is not there is told to `folder`."""
    batch = (number(plan.get("global_batch_size")) or 0) * (
        number(plan.get("sequence_length")) or 0
    )
    noise = _noise(rows)
    if not noise:
        folder.lacks(
            "Gradient noise scale",
            "no row of metrics.jsonl has it within bounds",
            "it needs two replicas, or two micro-batches a step, and more steps",
        )
    most = max([number(r.get("perf/memory_bytes")) or 0 for r in rows] + peaks(receipt), default=0)
    unit, scale = ("GiB", 2**-30) if most >= 2**30 else ("MiB", 2**-20)
    memory = series(rows, "perf/memory_bytes", scale)
    if not memory:
        folder.lacks(
            "Memory over time",
            "no row of metrics.jsonl has perf/memory_bytes",
            "the plan below says what weights, gradients and optimizer take",
        )
    still, whose = _standing_still(ranks), "Mean over ranks."
    if not still:
        still, whose = _standing_still([own_times(row) for row in rows]), "Rank 0 as it went."
    marks = [
        [r["step"], str(r["event"]).partition(": ")[2]]
        for r in rows
        if isinstance(r.get("event"), str)
    ]
    charts = [
        chart("loss", "Loss", "nats a token", [
            line("training", series(rows, "train/loss"), "a"),
            line("held out", series(rows, "eval/loss"), "b", dots=True),
        ], marks=marks),
        chart("reward", "Reward", "mean over completions", [
            line("training", series(rows, "train/reward"), "a"),
            line("held out", series(rows, "eval/reward"), "b", dots=True),
        ]),
        chart("rate", "Learning rate", "", [line("learning rate", series(rows, "train/learning_rate"), "c")], zero=True, low=True),
        chart("norm", "Gradient norm", "before clipping", [line("gradient norm", series(rows, "train/grad_norm"), "d")],
              rules=[("clipped above", number(config.get("max_grad_norm")))], log=True, low=True, marks=marks),
        chart("throughput", "Throughput", "tokens/s", [line("all replicas", series(rows, "perf/tokens_per_second"), "a")],
              rules=[("forecast", number(forecast.get("tokens_per_second"))), ("mean", number(receipt.get("tokens_per_second")))], zero=True),
        chart("exposed", "Not computing", "% of step time", [
            line(phase, series(still, phase, 100), phase) for phase in STILL
        ], zero=True, low=True, note=f"{whose} What none of them has is not drawn."),
        chart("mfu", "Model FLOPs used", "%", [line("MFU", series(rows, "perf/mfu", 100), "a")], zero=True, low=True),
        chart("noise", "Gradient noise scale", "tokens", [
            line("noise scale", noise, "a"),
            line("critical batch", series(rows, "batch/critical_tokens"), "b"),
        ], rules=[("this batch", batch or None)], log=True,
            note="Below the noise scale a larger batch still saves steps; far above it, it saves none. "
                 "Band: where the noise scale lies with 95% certainty; a wide band says little."),
        chart("memory", "Memory in use", f"{unit}, rank 0", [line("in use", memory, "a")], zero=True, low=True, rules=[
            ("peak", max(peaks(receipt), default=0) * scale),
            ("forecast of the peak", (number(forecast.get("memory_bytes")) or 0) * scale),
            ("model and optimizer", (number(plan.get("model_bytes")) or 0) * scale),
        ]),
    ]  # fmt: skip
    return [c for c in charts if c]


def _standing_still(rows: list[Row]) -> list[Row]:
    """Rows of `ranks.jsonl` as shares of the time in steps, mean over ranks."""
    found = []
    for row in rows:
        by_rank = so_far([row])
        total = {p: sum(r[p] for r in by_rank) for p in STEP_PHASES}
        whole = sum(total.values())
        if whole > 0:
            found.append({"step": row["step"], **{p: total[p] / whole for p in STILL}})
    ever = {k for row in found for k, v in row.items() if v}
    return [{k: v for k, v in row.items() if k in ever} for row in found]


def peaks(receipt: Row) -> list[float]:
    """Bytes of memory at most, by rank."""
    found = receipt.get("memory_by_rank")
    return [v for v in map(number, found) if v] if isinstance(found, list) else []
