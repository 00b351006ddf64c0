"""Forecast beside measurement on our own grid: ranks x links x strategies x model sizes.

Hosts are network namespaces with a core each (network.py); four ranks are two on each core. For every
link ONE probe at two ranks measures the link and what it takes from the compute; the model's pass is
timed without any communication, with as many ranks on a core as in the run. From these alone, and the
plan's own rules, each step is foretold (forecast/replay.py), before it is taken. Nothing is fitted to a
step that was measured.

    python benchmarks/grid.py probe|ranks N ...     a part; results are added to benchmarks/results/grid.json
    python benchmarks/grid.py score                 median and worst errors of what is there

Step times are medians over steps of the mean over ranks, after steps in which buckets and order settle.
Bytes are the ledger's (DDP's: the counters of the interface). Memory is the peak of the whole process.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from links import Team, keep_freed_memory, launcher_environment, parse_rate
from machine import machine
from network import Network, Worker, gather, remove_stale
from peers import Job, adamw, loss_of
from unisono.forecast.probe import ModelTimes, Probe
from unisono.forecast.replay import Foretold, Passes, System, Tensors, foretell, lanes_of
from unisono.plan import SHARD_BYTES
from unisono.sync.link import BUSY_S, Link

RESULTS = Path(__file__).parent / "results" / "grid.json"
RATES = ("unshaped", "1g", "500m", "100m")
MODELS = {
    "4M": Job(layers=4, hidden=256, vocab=4096, batch=4, sequence=256),
    "8M": Job(layers=6, hidden=320, vocab=4096, batch=4, sequence=256),
}
STRATEGIES = ("exact", "exact-bf16", "ddp", "sharded")
WARM_UP, STEPS = 4, 5
"""Untimed: the first is watched, and memory that was returned meanwhile is taken again."""
console = Console(highlight=False, width=150)


def probe_rank(pipe: Any, job: Job, rank: int, size: int, interface: str, folder: Path, alone: bool) -> None:  # fmt: skip
    """A rank: the whole probe, or the model's pass alone."""
    from unisono.probe.measure import measure
    from unisono.probe.passes import Own, held_bytes, time_model
    from unisono.sync.ledger import Group, Ledger
    from unisono.world import World

    enter(rank, size, interface, folder)
    base = held_bytes("cpu")
    model = job.model()
    batch = job.batches(rank, 0)[0]
    mine = Own(
        model, lambda: loss_of(model, batch, "sum"), adamw(model.parameters()), "grid", job.batch,
        job.sequence, "fp32", False, base,
    )  # fmt: skip
    votes = Group("probe", Ledger(), 100)
    if alone:
        pipe.send(("ok", time_model(mine, votes, "cpu").model_dump()))
    else:
        world = World(rank=rank, size=size, threads=1)
        pipe.send(("ok", measure(mine, None, world, votes, lambda what: None).model_dump()))


def enter(rank: int, size: int, interface: str, folder: Path) -> None:
    import os

    keep_freed_memory()
    os.environ.update(launcher_environment(rank, size, interface))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=100)
    )


def ask(network: Network, job: Job, alone: bool) -> dict[str, Any]:
    """What rank 0 of a probe says; all ranks' is the same."""
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        workers: list[Worker] = [
            network.start(
                k, f"probe, rank {k}", probe_rank, job, k, network.hosts, network.interface,
                Path(folder), alone,
            )
            for k in range(network.hosts)
        ]  # fmt: skip
        try:
            return gather(workers, 200)[0]
        finally:
            network.drop(workers)


# --- the forecast


def tensors_of(job: Job) -> Tensors:
    """As sync/ cuts the model: its tensors in the order of the forward pass, blocks, the tied table."""
    model = job.model()
    table = model.get_input_embeddings().weight
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    sizes = [p.numel() for p in model.parameters() if p is not table]
    return Tensors(tuple(sizes), tuple(blocks), table.numel(), tied=True)


def looked_up(job: Job, ranks: int, steps: Sequence[int]) -> list[int]:
    """Rows of the table that the rank with most of them looks up, by step: a function of the data."""
    return [
        max(len(torch.unique(job.batches(rank, step)[0][0])) for rank in range(ranks))
        for step in steps
    ]


def decided(
    strategy: str, job: Job, probe: Probe, alone: ModelTimes, ranks: int
) -> tuple[System, int, float, str]:
    """(system, bytes of a value on the wire, bytes of a bucket, name for peers.py): the plan's rules."""
    values = sum(p.numel() for p in job.model().parameters())
    fit = next(f for f in probe.links if f.collective == "all_to_all")
    stream = next(s for s in probe.sharing if s.collective == "all_to_all")
    link = Link(fit.latency_s, stream.bytes_per_s, BUSY_S)
    bucket_mb = link.bucket_mb(4 * values)
    if strategy == "ddp":
        return "ddp", 4, 0.0, "ddp"
    if strategy == "sharded":
        return "sharded", 4, 0.0, "sharded"
    if strategy == "exact-bf16":
        return "shards", 2, bucket_mb * 2**20, f"exact-bf16@{bucket_mb}"
    compute_s = alone.forward_s + alone.backward_s
    if 4 * values < SHARD_BYTES or link.hides_whole(4 * values, ranks, compute_s):
        return "whole", 4, bucket_mb * 2**20, f"exact-whole@{bucket_mb}"
    return "shards", 4, bucket_mb * 2**20, f"exact-shards@{bucket_mb}"


def foretold(
    strategy: str, job: Job, probe: Probe, alone: ModelTimes, ranks: int, cores: int
) -> tuple[Foretold, str]:
    """Before any step; and the name of the system in peers.py."""
    system, wire, bucket, name = decided(strategy, job, probe, alone, ranks)
    passes = Passes(
        alone.forward_s,
        alone.backward_s,
        alone.optimizer_s,
        1,
        alone.waiting_s,
        alone.pack_s,
        alone.pack_narrow_s,
    )
    lanes = lanes_of(probe, ranks, max(1.0, ranks / cores))
    rows = statistics.mean(looked_up(job, ranks, range(WARM_UP - 1, WARM_UP + STEPS)))
    found = foretell(
        system, tensors_of(job), passes, lanes, ranks, wire_bytes=wire, bucket_bytes=bucket,
        rows=rows, width=job.hidden,
    )  # fmt: skip
    return found, name


# --- the measurement


def measure(network: Network, job: Job, name: str) -> dict[str, Any]:
    """A system's steps in full swing."""
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        team = Team(name, job, network, Path(folder))
        try:
            team.ask(200, "steps", WARM_UP - 1, 0)
            before = network.counters()
            answers = team.ask(200, "steps", 1, STEPS)
            time.sleep(0.02)  # the last acknowledgements
            after = network.counters()
        finally:
            team.close()
    by_step = [statistics.mean(s) for s in zip(*(a["step_s"] for a in answers), strict=True)]
    wire = statistics.mean((b[0] - a[0]) / (STEPS + 1) for a, b in zip(before, after, strict=True))
    counted = answers[0]["counted_bytes"]
    return {
        "step_s": statistics.median(by_step),
        "step_s_each": by_step,
        "sent_bytes": wire if counted is None else counted / (STEPS + 1),
        "interface_bytes": wire,
        "peak_bytes": max(a["peak_bytes"] for a in answers),
        "base_bytes": max(a["base_bytes"] for a in answers),
    }


def run(ranks: int, rates: Sequence[str], models: Sequence[str], strategies: Sequence[str], known: dict) -> None:  # fmt: skip
    """Probe where there is no probe yet, foretell, then measure; rows replace older ones."""
    remove_stale()
    for rate in rates if ranks > 1 else rates[:1]:
        for model in models:
            job = MODELS[model]
            if rate not in known["probes"]:
                with Network(2) as network:
                    network.shape(parse_rate(rate))
                    known["probes"][rate] = ask(network, MODELS["4M"], alone=False)
                save(known)
            probe = Probe(**known["probes"][rate])
            with Network(max(2, ranks)) as network:
                network.hosts = ranks
                network.shape(parse_rate(rate))
                alone = ModelTimes(**ask(network, job, alone=True))
                for strategy in strategies if ranks > 1 else ["exact"]:
                    one(network, rate, model, strategy, ranks, probe, alone, known)
            save(known)


def one(
    network: Network, rate: str, model: str, strategy: str, ranks: int, probe: Probe, alone: ModelTimes, known: dict
) -> None:  # fmt: skip
    job = MODELS[model]
    forecast, name = foretold(strategy, job, probe, alone, ranks, len(network.cores))
    seen = measure(network, job, name if ranks > 1 else "alone")
    row = {
        "ranks": ranks, "rate": rate if ranks > 1 else "", "model": model, "strategy": strategy,
        "system": name,
        "forecast": {
            "step_s": forecast.total, "compute_s": forecast.compute, "waiting_s": forecast.waiting,
            "communication_s": forecast.communication, "optimizer_s": forecast.optimizer,
            "sent_bytes": forecast.sent_bytes,
        },
        "alone": alone.model_dump(),
        "measured": seen,
        "error": forecast.total / seen["step_s"] - 1,
    }  # fmt: skip
    console.print(
        f"{ranks} ranks {rate:8} {model} {name:18} foretold {forecast.total * 1e3:7.1f} ms "
        f"(compute {forecast.compute * 1e3:.0f}, communication {forecast.communication * 1e3:.0f}), "
        f"measured {seen['step_s'] * 1e3:7.1f} ms: {row['error']:+.1%}; bytes "
        f"{forecast.sent_bytes / max(1, seen['sent_bytes']) - 1:+.3%}"
    )
    same = ("ranks", "rate", "model", "strategy")
    known["rows"] = [r for r in known["rows"] if any(r[k] != row[k] for k in same)] + [row]


def save(known: dict) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", type=int, nargs="*", help="1, 2, 4; none: only score")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"probes": {}, "rows": []}
    known["machine"] = machine()
    for ranks in asked.ranks:
        run(ranks, asked.rates, asked.models, asked.strategies, known)
    save(known)


if __name__ == "__main__":
    main()
