"""Records of local files: JSON lines and texts. A bad one is counted and named with file and line.

Nothing is dropped silently: `Read.bad` counts every record that was not used, `Read.problems` holds
the first MOST_SHOWN of them, one line each.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from unisono.data.problems import BadRecord as BadRecord
from unisono.errors import ConfigError, DataError

T = TypeVar("T")
MOST_SHOWN = 20


@dataclass
class Problems:
    """The account of what was not used."""

    bad: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.bad += 1
        if len(self.lines) < MOST_SHOWN:
            self.lines.append(f"{where}: {reason}")


def json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line; blank lines are no records. Raises DataError: no file."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.add(where, f"not JSON ({str(error)[:80]})")
                continue
            if isinstance(record, dict):
                yield where, record
            else:
                problems.add(where, f"found a {type(record).__name__}; write a JSON object")


def parsed(
    path: Path, parse: Callable[[dict[str, Any]], T], problems: Problems, limit: int | None
) -> list[tuple[str, T]]:
    """(file:line, what `parse` made of it), the first `limit` good ones. Raises DataError: none."""
    found: list[tuple[str, T]] = []
    for where, record in json_lines(path, problems):
        if limit is not None and len(found) >= limit:
            break
        try:
            found.append((where, parse(record)))
        except BadRecord as error:
            problems.add(where, str(error))
    if not found:
        first = f": {problems.lines[0]}" if problems.lines else ""
        raise DataError(f"{path}: no usable record, {problems.bad} bad{first}")
    return found


def texts(path: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """(where, text) of each document: a file is one, a .jsonl has one a line under `text`."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not files:
            raise DataError(f"{path}: no file in this folder")
        for file in files:
            yield from texts(file, problems)
    elif ".jsonl" in path.suffixes:
        for where, record in json_lines(path, problems):
            text = record.get("text")
            if isinstance(text, str) and text:
                yield where, text
            else:
                problems.add(where, "no text under `text`")
    else:
        with _opened(path) as lines:
            text = lines.read()
        if text:
            yield str(path), text
        else:
            problems.add(str(path), "an empty file")


class _opened:
    """A text file, gzipped or not, whose errors of reading name it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            if not self.path.is_file():
                raise ConfigError(f"{self.path}: no such file")
            opened: Any = gzip.open if self.path.suffix == ".gz" else open
            self.file = opened(self.path, "rt", encoding="utf-8", newline="")
            return self.file
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path}: not UTF-8 text (byte {error.start})") from None
        if isinstance(error, EOFError | gzip.BadGzipFile):
            raise DataError(f"{self.path}: damaged: {error}") from None
