"""Checkpoints on disk: written whole or not at all, and never loaded damaged.

A checkpoint is a folder `checkpoint-STEP` with the files that the caller wrote and `manifest.json`:
format, step, time, the caller's `meta`, name, size and SHA-256 of every file, and a digest over all
of that. What the files mean is the caller's business; nothing here is unpickled or imported.

The order of a save, each point durable before the next:

    files -> their folders -> manifest.json -> rename to checkpoint-STEP -> the run folder

so a folder of that name was complete when it got it. Names that a crash may leave:

    .NAME.tmp               a save or a removal that did not end: never read; `prune` removes it
    checkpoint-STEP.old-N   what a second save of the same step replaces. It moves here, the new one
                            takes its name, then it goes. A crash between leaves it as the
                            checkpoint of that step, which `find` knows

What holds after each call, and after a crash at any moment of it:

- `save`: the new checkpoint is on the disk. A crash leaves the old ones as they were; if it redoes
  a step, the old or the new one of that step. An error of the disk leaves no torso.
- `verify`: every byte is what `save` wrote. It follows no link, opens no device and no name that a
  manifest made up. It cannot know who wrote a checkpoint: digests find damage, not forgery.
- `find`: the newest checkpoint that verifies, and what was passed over for it. Changes nothing.
- `prune`: the kept ones are untouched; a removed one loses its name before its first byte.

`save` and `prune` belong to the holder of the run folder's lock. The cost of a save over writing
the files is one SHA-256 (2 GB/s on a core with SHA instructions) and the fsyncs.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unisono.errors import CheckpointError
from unisono.files import fsync_folder, readable_bytes, replacing

FORMAT = 1
MANIFEST = "manifest.json"
_MANIFEST_BYTES = 16 * 2**20
"""No manifest of ours is longer; a longer one is not read into memory."""
_DEPTH = 8
"""Folders within folders of a checkpoint; save_pretrained needs one."""
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)(?:\.old-([1-9][0-9]*))?")
_TEMPORARY = re.compile(rf"\.{_CHECKPOINT.pattern}\.tmp")
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_DAMAGE = {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""Errors that mean that the bytes are gone. Others, such as no permission or too many open files,
say nothing about a checkpoint: passing over it for an older one would throw away good work."""
_FULL = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "disk quota exceeded on",
    errno.EFBIG: "file too large for",
}


@dataclass(frozen=True)
class File:
    """One file of a checkpoint; `name` is its path in it, with slashes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself, and where it lies."""

    path: Path
    step: int
    created: str
    meta: dict[str, Any]
    files: tuple[File, ...]

    @property
    def total_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size for file in self.files)


def save(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    meta: Mapping[str, Any],
    expected_bytes: int = 0,
) -> Path:
    """Make `checkpoint-STEP` of what `write(folder)` puts into an empty folder; return its path.

    `meta` is kept as JSON does it (tuples become lists, NaN and infinities stay). `expected_bytes`
    is only for the message when the disk is full. Raises CheckpointError if the disk fails; what
    else `write` raises passes through. Either way nothing of the new checkpoint is left, unless
    syncing the run folder failed: then it is there, but a power cut could still take it.
    """
    target = run / f"checkpoint-{step}"
    temporary = _temporary(target)
    plain_meta = json.loads(json.dumps(dict(meta)))
    committed = False
    try:
        _remove(temporary)
        temporary.mkdir()
        write(temporary)
        _seal(temporary, step, plain_meta)
        _set_aside(target)
        os.rename(temporary, target)
        committed = True
        fsync_folder(run)
    except BaseException as error:
        torso_bytes = _tree_bytes(temporary)
        with contextlib.suppress(OSError):
            _remove(temporary)
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"checkpoint {step} failed: {error}") from None
        if not _is_disk_error(error):
            raise
        last = _last_good(run, besides=target if committed else None)
        needed_bytes = max(expected_bytes, torso_bytes, last.total_bytes if last else 0)
        raise CheckpointError(
            f"checkpoint {step} failed: {_disk_reason(error, run, needed_bytes)}; "
            + (f"the last good one is {last.path.name}" if last else "there is no earlier one")
        ) from error
    for attempt in _candidates(run):
        if _step(attempt) == step and attempt != target:
            # The new one is safe, so this is only tidying: `prune` tries again.
            with contextlib.suppress(OSError):
                _discard(attempt)
    return target


def verify(path: Path) -> Manifest:
    """Read every byte of a checkpoint; raises CheckpointError naming the first thing wrong."""
    try:
        return _verify(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_os_reason(error)}") from error


def find(run: Path) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one and each leftover.

    Raises CheckpointError where one cannot be judged, for example for want of permission: what may
    be good is not passed over.
    """
    notes = [f"{path.name}: left by an interrupted save or removal" for path in _leftovers(run)]
    for path in _candidates(run):
        try:
            return _verify(path), notes
        except CheckpointError as error:
            notes.append(f"{path.name}: {error}")
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {_os_reason(error)}: make it readable, "
                "or name the checkpoint to resume from"
            ) from error
    return None, notes


def prune(
    run: Path, keep: int, best: int | None = None, protect: Collection[int] = ()
) -> list[str]:
    """Remove all checkpoints but the newest `keep`, and all leftovers; return the removed names.

    The checkpoints of step `best` and of the steps in `protect` stay besides. Only sizes are
    looked at, not contents. What does not look like a whole checkpoint is not counted and not
    removed: it may be another program's, and `find` names it.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}")
    removed: list[str] = []
    try:
        for path in _leftovers(run):
            _remove(path)
            removed.append(path.name)
        steps: list[int] = []
        for path in _candidates(run):
            try:
                step = _check(path, content=False).step
            except CheckpointError:
                continue
            superseded = step in steps
            if not superseded:
                steps.append(step)
            if superseded or (len(steps) > keep and step != best and step not in protect):
                _discard(path)
                removed.append(path.name)
    except OSError as error:
        raise CheckpointError(
            f"{run}: an old checkpoint cannot be removed: {_os_reason(error)}"
        ) from error
    return removed


# --- names


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _listed(run: Path) -> list[Path]:
    try:
        return [run / name for name in sorted(os.listdir(run))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{run}: cannot be read: {_os_reason(error)}") from error


def _leftovers(run: Path) -> list[Path]:
    return [path for path in _listed(run) if _TEMPORARY.fullmatch(path.name)]


def _candidates(run: Path) -> list[Path]:
    """What may be a checkpoint, newest first; of one step its own name first, then the last old."""
    paths = [path for path in _listed(run) if _CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=lambda p: (_step(p), not _old(p), _old(p)), reverse=True)


def _step(path: Path) -> int | None:
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def _old(path: Path) -> int:
    """The N of `checkpoint-STEP.old-N`, and 0 for `checkpoint-STEP`."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[2] or 0) if match else 0


# --- writing and removing


def _seal(folder: Path, step: int, meta: dict[str, Any]) -> None:
    """Write the manifest of a folder; files, folders and manifest are on the disk afterwards."""
    if os.path.lexists(folder / MANIFEST):
        raise CheckpointError(f"{MANIFEST} is the manifest's name; write the file under another")
    files: list[File] = []
    with _opened(folder) as folder_fd:
        # safetensors creates its files with mode 0600; the folder's mode knows the umask.
        mode = stat.S_IMODE(os.fstat(folder_fd).st_mode) & 0o666
        for name, fd in _entries(folder_fd):
            if not name.endswith("/"):
                files.append(File(name, os.fstat(fd).st_size, _sha256(fd)))
                with contextlib.suppress(OSError):  # some filesystems have no modes
                    os.fchmod(fd, mode)
            os.fsync(fd)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with replacing(folder / MANIFEST) as manifest:
        manifest.write(
            _render(
                {
                    "format": FORMAT,
                    "step": step,
                    "created": created,
                    "meta": meta,
                    "files": [asdict(file) for file in sorted(files, key=lambda f: f.name)],
                }
            )
        )


def _set_aside(target: Path) -> None:
    """Free the name of a checkpoint whose step is saved again; `find` still knows it."""
    if os.path.lexists(target):
        olds = [_old(path) for path in _candidates(target.parent) if _step(path) == _step(target)]
        os.rename(target, target.with_name(f"{target.name}.old-{1 + max(olds)}"))


def _discard(path: Path) -> None:
    """Remove a checkpoint: first its name, durably, then its bytes."""
    trash = _temporary(path)
    _remove(trash)
    os.rename(path, trash)
    fsync_folder(path.parent)
    _remove(trash)


def _remove(path: Path) -> None:
    """Remove whatever is there. A link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- reading


def _verify(path: Path) -> Manifest:
    _check(path, content=False)  # what is cheap to see is seen before gigabytes are read
    return _check(path, content=True)


def _check(path: Path, content: bool) -> Manifest:
    """Compare a folder with its manifest; CheckpointError if damaged, OSError if unreadable."""
    try:
        with _opened(path) as folder_fd:
            manifest = _read_manifest(path, folder_fd)
            expected = {file.name: file for file in manifest.files}
            missing = set(expected)
            for name, fd in _entries(folder_fd):
                if name.endswith("/"):
                    if not any(listed.startswith(name) for listed in expected):
                        raise CheckpointError(
                            f"{_show(name)}: a folder that is not in the manifest"
                        )
                elif name not in expected:
                    raise CheckpointError(f"{_show(name)}: not in the manifest")
                else:
                    _compare(expected[name], fd, content)
                    missing.discard(name)
            if missing:
                raise CheckpointError(f"{_show(min(missing))}: missing")
            return manifest
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise CheckpointError(f"cannot be read: {_os_reason(error)}") from error


def _compare(file: File, fd: int, content: bool) -> None:
    size = os.fstat(fd).st_size
    if size != file.size:
        raise CheckpointError(
            f"{_show(file.name)}: size differs (expected {file.size} bytes, found {size})"
        )
    if content and (found := _sha256(fd)) != file.sha256:
        raise CheckpointError(f"{_show(file.name)}: {_differs(file.sha256, found)}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Yield a descriptor of a folder that is no link, so that nobody can exchange it meanwhile."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"is {_kind(mode)}, not a folder")
    fd = os.open(path, _OPEN | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _entries(folder_fd: int, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield name and open descriptor of each file, and after its content of each folder (`NAME/`).

    The manifest is left out. Anything but files and folders raises CheckpointError, and is not
    opened: opening a pipe waits, opening a device can do anything.
    """
    if prefix.count("/") > _DEPTH:
        raise CheckpointError(f"{_show(prefix)}: more than {_DEPTH} folders deep")
    for name in sorted(os.listdir(folder_fd)):
        if (shown := prefix + name) == MANIFEST:
            continue
        mode = os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode
        is_folder = stat.S_ISDIR(mode)
        fd = _open_folder(name, folder_fd) if is_folder else _open_regular(name, folder_fd, shown)
        try:
            if is_folder:
                yield from _entries(fd, f"{shown}/")
                yield f"{shown}/", fd
            else:
                yield shown, fd
        finally:
            os.close(fd)


def _open_folder(name: str, folder_fd: int) -> int:
    return os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=folder_fd)


def _open_regular(name: str, folder_fd: int, shown: str) -> int:
    mode = os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{_show(shown)}: is {_kind(mode)}, not a regular file")
    return os.open(name, _OPEN | os.O_NONBLOCK, dir_fd=folder_fd)


def _sha256(fd: int) -> str:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the manifest


def _render(body: dict[str, Any]) -> bytes:
    """The one way to write a manifest; a file that differs from it in any byte is damaged."""
    text = json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True)
    return f"{text}\n".encode("ascii")


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _read_manifest(path: Path, folder_fd: int) -> Manifest:
    try:
        fd = _open_regular(MANIFEST, folder_fd, MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"incomplete: no {MANIFEST}") from None
    with open(fd, "rb") as file:
        raw = file.read(_MANIFEST_BYTES + 1)
    if len(raw) > _MANIFEST_BYTES:
        raise CheckpointError(f"{MANIFEST}: longer than {readable_bytes(_MANIFEST_BYTES)}")
    try:
        manifest = _parse(path, raw)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: damaged ({_show(str(error)):.120})") from None
    if _CHECKPOINT.fullmatch(path.name) and _step(path) != manifest.step:
        raise CheckpointError(f"{MANIFEST}: is of step {manifest.step}")
    for listed in manifest.files:
        if any(part in ("", ".", "..") for part in listed.name.split("/")):
            raise CheckpointError(f"{MANIFEST}: {_show(listed.name)} is no name in a checkpoint")
    return manifest


def _parse(path: Path, raw: bytes) -> Manifest:
    """Read what `_render` wrote. Raises CheckpointError, or what a value of a wrong type raises."""
    body = json.loads(raw)
    if not isinstance(body, dict):
        raise TypeError("not a mapping")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: format {body['format']!r:.20}, and this version of unisono reads {FORMAT}"
        )
    digest = body.pop("digest")
    if digest != (found := _digest(body)):
        raise CheckpointError(f"{MANIFEST}: {_differs(digest, found)}")
    if raw != _render(body):
        raise CheckpointError(f"{MANIFEST}: not the bytes that were written, if the same values")
    return Manifest(
        path=path,
        step=_typed(body["step"], int),
        created=_typed(body["created"], str),
        meta=_typed(body["meta"], dict),
        files=tuple(
            File(
                name=_typed(file["name"], str),
                size=_typed(file["size"], int),
                sha256=_typed(file["sha256"], str),
            )
            for file in _typed(body["files"], list)
        ),
    )


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"found {value!r:.40} in place of {kind.__name__}")
    return value


# --- messages


def _show(text: str) -> str:
    """A name as it is, or escaped where it could disturb a terminal."""
    return text if text.isprintable() else ascii(text)


def _differs(expected: object, found: str) -> str:
    return f"sha256 differs (expected {_show(str(expected)):.12}.., found {found:.12}..)"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _os_reason(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    return f"{reason} ({_show(str(error.filename))})" if error.filename else reason


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors and other Rust libraries raise classes of their own around the system's error.
    match = re.search(r"\(os error ([0-9]+)\)", str(error))
    return int(match[1]) if match else None


def _is_disk_error(error: BaseException) -> bool:
    return isinstance(error, OSError) or (
        isinstance(error, Exception) and _errno(error) is not None
    )


def _disk_reason(error: BaseException, run: Path, needed_bytes: int) -> str:
    number = _errno(error)
    if number not in _FULL:
        return _os_reason(error) if isinstance(error, OSError) else str(error)
    with contextlib.suppress(OSError):
        free = readable_bytes(shutil.disk_usage(run).free)
        return f"{_FULL[number]} {run} (needs about {readable_bytes(needed_bytes)}, free {free})"
    return f"{_FULL[number]} {run}"


def _last_good(run: Path, besides: Path | None) -> Manifest | None:
    """The newest checkpoint that looks whole, for a message: reading it all would take too long."""
    with contextlib.suppress(CheckpointError):
        for path in _candidates(run):
            with contextlib.suppress(CheckpointError, OSError):
                if path != besides:
                    return _check(path, content=False)
    return None


def _tree_bytes(folder: Path) -> int:
    """How much was written before the disk failed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total
