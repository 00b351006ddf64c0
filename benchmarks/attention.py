"""What does attention cost, in time and memory, against torch's and Hugging Face's own?

Forward and backward of one layer, each combination of path and length in a process of its own, which
times the best of a few runs and tells its peak of resident memory above the imports and one small run.

Paths: `ours` (causal, windows, sinks, packed documents, BigBird, strided blocks), torch's `math` and `flash`
attention, and what Hugging Face does: `sdpa` with a spelled-out mask for a window or for documents,
`eager`, and `flex` (which has no backward on a CPU). A path that cannot run says why instead.

    python benchmarks/attention.py [--lengths 2048 4096 ...] [--paths ...] [--heads 4 --kv-heads 2] [--json FILE]
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from machine import machine

HERE = Path(__file__).parent
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
WINDOW = 512
DOCUMENT = 1024
QUADRATIC = ("torch math", "hf eager", "hf sdpa window", "hf sdpa packed", "hf flex")
QUADRATIC_LIMIT = 8192
"""Longest sequence that a path with S x S numbers is asked for: 16k would need 3.3 GB a head."""


def paths() -> dict[str, Callable]:
    """Name -> f(q, k, v): the output of one layer's attention."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from unisono.attention.local import attend
    from unisono.attention.mask import Documents, Mask
    from unisono.attention.pattern import bigbird, strided

    def packed(length: int) -> Documents | None:
        return Documents.of_ids(torch.arange(length)[None] // DOCUMENT)

    masks = {
        "ours causal": lambda n: Mask(),
        "ours window": lambda n: Mask(window=WINDOW),
        "ours window 256": lambda n: Mask(window=256),
        "ours window 1024": lambda n: Mask(window=1024),
        "ours sinks": lambda n: Mask(window=WINDOW, sinks=4),
        "ours packed": lambda n: Mask(documents=packed(n)),
        "ours bigbird": lambda n: Mask(pattern=bigbird(256)),
        "ours bigbird 128": lambda n: Mask(pattern=bigbird(128)),
        "ours strided": lambda n: Mask(pattern=strided(256, 4)),
        "ours strided 128": lambda n: Mask(pattern=strided(128, 8)),
    }
    made: dict = {}

    def ours(name: str) -> Callable:
        def run(q, k, v):
            # A model makes its description once for all its layers.
            mask = made.setdefault((name, q.shape[2]), masks[name](q.shape[2]))
            return attend(q, k, v, mask, scale=q.shape[-1] ** -0.5)

        return run

    def sdpa(q, k, v, **how):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)

    def of_backend(backend: SDPBackend) -> Callable:
        def run(q, k, v):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True)

        return run

    def spelled(mask: Callable) -> Callable:
        """As transformers does with a mask: keys repeated, the mask a bool of S x S."""

        def run(q, k, v):
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            seen = mask(q.shape[2])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])

        return run

    def window(length: int):
        i = torch.arange(length)
        return (i[:, None] >= i) & (i[:, None] - i < WINDOW)

    def documents(length: int):
        i = torch.arange(length)
        return (i[:, None] >= i) & (i[:, None] // DOCUMENT == i // DOCUMENT)

    def eager(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        s = q @ k.mT * q.shape[-1] ** -0.5
        bias = torch.full(s.shape[-2:], torch.finfo(s.dtype).min).triu(1)
        return (s + bias).softmax(-1, dtype=torch.float32) @ v

    def flex(q, k, v):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n = q.shape[2]
        block = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < WINDOW), None, None, n, n, device="cpu"
        )
        return flex_attention(q, k, v, block_mask=block, enable_gqa=True)

    return {
        **{name: ours(name) for name in masks},
        "torch flash": of_backend(SDPBackend.FLASH_ATTENTION),
        "torch math": of_backend(SDPBackend.MATH),
        "hf sdpa window": spelled(window),
        "hf sdpa packed": spelled(documents),
        "hf eager": eager,
        "hf flex": flex,
    }


def one(
    path: str, length: int, heads: int, kv_heads: int, width: int, repeats: int, threads: int
) -> dict:
    """Time and memory of one path at one length, in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = paths()[path]

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def inputs(n: int) -> list:
        return [torch.randn(1, h, n, width).requires_grad_() for h in (heads, kv_heads, kv_heads)]

    def step(leaves: list, dout) -> tuple[float, float]:
        start = time.perf_counter()
        out = run(*leaves)
        middle = time.perf_counter()
        torch.autograd.grad(out, leaves, dout)
        return middle - start, time.perf_counter() - middle

    try:
        step(inputs(512), torch.randn(1, heads, 512, width))
        base = peak()
        leaves, dout = inputs(length), torch.randn(1, heads, length, width)
        times = [step(leaves, dout) for _ in range(repeats)]
    except (NotImplementedError, RuntimeError) as error:
        return {"path": path, "length": length, "refused": " ".join(str(error).split())[:160]}
    best = min(times, key=sum)
    return {
        "path": path, "length": length, "heads": heads, "kv_heads": kv_heads, "width": width, "threads": threads,
        "forward_ms": 1e3 * best[0], "backward_ms": 1e3 * best[1], "ms": 1e3 * sum(best),
        "peak_bytes": peak() - base, "density": density(path, length),
    }  # fmt: skip


def density(path: str, length: int) -> float | None:
    """Visible pairs of a mask of ours, of those that causal attention sees; counted, not estimated."""
    import numpy as np

    from unisono.attention.mask import FULL, SKIP, Mask
    from unisono.attention.pattern import bigbird, strided

    mask = {
        "ours window": Mask(window=WINDOW), "ours window 256": Mask(window=256), "ours window 1024": Mask(window=1024),
        "ours sinks": Mask(window=WINDOW, sinks=4), "ours bigbird": Mask(pattern=bigbird(256)),
        "ours strided": Mask(pattern=strided(256, 4)), "ours bigbird 128": Mask(pattern=bigbird(128)),
        "ours strided 128": Mask(pattern=strided(128, 8)),
    }.get(path)  # fmt: skip
    if mask is None:
        return None
    tile = 256
    first = np.arange(0, length, tile)
    kinds, _ = mask.classify(first, first + tile, first, first + tile)
    pairs = int((kinds == FULL).sum()) * tile * tile
    for x, y in zip(*np.nonzero((kinds != FULL) & (kinds != SKIP))):
        pairs += int(mask.spell(x * tile, x * tile + tile, y * tile, y * tile + tile).sum())
    return pairs / (length * (length + 1) / 2)


def longest(length: int) -> dict:
    """Forward and backward of one window layer of two heads over a million tokens, in this process."""
    import torch

    from unisono.attention.local import attend
    from unisono.attention.mask import Mask

    torch.set_num_threads(1)

    def step(n: int) -> float:
        leaves = [torch.randn(1, h, n, 64).requires_grad_() for h in (2, 1, 1)]
        start = time.perf_counter()
        attend(*leaves, Mask(window=WINDOW), scale=0.125).sum().backward()
        return time.perf_counter() - start

    step(512)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = step(length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "path": "ours window", "length": length, "heads": 2, "kv_heads": 1, "width": 64,
        "ms": 1e3 * seconds, "peak_bytes": 1024 * (peak - base), "whole_process_bytes": 1024 * peak,
    }  # fmt: skip


def summary(rows: list[dict]) -> dict:
    """The figures that the project aims for, from the rows."""
    one = [
        r for r in rows if "ms" in r and r.get("threads", 1) == 1 and "whole_process_bytes" not in r
    ]
    at = {(r["path"], r["length"]): r for r in one}
    two = {(r["path"], r["length"]): r for r in rows if r.get("threads") == 2}

    def ratio(slow: str, fast: str, length: int) -> float | None:
        a, b = at.get((slow, length)), at.get((fast, length))
        return a["ms"] / b["ms"] if a and b else None

    def exponent(path: str) -> float | None:
        a, b = at.get((path, 2048)), at.get((path, 16384))
        return math.log(b["peak_bytes"] / a["peak_bytes"], 8) if a and b else None

    def efficiency(path: str, length: int) -> float | None:
        speed, row = ratio("ours causal", path, length), at.get((path, length))
        return speed * row["density"] if speed and row and row["density"] else None

    return {
        "ours causal over torch math, 4k": ratio("torch math", "ours causal", 4096),
        "the same with two threads": two["torch math", 4096]["ms"] / two["ours causal", 4096]["ms"] if ("torch math", 4096) in two else None,
        "torch flash over ours causal, 4k": ratio("ours causal", "torch flash", 4096),
        "window 512 over full flash, 16k": ratio("torch flash", "ours window", 16384),
        "window 512 over hf sdpa window, 4k": ratio("hf sdpa window", "ours window", 4096),
        "packed over hf sdpa packed, 4k": ratio("hf sdpa packed", "ours packed", 4096),
        **{f"memory exponent 2k to 16k, {p}": exponent(p) for p in ("ours causal", "ours window", "ours sinks", "ours packed", "ours bigbird")},
        **{f"speed x density at {n}, {p}": efficiency(p, n) for n in (16384, 65536) for p in ("ours bigbird", "ours strided", "ours bigbird 128", "ours strided 128", "ours window", "ours sinks")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--paths", nargs="+")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--longest", type=int, default=1_000_000, help="tokens; 0: not")
    parser.add_argument("--one", nargs=2, metavar=("PATH", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--add", action="store_true", help="to the rows that FILE has")
    parser.add_argument("--page", type=Path, help="only write FILE's figures into this page")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "attention.json")
    args = parser.parse_args()
    if args.one:
        path, length = args.one[0], int(args.one[1])
        sizes = (args.heads, args.kv_heads, args.width, args.repeats, args.threads)
        print(json.dumps(longest(length) if path == "longest" else one(path, length, *sizes)))
        return
    if args.page:
        write_page(json.loads(args.json.read_text()), args.page)
        return
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    old = json.loads(args.json.read_text())["rows"] if args.add and args.json.exists() else []
    rows = {_key(r): r for r in old}
    jobs = [(p, n) for n in args.lengths for p in args.paths or paths() if p not in QUADRATIC or n <= QUADRATIC_LIMIT]  # fmt: skip
    for path, length in [*jobs, *([("longest", args.longest)] if args.longest else [])]:
        row = measure(path, length, args)
        rows[_key(row)] = row
        told = row.get("refused") or f"{row['ms']:9.1f} ms  {row['peak_bytes'] / 1e6:8.1f} MB"
        print(f"{length:>8} {path:20} {told}", flush=True)
    result = {"machine": about, "rows": list(rows.values()), "summary": summary(list(rows.values()))}  # fmt: skip
    for name, value in result["summary"].items():
        print(f"{name:45} {'-' if value is None else f'{value:.2f}'}")
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def _key(row: dict) -> tuple:
    return row["path"], row["length"], row.get("heads"), row.get("threads", 1)


def write_page(result: dict, page: Path) -> None:
    """Put the figures between the page's marks, so that none is copied by hand."""
    about, rows = result["machine"], result["rows"]
    cells = {(r["path"], r["length"]): r for r in rows if "ms" in r and r.get("threads", 1) == 1 and "whole_process_bytes" not in r}  # fmt: skip
    lengths = sorted({n for _, n in cells})
    first = next(iter(cells.values()))
    lines = [
        f"{about['cpu']}, one thread, torch {about['torch']}, {about['date']}; one layer, {first['heads']} query heads, "
        f"{first['kv_heads']} key heads of {first['width']}, float32, forward and backward: ms, and MB above the imports.",
        "",
        "| path | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for path in dict.fromkeys(p for p, _ in cells):
        told = [cells.get((path, n)) for n in lengths]
        lines.append(f"| {path} | " + " | ".join("" if r is None else f"{r['ms']:,.0f} / {r['peak_bytes'] / 1e6:,.0f}" for r in told) + " |")  # fmt: skip
    lines += ["", "| figure | |", "|---|---|"]
    lines += [f"| {n} | {v:.2f} |" for n, v in result["summary"].items() if v is not None]
    for r in rows:
        if "whole_process_bytes" in r:
            lines.append(f"| {r['length']:,} tokens, window {WINDOW}, 2 query heads and 1 key head of 64 | {r['ms'] / 1e3:.1f} s, {r['peak_bytes'] / 1e9:.2f} GB, {r['whole_process_bytes'] / 1e9:.2f} GB with the imports |")  # fmt: skip
    start, end = "<!-- measured -->\n", "<!-- /measured -->"
    text = page.read_text()
    page.write_text(text.split(start)[0] + start + "\n".join(lines) + "\n" + end + text.split(end)[1])  # fmt: skip


def measure(path: str, length: int, args: argparse.Namespace) -> dict:
    """One row, in a fresh process."""
    repeats = args.repeats if length <= 16384 else 1
    command = [
        sys.executable, __file__, "--one", path, str(length), "--heads", str(args.heads), "--kv-heads", str(args.kv_heads),
        "--width", str(args.width), "--repeats", str(repeats), "--threads", str(args.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"path": path, "length": length, "refused": done.stderr.strip()[-160:] or "killed"}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
