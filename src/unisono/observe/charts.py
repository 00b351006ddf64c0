"""Series over steps, as the page draws them: short, and no spike lost.

Of more than MOST_POINTS rows, neighbours become one bin with its mean, least and greatest value.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from unisono.observe.folder import Row, number, short

MOST_POINTS = 400
MOST_MARKS = 40


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
