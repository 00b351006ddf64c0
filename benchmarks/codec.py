"""What encoding costs: nanoseconds a value, and the share of a training step.

A rank of n encodes (n-1)/n of the gradients and 1/n of the changes of weights, and decodes (n-1)/n of
gradients and all changes, its own too (sync/shard.py). By default for the job of benchmarks/links.py:
13.5 M values, two ranks, 0.85 s of compute on a core. A copy of the same values stands beside it: what
float32 on the wire costs for packing alone. All operations take turns; the median counts.

    OMP_NUM_THREADS=1 python benchmarks/codec.py [--values 13520256] [--ranks 2] [--step-s 0.85] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from machine import machine
from unisono.sync.codec import make_codec

HERE = Path(__file__).parent
ROW = 1 << 19
"""Values of a bucket's row: 4 MiB of gradients, two ranks."""
LIMIT = 0.05


def operations() -> dict[str, Callable[[], object]]:
    """By name; each on one row, whose memory is not in the cache."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(ROW, generator=generator) for _ in range(32)]
    out, turn = torch.empty(ROW), [0]

    def row() -> torch.Tensor:
        turn[0] = (turn[0] + 1) % len(rows)
        return rows[turn[0]]

    found: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(row())}
    for name, gradients in (
        ("int8", make_codec("int8", stochastic=True)),
        ("int4", make_codec("int4")),
    ):
        changes = make_codec(name, rotated=False)
        codes = [gradients.encode(r) for r in rows[:8]]
        keeps = name == "int4"

        def encode(codec=gradients, keeps=keeps) -> None:
            codec.encode(values := row(), 1, values if keeps else None)

        def decode(codec, add, codes=codes) -> None:
            codec.decode(codes[turn[0] % len(codes)], row(), add)

        found[f"{name} gradients, encode"] = encode
        found[f"{name} gradients, decode"] = lambda c=gradients, d=decode: d(c, False)
        found[f"{name} changes, encode"] = lambda c=changes: c.encode(row())
        found[f"{name} changes, decode"] = lambda c=changes, d=decode: d(c, True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=13_520_256, help="that are trained")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--step-s", type=float, default=0.85, help="of compute on this machine")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "codec.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    print(f"{about['cpu']}, one core, torch {about['torch']}, {about['date']}")
    found = operations()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.repeats):
        for name, run in found.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) / ROW * 1e9)
    ns = {name: statistics.median(taken) for name, taken in times.items()}
    for name, value in ns.items():
        print(f"{name:24} {value:6.3f} ns a value")
    n, shares = args.ranks, {}
    others = (n - 1) / n
    for name in ("int8", "int4"):
        each = (
            ns[f"{name} gradients, encode"] * others
            + ns[f"{name} gradients, decode"] * others
            + ns[f"{name} changes, encode"] / n
            + ns[f"{name} changes, decode"]
        )
        shares[name] = each * 1e-9 * args.values / args.step_s
        print(
            f"{name}: {each * args.values / 1e6:.1f} ms a step, {shares[name]:.2%} of {args.step_s:g} s "
            f"(limit {LIMIT:.0%})"
        )
    result = {
        "machine": about, "values": args.values, "ranks": n, "step_s": args.step_s,
        "ns_per_value": ns, "share_of_step": shares,
    }  # fmt: skip
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
