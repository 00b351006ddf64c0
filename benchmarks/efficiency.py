"""Do two replicas train twice as fast as one, and at least as fast as PyTorch DDP?

Runs one and the same job (the Shakespeare recipe's model, weak in communication) as separate
processes, one thread a rank: one replica, two replicas under each strategy, interleaved and
repeated. The global batch is the same everywhere, so one replica does twice the micro-batches. Every
figure is a ratio within one round; medians over the rounds. Ranks are not pinned to cores: on two
cores that costs DDP a third, because gloo's threads then share the core of the backward pass.

    python benchmarks/efficiency.py [--rounds 5] [--steps 30] [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from machine import machine
from recipe import on_ranks, recipe, tell

HERE = Path(__file__).parent
SYSTEMS = ("one", "exact", "ddp")


def worker(sync: str, steps: int, out: Path) -> None:
    """One rank: take `steps` timed steps; rank 0 tells the median step time."""
    from unisono.train.advance import advance

    with recipe(out, f"sync={sync}") as job:
        times = []
        for _ in range(steps + 5):
            began = time.perf_counter()
            advance(job)
            job.progress.step += 1
            times.append(time.perf_counter() - began)
        if job.world.is_main:
            sent = job.ledger.sent_bytes / len(times)
            tell(out, {"step_s": statistics.median(times[5:]), "sent_bytes_per_step": sent})


def measure(system: str, steps: int) -> dict:
    sync, replicas = ("exact", 1) if system == "one" else (system, 2)
    return on_ranks(replicas, "--sync", sync, "--steps", steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "efficiency.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sync", choices=["exact", "ddp"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.sync, args.steps, args.out)
        return
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    rounds = []
    for number in range(args.rounds):
        order = SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]
        found = {system: measure(system, args.steps) for system in order}
        steps = {s: found[s]["step_s"] for s in SYSTEMS}
        row = {
            "step_ms": {s: 1e3 * t for s, t in steps.items()},
            "efficiency_exact": steps["one"] / (2 * steps["exact"]),
            "efficiency_ddp": steps["one"] / (2 * steps["ddp"]),
            "exact_over_ddp": steps["exact"] / steps["ddp"],
            "sent_bytes_per_step": found["exact"]["sent_bytes_per_step"],
        }
        rounds.append(row)
        print(
            f"round {number + 1}: "
            + ", ".join(f"{s} {t:.1f} ms" for s, t in row["step_ms"].items())
            + f"; efficiency {row['efficiency_exact']:.3f} (ddp {row['efficiency_ddp']:.3f}), "
            f"exact / ddp {row['exact_over_ddp']:.3f}",
            flush=True,
        )
    keys = ("efficiency_exact", "efficiency_ddp", "exact_over_ddp")
    medians = {k: statistics.median(r[k] for r in rounds) for k in keys}
    print("median:", ", ".join(f"{k} {v:.3f}" for k, v in medians.items()))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(
        json.dumps({"machine": about, "medians": medians, "rounds": rounds}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
