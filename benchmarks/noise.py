"""Do the two estimators of the gradient noise scale agree on the Shakespeare recipe, and what do they cost?

The whole recipe is trained twice on the same batches: by two replicas, each of whose gradients is a part
of the batch, and by one, which has the first half of its micro-batches as the part. Every second step is
measured, so that steps with and without can be told apart: the cost is the difference of their medians,
and the time in the norms themselves, which is what sets how often they are taken in a real run.

    python benchmarks/noise.py [--steps 450] [--minutes 60] [--replicas 1 2] [--json FILE]

With one of the two alone, the other is taken from the file.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from machine import machine
from recipe import on_ranks, recipe, tell

HERE = Path(__file__).parent
EVERY = 25
"""Steps between two rows."""
WARM = 10


def worker(steps: int, minutes: float, out: Path) -> None:
    """One rank of the recipe; rank 0 tells what came of it."""
    from unisono.observe.noise import BUDGET, Meter
    from unisono.train.advance import advance
    from unisono.train.batch_advice import advise, metrics

    class Alternating(Meter):
        """Measures every second step, and keeps what it cost."""

        def __init__(self) -> None:
            super().__init__(budget=float("inf"))
            self.number, self.norms_s = 0, []

        def due(self) -> bool:
            super().due()
            self.number += 1
            self._measured = self.number > 2 and self.number % 2 == 0
            return self._measured

        def keep(self, squares, sizes, spent_s, norm, total) -> None:
            if self._measured:
                self.norms_s.append(spent_s)
            super().keep(squares, sizes, spent_s, norm, total)

    with recipe(out, f"max_steps={steps}") as job:
        job.noise = meter = Alternating()
        times: dict[bool, list[float]] = {True: [], False: []}
        rows = []
        ends = time.perf_counter() + 60 * minutes
        for step in range(steps):
            began = time.perf_counter()
            advance(job)
            if step >= WARM:
                times[meter._measured].append(time.perf_counter() - began)
            job.progress.step += 1
            job.progress.tokens += job.plan.global_batch_size * job.plan.sequence_length
            if (step + 1) % EVERY == 0:
                found = metrics(meter.scale(), job.plan, job.progress.tokens)
                row = {k.removeprefix("batch__"): round(v) for k, v in found.items()}
                rows.append({"step": step + 1, **row})
                if job.votes.sum(float(time.perf_counter() > ends))[0]:
                    break
        if job.world.is_main:
            median_s = {measured: statistics.median(t) for measured, t in times.items()}
            norms_s = statistics.median(meter.norms_s)
            result = {
                "parts": job.sync.parts.kind,
                "rows": rows,
                "advice": advise(meter.scale(), job.plan, job.config, job.progress.tokens).lines,
                "step_ms": {"measured": 1e3 * median_s[True], "not": 1e3 * median_s[False]},
                "measured_over_not": median_s[True] / median_s[False],
                "norms_ms": 1e3 * norms_s,
                "norms_share_of_a_measured_step": norms_s / median_s[True],
                "norms_share_within_budget": BUDGET,
                "gradient_bytes": sum(p.numel() * 4 for _, p in job.sync.named_parameters()),
            }
            tell(out, result)


def compare(one: dict, two: dict) -> list[dict]:
    """The two estimates at the same steps, and their ratio."""
    key = "noise_scale_tokens"
    return [
        {"step": a["step"], "halves": a[key], "ranks": b[key], "ratio": a[key] / b[key]}
        for a, b in zip(one["rows"], two["rows"], strict=False)  # one may have been cut short
        if key in a and key in b
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--minutes", type=float, default=60.0, help="of each run, at most")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 1], choices=[1, 2])
    parser.add_argument("--json", type=Path, default=HERE / "results" / "noise.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.steps, args.minutes, args.out)
        return
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    report = json.loads(args.json.read_text()) if args.json.exists() else {}
    report["machine"] = about
    runs = report.setdefault("runs", {})
    for replicas in args.replicas:
        found = runs[str(replicas)] = on_ranks(
            replicas, "--steps", args.steps, "--minutes", args.minutes
        )
        print(
            f"{replicas} replicas, parts are {found['parts']}: "
            f"step {found['step_ms']['not']:.1f} ms, measured {found['measured_over_not'] - 1:+.2%}; "
            f"norms {found['norms_ms']:.2f} ms, {found['norms_share_of_a_measured_step']:.3%}\n"
            + "\n".join(found["advice"]),
            flush=True,
        )
    if {"1", "2"} <= runs.keys():
        both = report["agreement"] = compare(runs["1"], runs["2"])
        off = [abs(row["ratio"] - 1) for row in both]
        report["off_median"], report["off_most"] = statistics.median(off), max(off)
        report["off_at_the_end"] = off[-1]
        for row in both:
            print(
                "step {step}: halves {halves:,}, ranks {ranks:,}, ratio {ratio:.3f}".format(**row)
            )
        print(f"off by {off[-1]:.1%} at the end, {report['off_median']:.1%} in the median")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
