"""A run's folder as a reader finds it: files that are absent, torn, of an older version, or hostile.

Nothing here raises for what a file contains, only for a folder that is no run. What cannot be had is
listed under `missing`, with how to get it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisono.errors import UnisonoError
from unisono.files import read_lines

NOTHING = "\N{EN DASH}"
KNOWN = ("run.json", "plan.json", "metrics.jsonl", "receipt.json")
Row = dict[str, Any]


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
