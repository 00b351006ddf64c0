"""How fast one rank multiplies matrices and moves memory, all ranks measuring at once.

A rate is the best of a few repetitions; products grow until one takes LONG_S, memory is a copy of a
buffer that no cache holds, counted as STREAM does: bytes read and bytes written (McCalpin 1995).
"""

import time
from collections.abc import Callable

import psutil
import torch

SIZES = (512, 1024, 2048, 4096, 8192)
LONG_S = 0.1
REPEATS = 3
COPY_BYTES = 256 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def synchronize(device: str) -> None:
    """Wait for what a GPU's current stream still has to do; other streams go on."""
    if device != "cpu":
        torch.cuda.current_stream().synchronize()


def best_s(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Least seconds of `work` after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def matmul_flops(device: str) -> dict[str, float]:
    """FLOP/s of the best square product by dtype: fp32, bf16; on a GPU tf32 and fp16 as well."""
    found = {}
    names = ("fp32", "bf16") if device == "cpu" else ("fp32", "tf32", "bf16", "fp16")
    before = torch.backends.cuda.matmul.allow_tf32
    for name in names:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        found[name] = _flops(DTYPES.get(name, torch.float32), device)
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def _flops(dtype: torch.dtype, device: str) -> float:
    best = 0.0
    for size in SIZES:
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = best_s(lambda a=a, out=out: torch.mm(a, a, out=out), device)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_S:
            break
    return best


def memory_bytes_per_s(device: str, most_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written by a copy of up to `most_bytes`, per second."""
    most = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    size = min(most_bytes, int(most) // 64)
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_s(lambda: target.copy_(source), device, 5)
