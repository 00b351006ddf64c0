"""Files that survive a crash: replaced whole, appended by the line, owned by one process.

What is true after each call, and what a kill or a power cut at any moment leaves:

- `write_json` and `replacing`: when they return, the new content is on the disk under its name. A
  crash leaves the old content or the new, never a mixture; and perhaps `.NAME.tmp` beside it,
  which nobody reads and the next write replaces.
- `JsonLines.append`: the line is in the file whole, or not at all if it raises. It is not synced:
  a kill of the process loses nothing, a power cut may lose the newest lines. A crash leaves at most
  one torn line, the last; `read_lines` passes over it and the next opening cuts it off.
- `Followed` reads such a file while it grows, each line once.
- `truncate_after`: as `replacing`.
- `RunLock`: at most one process on any host that shares the filesystem is inside. The kernel frees
  it when the holder dies, however that happens, so no lock is ever stale.

Every file has one writer at a time, which is what RunLock is for. JSON has no number that is not
finite: NaN and infinities are written as null. Errors of the disk rise as OSError.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unisono.errors import UnisonoError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def fsync_file(path: Path) -> None:
    """Return when the content of a file is on the disk."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk: what was created, renamed, removed."""
    try:
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # Some network filesystems cannot sync a folder and say EINVAL; there is no other way to ask.
        if error.errno != errno.EINVAL:
            raise


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` at the end of the block, unless it raises."""
    temporary = path.with_name(f".{path.name}.tmp")
    # What a crash left goes first, for O_EXCL: nothing is ever written through a planted link.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON document, atomically and durably."""
    text = _dump(value, indent=2)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


class JsonLines:
    """Append rows to a file of JSON lines. A torn last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o666)
        try:
            os.ftruncate(self._fd, _whole_bytes(self._fd))
        except BaseException:
            self.close()
            raise

    def append(self, row: dict[str, Any]) -> None:
        """Add one line in one write. If it raises (disk full), the file is as it was before."""
        line = f"{_dump(row)}\n".encode()
        before_bytes = os.fstat(self._fd).st_size
        try:
            # One write, unless the disk is filling: it takes a part, and the next write says why.
            while line:
                line = line[os.write(self._fd, line) :]
        except BaseException:
            os.ftruncate(self._fd, before_bytes)
            raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines, without a torn last line or what is no object."""
    with path.open("rb") as file:
        for line in file:
            row = _row(line)
            if row is not None:
                yield row


def up_to(step: int) -> Callable[[dict[str, Any]], bool]:
    """For `truncate_after`: keeps rows of steps up to this one; what has no step goes."""

    def keep(row: dict[str, Any]) -> bool:
        found = row.get("step")
        return isinstance(found, int) and found <= step

    return keep


class Followed:
    """A file of JSON lines that grows: `new` gives the rows that were added since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._offset = 0

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether it is another file than before or was cut, so that former rows do not count; rows).

        A line that is not whole yet is read when it is. Raises OSError.
        """
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno())
            anew = found.st_ino != self._inode or found.st_size < self._offset
            if anew:
                self._inode, self._offset = found.st_ino, 0
            file.seek(self._offset)
            rows = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                row = _row(line)
                if row is not None:
                    rows.append(row)
            return anew, rows


def truncate_after(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a file of JSON lines without the rows that `keep` refuses; return how many went.

    Lines that are no JSON object go too and are counted. The kept ones stay byte for byte. A file
    that does not exist has nothing to drop. Call it before the file is opened for appending: an
    open JsonLines would go on writing into the old file, which no longer has a name.
    """
    dropped = 0
    try:
        source = path.open("rb")
    except FileNotFoundError:
        return 0
    with source, replacing(path) as file:
        for line in source:
            row = _row(line)
            if row is not None and keep(row):
                file.write(line)
            else:
                dropped += 1
    return dropped


class RunLock:
    """Own a run folder for the length of a `with` block; raises UnisonoError naming the owner.

    Take it in the process that writes the folder, not in a launcher that it could outlive: the lock
    ends with the process that took it. Children made by fork do not prolong it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fd = -1
        # flock belongs to the open file, which a forked child (a data loader's worker) shares: it
        # would keep the lock alive after its parent was killed. Children by exec have O_CLOEXEC.
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> "RunLock":
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.folder / ".lock", flags, 0o644)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UnisonoError(
                f"{self.folder}: cannot be used as output_dir ({reason}: {error.filename}): "
                "make it writable or choose another"
            ) from error
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: deleting it would let two processes lock two files of the same name.
        self._close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnisonoError(
                f"{self.folder} is in use by {_holder(self._fd)}: "
                "wait for it, stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UnisonoError(
                f"{self.folder}: this filesystem cannot lock files ({os.strerror(error.errno or 0)}), "
                "so nothing would keep a second run out: choose an output_dir on another filesystem"
            ) from None
        # Only for the message to whoever comes second: not synced, and no reason to fail.
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
        }
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{_dump(owner)}\n".encode(), 0)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def readable_bytes(count: int) -> str:
    """A number of bytes for a reader: 1.2 GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count} bytes"


def _holder(fd: int) -> str:
    """Who holds the lock, as its file says; it may be half written, or written by somebody else."""
    try:
        owner = json.loads(os.pread(fd, 1 << 16, 0))
        started = datetime.datetime.fromisoformat(owner["started"])
        today = started.date() == datetime.datetime.now(started.tzinfo).date()
        since = started.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")
        return f"pid {int(owner['pid'])} on host {owner['host']!s:.80} since {since}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"


def _whole_bytes(fd: int) -> int:
    """Where the last whole line ends. Reads backwards, so a long file costs no more."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - (1 << 16))
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _row(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for a torn line, zeros after a power cut, or other JSON."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _dump(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
