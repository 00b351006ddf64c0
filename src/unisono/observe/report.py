"""The report page: what the files of one or more runs say, as one HTML file that needs nothing else.

`view` reads a run's folder (folder.py) into plain values, with its charts (charts.py) and recorded steps
(recorded.py); compare.py sets several beside each other; `page` puts all into page/page.html with its
style and script, which draws. Every number comes from a file of the run.

Runs are not trusted: the page's content policy admits this one script by its hash and no other, data
lie in a JSON block without `<`, and the script writes text nodes only.

A 10,000-step run gives a page of about 240 kB in a second. No torch is imported.
"""

import base64
import datetime
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisono.clock import MEANING, PHASES, STEP_PHASES
from unisono.errors import UnisonoError
from unisono.files import readable_bytes, replacing
from unisono.observe.charts import own_times, peaks, run_charts, so_far
from unisono.observe.compare import compare
from unisono.observe.folder import NOTHING, Folder, Row, at, number, numbers, objects, short
from unisono.observe.recorded import bandwidth, some_ranks, timeline

PAGE = Path(__file__).parent / "page"
MOST_RUNS = 8
MOST_SAID = 40
RARE = ("recomputation", "generation", "imbalance")
"""Phases that are shown only where there is any."""


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
    ranks = folder.lines(
        "ranks.jsonl",
        "Time of every rank as it went",
        "train again: this run is of an older version",
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
        "time": _time(rows, ranks, receipt),
        "said": _said(rows, receipt),
        "advice": _advice(receipt),
        "batch": _batch_advice(receipt),
        "timeline": timeline(steps),
        "charts": run_charts(rows, ranks, config, plan, receipt, forecast, folder),
        "result": _result(receipt, forecast),
        "memory": _memory(receipt),
        "forecast": _forecast(forecast, receipt),
        "bandwidth": bandwidth(steps, probe),
        "plan": _plan(plan),
        "config": _flat(config),
        "environment": _environment(environment, receipt),
        "missing": folder.missing,
    }


def _result(receipt: Row, forecast: Row) -> Row | None:
    """A run's point of a scaling curve."""
    n, rate = number(receipt.get("replicas")), number(receipt.get("tokens_per_second"))
    if not n or not rate or n < 1 or rate < 0:
        return None
    own, foretold = number(receipt.get("efficiency")), number(forecast.get("tokens_per_second"))
    return {"replicas": n, "rate": short(rate), "own": own, "foretold": foretold}


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
    mfu = _share(receipt.get("mfu"))
    tile("MFU", mfu, "{:.1%}".format, "model FLOPs used")
    if mfu is None:
        flops = number(at(receipt, "mfu", "flops_per_second"))
        why = str(at(receipt, "mfu", "source") or "")
        tile("GFLOP/s a replica", flops and flops / 1e9, "{:,.1f}".format, f"no MFU: {why}")
    memory = max(peaks(receipt), default=None)
    foretold = number(forecast.get("memory_bytes"))
    note = f"forecast {readable_bytes(int(foretold))}" if foretold else "of the rank with most"
    tile("peak memory", memory, lambda v: readable_bytes(int(v)), note)
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


def _time(rows: list[Row], ranks: list[Row], receipt: Row) -> Row | None:
    """Seconds by phase, in all and by rank: the receipt's, or those so far."""
    by_rank = [numbers(r) for r in objects(receipt.get("seconds_by_rank"))]
    source = "the receipt: mean over ranks"
    if not by_rank:
        by_rank, source = so_far(ranks), "so far: mean over ranks"
    if not by_rank:
        by_rank, source = so_far([own_times(row) for row in rows]), "so far: rank 0"
    if not by_rank:
        return None
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
    kept = some_ranks(len(by_rank), 24, lambda r: by_rank[r].get("waiting", 0.0))
    return {
        "rows": [
            {"rank": r, "seconds": [short(by_rank[r].get(p, 0.0)) for p in PHASES]} for r in kept
        ],
        "note": f"{len(kept)} of {len(by_rank)} ranks: those that waited most and least"
        if len(kept) < len(by_rank)
        else "",
    }


def _said(rows: list[Row], receipt: Row) -> list[Row]:
    """Who slowed the run down with what it cost, then what was said while it went."""
    found = []
    for b in objects(receipt.get("blame")):
        who = "" if (rank := number(b.get("rank"))) is None else f"rank {rank:g} "
        cost = number(b.get("cost"))
        lost = "" if cost is None else f"; cost {cost:.0%} of all steps"
        found.append({"what": str(b.get("kind", "")), "text": f"{who}{b.get('detail', '')}{lost}"})
    events = [str(r["event"]) for r in rows if isinstance(r.get("event"), str)]
    for text in events[-MOST_SAID:]:
        step, _, event = text.partition(": ")
        found.append({"what": step, "text": event or text})
    return found


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


def _memory(receipt: Row) -> Row | None:
    """Peaks by rank, of several."""
    found = peaks(receipt)
    if len(found) < 2:
        return None
    kept = some_ranks(len(found), 16, lambda r: found[r])
    note = f"{len(kept)} of {len(found)} ranks: those with most and least"
    return {
        "rows": [{"rank": r, "bytes": found[r], "text": readable_bytes(int(found[r]))} for r in kept],
        "note": note if len(kept) < len(found) else "",
    }  # fmt: skip


def _forecast(forecast: Row, receipt: Row) -> Row | None:
    """Parts of a step, foretold and measured, in ms; and other figures of the two."""
    parts = numbers(forecast.get("parts"))
    whole = number(forecast.get("step_s"))
    if not parts and whole is None:
        return None
    measured = at(forecast, "measured") if receipt else None
    seen = numbers(at(measured, "parts"))
    names = [p for p in PHASES if p in parts or seen.get(p)] + [p for p in parts if p not in PHASES]
    rows = [("step", whole, number(at(measured, "step_s")))] if whole is not None else []
    rows += [(p, parts.get(p, 0.0), seen.get(p)) for p in names]
    facts = [
        ("tokens/s", "tokens_per_second", "{:,.0f}".format),
        ("scaling efficiency", "efficiency", "{:.1%}".format),
        ("sent by a rank in a step", "sent_bytes_per_step", _bytes),
        ("peak memory", "memory_bytes", _bytes),
    ]
    return {
        "rows": [
            {"part": p, "forecast": _ms(a), "measured": None if b is None else _ms(b)}
            for p, a, b in rows
        ],
        "facts": [_fact(name, forecast.get(key), at(measured, key), form) for name, key, form in facts],
        "error": number(forecast.get("error")) if measured else None,
        "sources": [f"{k}: {v}" for k, v in _flat(forecast.get("sources") or {}).items()],
    }  # fmt: skip


def _fact(name: str, foretold: Any, measured: Any, form: Callable[[float], str]) -> list[Any]:
    """[name, forecast, measured, how far off]."""
    a, b = number(foretold), number(measured)
    off = short(a / b - 1) if a is not None and b else None
    return [name, *(NOTHING if v is None else form(v) for v in (a, b)), off]


def _ms(seconds: float) -> float:
    return short(seconds * 1e3)


def _bytes(value: float) -> str:
    return readable_bytes(int(value))


def _plan(plan: Row) -> list[list[str]]:
    """[what, value, reason], what was decided first and what was given or follows after it."""
    found = plan.get("reasons")
    reasons = found if isinstance(found, Mapping) else {}
    hyper = numbers(plan.get("hyper"))
    rest = {k: v for k, v in plan.items() if k not in ("reasons", "hyper")}
    rows = [
        [k.replace("_", " "), _text(k, v), str(reasons.get(k, ""))]
        for k, v in {**rest, **hyper}.items()
        if v is not None
    ]
    return sorted(rows, key=lambda row: not row[2] or row[2] == "as given")


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
    return {k.removesuffix("_bytes").replace("_", " "): v for k, v in _flat(known).items()}


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
        "compare": compare(runs),
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
