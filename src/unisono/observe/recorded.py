"""What the recorded steps of a run show (`timeline.jsonl`): who waited for whom, and how fast what travelled.

`timeline` picks the steps that fit into a page and finds who came last to each collective. `bandwidth`
puts the collectives beside the probe's. Rows are read as data: what is damaged in one is passed over.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from unisono.clock import PHASES
from unisono.observe.folder import Row, at, number, objects, short

TIMELINE_BYTES = 110_000
"""Of timeline in a page, for each run; steps beyond that are left out, and the page says so."""
MOST_RANKS = 64


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
    kept = some_ranks(
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


def some_ranks(count: int, most: int, key: Callable[[int], float]) -> list[int]:
    """All ranks, or half of `most` from either end of the order by `key`."""
    ranks = sorted(range(count), key=key)
    return sorted(ranks if count <= most else ranks[: most // 2] + ranks[-most // 2 :])


# --- bandwidth


def bandwidth(rows: list[Row], probe: Row) -> Row | None:
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
