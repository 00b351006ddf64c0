"""Digests: what a file holds, and what a cache entry was made from.

Contract: equal digests mean equal content. A file is read once and then known again by path, size,
modification time and inode; one modified within the last seconds is not remembered, because it
could change again inside the clock's resolution. Cost: about 1 GB/s for what was not seen before.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
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


def identity(path: Path) -> list[int]:
    """What changes when a file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def file_digests(
    sources: Sequence[Source], memo: Path, progress: Callable[[float], None]
) -> list[str]:
    """sha256 of each source's bytes, remembered in the file `memo`."""
    known = read_json(memo)
    known = known if isinstance(known, dict) else {}
    before = dict(known)
    total = sum(s.path.stat().st_size for s in sources) or 1
    result, done = [], 0
    for source in sources:
        key = str(source.path.resolve())
        try:
            marks = identity(source.path)
            entry = known.get(key)
            if not (isinstance(entry, list) and len(entry) == 4 and entry[:3] == marks):
                with source.path.open("rb") as file:
                    entry = [*marks, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise DataError(f"{source.path}: cannot be read: {error.strerror}") from None
        if time.time() - marks[1] / 1e9 > _UNSETTLED_S:
            known[key] = entry
        result.append(entry[3])
        done += marks[0]
        progress(done / total)
    if known != before:
        # Of two processes the later one wins; what the other learned is only hashed again.
        with locked(memo.with_suffix(".lock")):
            write_json(memo, known)
    return result
