"""N replicas on this machine: start them, pass signals on, name the one that failed, leave none.

The rendezvous is a file in a private folder and gloo talks over the loopback interface, so nothing
listens beyond this machine. The parent imports no torch. Several machines: torchrun.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unisono.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE
from unisono.world import LAUNCHER_VARIABLE, STORE_VARIABLE, cores

GRACE_S = 20.0
"""How long the others may take to end after the first failure, or after a signal's second copy."""
ENDING_S = 5.0
"""How long what still runs then may take to end by SIGTERM, before it is killed."""


def launch(
    command: Sequence[str],
    replicas: int,
    threads: int | None = None,
    extra_env: Mapping[str, str] | None = None,
) -> int:
    """Run `command` once for every replica and wait for all; returns the exit code of the whole.

    EXIT_DONE or EXIT_STOPPED when every replica says so, otherwise the code of the first replica
    that failed. SIGTERM and SIGINT are passed on; a second one ends the replicas at once.
    """
    with tempfile.TemporaryDirectory(prefix="unisono-") as folder:
        workers = [
            # In groups of their own, so that Ctrl-C reaches them once, through the launcher: a
            # second signal would end them without a checkpoint.
            subprocess.Popen(
                command,
                env=_environment(r, replicas, threads, Path(folder), extra_env or {}),
                process_group=0,
            )
            for r in range(replicas)
        ]
        try:
            with _signals_passed_to(workers):
                return _wait(workers)
        finally:
            _end(workers)


def _environment(
    rank: int, replicas: int, threads: int | None, folder: Path, extra: Mapping[str, str]
) -> dict[str, str]:
    threads = threads or max(1, cores() // replicas)
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(replicas),
        "LOCAL_WORLD_SIZE": str(replicas),
        STORE_VARIABLE: str(folder / "store"),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
        LAUNCHER_VARIABLE: str(os.getpid()),
        **extra,
    }


def die_with_parent() -> None:
    """Called by a replica: let the kernel end it (SIGTERM) should its launcher vanish. Linux only."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if sys.platform != "linux" or launcher is None:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it vanished before the request was in place
        os.kill(os.getpid(), signal.SIGTERM)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of the whole, once no replica runs or the first failure's grace is over."""
    failed: tuple[int, int] | None = None
    deadline = float("inf")
    while True:
        codes = [w.poll() for w in workers]
        if failed is None:
            bad = [(r, c) for r, c in enumerate(codes) if c not in (None, EXIT_DONE, EXIT_STOPPED)]
            if bad:
                # A peer that lost its connection fails within milliseconds of the cause: a death
                # by signal, or the code of a user's error, is the better name for it.
                failed = min(bad, key=lambda rc: (rc[1] >= 0, rc[1] != EXIT_USAGE, rc[0]))
                deadline = time.monotonic() + GRACE_S
        if all(c is not None for c in codes) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if failed:
        rank, code = failed
        pid = workers[rank].pid
        if code < 0:
            name = signal.Signals(-code).name
            print(
                f"unisono: rank {rank} (pid {pid}) was killed by {name}; the other replicas "
                f"were stopped. Run the same command again to go on from the last checkpoint.",
                file=sys.stderr,
            )
            return EXIT_FAILED
        return code
    return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_DONE


@contextlib.contextmanager
def _signals_passed_to(workers: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    asked = 0

    def pass_on(number: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """No replica outlives the launcher."""
    running = [w for w in workers if w.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + ENDING_S
    for worker in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, deadline - time.monotonic()))
        if worker.poll() is None:
            worker.kill()
            worker.wait()
