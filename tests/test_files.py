import errno
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from unisono.errors import UnisonoError
from unisono.files import (
    Followed,
    JsonLines,
    RunLock,
    fsync_file,
    read_lines,
    readable_bytes,
    replacing,
    truncate_after,
    up_to,
    write_json,
)


def test_write_json_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [1.5, float("nan"), {"b": float("-inf")}]})
    assert json.loads(path.read_text()) == {"a": [1.5, None, {"b": None}]}
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    fsync_file(path)


@pytest.mark.parametrize("failing", ["open", "fsync", "rename"])
def test_write_json_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "plan.json"
    write_json(path, {"old": True})

    def fail(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="Input/output"):
            write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("call", ["open", "fsync", "rename"])
def test_write_json_killed_leaves_the_old_file_or_the_new(tmp_path, call):
    path = tmp_path / "plan.json"
    for nth in range(1, 4):
        write_json(path, {"old": True})
        _killed_at(call, nth, lambda: write_json(path, {"new": True}))
        assert json.loads(path.read_text()) in ({"old": True}, {"new": True})
    write_json(path, {"last": True})
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_planted_link_is_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / ".plan.json.tmp").symlink_to(outside)
    with replacing(tmp_path / "plan.json") as file:
        file.write(b"{}")
    assert outside.read_text() == "mine"


# --- JSON lines


def test_json_lines_append_and_reopen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start in (0, 2):
        with JsonLines(path) as lines:
            lines.append({"step": start, "loss": float("nan")})
            lines.append({"step": start + 1, "text": "a\nb"})
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2, 3]
    lines.close()


def test_a_last_line_without_its_end_is_torn_even_if_it_parses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    torn = b'{"step": 0}\n{"step": 1}'
    path.write_bytes(torn)
    assert [row["step"] for row in read_lines(path)] == [0]
    assert truncate_after(path, lambda _: True) == 1
    assert path.read_bytes() == b'{"step": 0}\n'
    path.write_bytes(torn)
    JsonLines(path).close()
    assert path.read_bytes() == b'{"step": 0}\n'


@pytest.mark.parametrize("tail_bytes", [1, 20, 65_535, 65_536, 200_000])
def test_a_torn_last_line_is_cut_off(tmp_path, tail_bytes):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        for step in range(3):
            lines.append({"step": step})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "x": "'.ljust(tail_bytes, b"y")[:tail_bytes])
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2]
    with JsonLines(path) as lines:
        assert path.read_bytes() == whole
        lines.append({"step": 3})
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2, 3]


def test_rows_without_a_step_go_with_those_of_later_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 9}, {}, {"step": "x"}, {"step": None}, {"step": [1]}, {"step": 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2')
    assert truncate_after(path, up_to(4)) == 6
    assert list(read_lines(path)) == [{"step": 1}, {"step": 4}]


def test_a_file_that_is_followed_gives_each_row_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nodd\n{"step": 2')
    followed = Followed(path)
    assert followed.new() == (True, [{"step": 1}])
    with path.open("a") as file:
        file.write("}\n")
    assert followed.new() == (False, [{"step": 2}])
    assert followed.new() == (False, [])
    path.write_text('{"step": 7}\n')  # cut, in place
    assert followed.new() == (True, [{"step": 7}])
    truncate_after(path, up_to(0))  # replaced
    with path.open("a") as file:
        file.write('{"step": 1, "again": true}\n')
    assert followed.new() == (True, [{"step": 1, "again": True}])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        followed.new()


def test_a_file_of_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step"')
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_an_append_that_the_disk_cuts_short_leaves_no_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.append({"step": 0})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                lines.append({"step": 1, "text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == b'{"step": 0}\n'
        lines.append({"step": 1})
    assert [row["step"] for row in read_lines(path)] == [0, 1]


def test_truncate_after_drops_rows_and_keeps_the_rest_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":1,  "loss": 1.0}\n'
    path.write_bytes(kept + b'{"step": 3}\n' + b"\0" * 8 + b"\n[1]\n" + kept + b'{"step": 2')
    assert truncate_after(path, lambda row: row["step"] <= 2) == 4
    assert path.read_bytes() == kept * 2
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert truncate_after(tmp_path / "none.jsonl", lambda _: False) == 0
    assert not (tmp_path / "none.jsonl").exists()


def test_truncate_after_whose_question_fails_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"loss": 1}\n')
    with pytest.raises(KeyError):
        truncate_after(path, lambda row: row["step"] <= 2)
    assert path.read_bytes() == b'{"step": 1}\n{"loss": 1}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


# --- the lock

HOLDER = """
import os, sys, time
from pathlib import Path
from unisono.files import RunLock
with RunLock(Path(sys.argv[1])):
    worker = os.fork() if sys.argv[2] == "fork" else -1
    if worker <= 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("children", ["none", "fork"])
def test_a_second_process_is_refused_until_the_holder_is_killed(tmp_path, children):
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run), children]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = -1
    try:
        worker = int(holder.stdout.readline())
        with pytest.raises(UnisonoError) as refused, RunLock(run):
            pass
        message = str(refused.value)
        assert message.startswith(f"{run} is in use by pid {holder.pid} on host ")
        assert message.endswith(": wait for it, stop it, or choose another output_dir")
        assert re.search(r" since \d\d:\d\d:\d\d: ", message)
        holder.kill()
        holder.wait()
        # The forked worker is still alive here and must not keep the lock.
        with RunLock(run):
            owner = json.loads((run / ".lock").read_text())
            assert owner["pid"] == os.getpid()
            assert {"pid", "host", "started", "command"} == set(owner)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        if worker not in (-1, holder.pid):
            os.kill(worker, signal.SIGKILL)


def test_the_lock_is_free_after_the_block_and_its_file_stays(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(UnisonoError, match=f"pid {os.getpid()} "):
            RunLock(tmp_path).__enter__()
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o644 & ~_umask()
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        _ = 1 / 0
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"pid": 1}', b"\xff", b"[" * 9999, b'{"pid": 1, "started": "12"}'],
)
def test_a_lock_file_with_any_content_still_refuses(tmp_path, content):
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(UnisonoError, match="is in use by another process: wait"):
            RunLock(tmp_path).__enter__()


def test_an_old_lock_tells_its_day(tmp_path):
    with RunLock(tmp_path):
        owner = {"pid": 123, "host": "h", "started": "2026-01-02T12:01:02+00:00", "command": "x"}
        (tmp_path / ".lock").write_text(json.dumps(owner))
        with pytest.raises(UnisonoError, match="by pid 123 on host h since 2026-01-02 12:01:02: "):
            RunLock(tmp_path).__enter__()


def test_a_filesystem_without_locks_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UnisonoError, match="this filesystem cannot lock files"):
        RunLock(tmp_path).__enter__()


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnisonoError, match="cannot be used as output_dir"):
        RunLock(tmp_path / "file" / "run").__enter__()


def test_readable_bytes():
    assert readable_bytes(12) == "12 bytes"
    assert readable_bytes(1536) == "1.5 KiB"
    assert readable_bytes(300 * 2**20) == "300.0 MiB"
    assert readable_bytes(5 * 2**28) == "1.2 GiB"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _killed_at(call, nth, action):
    """Run `action` in a forked child that dies without any cleanup before the nth `os.CALL`."""
    pid = os.fork()
    if pid == 0:
        real, count = getattr(os, call), 0

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == nth:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(os, call, counted)
        action()
        os._exit(0)
    os.waitpid(pid, 0)
