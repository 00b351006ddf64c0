"""What a run ran on: versions, device, host (rank 0's, written once as environment.json); and memory."""

import ctypes
import os
import platform
import resource
import sys
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def environment(**known: Any) -> dict[str, Any]:
    """Facts by name, those that are `known` first. No variables of the environment and no paths: a page of them may be shared."""
    return {
        **known,
        "host": platform.node(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def device_name(device: str) -> str:
    """Of a GPU, or of the CPU as the kernel calls it."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes(device: str) -> int:
    """Memory at this moment: allocated on the GPU, else resident of this process."""
    if device != "cpu":
        import torch

        return torch.cuda.memory_allocated(device)
    return int(_process().memory_info().rss)


@lru_cache(1)
def _process() -> psutil.Process:
    return psutil.Process()


def give_back_memory() -> None:
    """To the system, what C's allocator keeps of what was freed; where it can be asked to (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: str) -> None:
    """Count the peak from here on; where the kernel does not allow it, from the start of the process."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: str) -> int:
    """The most of `memory_bytes` so far."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from the source
        return None
