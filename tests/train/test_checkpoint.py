"""Checkpoints under crashes, kills, damage, hostility and full disks.

A crash is a forked child that dies by os._exit before its nth call that changes the disk (for a
write: also after half of it); n runs until the child survives, so every point is met.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unisono.errors import CheckpointError
from unisono.train import checkpoint
from unisono.train.checkpoint import find, prune, save, verify

# --- checkpoints whose content follows from a number


def content(key: object, size: int = 3000) -> dict[str, bytes]:
    rng = random.Random(str(key))
    return {
        "model.safetensors": rng.randbytes(size),
        "optimizer.safetensors": rng.randbytes(size),
        "empty.txt": b"",
        "tokenizer/chat.jinja": rng.randbytes(50),
    }


def writer(key: object, size: int = 3000):
    def write(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        for name, data in content(key, size).items():
            fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                while data:
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)

    return write


def put(run: Path, step: int, key: object = None, size: int = 3000) -> Path:
    key = step if key is None else key
    return save(run, step, writer(key, size), {"key": key, "step": step})


def key_of(manifest: checkpoint.Manifest) -> object:
    """The key a checkpoint was made from, after comparing every byte with what that key gives."""
    key = manifest.meta["key"]
    for name, data in content(key, manifest.files[1].size).items():
        assert (manifest.path / name).read_bytes() == data
    return key


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run))


# --- what it does when nothing goes wrong


def test_save_verify_find(tmp_path):
    assert find(tmp_path / "nothing") == (None, [])
    assert find(tmp_path) == (None, [])
    put(tmp_path, 9)
    path = put(tmp_path, 10)
    assert path == tmp_path / "checkpoint-10"
    manifest = verify(path)
    assert (manifest.path, manifest.step, key_of(manifest)) == (path, 10, 10)
    assert [file.name for file in manifest.files] == sorted(content(10))
    assert manifest.total_bytes == 6050
    assert find(tmp_path) == (manifest, [])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]


def test_meta_comes_back_as_json_keeps_it(tmp_path):
    meta = {
        "a": (1, 2),
        "loss": float("inf"),
        "rate": 1e-05,
        "word": "h\u00e9 \ud800",
        "none": None,
    }
    manifest = verify(save(tmp_path, 0, lambda folder: None, meta))
    assert manifest.meta == {**meta, "a": [1, 2]}
    assert manifest.files == ()
    with pytest.raises(TypeError):
        save(tmp_path, 1, lambda folder: None, {"a": object()})
    assert names(tmp_path) == ["checkpoint-0"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = put(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [path, *path.rglob("*")]}
    assert modes.pop("checkpoint-1") == modes.pop("tokenizer") == 0o750
    assert set(modes.values()) == {0o640}


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    put(tmp_path, 40, "old")
    put(tmp_path, 40, "new")
    manifest, notes = find(tmp_path)
    assert key_of(manifest) == "new"
    assert notes == []
    assert names(tmp_path) == ["checkpoint-40"]


def test_prune_keeps_the_newest_the_best_and_the_protected(tmp_path):
    for step in (1, 2, 3, 9, 10, 11):
        put(tmp_path, step)
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    (tmp_path / "checkpoint-4").mkdir()  # another program's: no manifest
    (tmp_path / "checkpoint-5-backup").mkdir()
    (tmp_path / ".checkpoint-mine.tmp").mkdir()
    removed = prune(tmp_path, keep=2, best=2, protect={1})
    assert removed == [".checkpoint-7.tmp", "checkpoint-9", "checkpoint-3"]
    kept = ["checkpoint-1", "checkpoint-10", "checkpoint-11", "checkpoint-2"]
    assert names(tmp_path) == sorted(
        [*kept, "checkpoint-4", "checkpoint-5-backup", ".checkpoint-mine.tmp"]
    )
    for name in kept:
        key_of(verify(tmp_path / name))
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, keep=0)


def test_prune_does_not_count_what_is_not_whole(tmp_path):
    for step in (10, 20, 30):
        put(tmp_path, step)
    (tmp_path / "checkpoint-30" / "model.safetensors").unlink()
    assert prune(tmp_path, keep=1) == ["checkpoint-10"]
    manifest, notes = find(tmp_path)
    assert manifest.step == 20
    assert notes == ["checkpoint-30: model.safetensors: missing"]


def test_find_names_what_it_passes_over(tmp_path):
    for step in (20, 30, 40, 50, 60, 100):
        put(tmp_path, step)
    flip(tmp_path / "checkpoint-40" / "model.safetensors", 7, 1)
    (tmp_path / "checkpoint-50" / "manifest.json").unlink()
    os.truncate(tmp_path / "checkpoint-60" / "tokenizer" / "chat.jinja", 49)
    shutil.rmtree(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-100").symlink_to(tmp_path / "checkpoint-30")
    (tmp_path / "checkpoint-200").write_text("")
    (tmp_path / ".checkpoint-70.tmp").mkdir()
    manifest, notes = find(tmp_path)
    assert manifest.step == 30
    good = hashlib.sha256(content(40)["model.safetensors"]).hexdigest()
    assert notes[-1].startswith(
        f"checkpoint-40: model.safetensors: sha256 differs (expected {good[:12]}.., found "
    )
    assert notes[:-1] == [
        ".checkpoint-70.tmp: left by an interrupted save or removal",
        "checkpoint-200: is a regular file, not a folder",
        "checkpoint-100: is a symbolic link, not a folder",
        "checkpoint-60: tokenizer/chat.jinja: size differs (expected 50 bytes, found 49)",
        "checkpoint-50: incomplete: no manifest.json",
    ]


def test_what_cannot_be_judged_is_not_passed_over(tmp_path, monkeypatch):
    put(tmp_path, 30)
    put(tmp_path, 40)
    failing(monkeypatch, "open", errno.EACCES, lambda path, *_: path == "model.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint-40: cannot be read: permission denied"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match="permission denied"):
        verify(tmp_path / "checkpoint-30")
    monkeypatch.undo()
    unreadable = os.stat(tmp_path / "checkpoint-40" / "model.safetensors").st_ino
    failing(monkeypatch, "fstat", errno.EIO, lambda fd: real_stat(fd).st_ino == unreadable)
    manifest, notes = find(tmp_path)
    assert manifest.step == 30
    assert notes == ["checkpoint-40: cannot be read: input/output error"]


# --- crashes, at every point

CHANGES = ("open", "write", "mkdir", "rename", "unlink", "rmdir", "fsync", "fchmod", "ftruncate")
real_stat = os.stat


class Calls:
    """Count the calls of this process that change the disk, and ask `hook` before each."""

    def __init__(self, hook) -> None:
        self.count, self.hook = 0, hook
        self.real = {name: getattr(os, name) for name in CHANGES}

    def __enter__(self):
        for name, real in self.real.items():
            setattr(os, name, self.wrap(name, real))
        return self

    def __exit__(self, *_):
        for name, real in self.real.items():
            setattr(os, name, real)

    def wrap(self, name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.count += 1
            self.hook(self, name, args)
            return real(*args, **kwargs)

        return call


def crashes(action, prepare, torn: bool = False):
    """Yield n for every n: `prepare()` was called, and `action()` died before its nth change."""
    for n in itertools.count(1):
        prepare()
        if not crashes_at(n, action, torn):
            return
        yield n


def crashes_at(n: int, action, torn: bool = False) -> bool:
    def die(calls: Calls, name: str, args: tuple) -> None:
        if calls.count == n:
            if torn and name == "write":
                calls.real["write"](args[0], args[1][: len(args[1]) // 2])
            os._exit(9)

    pid = os.fork()
    if pid == 0:
        try:
            with Calls(die):
                action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.fixture
def fast(request):
    """A folder in memory where there is one: these tests sync a thousand times."""
    shm = Path("/dev/shm")
    base = shm if os.access(shm, os.W_OK) else Path("/tmp")
    folder = base / f"unisono-test-{os.getpid()}-{random.getrandbits(32):x}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def fresh(run: Path, *steps: tuple[int, object]):
    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step, key in steps:
            put(run, step, key)

    return prepare


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_anywhere_in_a_save_leaves_the_old_or_the_new(fast, torn):
    run, seen = fast / "run", []
    prepare = fresh(run, (30, "old"))
    for _ in crashes(lambda: put(run, 40, "new"), prepare, torn):
        manifest, _ = find(run)
        assert key_of(manifest) == {30: "old", 40: "new"}[manifest.step]
        seen.append(manifest.step)
        # The next save and prune clear away what the crash left.
        put(run, 40, "again")
        prune(run, keep=2)
        assert names(run) == ["checkpoint-30", "checkpoint-40"]
        assert key_of(find(run)[0]) == "again"
    assert len(seen) > 20
    assert set(seen) == {30, 40}


def test_a_crash_anywhere_in_the_first_save_leaves_nothing_or_the_new(fast):
    run, seen = fast / "run", set()
    for _ in crashes(lambda: put(run, 0, "new"), fresh(run)):
        manifest, _ = find(run)
        seen.add(manifest and key_of(manifest))
    assert seen == {None, "new"}


def test_a_crash_anywhere_in_a_redo_leaves_that_step_old_or_new(fast):
    run, seen = fast / "run", set()
    for _ in crashes(lambda: put(run, 40, "new"), fresh(run, (30, "x"), (40, "old"))):
        manifest, _ = find(run)
        assert manifest.step == 40
        seen.add((manifest.path.name, key_of(manifest)))
        prune(run, keep=1)
        assert names(run) == [manifest.path.name]
        assert find(run) == (manifest, [])
    assert seen == {
        ("checkpoint-40", "old"),
        ("checkpoint-40.old-1", "old"),
        ("checkpoint-40", "new"),
    }


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_in_a_redo_after_a_crash_in_a_redo(fast, stride):
    run, base = fast / "run", fast / "base"
    prepare = fresh(base, (40, 0))
    for n in range(1, 200, stride):
        prepare()
        if not crashes_at(n, lambda: put(base, 40, 1)):
            break
        # Damage the name of its own besides, so that nothing but an old one may be left.
        for damaged in (False, True) if (base / "checkpoint-40.old-1").exists() else (False,):
            if damaged and (base / "checkpoint-40").exists():
                flip(base / "checkpoint-40" / "model.safetensors", 5, 2)
            for m in range(1, 200, stride):
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(base, run)
                alive = not crashes_at(m, lambda: put(run, 40, 2))
                assert key_of(find(run)[0]) in (0, 1, 2)
                if alive:
                    assert names(run) == ["checkpoint-40"]
                    assert key_of(find(run)[0]) == 2
                    break


def test_a_crash_anywhere_in_prune_touches_no_kept_one(fast):
    run = fast / "run"
    steps = [(step, step) for step in (10, 20, 30, 40, 50)]

    def prepare() -> None:
        fresh(run, *steps)()
        shutil.copytree(run / "checkpoint-30", run / "checkpoint-50.old-2")
        shutil.copytree(run / "checkpoint-10", run / ".checkpoint-60.tmp")
        rewrite(run / "checkpoint-50.old-2", step=50)

    for _ in crashes(lambda: prune(run, keep=2, best=10), prepare):
        for step in (10, 40, 50):
            assert key_of(verify(run / f"checkpoint-{step}")) == step
        # Whatever still has the name of a checkpoint is one.
        for name in names(run):
            if not name.startswith("."):
                verify(run / name)
        prune(run, keep=2, best=10)
        assert names(run) == ["checkpoint-10", "checkpoint-40", "checkpoint-50"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("redo", [False, True])
def test_an_error_anywhere_in_a_save_is_reported_and_leaves_no_torso(fast, code, redo):
    run = fast / "run"
    prepare = fresh(run, (30, "old"), *([(40, "old")] if redo else []))
    reported = 0
    for n in itertools.count(1):
        prepare()
        with Calls(lambda calls, *_, n=n: calls.count == n and fail(code)) as calls:
            error = error_of(lambda: put(run, 40, "new"))
        saved = error is None
        assert saved or re.match("checkpoint 40 failed: .*; the last good one is check", error)
        reported += not saved
        manifest, notes = find(run)
        key = key_of(manifest)
        assert manifest.step == 40 if redo or saved else True
        # Tidying after a successful save may fail silently: the next prune does it.
        assert key == "new" if saved else notes == []
        if calls.count < n:
            break
        prune(run, keep=2)
        assert not [name for name in names(run) if name.startswith(".")]
        assert key_of(find(run)[0]) == key
    assert reported > 15


def error_of(action) -> str | None:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def fail(code: int, *_) -> None:
    raise OSError(code, os.strerror(code))


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path):
    """The order of syncs and names, which no kill of a process can show, but a power cut does."""
    run = tmp_path / "run"
    fresh(run, (40, "old"))()
    trace = []

    def record(calls: Calls, name: str, args: tuple) -> None:
        if name in ("fsync", "write"):
            args = (os.readlink(f"/proc/self/fd/{args[0]}"),)
        if name in ("fsync", "write", "rename"):
            trace.append(" ".join([name, *(os.path.relpath(path, run) for path in args)]))
        elif name == "unlink" and isinstance(args[0], str) and trace[-1] != "remove":
            trace.append("remove")  # rmtree's; a Path is only an attempt to clear an old leftover

    with Calls(record):
        put(run, 40, "new")
    new = ".checkpoint-40.tmp"
    files = [name for name, data in content("new").items() if data]
    assert trace[: len(files)] == [f"write {new}/{name}" for name in files]
    assert trace[len(files) :] == [
        f"fsync {new}/empty.txt",
        f"fsync {new}/model.safetensors",
        f"fsync {new}/optimizer.safetensors",
        f"fsync {new}/tokenizer/chat.jinja",
        f"fsync {new}/tokenizer",
        f"fsync {new}/.manifest.json.tmp",
        f"rename {new}/.manifest.json.tmp {new}/manifest.json",
        f"fsync {new}",
        "rename checkpoint-40 checkpoint-40.old-1",
        f"rename {new} checkpoint-40",
        "fsync .",
        "rename checkpoint-40.old-1 .checkpoint-40.old-1.tmp",
        "fsync .",
        "remove",
    ]


# --- real kills

SAVER = """
import os, sys
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
from test_checkpoint import put, prune
run = Path(sys.argv[1])
step = int(sys.argv[3])
while True:
    put(run, step, step, 200_000)
    put(run, step, step, 200_000)
    prune(run, keep=2)
    os.write(1, b"%d\\n" % step)
    step += 1
"""


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_no_committed_step(tmp_path, kills):
    rng, committed = random.Random(7), 0
    for _ in range(kills):
        command = [sys.executable, "-c", SAVER, str(tmp_path), os.path.dirname(__file__)]
        child = subprocess.Popen([*command, str(committed + 1)], stdout=subprocess.PIPE)
        try:
            first = child.stdout.readline()
            time.sleep(rng.random() * 0.1)
        finally:
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read()
            child.stdout.close()
            child.wait()
        done = int((first + rest).split(b"\n")[-2])
        manifest, _ = find(tmp_path)
        assert manifest.step in (done, done + 1)
        assert key_of(manifest) == manifest.step
        committed = manifest.step
    prune(tmp_path, keep=1)
    assert names(tmp_path) == [manifest.path.name]


# --- damage


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def some_file(rng: random.Random, folder: Path, filled: bool = False) -> Path:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return rng.choice([p for p in files if p.stat().st_size] if filled else files)


def flip_bit(rng, folder, other):
    path = some_file(rng, folder, filled=True)
    flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))


def truncate(rng, folder, other):
    path = some_file(rng, folder, filled=True)
    os.truncate(path, rng.randrange(path.stat().st_size))


def extend(rng, folder, other):
    with some_file(rng, folder).open("ab") as file:
        file.write(rng.choice([b"\0", b"\n", b" ", rng.randbytes(rng.randrange(1, 5000))]))


def zero_page(rng, folder, other):
    path = some_file(rng, folder, filled=True)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + 512)
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def swap_two(rng, folder, other):
    a, b = folder / "model.safetensors", some_file(rng, folder)
    if a == b:
        b = folder / "optimizer.safetensors"
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)


def from_another_step(rng, folder, other):
    name = rng.choice(["model.safetensors", "tokenizer/chat.jinja", "manifest.json"])
    shutil.copy(other / name, folder / name)


def whole_other_step(rng, folder, other):
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def duplicate_key(rng, folder, other):
    path = folder / "manifest.json"
    line = rng.choice([b'"step": 40', b'"step": 30', b'"format": 1', b'"meta": {}', b'"files": []'])
    text = path.read_bytes()
    place = rng.choice([2, text.rindex(b"\n}")])
    path.write_bytes(text[:place] + (line + b"," if place == 2 else b"," + line) + text[place:])


def edit_value(rng, folder, other):
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    edits = [("step", 41), ("format", 2), ("digest", "0" * 64), ("meta", {}), ("created", "now")]
    edits += [("files", body["files"][1:]), ("files", []), ("extra", 1)]
    key, value = rng.choice(edits)
    path.write_text(json.dumps({**body, key: value}, indent=1, sort_keys=True) + "\n")


def reformat(rng, folder, other):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=rng.choice([None, 0, 2])))


def delete(rng, folder, other):
    some_file(rng, folder).unlink()


def delete_folder(rng, folder, other):
    shutil.rmtree(folder / "tokenizer")


def rename_file(rng, folder, other):
    path = some_file(rng, folder)
    path.rename(path.with_name(path.name + rng.choice(["~", "\n", "\udc80"])))


def add(rng, folder, other):
    name = rng.choice(["pytorch_model.bin", ".hidden", "tokenizer/x", "MANIFEST.json", "a\x1b[2J"])
    (folder / name).write_bytes(rng.randbytes(rng.randrange(3)))


def add_folder(rng, folder, other):
    (folder / rng.choice(["new", "tokenizer/new"])).mkdir()


def link(rng, folder, other):
    path = some_file(rng, folder)
    target = rng.choice([other / path.relative_to(folder), Path("/dev/zero"), Path("missing")])
    path.unlink()
    path.symlink_to(target)


def link_to_the_same_bytes(rng, folder, other):
    path = some_file(rng, folder)
    outside = folder.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def link_folder(rng, folder, other):
    (folder / "tokenizer").rename(folder.parent / "moved")
    (folder / "tokenizer").symlink_to(folder.parent / "moved")


def pipe(rng, folder, other):
    path = some_file(rng, folder)
    path.unlink()
    os.mkfifo(path)


MUTATIONS = [flip_bit, truncate, extend, zero_page, swap_two, from_another_step, whole_other_step]
MUTATIONS += [duplicate_key, edit_value, reformat, delete, delete_folder, rename_file, add]
MUTATIONS += [add_folder, link, link_to_the_same_bytes, link_folder, pipe]


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_damage_is_loaded_silently(fast, count):
    base, run = fast / "base", fast / "run"
    fresh(base, (30, 30), (40, 40))()
    silent = []
    for seed in range(count):
        rng = random.Random(seed)
        mutate = MUTATIONS[seed % len(MUTATIONS)] if seed % 2 else flip_bit
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        mutate(rng, run / "checkpoint-40", run / "checkpoint-30")
        with contextlib.suppress(CheckpointError):
            verify(run / "checkpoint-40")
            silent.append((seed, mutate.__name__))
        manifest, notes = find(run)
        if manifest.step != 30 or key_of(manifest) != 30:
            silent.append((seed, mutate.__name__))
        assert len(notes) == 1
        assert notes[0].startswith("checkpoint-40: ") and notes[0].isprintable()
    assert silent == []


def test_every_bit_of_a_manifest_counts(fast):
    path = save(fast, 40, lambda folder: None, {"rate": 1e-05, "word": "\u00e9\u00f6"})
    manifest = path / "manifest.json"
    good = manifest.read_bytes()
    for offset, bit in itertools.product(range(len(good)), range(8)):
        flip(manifest, offset, bit)
        with pytest.raises(CheckpointError, match=r"checkpoint-40: manifest\.json: "):
            verify(path)
        manifest.write_bytes(good)
    verify(path)


def test_a_changed_manifest_is_told_by_its_digest(tmp_path):
    path = put(tmp_path, 40)
    body = json.loads((path / "manifest.json").read_bytes())
    edited = json.dumps({**body, "created": "never"}, indent=1, sort_keys=True)
    (path / "manifest.json").write_text(f"{edited}\n")
    with pytest.raises(CheckpointError, match=f"sha256 differs .expected {body['digest'][:12]}"):
        verify(path)


def test_hard_links_are_as_good_as_files(tmp_path):
    path = put(tmp_path, 1)
    os.link(path / "model.safetensors", tmp_path / "other-name")
    verify(path)


# --- hostility: manifests with the right digest and the wrong content


def rewrite(path: Path, **changes) -> None:
    """A manifest that somebody made on purpose: whatever it says, its digest is right."""
    body = json.loads((path / "manifest.json").read_bytes())
    body.pop("digest")
    body.update(changes)
    body = {key: value for key, value in body.items() if value is not ...}
    (path / "manifest.json").write_bytes(checkpoint._render(body))


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "a//b", "a/", "tokenizer/"),
        *("tokenizer", "manifest.json", "x\0y", "n" * 5000, "\udc80"),
    ],
)
def test_a_manifest_cannot_reach_outside(tmp_path, name):
    path = put(tmp_path, 1)
    secret = b"secret"
    (tmp_path / "secret").write_bytes(secret)
    entry = {"name": name, "size": 6, "sha256": hashlib.sha256(secret).hexdigest()}
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    rewrite(path, files=[*files, entry])
    with pytest.raises(CheckpointError) as caught:
        verify(path)
    assert str(caught.value).isprintable()
    outside = any(part in ("", ".", "..") for part in name.split("/"))
    assert ("is no name in a checkpoint" if outside else ": missing") in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in ("1", 1.0, True, 2, 10**5000, ...)),
        *({"files": value} for value in ({}, [1], [{"name": "x"}], ...)),
        *({"format": value} for value in (2, "1", ...)),
        *({"meta": []}, {"created": 1}),
    ],
    ids=range(15),
)
def test_a_manifest_of_wrong_types_is_damaged(tmp_path, changes):
    path = put(tmp_path, 1)
    if changes.get("step") == 10**5000:
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text.replace('"step": 1', f'"step": 1{"0" * 5000}'))
    else:
        rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        verify(path)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"null", b"[]", b"{}", b"NaN", b"\xff\xfe{\0}\0", b'{"format": 1, "digest": []}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b" " * (2**24 + 1)),
    ],
    ids=range(10),
)
def test_a_manifest_of_any_bytes_is_damaged(tmp_path, raw):
    path = put(tmp_path, 1)
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        verify(path)


def test_a_long_manifest_is_not_read(tmp_path):
    path = put(tmp_path, 1)
    os.truncate(path / "manifest.json", 2**30)
    with pytest.raises(CheckpointError, match=r"manifest\.json: longer than 16\.0 MiB"):
        verify(path)


def test_an_older_format_is_told_from_damage(tmp_path):
    path = put(tmp_path, 1)
    rewrite(path, format=7)
    with pytest.raises(CheckpointError, match="format 7, and this version of unisono reads 1"):
        verify(path)


def test_a_device_is_not_opened(tmp_path):
    path = put(tmp_path, 1)
    (path / "model.safetensors").unlink()
    try:
        os.mknod(path / "model.safetensors", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device node needs root")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a device, not a regular"):
        verify(path)


def test_a_file_exchanged_for_a_link_meanwhile_is_not_followed(tmp_path, monkeypatch):
    path = put(tmp_path, 1)

    def exchange(name, **kwargs):
        result = real_stat(name, **kwargs)
        if name == "model.safetensors" and not os.path.lexists(tmp_path / "outside"):
            (path / name).rename(tmp_path / "outside")
            (path / name).symlink_to(tmp_path / "outside")
            # The one who checks before opening may ask twice: tell it twice.
            monkeypatch.setattr(os, "stat", lambda *_, **__: result)
        return result

    monkeypatch.setattr(os, "stat", exchange)
    with pytest.raises(CheckpointError, match=r"too many levels of symbolic links"):
        verify(path)


def test_a_deep_tree_is_refused(tmp_path):
    path = put(tmp_path, 1)
    (path / "/".join("d" * 200)).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="folders deep"):
        verify(path)


def test_links_in_the_place_of_checkpoints_are_not_followed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    outside = put(tmp_path, 40, "mine")
    for name in ("checkpoint-40", "checkpoint-50", ".checkpoint-40.tmp", ".checkpoint-9.tmp"):
        (run / name).symlink_to(outside)
    assert find(run)[0] is None
    put(run, 40, "new")
    assert prune(run, keep=1) == [".checkpoint-9.tmp"]
    assert names(run) == ["checkpoint-40", "checkpoint-50"]
    assert key_of(verify(run / "checkpoint-40")) == "new"
    assert key_of(verify(outside)) == "mine"


@pytest.mark.parametrize("kind", ["link", "pipe", "manifest"])
def test_save_refuses_what_is_no_file_of_its_own(tmp_path, kind):
    def write(folder: Path) -> None:
        writer(1)(folder)
        if kind == "link":
            (folder / "x").symlink_to("model.safetensors")
        elif kind == "pipe":
            os.mkfifo(folder / "x")
        else:
            (folder / "manifest.json").write_text("{}")

    with pytest.raises(CheckpointError, match=r"checkpoint 1 failed: (x|manifest\.json)\b"):
        save(tmp_path, 1, write, {})
    assert names(tmp_path) == []


# --- disks that fail


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int):
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_with_what_is_needed_and_free(tmp_path):
    with small_disk(tmp_path, 2**20):
        with pytest.raises(CheckpointError, match=r"needs about .* there is no earlier one"):
            put(tmp_path, 1, size=2**21)
        put(tmp_path, 30, size=300 * 1024)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 40, writer(40, 300 * 1024), {}, expected_bytes=700 * 1024)
        assert names(tmp_path) == ["checkpoint-30"]
        assert key_of(find(tmp_path)[0]) == 30
        assert str(caught.value).startswith(
            f"checkpoint 40 failed: no space left on {tmp_path} (needs about 700.0 KiB, free "
        )
        assert str(caught.value).endswith(" KiB); the last good one is checkpoint-30")


def test_a_full_disk_under_safetensors_is_named_too(tmp_path):
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    with (
        small_disk(tmp_path, 2**20),
        pytest.raises(CheckpointError, match="failed: no space left on"),
    ):
        save(
            tmp_path,
            1,
            lambda folder: safetensors.save_file({"w": numpy.ones(2**18)}, folder / "m"),
            {},
        )


@pytest.mark.parametrize("redo", [False, True])
def test_a_file_size_limit_is_named_and_the_old_one_stays(tmp_path, redo):
    step = 30 if redo else 40
    put(tmp_path, 30, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(folder: Path) -> None:
        with (folder / "model").open("wb") as file:
            file.write(bytes(2**20))

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, step, write, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"checkpoint {step} failed: file too large for {tmp_path} (needs about 512.0 KiB" in str(
        caught.value
    )
    assert "free " in str(caught.value)
    assert str(caught.value).endswith("; the last good one is checkpoint-30")
    assert names(tmp_path) == ["checkpoint-30"]
    assert key_of(find(tmp_path)[0]) == "old"


def test_a_read_only_disk_is_named(tmp_path, monkeypatch):
    put(tmp_path, 30)
    failing(monkeypatch, "mkdir", errno.EROFS, lambda *_: True)
    with pytest.raises(CheckpointError) as caught:
        put(tmp_path, 40)
    assert str(caught.value) == (
        "checkpoint 40 failed: read-only file system; the last good one is checkpoint-30"
    )


def test_a_checkpoint_that_may_not_last_is_not_the_last_good_one(tmp_path, monkeypatch):
    put(tmp_path, 30)
    folder = os.stat(tmp_path).st_ino
    failing(monkeypatch, "fsync", errno.EIO, lambda fd: os.fstat(fd).st_ino == folder)
    with pytest.raises(CheckpointError, match=r"failed: input/output error; .* is checkpoint-30"):
        put(tmp_path, 40)
    assert find(tmp_path)[0].step == 40


def test_what_is_no_error_of_the_disk_passes_through(tmp_path):
    def write(folder: Path) -> None:
        writer(1)(folder)
        raise error

    for error in (ValueError("nan"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            save(tmp_path, 1, write, {})
        assert names(tmp_path) == []


def test_prune_that_cannot_remove_says_so(tmp_path, monkeypatch):
    put(tmp_path, 1)
    put(tmp_path, 2)
    failing(monkeypatch, "rename", errno.EACCES, lambda *_: True)
    with pytest.raises(CheckpointError, match="cannot be removed: permission denied"):
        prune(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def failing(monkeypatch, name: str, code: int, when) -> None:
    real = getattr(os, name)

    def call(*args, **kwargs):
        if when(*args):
            fail(code)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)
