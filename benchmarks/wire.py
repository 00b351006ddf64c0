"""Does half precision on the wire cost anything in loss?

Trains the Shakespeare recipe to its end on two replicas with either type on the wire, for several
random seeds (of weights, order and held-out split alike), and compares the held-out loss at the same tokens.
A training run amplifies any difference, so that a difference in the last bits of some sums moves its end by
half a percent. So every seed is run several times, with other sizes of buckets, which changes nothing
else: their spread is chance, and the difference of two means has its standard error beside it.
Not a timing; the machine may be busy.

    python benchmarks/wire.py [--seeds 1 2 3] [--repeats 3] [--steps 450] [--json FILE]
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

from machine import machine

HERE = Path(__file__).parent
WIRES = ("float32", "bfloat16")
BUCKETS_MB = (2.0, 1.0, 0.5, 3.0, 1.5, 4.0)
"""Of each repeat."""


def held_out_loss(seed: int, wire: str, bucket_mb: float, steps: int | None) -> float:
    """The recipe's held-out loss, nats per token, after a whole run."""
    from unisono.launch.local import launch

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "unisono", "train", "shakespeare",
            f"output_dir={folder}", f"seed={seed}", f"wire={wire}", "shard_optimizer=true",
            f"bucket_mb={bucket_mb}", "device=cpu", "sample_prompt=", "baseline_steps=0", "replicas=2",
        ]  # fmt: skip
        if steps:
            command.append(f"max_steps={steps}")
        if launch(command, 2, 1) != 0:
            raise SystemExit(f"seed {seed}, {wire}: the run failed")
        return float(json.loads((Path(folder) / "receipt.json").read_text())["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=3, choices=range(2, len(BUCKETS_MB) + 1))
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "wire.json")
    args = parser.parse_args()
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    rows = []
    for seed in args.seeds:
        losses: dict[str, list[float]] = {wire: [] for wire in WIRES}
        for bucket_mb in BUCKETS_MB[: args.repeats]:
            for wire in WIRES:
                losses[wire].append(held_out_loss(seed, wire, bucket_mb, args.steps))
        mean = {wire: statistics.mean(x) for wire, x in losses.items()}
        error = math.sqrt(sum(statistics.variance(x) / len(x) for x in losses.values()))
        row = {
            "seed": seed,
            "held_out_loss": losses,
            "difference": mean["bfloat16"] / mean["float32"] - 1,
            "standard_error": error / mean["float32"],
            "spread_of_float32": (max(losses["float32"]) - min(losses["float32"]))
            / mean["float32"],
        }
        rows.append(row)
        print(
            f"RESULT seed {seed}: float32 {mean['float32']:.4f} (spread {row['spread_of_float32']:.2%}), "
            f"bfloat16 {mean['bfloat16']:.4f}, {row['difference']:+.2%} +- {row['standard_error']:.2%}",
            flush=True,
        )
    difference = statistics.mean(r["difference"] for r in rows)
    error = math.sqrt(sum(r["standard_error"] ** 2 for r in rows)) / len(rows)
    print(f"RESULT mean of {len(rows)} seeds: {difference:+.3%} +- {error:.3%}")
    result = {
        "machine": about,
        "steps": args.steps,
        "buckets_mb": BUCKETS_MB[: args.repeats],
        "seeds": rows,
        "mean_difference": difference,
        "standard_error": error,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
