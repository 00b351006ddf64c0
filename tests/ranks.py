"""Run a function on N real gloo ranks: `run_ranks(function, 4, *args)` returns what each returned.

Ranks are forked from a server that has imported torch once, so they start in milliseconds; they
meet through a file, so no port is taken. A failing rank's traceback is the test's failure, the
others are ended, and every process is gone when this returns. Results come back by value, pickled.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(  # what is not installed is passed over
    [
        "torch",
        "torch.distributed",
        "transformers.models.llama.modeling_llama",
        "unisono.sync",
        "peft",
    ]
)


def _entry(function: Callable, env: dict[str, str], join: bool, pipe: Any, args: tuple) -> None:
    os.environ.update(env)
    import torch

    from unisono import world as world_module

    try:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        world = world_module.from_env(device="cpu", threads=1, timeout_s=60)
        if join:
            with world_module.joined(world):
                result = function(world, *args)
        else:
            result = function(world, *args)
        pipe.send_bytes(pickle.dumps(("ok", result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        os._exit(1)


class Ranks:
    """Ranks that are running. `result` waits for them, `signal` sends them one."""

    def __init__(self, processes: list, pipes: list) -> None:
        self._processes, self._pipes = processes, pipes

    def signal(self, number: int, rank: int | None = None) -> None:
        for r, process in enumerate(self._processes):
            if (rank is None or r == rank) and process.is_alive():
                os.kill(process.pid, number)

    def alive(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def gone(self, rank: int) -> bool:
        return not self._processes[rank].is_alive()

    def join(self) -> None:
        for process in self._processes:
            process.join()

    def result(self, timeout: float = 120) -> list:
        return _collect(self._pipes, timeout)


@contextmanager
def started(
    function: Callable, size: int, *args: Any, join: bool = False, env: dict | None = None
) -> Iterator[Ranks]:
    """Ranks that run `function(world, *args)`; all are dead afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "UNISONO_STORE": str(Path(folder) / "store"),
                "GLOO_SOCKET_IFNAME": "lo",
                **(env or {}),
            }
            ours, theirs = _context.Pipe(duplex=False)
            arguments = (function, variables, join, theirs, args)
            process = _context.Process(target=_entry, args=arguments)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        ranks = Ranks(processes, pipes)
        try:
            yield ranks
        finally:
            for process in processes:
                process.join(0.5)
            ranks.signal(signal.SIGKILL)
            ranks.join()
            for pipe in pipes:
                pipe.close()


def run_ranks(
    function: Callable, size: int, *args: Any, timeout: float = 120, join: bool = True,
    env: dict | None = None,
) -> list:  # fmt: skip
    with started(function, size, *args, join=join, env=env) as ranks:
        return ranks.result(timeout)


def _collect(pipes: list, timeout: float) -> list:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(results) + len(errors) < len(pipes) and time.monotonic() < deadline:
        waiting = [p for r, p in enumerate(pipes) if r not in results and r not in errors]
        for pipe in multiprocessing.connection.wait(waiting, timeout=1):
            rank = pipes.index(pipe)
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                kind, value = "error", "the process died without a word"
            (results if kind == "ok" else errors)[rank] = value
        if errors:
            deadline = min(deadline, time.monotonic() + 2)
    if errors:
        # The rank that failed by itself explains more than those that then lost it.
        first = min(errors, key=lambda r: ("lost the other replicas" in errors[r], r))
        raise AssertionError(f"rank {first} of {len(pipes)} failed:\n{errors[first]}")
    missing = [r for r in range(len(pipes)) if r not in results]
    assert not missing, f"ranks {missing} of {len(pipes)} did not finish in {timeout} s"
    return [results[r] for r in range(len(pipes))]
