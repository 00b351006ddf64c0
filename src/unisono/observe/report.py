"""The report page: what the files of one or more runs say, as one HTML file that needs nothing else.

`view` reads a run's folder into plain values, `compare` several runs, `page` puts them into
page/page.html with its style and script; the script draws. Every number comes from a file of the run;
whatever is absent or damaged is listed under `missing` with how to get it. Nothing here raises for
what a file contains, only for a folder that is no run.

Runs are not trusted: the page's content policy admits this one script by its hash and no other, data
lie in a JSON block without `<`, and the script writes text nodes only.

Long series are cut into at most MOST_POINTS bins, each with mean, least and greatest value, so that no
spike is lost; a 10,000-step run gives a page of about 200 kB. No torch is imported.
"""

import base64
import datetime
import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.clock import PHASES, STEP_PHASES
from unisono.errors import UnisonoError
from unisono.files import read_lines, readable_bytes, replacing

NOTHING = "\N{EN DASH}"
PAGE = Path(__file__).parent / "page"
MOST_RUNS = 8
MOST_POINTS = 400
TIMELINE_BYTES = 110_000
"""Of timeline in a page, for each run; steps beyond that are left out, and the page says so."""
MOST_RANKS = 64
KNOWN = ("run.json", "plan.json", "metrics.jsonl", "receipt.json")
MEANING = {
    "compute": "forward and backward",
    "recomputation": "forward again, for memory",
    "communication": "exposed: nothing else ran meanwhile",
    "waiting": "for a slower replica",
    "imbalance": "for one with more work",
    "data": "reading batches",
    "optimizer": "clip and update",
    "checkpoint": "writing to disk",
    "evaluation": "on the held-out split",
    "other": "logging, checks, the loop",
}
RARE = ("recomputation", "imbalance")
"""Phases that are shown only where there is any."""
Row = dict[str, Any]


# --- a run's files, whatever state they are in


class Folder:
    """The files of a run, and what is missing of them."""

    def __init__(self, path: Path) -> None:
        """Raises UnisonoError when this is no run's folder."""
        self.path = path
        self.missing: list[tuple[str, str, str]] = []
        """(what the page lacks, why, how to get it)"""
        try:
            found = any((path / name).is_file() for name in KNOWN)
        except OSError as error:
            raise UnisonoError(f"{path}: cannot be read: {error.strerror}") from None
        if not found:
            raise UnisonoError(
                f"{path}: no run is there (none of {', '.join(KNOWN)}); give the output_dir of a run"
            )

    def lacks(self, what: str, why: str, how: str) -> None:
        self.missing.append((what, why, how))

    def json(self, name: str, what: str, how: str) -> Row:
        """The object in a file; {} and an entry in `missing` where there is none."""
        try:
            value = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            self.lacks(what, f"{name} is not there", how)
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.lacks(what, f"{name} cannot be read ({type(error).__name__})", how)
            return {}
        if not isinstance(value, dict):
            self.lacks(what, f"{name} holds no object", how)
            return {}
        return value

    def lines(self, name: str, what: str, how: str) -> list[Row]:
        """The rows of a file, those with a step."""
        try:
            # In this order: a row that a running job adds meanwhile is not taken for a torn one.
            with (self.path / name).open("rb") as file:
                lines = sum(1 for _ in file)
            rows = list(read_lines(self.path / name))
        except FileNotFoundError:
            self.lacks(what, f"{name} is not there", how)
            return []
        except OSError as error:
            self.lacks(what, f"{name} cannot be read ({error.strerror})", how)
            return []
        if lines > len(rows):
            torn = lines - len(rows)
            self.lacks(
                f"{torn} {'line' if torn == 1 else 'lines'} of {name}",
                "torn by a stop in the middle of a write, or damaged",
                "nothing to do: the next start of the run cuts a torn line off",
            )
        rows = [r for r in rows if isinstance(r.get("step"), int) and number(r["step"]) is not None]
        if not rows and not lines:
            self.lacks(what, f"{name} is empty so far", how)
        return rows


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def at(value: Any, *path: Any) -> Any:
    """value[path[0]][path[1]]..., None where that leads nowhere."""
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {str(k): v for k, raw in items if (v := number(raw)) is not None}


def objects(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []


def short(value: float) -> float:
    """Five significant digits: what a chart can show."""
    return float(f"{value:.5g}")


# --- series


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
    low: bool = False,
) -> Row | None:  # fmt: skip
    """What the script needs to draw lines over steps; None without a point."""
    drawn = [line for line in lines if line["points"]]
    if not drawn:
        return None
    return {
        "id": name, "title": title, "unit": unit, "lines": drawn, "log": log, "zero": zero,
        "rules": [[label, value] for label, value in rules if value], "note": note, "low": low,
    }  # fmt: skip


def line(
    name: str, points: Sequence[Sequence[float]], colour: str = "a", dots: bool = False
) -> Row:
    return {"name": name, "points": points, "colour": colour, "dots": dots}


# --- one run


def view(path: Path) -> Row:
    """What the page shows of the run in `path`. Raises UnisonoError when there is none."""
    folder = Folder(path)
    config = folder.json("run.json", "Configuration", "train writes it before the first step")
    plan = folder.json("plan.json", "Plan and its reasons", "train writes it before the first step")
    rows = folder.lines(
        "metrics.jsonl", "Loss and throughput", "train writes a row every logging_steps steps"
    )
    receipt = folder.json("receipt.json", "Receipt", "train writes it when the last step is done")
    environment = folder.json(
        "environment.json", "Versions and host", "train again: this run is of an older version"
    )
    forecast = folder.json(
        "forecast.json",
        "Forecast against measurement",
        "unisono probe measures the machine and the link; a run that finds a probe is forecast",
    )
    probe = folder.json("probe.json", "Bandwidth of the probe", "run unisono probe before the run")
    steps = folder.lines(
        "timeline.jsonl", "Timeline", "train again: this run is of an older version"
    )
    step = max([r["step"] for r in rows] + [int(number(receipt.get("step")) or 0)], default=0)
    last = number(plan.get("max_steps")) or number(config.get("max_steps"))
    # A receipt of fewer steps than the metrics is of the time before a resume.
    if receipt and step > (number(receipt.get("step")) or step):
        folder.lacks("Receipt", "it is older than the newest steps", "let the run finish")
        receipt = {}
    return {
        "name": path.resolve().name,
        "state": _state(step, last, receipt),
        "step": step,
        "subtitle": _subtitle(config, plan, receipt),
        "tiles": _tiles(rows, receipt, step, last, forecast),
        "time": _time(rows, receipt),
        "advice": _advice(receipt),
        "batch": _batch_advice(receipt),
        "timeline": timeline(steps),
        "charts": _charts(rows, plan, receipt, forecast, folder),
        "forecast": _forecast(forecast, receipt, rows),
        "bandwidth": _bandwidth(steps, probe),
        "plan": _plan(plan),
        "config": _flat(config),
        "environment": _environment(environment, receipt),
        "missing": folder.missing,
    }


def _state(step: int, last: float | None, receipt: Row) -> Row:
    if receipt:
        return {"kind": "done", "text": f"finished, {step:,} steps"}
    of = f" of {int(last):,}" if last else ""
    return {"kind": "open", "text": f"not finished: step {step:,}{of}"}


def _subtitle(config: Row, plan: Row, receipt: Row) -> str:
    model = config.get("model")
    if isinstance(model, Mapping):
        sizes = [f"{model[k]} {label}" for k, label in (("hidden_size", "wide"), ("num_hidden_layers", "layers")) if k in model]  # fmt: skip
        model = ", ".join([str(model.get("model_type", "model")), *sizes])
    n = number(plan.get("replicas")) or number(receipt.get("replicas"))
    parts = [model, f"{n:g} {'replica' if n == 1 else 'replicas'}" if n else None,
             config.get("sync") and f"sync {config['sync']}", receipt.get("device")]  # fmt: skip
    return " · ".join(str(p) for p in parts if p)


def _tiles(
    rows: list[Row], receipt: Row, step: int, last: float | None, forecast: Row
) -> list[Row]:
    """The numbers to see first."""
    tiles = []

    def tile(label: str, value: float | None, form: Callable[[float], str], note: str) -> None:
        if value is not None:
            tiles.append({"label": label, "value": form(value), "note": note})

    rate = number(receipt.get("tokens_per_second"))
    if rate is None:
        recent = [v for r in rows if (v := number(r.get("perf/tokens_per_second"))) is not None][
            -20:
        ]
        rate = statistics.median(recent) if recent else None
    foretold = number(forecast.get("tokens_per_second"))
    note = f"forecast {foretold:,.0f}" if foretold else "in steps, all replicas"
    tile("tokens/s", rate, "{:,.0f}".format, note)
    n = number(receipt.get("replicas"))
    note = f"of {n:g} x one replica alone" if n else ""
    tile("scaling efficiency", number(receipt.get("efficiency")), "{:.1%}".format, note)
    held = [(v, r["step"]) for r in rows if (v := number(r.get("eval/loss"))) is not None]
    if held:
        best, when = min(held)
        note = f"best, step {when:,}; perplexity {math.exp(min(best, 99)):,.1f}"
        tile("held-out loss", best, "{:.3f}".format, note)
    loss = [v for r in rows if (v := number(r.get("train/loss"))) is not None]
    tile("training loss", loss[-1] if loss else None, "{:.3f}".format, "last row")
    tile("step", number(receipt.get("step_ms")), _milliseconds, "mean")
    tile("wall time", number(receipt.get("wall_s")), _duration, "since start or resume")
    tile("MFU", _share(receipt.get("mfu")), "{:.1%}".format, "model FLOPs used")
    note = "time that became committed steps"
    tile("goodput", _share(receipt.get("goodput")), "{:.1%}".format, note)
    if not receipt and last:
        tile("progress", step / last, "{:.0%}".format, f"step {step:,} of {int(last):,}")
    return tiles


def _share(value: Any) -> float | None:
    """A share, given bare or as {"value" | "share": ...}."""
    if isinstance(value, Mapping):
        value = value.get("value", value.get("share"))
    return number(value)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _time(rows: list[Row], receipt: Row) -> Row | None:
    """Seconds by phase, in all and by rank: the receipt's, or of the rows so far (rank 0)."""
    by_rank = [numbers(r) for r in objects(receipt.get("seconds_by_rank"))]
    source = "the receipt: mean over ranks"
    if not by_rank:
        so_far: dict[str, float] = defaultdict(float)
        for row in rows:
            for phase in PHASES:
                so_far[phase] += number(row.get(f"time/{phase}_s")) or 0.0
        by_rank, source = [so_far], "metrics so far: rank 0"
    seconds = {p: statistics.fmean(r.get(p, 0.0) for r in by_rank) for p in PHASES}
    total = sum(seconds.values())
    if total <= 0:
        return None
    steps = number(receipt.get("steps"))
    stepping = sum(seconds[p] for p in STEP_PHASES)
    return {
        "source": source,
        "seconds": short(total),
        "rows": [
            {
                "phase": p,
                "seconds": short(s),
                "share": short(s / total),
                "step_ms": short(1e3 * s / steps) if steps and p in STEP_PHASES else None,
                "meaning": MEANING[p],
                # Throughput in steps if this phase took nothing and all else stayed.
                "gain": short(s / (stepping - s))
                if p in STEP_PHASES and p != "compute" and s < stepping
                else None,
            }
            for p, s in seconds.items()
            if s or p not in RARE
        ],
        "by_rank": _by_rank(by_rank),
    }


def _by_rank(by_rank: list[dict[str, float]]) -> Row | None:
    if len(by_rank) < 2:
        return None
    kept = _some_ranks(len(by_rank), 24, lambda r: by_rank[r].get("waiting", 0.0))
    return {
        "rows": [
            {"rank": r, "seconds": [short(by_rank[r].get(p, 0.0)) for p in PHASES]} for r in kept
        ],
        "note": f"{len(kept)} of {len(by_rank)} ranks: those that waited most and least"
        if len(kept) < len(by_rank)
        else "",
    }


def _some_ranks(count: int, most: int, key: Callable[[int], float]) -> list[int]:
    """All ranks, or half of `most` from either end of the order by `key`."""
    ranks = sorted(range(count), key=key)
    return sorted(ranks if count <= most else ranks[: most // 2] + ranks[-most // 2 :])


def _advice(receipt: Row) -> list[Row]:
    return [
        {
            "what": str(item.get("what", "")),
            "do": str(item.get("do", "")),
            "share": number(item.get("share")),
            "gain": number(item.get("gain")),
        }
        for item in objects(receipt.get("advice"))
    ]


def _batch_advice(receipt: Row) -> list[str]:
    lines = at(receipt, "batch_advice", "lines")
    return [str(text) for text in lines] if isinstance(lines, list) else []


def _noise(rows: list[Row]) -> list[list[float]]:
    """[step, noise scale, low, high], only where the interval has both ends: else it is not known."""
    names = [f"batch/noise_scale_{end}tokens" for end in ("", "low_", "high_")]
    points = [[r["step"], *(number(r.get(n)) for n in names)] for r in rows]
    known = sorted((p for p in points if None not in p), key=lambda p: p[0])
    return [[x, *map(short, y)] for x, *y in known[:: math.ceil(len(known) / MOST_POINTS) or 1]]


def _charts(
    rows: list[Row], plan: Row, receipt: Row, forecast: Row, folder: Folder
) -> list[Row]:  # fmt: skip
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
    memory = series(rows, "perf/memory_bytes")
    if not memory:
        folder.lacks(
            "Memory over time",
            "no row of metrics.jsonl has perf/memory_bytes",
            "the plan below says what weights, gradients and optimizer take",
        )
    charts = [
        chart("loss", "Loss", "nats a token", [
            line("training", series(rows, "train/loss"), "a"),
            line("held out", series(rows, "eval/loss"), "b", dots=True),
        ]),
        chart("rate", "Learning rate", "", [line("learning rate", series(rows, "train/learning_rate"), "c")], zero=True, low=True),
        chart("norm", "Gradient norm", "before clipping", [line("gradient norm", series(rows, "train/grad_norm"), "d")],
              rules=[("clipped above", number(_config(folder, "max_grad_norm")))], log=True, low=True),
        chart("throughput", "Throughput", "tokens/s", [line("all replicas", series(rows, "perf/tokens_per_second"), "a")],
              rules=[("forecast", number(forecast.get("tokens_per_second"))), ("mean", number(receipt.get("tokens_per_second")))], zero=True),
        chart("exposed", "Not computing", "% of step time", [
            line("communication", series(rows, "comm/exposed_fraction", 100), "communication"),
            line("waiting", series(rows, "comm/waiting_fraction", 100), "waiting"),
        ], zero=True, low=True, note="Exposed communication, and waiting for a slower replica: rank 0 as it went. "
              "What a step waited for others is settled one step later, so a row of one step may fall below zero."),
        chart("mfu", "Model FLOPs used", "%", [line("MFU", series(rows, "perf/mfu", 100), "a")], zero=True, low=True),
        chart("noise", "Gradient noise scale", "tokens", [
            line("noise scale", noise, "a"),
            line("critical batch", series(rows, "batch/critical_tokens"), "b"),
        ], rules=[("this batch", batch or None)], log=True,
            note="Below the noise scale a larger batch still saves steps; far above it, it saves none. "
                 "Band: where the noise scale lies with 95% certainty; a wide band says little."),
        chart("memory", "Memory", "GiB", [line("in use", series(rows, "perf/memory_bytes", 2**-30), "a")],
              rules=[("model and optimizer", (number(plan.get("model_bytes")) or 0) / 2**30),
                     ("forecast", (number(forecast.get("memory_bytes")) or 0) / 2**30)], zero=True),
    ]  # fmt: skip
    return [c for c in charts if c]


def _config(folder: Folder, name: str) -> Any:
    try:
        return at(json.loads((folder.path / "run.json").read_bytes()), name)
    except (OSError, ValueError, RecursionError):
        return None


def _forecast(forecast: Row, receipt: Row, rows: list[Row]) -> Row | None:
    """Parts of a step, foretold and measured, in ms."""
    parts = numbers(forecast.get("parts"))
    whole = number(forecast.get("step_s"))
    if not parts and whole is None:
        return None
    found = _time(rows, receipt) if receipt else None
    measured = {r["phase"]: r["step_ms"] for r in found["rows"]} if found else {}
    names = [p for p in PHASES if p in parts] + [p for p in parts if p not in PHASES]
    table = [
        {"part": p, "forecast": short(parts[p] * 1e3), "measured": measured.get(p)} for p in names
    ]
    if whole is not None:
        took = number(receipt.get("step_ms"))
        table.insert(
            0, {"part": "step", "forecast": short(whole * 1e3), "measured": took and short(took)}
        )
    pairs = [
        ("tokens/s", number(forecast.get("tokens_per_second")), number(receipt.get("tokens_per_second")), "{:,.0f}"),
        ("scaling efficiency", number(forecast.get("efficiency")), number(receipt.get("efficiency")), "{:.1%}"),
    ]  # fmt: skip
    return {
        "rows": table,
        "facts": [
            [
                name,
                f.format(a) if a is not None else NOTHING,
                f.format(b) if b is not None else NOTHING,
            ]
            for name, a, b, f in pairs
            if a is not None or b is not None
        ],
        "error": number(forecast.get("error")),
    }


def _plan(plan: Row) -> list[list[str]]:
    found = plan.get("reasons")
    reasons = found if isinstance(found, Mapping) else {}
    hyper = numbers(plan.get("hyper"))
    rest = {k: v for k, v in plan.items() if k not in ("reasons", "hyper")}
    return [
        [k.replace("_", " "), _text(k, v), str(reasons.get(k, ""))]
        for k, v in {**rest, **hyper}.items()
        if v is not None
    ]


def _text(name: str, value: Any) -> str:
    found = number(value)
    if found is None:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list | tuple):
            return ", ".join(_text("", v) for v in value)
        return NOTHING if value is None else str(value)
    if "bytes" in name:
        return readable_bytes(int(found))
    return f"{found:,}" if isinstance(value, int) else f"{found:.6g}"


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: _text(prefix, value)}
    return {
        k: v
        for name, inner in value.items()
        for k, v in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _environment(environment: Row, receipt: Row) -> dict[str, str]:
    known = environment or {k: receipt[k] for k in ("device", "machine") if receipt.get(k)}
    return {k.replace("_", " "): v for k, v in _flat(known).items()}


# --- the timeline


def timeline(rows: list[Row]) -> Row | None:
    """The recorded steps that fit, with who came last at each collective; None without any."""
    by_step: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if isinstance(row.get("rank"), int) and isinstance(row.get("spans"), list):
            by_step[row["step"]].append(row)
    if not by_step:
        return None
    shown: list[Row] = []
    room = TIMELINE_BYTES
    for step in _in_order_of_interest(sorted(by_step)):
        ordered = sorted(by_step[step], key=lambda r: r["rank"])
        one, size, most = None, room + 1, 2 * MOST_RANKS
        while size > room and most > 2 and not (shown and one):
            most //= 2
            one = _step(step, ordered, most)
            size = len(json.dumps(one, separators=(",", ":")))
        if one is None:
            continue
        if shown and size > room:
            break
        shown.append(one)
        room -= size
    if not shown:
        return None
    shown.sort(key=lambda s: s["step"])
    return {"steps": shown, "recorded": len(by_step)}


def _in_order_of_interest(steps: list[int]) -> list[int]:
    """The newest, the first, then what halves the largest gap."""
    if len(steps) < 3:
        return steps[::-1]
    order, gaps = [steps[-1], steps[0]], [(0, len(steps) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if middle not in (low, high):
            order.append(steps[middle])
            gaps += [(low, middle), (middle, high)]
    return order


def _step(step: int, rows: list[Row], most: int) -> Row | None:
    """One step, at most `most` ranks of it."""
    spans = {r["rank"]: _spans(r["spans"]) for r in rows}
    collectives = {r["rank"]: _collectives(r) for r in rows}
    ends = [s[2] for each in spans.values() for s in each]
    if not ends:
        return None
    begin, end = min(s[1] for each in spans.values() for s in each), max(ends)
    arrivals: dict[tuple[Any, ...], list[tuple[float, int]]] = defaultdict(list)
    for rank, each in collectives.items():
        for c in each:
            arrivals[c["key"]].append((c["started"], rank))
    # Only where all ranks have the entry is it known who came last.
    last = {k: max(a) for k, a in arrivals.items() if len(a) == (len(k[-1]) or len(rows)) > 1}
    waits: dict[tuple[int, int], float] = defaultdict(float)
    ranks = []
    kept = _some_ranks(
        len(rows),
        most,
        lambda i: sum(
            s[2] - s[1] for s in spans[rows[i]["rank"]] if s[0] == PHASES.index("waiting")
        ),
    )
    for index, row in enumerate(rows):
        rank = row["rank"]
        travelled = []
        for c in collectives[rank]:
            late, who = last.get(c["key"], (0.0, -1))
            blamed = 0.0
            if who not in (-1, rank) and c["finished"] is not None:
                # Of the standing still, what lies before the last one came was for that one.
                blamed = max(0.0, min(c["waited"], late - (c["finished"] - c["waited"])))
                waits[rank, who] += blamed
            travelled.append(
                [c["operation"], c["group"], c["sequence"], c["bytes"], c["started"], c["waited"],
                 c["finished"], who, round(blamed, 3)]
            )  # fmt: skip
        if index in kept:
            ranks.append(
                {
                    "rank": rank,
                    "host": str(row.get("host", "")),
                    "error": number(row.get("offset_error_ms")) or 0.0,
                    "spans": spans[rank],
                    "collectives": travelled,
                    "left_out": int((number(row.get("spans_left_out")) or 0) + (number(row.get("collectives_left_out")) or 0)),
                }
            )  # fmt: skip
    return {
        "step": step,
        "begin": begin,
        "end": end,
        "num_ranks": len(rows),
        "ranks": ranks,
        "waits": [[a, b, round(ms, 3)] for (a, b), ms in sorted(waits.items(), key=lambda w: -w[1])[:6] if ms > 0],
    }  # fmt: skip


def _spans(raw: Any) -> list[list[float]]:
    """[index of the phase, began, ended] in ms."""
    found: list[list[float]] = []
    for item in raw:
        if isinstance(item, list) and len(item) == 3 and item[0] in PHASES:
            began, ended = number(item[1]), number(item[2])
            if began is not None and ended is not None and ended >= began:
                found.append([PHASES.index(item[0]), began, ended])
    return found


def _collectives(row: Row) -> list[Row]:
    """Those of a row; `key` is the same on all ranks that take part, and ends with them, () for all."""
    found = []
    for item in objects(row.get("collectives")):
        if number(item.get("started_ms")) is None:
            continue
        operation, group = str(item.get("operation", "")), str(item.get("group", ""))
        sequence = int(number(item.get("sequence")) or 0)
        members = at(row.get("groups"), group)
        members = tuple(map(str, members)) if isinstance(members, list) else ()
        found.append(
            {
                "key": (operation, group, sequence, members),
                "operation": operation,
                "group": group,
                "sequence": sequence,
                "bytes": int(number(item.get("sent_bytes")) or 0),
                "started": number(item.get("started_ms")),
                "waited": number(item.get("waited_ms")) or 0.0,
                "finished": number(item.get("finished_ms")),
            }
        )
    return found


# --- bandwidth


def _bandwidth(rows: list[Row], probe: Row) -> Row | None:
    """Collectives of the recorded steps beside the probe's: [whole tensor's bytes, bus MB/s].

    nccl-tests' bus bandwidth is what each rank sends over the time, of a broadcast the whole. A
    collective has begun when the last rank came and is known to have ended when the first rank knew;
    overlapped with computation it may have ended before that, so that these are lower bounds.
    """
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    ranks: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        if isinstance(row.get("rank"), int):
            ranks[row["step"]].add(row["rank"])
            for c in _collectives(row):
                found[(row["step"], *c["key"])].append(c)
    points: dict[str, list[list[float]]] = defaultdict(list)
    for (step, operation, _, _, members), each in found.items():
        n = len(members) or len(ranks[step])
        if n < 2 or len(each) != n or any(c["finished"] is None for c in each):
            continue
        seconds = (min(c["finished"] for c in each) - max(c["started"] for c in each)) / 1e3
        sent = max(c["bytes"] for c in each)
        if seconds > 0 and sent > 0:
            whole = sent / _sent_of_whole(operation, n)
            bus = whole if operation == "broadcast" else sent
            points[operation].append([round(whole), short(bus / seconds / 1e6)])
    lines: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for p in objects(probe.get("collectives")):
        size, speed = number(p.get("bytes")), number(p.get("busbw_GBps"))
        if size and speed and size > 0 and speed > 0:
            where = str(p.get("operation", "")), str(p.get("axis") or "")
            lines[where].append([size, short(speed * 1e3)])
    if not points and not lines:
        return None
    return {
        "points": [{"operation": k, "points": _thin(v)} for k, v in sorted(points.items())],
        "lines": [
            {"operation": operation, "axis": axis, "points": sorted(v)[:200]}
            for (operation, axis), v in sorted(lines.items())
        ][:16],
    }


def _sent_of_whole(operation: str, n: int) -> float:
    """What the rank that sends most sends, over the whole tensor (sync/ledger.py)."""
    if operation in ("broadcast", "shift"):
        return n - 1 if operation == "broadcast" else 1
    return (2 if operation == "all-reduce" else 1) * (n - 1) / n


def _thin(points: list[list[float]], most: int = 250) -> list[list[float]]:
    """Every so-maniest of the points in order of size."""
    points = sorted(points)
    return points[:: math.ceil(len(points) / most)]


# --- several runs


def compare(runs: Sequence[Row], paths: Sequence[Path]) -> Row | None:
    """Scaling over the runs, what changed between them, and where each one's time went."""
    if len(runs) < 2:
        return None
    return {
        "scaling": _scaling(paths, runs),
        "changed": _changed(runs),
        "charts": [c for c in (_overlay(runs, "loss", 0), _overlay(runs, "loss", 1), _overlay(runs, "throughput", 0)) if c],
        "time": [
            {"name": r["name"], "rows": {x["phase"]: x["step_ms"] for x in r["time"]["rows"]}}
            for r in runs
            if r["time"] and any(x["step_ms"] for x in r["time"]["rows"])
        ],
    }  # fmt: skip


def _scaling(paths: Sequence[Path], runs: Sequence[Row]) -> list[Row]:
    """Throughput by replicas, best first at equal counts."""
    found = []
    for path, run in zip(paths, runs, strict=True):
        try:
            receipt = json.loads((path / "receipt.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        n, rate = number(at(receipt, "replicas")), number(at(receipt, "tokens_per_second"))
        if n and rate:
            own = number(at(receipt, "efficiency"))
            found.append({"name": run["name"], "replicas": n, "rate": short(rate), "own": own})
    found.sort(key=lambda f: (f["replicas"], -f["rate"]))
    for f in found:
        first = found[0]
        f["efficiency"] = short((f["rate"] / f["replicas"]) / (first["rate"] / first["replicas"]))
    return found


def _changed(runs: Sequence[Row]) -> list[list[str]]:
    """[name, value in each run] of what is not the same in all."""
    tables = []
    for run in runs:
        plan = {f"plan: {what}": value for what, value, _ in run["plan"]}
        environment = {f"environment: {k}": v for k, v in run["environment"].items()}
        tables.append({**run["config"], **plan, **environment})
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [[name, *(table.get(name, NOTHING) for table in tables)] for name in names]
    asked = {row[0].replace("_", " ") for row in rows if len(set(row[1:])) > 1}
    return [
        row
        for row in rows
        if len(set(row[1:])) > 1
        and row[0] != "output_dir"
        # What follows from the configuration under the same name is said once.
        and row[0].partition(": ")[2] not in asked
    ]


def _overlay(runs: Sequence[Row], name: str, index: int) -> Row | None:
    """Line `index` of the chart of this name, of every run."""
    lines, found = [], None
    for k, run in enumerate(runs):
        for c in run["charts"]:
            if c["id"] == name and len(c["lines"]) > index:
                found = found or c
                points = c["lines"][index]["points"]
                lines.append({**line(run["name"], points, f"run{k}"), "dots": False})
    if found is None or len(lines) < 2:
        return None
    what = found["lines"][index]["name"]
    title = found["title"] if len(found["lines"]) == 1 else f"{found['title']}, {what}"
    return {**found, "id": f"{name}-{index}", "title": title, "lines": lines, "rules": []}


# --- the page


def read(paths: Sequence[Path]) -> Row:
    """All that a page shows of these runs. Raises UnisonoError for a folder that is no run."""
    if len(paths) > MOST_RUNS:
        raise UnisonoError(f"report: found {len(paths)} runs; give at most {MOST_RUNS}")
    runs = [view(path) for path in paths]
    names = [run["name"] for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = f"{path.resolve().parent.name}/{run['name']}"
    return {
        "phases": PHASES,
        "runs": runs,
        "compare": compare(runs, paths),
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def as_json(data: Row) -> str:
    """JSON without the characters that could end the block it stands in, or a line of a script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page(data: Row, live: bool = False) -> str:
    """The HTML of a page. `live`: it asks its server for newer data."""
    from jinja2 import Environment

    style, script = (PAGE / "page.css").read_text(), (PAGE / "page.js").read_text()
    shell = Environment(autoescape=True).from_string((PAGE / "page.html").read_text())
    return shell.render(
        title=" and ".join(run["name"] for run in data["runs"]),
        style=style,
        script=script,
        data=as_json(data),
        live=live,
        policy=policy(style, script, live),
    )


def policy(style: str, script: str, live: bool) -> str:
    """The content policy: this style, this script, and no connection but to a live page's server."""
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write(paths: Sequence[Path], output: Path) -> Row:
    """Write the page; returns what it shows. Raises UnisonoError: no run, or no place to write."""
    data = read(paths)
    try:
        with replacing(output) as file:
            file.write(page(data).encode())
    except OSError as error:
        raise UnisonoError(f"{output}: cannot be written: {error.strerror}") from None
    return data
