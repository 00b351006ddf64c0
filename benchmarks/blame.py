"""Is what slows a run down named, with its rank, ten times of ten, and nothing in ten clean runs?

Real jobs on gloo, about six seconds of steps each, with one fault from the first step on:

- slow rank: computes 20% longer for the same work (it spins after each forward pass)
- slow loader: one rank's batches come 4 ms later
- uneven load: one rank's sequences are half as long again
- slow link: one host sends at 200 Mbit/s; two or three hosts (network namespaces, a core each as far as
  there are, `tc tbf`), the others unshaped or at 1 Gbit/s

Clean runs are the same jobs without a fault: two or three ranks on loopback, and two or three hosts
whose links are equal, at 1 Gbit/s, 200 Mbit/s or unshaped. Three ranks share two cores.

A run is right when it names the injected cause and rank, said while it ran and again in the receipt,
and names nothing else in either.

    python benchmarks/blame.py [--only "slow rank" clean] [--trials 10] [--json FILE]

Pieces (`--only`) are put together in the JSON file.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from jobs import make_job, run, write_corpus  # noqa: E402
from machine import machine  # noqa: E402
from network import Network, gather, remove_stale  # noqa: E402
from ranks import run_ranks  # noqa: E402

KINDS = ["slow rank", "slow loader", "uneven load", "slow link"]
SLOWER, LATER_S, LONGER = 0.2, 0.004, 0.5
SLOW_LINK = 200e6
CLEAN = [(2, None), (3, None), (2, "1g"), (3, "1g"), (2, "200m"), (2, None), (3, None), (2, "unshaped"), (3, "200m"), (2, None)]  # fmt: skip
RATES = {"1g": 1e9, "200m": 200e6, "unshaped": None}
MODEL = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}  # fmt: skip


# --- on a rank


def inject(world, kind: str, culprit: int) -> None:
    """Before the job begins, on every rank; only the culprit changes."""
    if world.rank != culprit:
        return
    import numpy as np

    from unisono.data.blocks import Batch
    from unisono.train.job import Job
    from unisono.train.step import Feed

    measure, batch = Job.measure, Feed.batch

    def slow(job, rows):
        began = time.perf_counter()
        found = measure(job, rows)
        # The backward pass takes twice as long as the forward pass.
        until = time.perf_counter() + 3 * SLOWER * (time.perf_counter() - began)
        while time.perf_counter() < until:
            pass
        return found

    def late(feed, step, leaf):
        time.sleep(LATER_S)
        return batch(feed, step, leaf)

    def long(feed, step, leaf):
        rows = batch(feed, step, leaf)
        more = int(LONGER * rows.input_ids.shape[1])

        def stretched(values):
            return np.concatenate([values, values[:, :more]], axis=1)

        return Batch(*map(stretched, (rows.input_ids, rows.labels, rows.position_ids)), packed=True)

    if kind == "slow rank":
        Job.measure = slow
    elif kind == "slow loader":
        Feed.batch = late
    elif kind == "uneven load":
        Feed.batch = long


def rank(world, config, kind: str, culprit: int) -> tuple:
    inject(world, kind, culprit)
    return run(world, config)


def on_host(pipe, number: int, size: int, store: str, interface: str, cache: str, config) -> None:
    """One rank in its namespace, which Network has moved this process to."""
    os.environ |= {
        "RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "UNISONO_STORE": store, "GLOO_SOCKET_IFNAME": interface, "XDG_CACHE_HOME": cache,
    }  # fmt: skip
    import torch

    from unisono import world as world_module

    torch.set_num_threads(1)
    pipe.send(("ok", run(world_module.from_env(device="cpu", threads=1, timeout_s=60), config)))


# --- trials


def trial(kind: str, culprit: int, size: int, link: str | None, steps: int, corpus: Path) -> dict:
    """A run with a fault of `kind` on `culprit`; "clean" has none. `link`: of the hosts, None: one host."""
    cache = str(corpus.parent / "cache")
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        config = make_job(
            corpus, output, max_steps=steps, model=MODEL, sequence_length=64,
            global_batch_size=12, logging_steps=20, save_steps=1000, timeout_s=60,
        )  # fmt: skip
        if link is None:
            done = run_ranks(rank, size, config, kind, culprit, join=False, env={"XDG_CACHE_HOME": cache})  # fmt: skip
        else:
            with Network(size) as network:
                network.shape(RATES[link])
                if kind == "slow link":
                    network.shape(SLOW_LINK, culprit)
                workers = [
                    network.start(k, f"rank {k}", on_host, k, size, f"{name}/store", network.interface, cache, config)
                    for k in range(size)
                ]  # fmt: skip
                done = gather(workers, 120)
        assert done[0][0] == "done", done[0][0]
        receipt = json.loads((output / "receipt.json").read_text())
    said = [line.partition(": ")[2] for line in receipt["events"] if ": jump: " not in line]
    named = [(b["kind"], b["rank"]) for b in receipt["blame"]]
    wanted = [(kind, culprit)] if kind != "clean" else []
    found = [re.match(r"([a-z ]+): (?:rank (\d+)|)", line).groups() for line in said]
    spoken = [(k, int(r) if r else None) for k, r in found]
    return {
        "kind": kind, "rank": culprit, "replicas": size, "link": link, "said": receipt["events"],
        "receipt": [[k, r] for k, r in named], "costs": [round(b["cost"], 3) for b in receipt["blame"]],
        "step_ms": round(receipt["step_ms"], 1), "shares": {k: round(v, 4) for k, v in receipt["shares"].items()},
        "right": named == wanted and spoken == wanted,
    }  # fmt: skip


def setting(kind: str, number: int) -> tuple[int, int, str | None]:
    """(culprit, replicas, link) of a trial."""
    if kind == "clean":
        return -1, *CLEAN[number % len(CLEAN)]
    if kind == "slow link":
        size = 2 + number % 2
        return number // 2 % size, size, ("unshaped", "1g")[number // 4 % 2]
    return number % 2, 2, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="of each kind")
    parser.add_argument("--only", nargs="+", default=[*KINDS, "clean"])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "blame.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import transformers.models.llama.modeling_llama  # noqa: F401  (before processes are forked)

    remove_stale()
    result = {}
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(args.json.read_text())
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name))
        for kind in args.only:
            rows = []
            for number in range(args.trials):
                row = trial(kind, *setting(kind, number), args.steps, corpus)
                rows.append(row)
                print(f"{kind} {number + 1}, rank {row['rank']} of {row['replicas']}, link {row['link']}: {'right' if row['right'] else 'WRONG'} {row['receipt']} {row['costs']}, step {row['step_ms']} ms {row['said']}", flush=True)  # fmt: skip
            right = sum(r["right"] for r in rows)
            result[kind] = {"right": right, "of": len(rows), "machine": machine(), "trials": rows}
            print(f"{kind}: {right} of {len(rows)}", flush=True)
            args.json.parent.mkdir(exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
