"""Goodput: the time that became committed steps over the time that the run's processes lived.

`sessions.jsonl` in the run folder has a row when a process begins to work on the run, one for every
checkpoint it commits, and one at its end; times are time.time(), `stepping_s` seconds in steps since the
session began. A session that resumes at an earlier step than another had reached takes the time of
the steps in between away from it: they are done twice. When a process died is known to the last thing
that it wrote: a row of metrics, whose time the next session notes before it cuts rows off.

What is not goodput: starting (tokenizing, loading, baselines), evaluation, checkpoints, steps lost with a
process, steps skipped. Time between sessions, in which nothing ran, is told beside it.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unisono.files import JsonLines, read_lines

FILE = "sessions.jsonl"


@dataclass(frozen=True)
class Goodput:
    """Of a run over all its sessions, in seconds."""

    value: float
    """committed_s / wall_s."""
    committed_s: float
    wall_s: float
    lost_s: float
    """In steps that were not committed."""
    down_s: float
    """Between sessions."""
    sessions: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Sessions:
    """Rank 0's writer. Raises OSError where the disk does not take it."""

    def __init__(self, run: Path, began: float, step: int, metrics: str) -> None:
        """`began`: time.time(). `metrics`: the file whose last row may be the last sign of life."""
        last = [row.get("time") for name in (FILE, metrics) for row in _last(run / name)]
        signs = [float(sign) for sign in last if sign is not None and _is_number(sign)]
        self._path = run / FILE
        self._lines = JsonLines(self._path)
        if signs:
            self._lines.append({"event": "seen", "time": max(signs)})
        self._write("began", step, 0.0, began)

    def saved(self, step: int, stepping_s: float) -> None:
        """`step` is on the disk."""
        self._write("saved", step, stepping_s)

    def ended(self, step: int, stepping_s: float) -> Goodput:
        """All is done; returns what it came to."""
        self._write("ended", step, stepping_s)
        return goodput(read_lines(self._path))

    def close(self) -> None:
        self._lines.close()

    def _write(self, event: str, step: int, stepping_s: float, when: float | None = None) -> None:
        row = {"event": event, "time": round(time.time() if when is None else when, 3)}
        self._lines.append({**row, "step": step, "stepping_s": round(stepping_s, 3)})


def _last(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_lines(path))[-1:]
    except OSError:
        return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_sound(row: Mapping[str, Any]) -> bool:
    """What a damaged file may hold besides is passed over."""
    numbers = ("time",) if row.get("event") == "seen" else ("time", "step", "stepping_s")
    return isinstance(row.get("event"), str) and all(_is_number(row.get(n)) for n in numbers)


def goodput(rows: Iterable[Mapping[str, Any]]) -> Goodput:
    """From the rows of `sessions.jsonl`, the last session's end included."""
    sessions: list[list[Mapping[str, Any]]] = []
    for row in filter(_is_sound, rows):
        if row.get("event") == "began":
            sessions.append([])
        if sessions:
            sessions[-1].append(row)
    committed = stepped = wall = down = 0.0
    for k, session in enumerate(sessions):
        # What a later session does again counts there.
        limit = min((later[0]["step"] for later in sessions[k + 1 :]), default=float("inf"))
        kept = [r for r in session if r["event"] != "seen" and r["step"] <= limit]
        committed += max((r["stepping_s"] for r in kept), default=0.0)
        last = max(r["time"] for r in session)
        wall += last - session[0]["time"]
        stepped += max((r.get("stepping_s", 0.0) for r in session), default=0.0)
        if k:
            down += max(0.0, session[0]["time"] - max(r["time"] for r in sessions[k - 1]))
    value = committed / wall if wall > 0 else 0.0
    return Goodput(value, committed, wall, stepped - committed, down, len(sessions))
