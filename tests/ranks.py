"""Run a function on N real gloo ranks: `run_ranks(function, 4, *args)` returns what each returned.

Ranks are forked from a server that has imported torch once, so they start in milliseconds; they
meet through a file, so no port is taken. Results come back by value, pickled. A failing rank's traceback is the test's failure, the
others are ended, and every process is gone when this returns.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "transformers", "unisono.sync"])


def _entry(function: Callable[..., Any], env: dict[str, str], pipe: Any, args: tuple) -> None:
    os.environ.update(env)
    import torch

    from unisono import world as world_module

    try:
        torch.manual_seed(0)
        world = world_module.from_env(device="cpu", threads=1, timeout_s=60)
        with world_module.joined(world):
            result = function(world, *args)
        pipe.send_bytes(pickle.dumps(("ok", result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        os._exit(1)


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list:
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "UNISONO_STORE": str(Path(folder) / "store"),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_entry, args=(function, env, theirs, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                process.join()


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
            except EOFError:
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
