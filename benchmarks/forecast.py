"""Score the cost model on published runs, and choose its few global constants.

    python benchmarks/forecast.py --runs FILE [--json OUT]     # score with the constants as they are
    python benchmarks/forecast.py --runs FILE --folds          # leave one source out: fit on the others
    python benchmarks/forecast.py --runs FILE --fit            # constants from all sources, to copy

FILE has the columns of the collection of published runs. `published.py` says which rows qualify, by
what they state and never by how well they fit. The error of a row is |forecast - published| / published
of the throughput per device. A curve is the rows of one `curve_id` that differ in the number of devices
alone; its error at a count is the difference, in percentage points, of throughput per device relative
to the curve's smallest count, which itself is not counted.

Fitting: bounded absolute deviations of the logarithm, of rows and of curves, each source weighing as the root of its rows, with a
pull towards the values that were written down beforehand; coordinate by coordinate, on a logarithmic
scale. A source is a whole repository or paper.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from published import Published, alike_in_curves, curve_of, read
from unisono.forecast.constants import DEFAULT, PRIOR, Constants
from unisono.forecast.cost import step
from unisono.forecast.network import fabric

SHARED = Path(os.environ.get("UNISONO_SHARED", Path(__file__).parents[2] / "shared"))

FITTED = {
    "matmul": (0.5, 1.0), "matmul_tf32": (0.5, 1.0), "matmul_fp32": (0.5, 1.0), "matmul_fp8": (0.4, 0.9), "flash": (0.2, 0.85), "flash_new": (0.2, 0.85),
    "flash_width": (4.0, 200.0), 
    "traffic": (0.5, 4.0), "passes": (1.0, 8.0), "early_passes": (1.0, 12.0),
    "node_hop_s": (2e-6, 60e-6), "contention": (0.02, 0.5), "jitter": (0.001, 0.05), "jitter_s": (0.0002, 0.02),
}  # fmt: skip
"""Constants that are fitted, and the range that is physically sensible."""

OUTLIER = 0.5
PULL = 0.1
"""Weight of a constant's squared logarithmic distance from what was written down, against a source's
mean absolute error. Chosen by `--folds`, held out: at 0.02 rows are 10.7% and curves 2.7 points off, at 0.05
9.8% and 3.1, at 0.07 9.9% and 3.1, at 0.1 8.5% and 3.2. What is pulled less follows single sources: standard
deviations of 5 to 10 ms a step, attention at a third of its rate."""


def throughput(row: Published, constants: Constants) -> float:
    """Forecast tokens/s of one device."""
    seconds = step(row.run, row.device, fabric(row.device, constants), constants).total
    return row.run.tokens / row.run.mesh.size / seconds


def get(constants: Constants, name: str) -> float:
    for part in name.split("."):
        constants = getattr(constants, part)
    return constants  # type: ignore[return-value]


def with_value(constants: Constants, name: str, value: float) -> Constants:
    if "." not in name:
        return replace(constants, **{name: value})
    outer, inner = name.split(".")
    return replace(constants, **{outer: replace(getattr(constants, outer), **{inner: value})})


def loss(rows: Sequence[Published], constants: Constants) -> float:
    """Mean over sources of the mean bounded error, of throughput and of curves, and the pull."""
    errors: dict[str, list[float]] = defaultdict(list)
    bends: dict[str, list[float]] = defaultdict(list)
    scored = forecast_all(rows, constants)
    for s in scored:
        errors[s.row.source].append(bounded(math.log(s.forecast / s.row.tokens_per_s)))
    for base, s in curves(scored):
        forecast, published = s.forecast / base.forecast, s.row.tokens_per_s / base.row.tokens_per_s
        bends[s.row.source].append(bounded(math.log(forecast / published)))
    pull = statistics.fmean(math.log(get(constants, n) / get(PRIOR, n)) ** 2 for n in FITTED)
    return weighted(errors) + weighted(bends) + PULL * pull


def bounded(error: float) -> float:
    """|x| for small x, OUTLIER for large: a row that no setting explains says little."""
    return abs(error) / (1 + abs(error) / OUTLIER)


def weighted(parts: dict[str, list[float]]) -> float:
    """Mean of the sources' means, each by the root of its rows."""
    weight = sum(math.sqrt(len(part)) for part in parts.values())
    return sum(math.sqrt(len(p)) * statistics.fmean(p) for p in parts.values()) / max(1.0, weight)


def fit(rows: Sequence[Published], start: Constants) -> Constants:
    """Pattern search on a logarithmic scale; every step is halved until 2%."""
    best, value, size = start, loss(rows, start), 0.3
    while size > 0.02:
        better = False
        for name, (low, high) in FITTED.items():
            for sign in (1, -1):
                moved = min(high, max(low, get(best, name) * math.exp(sign * size)))
                tried = with_value(best, name, moved)
                if (found := loss(rows, tried)) < value - 1e-6:
                    best, value, better = tried, found, True
                    break
        if not better:
            size /= 2
    return best


@dataclass(frozen=True)
class Scored:
    row: Published
    forecast: float

    @property
    def error(self) -> float:
        return abs(self.forecast / self.row.tokens_per_s - 1)


def forecast_all(rows: Sequence[Published], constants: Constants) -> list[Scored]:
    return [Scored(row, throughput(row, constants)) for row in rows]


def leave_one_source_out(rows: Sequence[Published]) -> list[Scored]:
    """Every source by constants that were fitted on the others alone, from the same start."""
    scored = []
    for source in sorted({row.source for row in rows}):
        others = [row for row in rows if row.source != source]
        chosen = fit(others, PRIOR)
        held = forecast_all([row for row in rows if row.source == source], chosen)
        scored += held
        print(f"held out {source:34} {len(held):4} rows  median {percent(held, 0.5):5.1f}%  "
              f"p90 {percent(held, 0.9):5.1f}%", file=sys.stderr)  # fmt: skip
    return scored


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the sorted values; nan for none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def percent(scored: Sequence[Scored], share: float) -> float:
    return 100 * quantile([s.error for s in scored], share)


def curves(scored: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """(smallest count, another count) of every curve; one row a count, the first."""
    groups: dict[tuple[object, ...], dict[int, Scored]] = defaultdict(dict)
    for s in scored:
        if s.row.curve:
            groups[curve_of(s.row)].setdefault(s.row.run.mesh.size, s)
    return [
        (group[min(group)], group[count])
        for group in groups.values()
        for count in sorted(group)
        if count != min(group)
    ]


def curve_points(scored: Sequence[Scored]) -> list[float]:
    """Error of every efficiency in percentage points."""
    return [
        100 * abs(s.forecast / base.forecast - s.row.tokens_per_s / base.row.tokens_per_s)
        for base, s in curves(scored)
    ]


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    points = curve_points(scored)
    return {
        "rows": len(scored),
        "median_absolute_percentage_error": finite(percent(scored, 0.5)),
        "p68_absolute_percentage_error": finite(percent(scored, 0.68)),
        "p90_absolute_percentage_error": finite(percent(scored, 0.9)),
        "curve_points": len(points),
        "curve_median_error_points": finite(quantile(points, 0.5)),
        "curve_p90_error_points": finite(quantile(points, 0.9)),
    }


def spread_at_equal_settings(rows: Sequence[Published]) -> dict[str, Any]:
    """How far rows of one source that state the same setting lie from their own median.

    No forecast from the setting can be nearer than that median: what differs is not stated in it, such
    as the framework or a repetition.
    """
    groups: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for row in rows:
        groups[row.source, row.device.name, row.device.node_bytes_per_s, row.run].append(row.tokens_per_s)  # fmt: skip
    errors = [
        100 * abs(statistics.median(group) / value - 1)
        for group in groups.values()
        if len(set(group)) > 1
        for value in group
    ]
    return {
        "rows": len(errors),
        "median_absolute_percentage_error": finite(quantile(errors, 0.5)),
        "p90_absolute_percentage_error": finite(quantile(errors, 0.9)),
    }


def report(scored: Sequence[Scored], left_out: Sequence[tuple[str, str]]) -> dict[str, Any]:
    sources: dict[str, list[Scored]] = defaultdict(list)
    for s in scored:
        sources[s.row.source].append(s)
    return {
        **summary(scored),
        "decoders": summary([s for s in scored if s.row.run.model.causal]),
        "encoders": summary([s for s in scored if not s.row.run.model.causal]),
        "equal_settings": spread_at_equal_settings([s.row for s in scored]),
        "sources": {name: summary(part) for name, part in sorted(sources.items())},
        "not_qualified": dict(Counter(why for _, why in left_out).most_common()),
        "left_out": [{"id": name, "why": why} for name, why in left_out],
        "list": [
            {
                "id": s.row.id,
                "source": s.row.source,
                "device": s.row.device.name,
                "devices": s.row.run.mesh.size,
                "published_tokens_per_s_per_device": s.row.tokens_per_s,
                "forecast_tokens_per_s_per_device": round(s.forecast, 2),
                "error_percent": round(100 * s.error, 2),
            }
            for s in scored
        ],
    }


def finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def load(path: Path) -> tuple[list[Published], list[tuple[str, str]]]:
    """Rows that qualify; (id, why not) of the others. Columns in any order, case and completeness."""
    rows, left_out = [], []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        for line, raw in enumerate(csv.DictReader(file), 2):
            row = {k.strip().lower().replace(" ", "_"): v or "" for k, v in raw.items() if k}
            found = read(row)
            if isinstance(found, str):
                left_out.append((row.get("id") or f"line {line}", found))
            else:
                rows.append(found)
    return alike_in_curves(rows), left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=SHARED / "data" / "published-runs.csv")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folds", action="store_true", help="leave one source out")
    parser.add_argument("--fit", action="store_true", help="print constants fitted on all rows")
    asked = parser.parse_args()
    if not asked.runs.is_file():
        sys.exit(f"--runs: {asked.runs} is no file; name a CSV of published runs")
    rows, left_out = load(asked.runs)
    if asked.fit:
        chosen = fit(rows, PRIOR)
        for name in FITTED:
            print(f"{name:14} {get(PRIOR, name):10.4g} -> {get(chosen, name):10.4g}")
        scored = forecast_all(rows, chosen)
    else:
        scored = leave_one_source_out(rows) if asked.folds else forecast_all(rows, DEFAULT)
    result = report(scored, left_out)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    parts = {**result["sources"], "decoders": result["decoders"], "encoders": result["encoders"]}
    for name, part in {**parts, "all": result}.items():
        print(
            f"{name:32} {part['rows']:4} rows  median {part['median_absolute_percentage_error']}%  "
            f"p90 {part['p90_absolute_percentage_error']}%  curves "
            f"{part['curve_median_error_points']} points ({part['curve_points']})"
        )
    print("equal settings:", result["equal_settings"], "not qualified:", result["not_qualified"])


if __name__ == "__main__":
    main()
