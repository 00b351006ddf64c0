"""Several runs side by side: the scaling curve, what changed, and their charts over each other."""

from collections.abc import Sequence

from unisono.observe.charts import line
from unisono.observe.folder import NOTHING, Row, short


def compare(runs: Sequence[Row]) -> Row | None:
    """Of what report.view gives: scaling, what changed, and where each one's time went."""
    if len(runs) < 2:
        return None
    return {
        "scaling": _scaling(runs),
        "changed": _changed(runs),
        "charts": [c for c in (_overlay(runs, "loss", 0), _overlay(runs, "loss", 1), _overlay(runs, "throughput", 0)) if c],
        "time": [
            {"name": r["name"], "rows": {x["phase"]: x["step_ms"] for x in r["time"]["rows"]}}
            for r in runs
            if r["time"] and any(x["step_ms"] for x in r["time"]["rows"])
        ],
    }  # fmt: skip


def _scaling(runs: Sequence[Row]) -> list[Row]:
    """Throughput by replicas, best first at equal counts."""
    found = [{"name": run["name"], **run["result"]} for run in runs if run["result"]]
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
    note = _apart(lines) if name == "loss" else ""
    return {
        **found, "id": f"{name}-{index}", "title": title, "lines": lines, "rules": [], "marks": [],
        "note": note, "dashed": True,
    }  # fmt: skip


def _apart(lines: Sequence[Row]) -> str:
    """How far the lines are from the first one where they have the same steps."""
    first = {p[0]: p[1] for p in lines[0]["points"]}
    off = [(abs(p[1] - first[p[0]]), p[0]) for x in lines[1:] for p in x["points"] if p[0] in first]
    if not off:
        return ""
    most, step = max(off)
    if not most:
        return f"Equal to the fifth digit at all {len(first):,} points that they share."
    return f"At most {most:.2g} apart, at step {step:,g}."
