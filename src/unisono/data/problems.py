"""Bad records: counted by kind, the first of each kind remembered, all of them kept aside.

Contract: `add` either keeps the record in the quarantine file and returns, or, when strict, raises
DataError with file, line and reason. Memory: one example a kind. Disk: at most KEPT_BYTES of each
record, written as it comes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from unisono.errors import DataError

KEPT_BYTES = 2000


class BadRecord(Exception):
    """Why a record cannot be used; `kind` is what such records are counted under."""

    def __init__(self, reason: str, kind: str = "bad record") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem: how often, and where first. Line 0 is the file as a whole."""

    kind: str
    count: int
    file: str
    line: int
    reason: str

    @property
    def where(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.reason}"
            if self.line
            else f"{self.file}: {self.reason}"
        )


class Problems:
    """The account of bad records. A context manager: it closes its quarantine file."""

    def __init__(self, quarantine: Path | None = None, strict: bool = False) -> None:
        self.quarantine = quarantine
        self.strict = strict
        self.muted = False
        """While records that were already accounted for are read again."""
        self.by_kind: dict[str, Problem] = {}
        self._file: TextIO | None = None

    def add(self, kind: str, file: str, line: int, reason: str, record: bytes = b"") -> None:
        """Account for one bad record. Raises DataError when strict."""
        if self.muted:
            return
        known = self.by_kind.get(kind)
        problem = Problem(kind, 1, file, line, reason)
        if self.strict:
            raise DataError(f"{problem.where} (strict_data stops at the first bad record)")
        self.by_kind[kind] = replace(known, count=known.count + 1) if known else problem
        if self.quarantine is not None:
            if self._file is None:
                self._file = self.quarantine.open("w", encoding="ascii")
            kept = record[:KEPT_BYTES].decode("utf-8", "backslashreplace")
            entry = {"file": file, "line": line, "kind": kind, "reason": reason, "record": kept}
            self._file.write(json.dumps(entry) + "\n")

    def begin(self, quarantine: Path) -> None:
        """Start a new account, kept in another file."""
        self.close()
        self.by_kind = {}
        self.quarantine = quarantine

    @property
    def total(self) -> int:
        return sum(p.count for p in self.by_kind.values())

    def merge(self, others: Iterable[Problem]) -> None:
        """Add the account of a later part of the same data."""
        for other in others:
            known = self.by_kind.get(other.kind)
            self.by_kind[other.kind] = (
                replace(known, count=known.count + other.count) if known else other
            )

    def summary(self) -> list[str]:
        """One line a kind, the most frequent first."""
        kept = f"; kept in {self.quarantine.name}" if self.quarantine is not None else ""
        return [
            f"{p.count} record{'s' if p.count > 1 else ''}: {p.kind} (first: {p.where}){kept}"
            for p in sorted(self.by_kind.values(), key=lambda p: -p.count)
        ]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(p) for p in self.by_kind.values()]

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def __enter__(self) -> "Problems":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
