"""Does half precision on the wire cost anything in loss?

Trains the Shakespeare recipe to its end on two replicas with either type on the wire, for several
random seeds (of weights, order and held-out split alike), and compares the held-out loss at the same tokens.
The control is float32 again with whole gradients on every replica, which differs in the last bits of
some sums only: what it shows is chance, as a training run amplifies any difference. Not a timing; the
machine may be busy.

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
KINDS = {
    "float32": ("wire=float32", "shard_optimizer=true"),
    "control": ("wire=float32", "shard_optimizer=false"),
    "bfloat16": ("wire=bfloat16", "shard_optimizer=true"),
}


def held_out_loss(seed: int, kind: str, steps: int | None) -> float:
    """The recipe's held-out loss, nats per token, after a whole run."""
    from unisono.launch.local import launch

    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "unisono", "train", "shakespeare",
            f"output_dir={folder}", f"seed={seed}", *KINDS[kind],
            "bucket_mb=2", "device=cpu", "sample_prompt=", "baseline_steps=0", "replicas=2",
        ]  # fmt: skip
        if steps:
            command.append(f"max_steps={steps}")
        if launch(command, 2, 1) != 0:
            raise SystemExit(f"seed {seed}, {kind}: the run failed")
        return float(json.loads((Path(folder) / "receipt.json").read_text())["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "wire.json")
    args = parser.parse_args()
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    print(f"{'seed':>6}" + "".join(f"{kind:>20}" for kind in KINDS))
    rows = []
    for seed in args.seeds:
        loss = {kind: held_out_loss(seed, kind, args.steps) for kind in KINDS}
        rows.append({"seed": seed, **loss})
        shown = (f"{loss[k]:11.4f} {loss[k] / loss['float32'] - 1:+8.3%}" for k in KINDS)
        print(f"{seed:6}" + "".join(shown), flush=True)
    mean = {
        kind: statistics.mean(r[kind] for r in rows) / statistics.mean(r["float32"] for r in rows)
        - 1
        for kind in KINDS
    }
    print(f"{'mean':>6}" + "".join(f"{mean[k]:+20.3%}" for k in KINDS))
    result = {"machine": about, "steps": args.steps, "rows": rows, "mean_difference": mean}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
