"""A board beside the rendezvous: each rank leaves its newest record there and reads the others'.

Nothing new listens, and no rank ever waits for another. What the rendezvous is decides how:

- A file (our launcher): files of our own in the same private folder, replaced by rename, so that a
  reader sees the old record or the new one. Not torch's FileStore itself: it is a log that grows
  with every `set`, and a rank that is stopped inside of one holds the lock of all (torch 2.13).
- TCPStore (torchrun): `clone` makes a second connection. On one connection a single lock is held for
  as long as an operation waits, so that a thread would stand behind a main thread that is in a
  rendezvous. Once the process that keeps the store is stopped, an operation never returns, whatever
  its timeout (torch 2.13); so a thread of its own talks to it, and `silent_s` tells that it hangs.

A record is a few KiB. With files there is also a `Tape` for each rank, shared memory that outlives a
process: which collectives it began, down to the very last (gloo aborts a process that receives more
than it asked for, which is how ranks that have parted often end).
"""

import mmap
import os
import struct
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

READS_A_SECOND = 4096
"""Of records from a TCPStore, by one rank: with more than 1024 ranks it reads less often."""
READER_S = 1.0
"""Who has not read for so long is not reading: then nothing is fetched."""

_SLOT = struct.Struct("<IIqq")
_SLOTS = 256
OPERATIONS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "broadcast", "shift")


class Tape:
    """The newest collectives that a rank has begun, in shared memory."""

    def __init__(self, path: Path, write: bool = False) -> None:
        size = _SLOT.size * _SLOTS
        self._next = 0
        with path.open("w+b" if write else "rb") as file:
            if write:
                file.truncate(size)
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), size, access=access)

    def write(self, key: int, operation: str, sequence: int, payload_bytes: int) -> None:
        """`key`: of the group, as `tape_key` gives it."""
        offset = self._next % _SLOTS * _SLOT.size
        _SLOT.pack_into(
            self._map, offset, key, OPERATIONS.index(operation), sequence, payload_bytes
        )
        self._next += 1

    def read(self) -> dict[int, dict[int, tuple[str, int]]]:
        """For each group's key: sequence -> (operation, payload_bytes)."""
        found: dict[int, dict[int, tuple[str, int]]] = {}
        for key, operation, sequence, payload in _SLOT.iter_unpack(self._map[:]):
            if sequence and operation < len(OPERATIONS):
                found.setdefault(key, {})[sequence] = OPERATIONS[operation], payload
        return found


def tape_key(group: str) -> int:
    return zlib.crc32(group.encode())


class Board(Protocol):
    """One rank's view. Used by one thread at a time."""

    place: str
    rank: int
    size: int

    def post(self, record: bytes) -> None:
        """This rank's newest record; the one before is gone."""

    def read(self) -> dict[int, bytes]:
        """The newest known record of every rank that has one."""
        ...

    def silent_s(self) -> float:
        """For how long the board has not been reached."""
        ...

    def own_tape(self) -> Tape | None: ...

    def tape(self, rank: int) -> Tape | None:
        """Another rank's, if there is one on this machine."""

    def close(self) -> None:
        """What was posted last reaches the others, within a second; then nothing runs any more."""


def open_board(name: str) -> Board | None:
    """The board `name` of this launch, after `joined`; None where a rank is alone. Not collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store: Any = _get_default_store()
    innermost = store
    while isinstance(innermost, dist.PrefixStore):
        innermost = innermost.underlying_store
    rank, size = dist.get_rank(), dist.get_world_size()
    if isinstance(innermost, dist.FileStore):
        return FileBoard(Path(innermost.path).parent, name, rank, size)
    if isinstance(innermost, dist.TCPStore):
        return StoreBoard(store, f"{innermost.host}:{innermost.port}", name, rank, size)
    return None


class FileBoard:
    """Files in the folder of the rendezvous, all ranks on this machine."""

    def __init__(self, folder: Path, name: str, rank: int, size: int) -> None:
        self.place, self.rank, self.size = str(folder), rank, size
        self._others: dict[int, Tape] = {}
        self._records = [folder / f"{name}-{r}" for r in range(size)]
        self._tapes = [folder / f"{name}-tape-{r}" for r in range(size)]
        self._own = Tape(self._tapes[rank], write=True)

    def post(self, record: bytes) -> None:
        path = self._records[self.rank]
        new = path.with_suffix(".new")
        with suppress(OSError):  # the folder is gone: so is the launcher
            new.write_bytes(record)
            os.replace(new, path)

    def read(self) -> dict[int, bytes]:
        found = {}
        for rank, path in enumerate(self._records):
            with suppress(OSError):
                found[rank] = path.read_bytes()
        return found

    def silent_s(self) -> float:
        return 0.0

    def own_tape(self) -> Tape | None:
        return self._own

    def tape(self, rank: int) -> Tape | None:
        with suppress(OSError, ValueError):  # not there yet
            if rank not in self._others:
                self._others[rank] = Tape(self._tapes[rank])
        return self._others.get(rank)

    def close(self) -> None:
        pass


class StoreBoard:
    """Keys of the TCPStore that the launcher keeps."""

    def __init__(self, store: Any, place: str, name: str, rank: int, size: int) -> None:
        self.place, self.rank, self.size = place, rank, size
        self._store = store.clone()
        self._keys = [f"{name}-{r}" for r in range(size)]
        self._present: set[str] = set()
        self._between_s = size / READS_A_SECOND
        self._mine: bytes | None = None
        self._others: dict[int, bytes] = {}
        self._read_at = self._fetched_at = -1e9
        self._reached = time.monotonic()
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._talk, name="unisono-board", daemon=True)
        self._thread.start()

    def post(self, record: bytes) -> None:
        self._mine = record
        self._wake.set()

    def read(self) -> dict[int, bytes]:
        self._read_at = time.monotonic()
        self._wake.set()
        return dict(self._others)

    def silent_s(self) -> float:
        return time.monotonic() - self._reached

    def own_tape(self) -> Tape | None:
        return None

    def tape(self, rank: int) -> Tape | None:
        return None

    def close(self) -> None:
        self._over.set()
        self._wake.set()
        self._thread.join(1.0)

    def _talk(self) -> None:
        with suppress(RuntimeError):  # the store is gone; `silent_s` tells
            while True:
                over = self._over.is_set()
                mine, self._mine = self._mine, None
                if mine is not None:
                    self._store.set(self._keys[self.rank], mine)
                now = time.monotonic()
                if now - self._read_at < READER_S and now - self._fetched_at >= self._between_s:
                    self._fetch()
                    self._fetched_at = now
                else:
                    self._store.check([self._keys[self.rank]])  # an answer is a sign of life
                self._reached = time.monotonic()
                if over:
                    return
                self._wake.wait()
                self._wake.clear()

    def _fetch(self) -> None:
        for key in self._keys:
            if key not in self._present and self._store.check([key]):
                self._present.add(key)
        ranks = [r for r, key in enumerate(self._keys) if key in self._present]
        values = self._store.multi_get([self._keys[r] for r in ranks]) if ranks else []
        self._others = dict(zip(ranks, values))
