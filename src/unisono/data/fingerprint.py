"""Digests: what a file holds, and what a cache entry was made from.

Contract: equal digests mean equal content. A file is read once and then known again by path, size,
modification time and inode; one modified within the last seconds is not remembered, because it
could change again inside the clock's resolution. Cost: about 1 GB/s for what was not seen before.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisono.data.cache import locked, read_json
from unisono.data.source import Source
from unisono.errors import DataError
from unisono.files import write_json

_UNSETTLED_S = 2.0


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Content:
    """What a file held when it was looked at."""

    sha256: str
    marks: tuple[int, int, int]
    """Size, modification time in ns, inode: what changes when the file does."""


def marks(path: Path) -> tuple[int, int, int]:
    """Raises DataError where there is no file any more."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def contents(
    sources: Sequence[Source], memo: Path, progress: Callable[[float], None]
) -> list[Content]:
    """Each source's content, remembered in the file `memo`."""
    known = read_json(memo)
    known = known if isinstance(known, dict) else {}
    before = dict(known)
    seen = [marks(s.path) for s in sources]
    total, done = sum(size for size, _, _ in seen) or 1, 0
    result = []
    for source, found in zip(sources, seen):
        key = str(source.path.resolve())
        entry = known.get(key)
        if isinstance(entry, list) and len(entry) == 4 and tuple(entry[:3]) == found:
            sha256 = entry[3]
        else:
            sha256 = _sha256(source.path)
            if time.time() - found[1] / 1e9 > _UNSETTLED_S:
                known[key] = [*found, sha256]
        result.append(Content(sha256, found))
        done += found[0]
        progress(done / total)
    if known != before:
        # Of two processes the later one wins; what the other learned is only hashed again.
        with locked(memo.with_suffix(".lock")):
            write_json(memo, known)
    return result


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
