"""Local replicas: exit codes, signals, the name of what failed, and nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import unisono
from unisono.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE
from unisono.launch import local
from unisono.launch.local import launch

BEGIN = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"])
def ready():
    (folder / f"pid-{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"pid-{rank}.tmp").rename(folder / f"pid-{rank}")
"""
STOPPABLE = """
def stop(number, frame):
    (folder / f"got-{rank}").open("a").write(f"{number}\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
ready()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has temporary files and replicas of its own; all must be gone at its end."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    yield
    assert list(temporary.iterdir()) == []
    pids = [int(p.read_text()) for p in tmp_path.glob("pid-?")]
    assert [p for p in pids if not gone(p)] == []


def program(body: str) -> list[str]:
    return [sys.executable, "-S", "-c", BEGIN + textwrap.dedent(body)]


def run(body: str, replicas: int = 3, **options) -> int:
    return launch(program(body), replicas, **options)


class Launcher:
    """`launch` in a process of its own, with all its replicas ready."""

    def __init__(self, body: str, replicas: int, folder: Path, before: str = "") -> None:
        code = f"""
import sys
{before}
from unisono.launch.local import launch
sys.exit(launch({program(body)!r}, {replicas}))
"""
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(list(folder.glob("pid-?"))) == replicas)
        self.pids = [int((folder / f"pid-{r}").read_text()) for r in range(replicas)]

    def end(self, seconds: float = 20) -> tuple[int, str]:
        _, told = self.process.communicate(timeout=seconds)
        return self.process.returncode, told


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Ended; where nobody reaps orphans they stay as zombies."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- exit codes


@pytest.mark.parametrize(
    ("codes", "whole"),
    [
        ([0, 0, 0], EXIT_DONE),
        ([75, 75, 75], EXIT_STOPPED),
        ([0, 75, 0], EXIT_STOPPED),
        ([0, 2, 0], EXIT_USAGE),
        ([0, 0, 1], EXIT_FAILED),
        ([17, 0, 75], 17),
    ],
)
def test_exit_codes(codes: list[int], whole: int) -> None:
    assert run(f"sys.exit({codes}[rank])") == whole


def test_the_first_failure_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others fail because of it, later and with other codes."""
    body = "time.sleep(0.0 if rank == 1 else 0.5); sys.exit([3, 2, 4][rank])"
    assert run(body) == 2


def test_what_a_replica_is_told() -> None:
    checks = """
    e = os.environ
    assert e["WORLD_SIZE"] == e["LOCAL_WORLD_SIZE"] == "3", e
    assert e["LOCAL_RANK"] == e["RANK"]
    assert e["OMP_NUM_THREADS"] == "5"
    assert e["GLOO_SOCKET_IFNAME"] == e["NCCL_SOCKET_IFNAME"] == "lo"
    assert e["UNISONO_LAUNCHER"] == str(os.getppid())
    assert Path(e["UNISONO_STORE"]).parent.stat().st_mode & 0o077 == 0, "private"
    assert e["MORE"] == "x"
    """
    assert run(checks, threads=5, extra_env={"MORE": "x"}) == EXIT_DONE


# --- failures


def test_a_replica_that_is_killed_is_named(tmp_path: Path) -> None:
    """The others notice the loss themselves and end within the grace."""
    body = """
    def lost(*_): sys.exit(1)
    signal.signal(signal.SIGALRM, lost)
    ready()
    if rank == 1:
        time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)
    signal.setitimer(signal.ITIMER_REAL, 1)
    time.sleep(60)
    """
    launcher = Launcher(body, 3, tmp_path)
    code, told = launcher.end()
    assert code == EXIT_FAILED
    assert f"rank 1 (pid {launcher.pids[1]}) was killed by SIGKILL" in told
    assert "Run the same command again" in told
    assert len(told.splitlines()) == 1


def test_replicas_that_do_not_end_by_themselves_are_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One hangs, one hangs and hears no SIGTERM."""
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    monkeypatch.setattr(local, "ENDING_S", 1.0)
    body = """
    if rank == 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    while len(list(folder.glob("pid-?"))) < 3: time.sleep(0.01)
    if rank == 0: sys.exit(9)
    time.sleep(60)
    """
    began = time.monotonic()
    assert run(body) == 9
    assert time.monotonic() - began < 8


def test_a_command_that_does_not_exist_leaves_nothing() -> None:
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 2)


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_every_replica_once(tmp_path: Path, number: int) -> None:
    launcher = Launcher(STOPPABLE, 3, tmp_path)
    launcher.process.send_signal(number)
    assert launcher.end()[0] == EXIT_STOPPED
    for rank in range(3):
        assert (tmp_path / f"got-{rank}").read_text().split() == [str(int(signal.SIGTERM))]


def test_ctrl_c_reaches_every_replica_once(tmp_path: Path) -> None:
    """A terminal signals its whole process group; a second signal would skip the checkpoint."""
    slow = STOPPABLE.replace("sys.exit(75)", "time.sleep(0.5)").replace("time.sleep(60)", "time.sleep(2); sys.exit(75)")  # fmt: skip
    launcher = Launcher(slow, 2, tmp_path)
    os.killpg(launcher.process.pid, signal.SIGINT)
    assert launcher.end()[0] == EXIT_STOPPED
    for rank in range(2):
        assert len((tmp_path / f"got-{rank}").read_text().split()) == 1


def test_a_second_signal_ends_the_replicas_at_once(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, lambda *_: (folder / f'got-{rank}').touch()); ready()\nwhile True: time.sleep(1)"  # fmt: skip
    launcher = Launcher(deaf, 2, tmp_path)
    launcher.process.send_signal(signal.SIGTERM)
    wait_for(lambda: len(list(tmp_path.glob("got-*"))) == 2)
    began = time.monotonic()
    launcher.process.send_signal(signal.SIGTERM)
    code, _ = launcher.end()
    assert code == EXIT_FAILED
    assert time.monotonic() - began < 5


def test_a_launcher_that_is_killed_leaves_no_replica(tmp_path: Path) -> None:
    body = f"""
    sys.path.insert(0, {str(Path(unisono.__file__).parents[1])!r})
    from unisono.launch.local import die_with_parent
    die_with_parent()
    ready()
    time.sleep(60)
    """
    launcher = Launcher(body, 3, tmp_path)
    launcher.process.kill()
    launcher.end()
    wait_for(lambda: all(map(gone, launcher.pids)), 5)
    # Nobody is left who could remove the folder of the rendezvous.
    [folder] = (tmp_path / "tmp").iterdir()
    folder.rmdir()


def test_a_replica_that_starts_after_its_launcher_died_ends(tmp_path: Path) -> None:
    code = "from unisono.launch.local import die_with_parent; die_with_parent(); print('alive')"
    env = {**os.environ, "UNISONO_LAUNCHER": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_without_a_launcher_nothing_dies() -> None:
    assert "UNISONO_LAUNCHER" not in os.environ
    local.die_with_parent()


def test_handlers_of_the_caller_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert run("") == EXIT_DONE
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
