"""Where we run: rank, replicas, device. The only reader of the environment.

Any launcher that sets RANK, WORLD_SIZE and MASTER_ADDR works (torchrun does); Unisono's own local
launcher rendezvous through a file in a private folder instead, so that it opens no port for it.
Without either there is one replica, which runs the same code.
"""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from unisono.errors import ConfigError

_T = TypeVar("_T")

STORE_VARIABLE = "UNISONO_STORE"
"""Set by the local launcher: the file of the rendezvous."""
LAUNCHER_VARIABLE = "UNISONO_LAUNCHER"
"""Set by the local launcher: its process id."""


@dataclass(frozen=True)
class World:
    """One rank's view of the replicas. Frozen and printable."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    device: str = "cpu"
    threads: int | None = None
    timeout_s: float = 600.0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, *rows: _T) -> Any:
        """This rank's contiguous rows of a global batch: `x, y = world.share(x, y)`.

        Takes tensors, arrays or lists that every rank holds whole, equal in length, and cuts them
        along the first dimension; shares differ by one row at most and may be empty. Not
        collective.
        """
        shares = tuple(self._share(r) for r in rows)
        return shares[0] if len(shares) == 1 else shares

    def _share(self, rows: Any) -> Any:
        count = len(rows)
        return rows[self.rank * count // self.size : (self.rank + 1) * count // self.size]


def launched(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher has already made this process one of several ranks."""
    environ = os.environ if environ is None else environ
    return "RANK" in environ and "WORLD_SIZE" in environ


def from_env(
    device: str = "auto",
    threads: int | None = None,
    timeout_s: float = 600.0,
    environ: Mapping[str, str] | None = None,
) -> World:
    """The World that the launcher's environment describes. Raises ConfigError on a torn one."""
    environ = os.environ if environ is None else environ

    def number(name: str, default: int) -> int:
        text = environ.get(name, str(default))
        if not text.isdecimal():
            raise ConfigError(f"environment {name}={text!r}: must be a whole number of at least 0")
        return int(text)

    rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
    if not rank < size:
        raise ConfigError(f"environment RANK={rank}: must be below WORLD_SIZE={size}")
    found = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    meeting = () if STORE_VARIABLE in environ else ("MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in ("RANK", "WORLD_SIZE", *meeting) if name not in environ]
    if found and missing:
        raise ConfigError(
            f"environment: {missing[0]} is missing beside {' and '.join(found)}; start the "
            f"replicas with torchrun or --replicas, or unset {' and '.join(found)}"
        )
    local_rank, local_size = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        host=socket.gethostname(),
        device=_device(device, local_rank, local_size),
        threads=threads or _threads(environ, local_size),
        timeout_s=timeout_s,
    )


def _threads(environ: Mapping[str, str], local_size: int) -> int:
    """OMP_NUM_THREADS if set, else the cores divided among the replicas of this host."""
    text = environ.get("OMP_NUM_THREADS", "")
    if text.isdigit() and int(text) > 0:
        return int(text)
    return max(1, cores() // local_size)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(asked: str, local_rank: int, local_size: int) -> str:
    if asked == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        if asked == "cuda":
            raise ConfigError("device: found 'cuda', but torch sees no GPU; write device: cpu")
        return "cpu"
    if local_size > count:
        raise ConfigError(
            f"replicas: {local_size} on this host, which has {count} GPU; "
            f"write replicas: {count}, or device: cpu"
        )
    return f"cuda:{local_rank if count > 1 else 0}"


@contextlib.contextmanager
def joined(world: World) -> Iterator[World]:
    """Collective: be part of the replicas inside the `with`. Every rank must enter it.

    One replica makes a group of one, so that nothing after this asks how many there are.
    """
    import torch
    import torch.distributed as dist

    if world.threads:
        torch.set_num_threads(world.threads)
    if world.device == "cpu":
        _keep_freed_memory()
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for determinism: strict
        torch.cuda.set_device(world.device)
    # Alone there is nobody to reach, and nothing should listen beyond this machine.
    _name_interface(os.environ.get("MASTER_ADDR") if launched() else "127.0.0.1")
    store_file = os.environ.get(STORE_VARIABLE)
    backend = "gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=world.timeout_s)
    if not launched():
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    elif store_file:
        store = dist.FileStore(store_file, world.size)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
    else:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    yield world
    # Not after a failure: where NCCL is the backend, leaving is collective too and would wait.
    dist.destroy_process_group()


def join(device: str = "auto", threads: int | None = None, timeout_s: float = 600.0) -> World:
    """Collective: join the replicas of this launch until the process ends; returns the World.

    For a loop of one's own, run as one process or under any launcher such as torchrun. Every rank
    must call it once. Raises ConfigError when the environment or the devices do not fit.
    """
    import atexit

    world = from_env(device, threads, timeout_s)
    stack = contextlib.ExitStack()
    stack.enter_context(joined(world))
    atexit.register(stack.close)
    return world


def _keep_freed_memory() -> None:
    """Let glibc reuse what was freed instead of returning it to the kernel.

    Every step frees and takes the same large tensors; the kernel would clear their pages each time,
    4% of a step of the shipped recipe. The process keeps its peak memory instead. No-op elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)


def _name_interface(master: str | None) -> None:
    """Tell gloo which network reaches the others.

    It would ask what the host's own name resolves to, often 127.0.1.1, which other hosts cannot
    reach. The kernel knows: the source address of a route to the master.
    """
    if not master or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    try:
        family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            source = probe.getsockname()[0]
    except OSError:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == source for a in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def cache_folder() -> Path:
    """Where prepared data and trained tokenizers are kept: $XDG_CACHE_HOME/unisono."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unisono"
