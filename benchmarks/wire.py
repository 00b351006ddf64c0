"""Does half precision on the wire cost anything in loss?

Trains the Shakespeare recipe to its end on two replicas with either type on the wire, for several
random seeds (of weights, order and held-out split alike), and compares the held-out loss. The tokens
are the same for both, so the difference is the wire's alone. Not a timing; the machine may be busy.

    python benchmarks/wire.py [--seeds 1 2 3] [--steps 450] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from machine import machine

HERE = Path(__file__).parent
WIRES = ("float32", "bfloat16")


def held_out_loss(seed: int, wire: str, steps: int | None) -> float:
    """The recipe's held-out loss, nats per token, after a whole run."""
    from unisono.launch.local import launch

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "unisono", "train", "shakespeare",
            f"output_dir={folder}", f"seed={seed}", f"wire={wire}", "shard_optimizer=true",
            "bucket_mb=2", "device=cpu", "sample_prompt=", "baseline_steps=0", "replicas=2",
        ]  # fmt: skip
        if steps:
            command.append(f"max_steps={steps}")
        if launch(command, 2, 1) != 0:
            raise SystemExit(f"seed {seed}, {wire}: the run failed")
        return float(json.loads((Path(folder) / "receipt.json").read_text())["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "wire.json")
    args = parser.parse_args()
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    print(f"{'seed':>6} {'float32':>10} {'bfloat16':>10} {'difference':>11}")
    rows = []
    for seed in args.seeds:
        loss = {wire: held_out_loss(seed, wire, args.steps) for wire in WIRES}
        difference = loss["bfloat16"] / loss["float32"] - 1
        rows.append({"seed": seed, **loss, "difference": difference})
        print(f"{seed:6} {loss['float32']:10.4f} {loss['bfloat16']:10.4f} {difference:+11.3%}", flush=True)  # fmt: skip
    mean = statistics.mean(r["difference"] for r in rows)
    worst = max((r["difference"] for r in rows), key=abs)
    print(f"mean {mean:+.3%}, largest {worst:+.3%}")
    result = {"machine": about, "steps": args.steps, "rows": rows, "mean": mean, "largest": worst}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
