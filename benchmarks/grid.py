"""Forecast beside measurement on our own grid: ranks x links x strategies x model sizes.

Hosts are network namespaces with a core each (network.py); four ranks are two on each core. For every
link ONE probe at two ranks measures the link and what it takes from the compute; the model's pass is
timed without any communication, with as many ranks on a core as in the run; FSDP2's own cost is the
difference that it makes to one rank, which sends nothing. From these alone, and the
plan's own rules, each step is foretold (forecast/replay.py), before it is taken. Nothing is fitted to a
step that was measured.

    python benchmarks/grid.py 1 2 4 [--rates 1g ...]   what is missing in benchmarks/results/grid.json
    python benchmarks/grid.py                          only score what is there, with the code as it is
    python benchmarks/grid.py --csv FILE               the same rows for benchmarks/forecast.py --runs

Step times are medians over steps of the mean over ranks, after steps in which buckets and order settle.
Bytes are the ledger's (DDP's: the counters of the interface). Memory is the peak of the whole process.
"""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from links import (
    Team,
    busy_s,
    cpu_s,
    keep_freed_memory,
    launcher_environment,
    parse_rate,
    stop,
)
from machine import machine
from network import Failed, Network, Worker, gather, remove_stale
from peers import Job, adamw, loss_of
from unisono.forecast.probe import ModelTimes, Probe
from unisono.forecast.replay import Foretold, Passes, System, Tensors, foretell, lanes_of
from unisono.plan import SHARD_BYTES
from unisono.sync.link import BUSY_S, NARROW_BUSY_S, Link
from unisono.sync.zero import TABLE_SHARE

RESULTS = Path(__file__).parent / "results" / "grid.json"
RATES = ("unshaped", "1g", "500m", "100m")
MODELS = {
    "4M": Job(layers=4, hidden=256, vocab=4096, batch=4, sequence=256),
    "8M": Job(layers=6, hidden=320, vocab=4096, batch=4, sequence=256),
}
STRATEGIES = ("exact", "exact-bf16", "ddp", "sharded")
DISTURBED = 0.03
"""Share of this machine's time that goes to other programs; 1.5% are always there."""
WARM_UP, STEPS = 3, 5
"""Untimed: the first is watched, and memory that was returned meanwhile is taken again."""


@dataclass(frozen=True)
class Combination:
    """A row of the grid."""

    ranks: int
    rate: str
    """Of the link; one rank has none."""
    model: str
    strategy: str


SAME = ("ranks", "rate", "model", "strategy")


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
    keep_freed_memory()
    os.environ.update(launcher_environment(rank, size, interface))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=100)
    )


def ask(network: Network, job: Job, alone: bool) -> dict[str, Any]:
    """What rank 0 of a probe says; all ranks' is the same. Up to three times where it is disturbed."""
    found: list[tuple[float, dict[str, Any]]] = []
    while not found or (found[-1][0] > DISTURBED and len(found) < 3):
        found.append(one_probe(network, job, alone))
    return min(found, key=lambda f: f[0])[1]


def one_probe(network: Network, job: Job, alone: bool) -> tuple[float, dict[str, Any]]:
    """(share of the machine that other programs took, what was found)."""
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        workers: list[Worker] = [
            network.start(
                k, f"probe, rank {k}", probe_rank, job, k, network.hosts, network.interface,
                Path(folder), alone,
            )
            for k in range(network.hosts)
        ]  # fmt: skip
        pids = [w.process.pid for w in workers]
        began, busy = time.perf_counter(), busy_s() - cpu_s(pids)
        try:
            found = gather(workers, 200)[0]
            busy = busy_s() - cpu_s(pids) - busy
        finally:
            network.drop(workers)
    return busy / (time.perf_counter() - began) / (os.cpu_count() or 1), found


# --- the forecast


def tensors_of(job: Job, rows_of: int = 1) -> Tensors:
    """As sync/ cuts the model: its tensors in the order of the forward pass, blocks, the tied table.

    `rows_of`: ranks that share each tensor's rows, to whose multiples `sharded` fills them up.
    """
    model = job.model()
    table = model.get_input_embeddings().weight

    def values(p: torch.Tensor) -> int:
        return math.ceil(len(p) / rows_of) * rows_of * (p.numel() // len(p))

    blocks = [sum(values(p) for p in layer.parameters()) for layer in model.model.layers]
    sizes = [values(p) for p in model.parameters() if p is not table]
    return Tensors(tuple(sizes), tuple(blocks), values(table), tied=True)


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
    bucket_mb = link.bucket_mb(4 * values, 2 if strategy == "exact-bf16" else 4)
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
    strategy: str,
    job: Job,
    probe: Probe,
    alone: ModelTimes,
    ranks: int,
    cores: int,
    fsdp_s: float,
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
        fsdp_s * max(1.0, ranks / cores),
    )
    lanes = lanes_of(probe, ranks, max(1.0, ranks / cores))
    tensors = tensors_of(job, ranks if system == "sharded" else 1)
    most = max(looked_up(job, ranks, [0]))
    if system == "shards" and most * (ranks - 1) > TABLE_SHARE * job.vocab:
        # Too many rows for them to travel by themselves (sync/zero.py): a weight as any other.
        tensors = replace(tensors, sizes=(tensors.table, *tensors.sizes), table=0)
    rows = statistics.mean(looked_up(job, ranks, range(WARM_UP - 1, WARM_UP + STEPS)))
    found = foretell(
        system, tensors, passes, lanes, ranks, wire_bytes=wire, bucket_bytes=bucket,
        rows=rows, width=job.hidden, bucket_s=NARROW_BUSY_S,
    )  # fmt: skip
    return found, name


def memory_foretold(system: System, tensors: Tensors, alone: ModelTimes, ranks: int) -> float:
    """Bytes of the whole process at its peak: the plain loop's, with another place for the state.

    Buckets hold the gradients from step to step, also in the first step of `shards`.
    """
    size, n = 4 * tensors.total, ranks
    if n == 1:
        return alone.peak_memory_bytes
    if system in ("ddp", "whole"):
        received = size if system == "whole" and n > 2 else 0
        return alone.peak_memory_bytes + size + received
    if system == "shards":
        own = (tensors.table + sum(tensors.sizes) / n) / tensors.total
        received = size if n > 2 else 0
        return alone.peak_memory_bytes + max(
            size + received - 2 * size, 2 * size * (own - 1) + size
        )
    blocks = 2 * 4 * max(tensors.blocks)
    return alone.peak_memory_bytes - 3 * size * (1 - 1 / n) + 4 * tensors.table + blocks


# --- the measurement


def measure(network: Network, job: Job, name: str) -> dict[str, Any]:
    """A system's steps in full swing; once more where other programs ran beside it."""
    found = one_measurement(network, job, name)
    if found["busy_otherwise"] > DISTURBED:
        again = one_measurement(network, job, name)
        return min(found, again, key=lambda m: m["busy_otherwise"])
    return found


def one_measurement(network: Network, job: Job, name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        team = Team(name, job, network, Path(folder))
        try:
            team.ask(200, "steps", WARM_UP - 1, 0)
            before = network.counters()
            pids = [w.process.pid for w in team.workers]
            began, busy = time.perf_counter(), busy_s() - cpu_s(pids)
            answers = team.ask(200, "steps", 1, STEPS)
            busy = busy_s() - cpu_s(pids) - busy
            wall_s = time.perf_counter() - began
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
        "busy_otherwise": busy / wall_s / (os.cpu_count() or 1),
    }


def run(combinations: Sequence[Combination], known: dict[str, Any], seconds: float) -> None:
    """Measure what is missing, until `seconds` have passed. Each link is probed once, at two ranks."""
    end = time.monotonic() + seconds
    remove_stale()
    have = {tuple(r[k] for k in SAME) for r in known["rows"]}
    alone: dict[tuple[int, str, str], ModelTimes] = {}
    for c in combinations:
        rate = c.rate or RATES[0]
        if (c.ranks, c.rate, c.model, c.strategy) in have:
            continue
        if time.monotonic() > end:
            print("time is over; the same command again goes on", flush=True)
            return
        if rate not in known["probes"]:
            with Network(2) as network:
                network.shape(parse_rate(rate))
                known["probes"][rate] = ask(network, MODELS["4M"], alone=False)
            save(known)
        if c.model not in known["fsdp"]:
            known["fsdp"][c.model] = fsdp_by_itself(MODELS[c.model])
            save(known)
        with Network(max(2, c.ranks)) as network:
            network.hosts = c.ranks
            network.shape(parse_rate(rate))
            if (c.ranks, c.model, rate) not in alone:
                alone[c.ranks, c.model, rate] = ModelTimes(
                    **ask(network, MODELS[c.model], alone=True)
                )
            one(network, c, Probe(**known["probes"][rate]), alone[c.ranks, c.model, rate], known)
        save(known)


def fsdp_by_itself(job: Job) -> float:
    """Seconds that FSDP2 adds to a step of one rank, which has nothing to send."""
    with Network(2) as network:
        network.hosts = 1
        try:
            sharded, plain = (measure(network, job, name) for name in ("fsdp2-reshard", "alone"))
        except Failed as error:
            print(f"FSDP2 on one rank: {error}", flush=True)
            return 0.0
    return max(0.0, sharded["step_s"] - plain["step_s"])


def one(
    network: Network, c: Combination, probe: Probe, alone: ModelTimes, known: dict[str, Any]
) -> None:
    """Foretell, then measure."""
    row: dict[str, Any] = {
        **asdict(c), "cores": len(network.cores), "alone": alone.model_dump(),
        "probe": c.rate or RATES[0],
    }  # fmt: skip
    row["fsdp_s"] = known["fsdp"].get(c.model, 0.0) if c.strategy == "sharded" else 0.0
    row |= forecast_of(row, probe)
    row["measured"] = measure(network, MODELS[c.model], row["system"] if c.ranks > 1 else "alone")
    show_row(row)
    known["rows"].append(row)


def forecast_of(row: dict[str, Any], probe: Probe) -> dict[str, Any]:
    """From the probe and the pass alone; what was measured is not looked at."""
    job, alone, ranks = MODELS[row["model"]], ModelTimes(**row["alone"]), row["ranks"]
    fsdp_s = row.get("fsdp_s", 0.0)
    found, name = foretold(row["strategy"], job, probe, alone, ranks, row["cores"], fsdp_s)
    system = decided(row["strategy"], job, probe, alone, ranks)[0]
    return {
        "system": name,
        "forecast": {
            "step_s": found.total, "compute_s": found.compute, "waiting_s": found.waiting,
            "communication_s": found.communication, "optimizer_s": found.optimizer,
            "sent_bytes": found.sent_bytes,
            "peak_bytes": memory_foretold(system, tensors_of(job), alone, ranks),
        },
    }  # fmt: skip


def show_row(row: dict[str, Any]) -> None:
    f, m = row["forecast"], row["measured"]
    sent = f["sent_bytes"] / m["sent_bytes"] - 1 if row["ranks"] > 1 else 0.0
    line = (
        f"{row['ranks']} {row['rate']:8} {row['model']} {row['system']:18} foretold {f['step_s'] * 1e3:7.1f} ms "
        f"(compute {f['compute_s'] * 1e3:.0f}, communication {f['communication_s'] * 1e3:.0f}), measured "
        f"{m['step_s'] * 1e3:7.1f}: {f['step_s'] / m['step_s'] - 1:+.1%}; bytes {sent:+.3%}; peak "
        f"{f['peak_bytes'] / m['peak_bytes'] - 1:+.1%}"
    )
    print(line, flush=True)


def score(known: dict[str, Any]) -> dict[str, Any]:
    """Absolute errors over all rows, and by number of ranks."""

    def errors(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
        off = [
            abs(r["forecast"][what] / r["measured"][what] - 1) for r in rows if r["measured"][what]
        ]
        return (
            {"rows": len(off), "median": statistics.median(off), "worst": max(off)} if off else {}
        )

    rows = known["rows"]
    several = [r for r in rows if r["ranks"] > 1]
    ours = [r for r in several if r["system"] != "ddp"]  # DDP's are those of the interface
    return {
        "step_s": errors(rows, "step_s"),
        **{f"step_s, {n} ranks": errors([r for r in rows if r["ranks"] == n], "step_s")
           for n in sorted({r["ranks"] for r in rows})},
        **{f"step_s, {s}": errors([r for r in several if r["strategy"] == s], "step_s")
           for s in STRATEGIES},
        "sent_bytes": errors(ours, "sent_bytes"),
        "sent_bytes, ddp at the interface": errors([r for r in several if r["system"] == "ddp"], "sent_bytes"),
        "peak_bytes": errors(rows, "peak_bytes"),
    }  # fmt: skip


def write_csv(known: dict[str, Any], path: Path) -> None:
    """In the columns of the collection of published runs."""
    with path.open("w", newline="") as file:
        rows = [columns(row) for row in known["rows"]]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def columns(row: dict[str, Any]) -> dict[str, Any]:
    job, n, step_s = MODELS[row["model"]], row["ranks"], row["measured"]["step_s"]
    heads = max(1, job.hidden // 64)
    return {
        "id": f"grid-{n}-{row['rate'] or 'alone'}-{row['model']}-{row['strategy']}",
        "source": "unisono/benchmarks/grid.py", "model": f"llama-{row['model']}",
        "n_layers": job.layers, "hidden": job.hidden, "n_heads": heads, "n_kv_heads": heads,
        "ffn": job.hidden * 31 // 12, "vocab": job.vocab, "seq_len": job.sequence,
        "gpu": "one core of a CPU" if n <= row["cores"] else "half a core", "gpu_count": n,
        "gpus_per_node": 1, "inter_node_link": row["rate"], "precision": "fp32",
        "strategy": "fsdp" if row["strategy"] == "sharded" else row["strategy"].replace("exact", "ddp exact"),
        "dp": n, "micro_batch": job.batch, "global_batch_sequences": job.batch * n,
        "step_time_s": step_s, "tokens_per_s_per_gpu": job.batch * job.sequence / step_s,
        "forecast_step_time_s": row["forecast"]["step_s"],
        "curve_id": f"grid-{row['rate']}-{row['model']}-{row['strategy']}", "domain": "llm",
        "throughput_unit": "", "metric_scope": "steady_state",
    }  # fmt: skip


def save(known: dict) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", type=int, nargs="*", help="1, 2, 4; none: only score")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"probes": {}, "rows": []}
    known.setdefault("fsdp", {})
    if asked.ranks:
        known["machine"] = machine()
    combinations = [
        Combination(ranks, rate if ranks > 1 else "", model, strategy)
        for ranks in asked.ranks
        for model in asked.models
        for rate in (asked.rates if ranks > 1 else [""])
        for strategy in (asked.strategies if ranks > 1 else ["exact"])
    ]
    run(combinations, known, asked.seconds)
    for row in known["rows"]:
        if row["strategy"] == "sharded":
            row["fsdp_s"] = known["fsdp"].get(row["model"], 0.0)
        row |= forecast_of(row, Probe(**known["probes"][row["probe"]]))
        show_row(row)
    known["rows"] = [{**row, "columns": columns(row)} for row in known["rows"]]
    known["score"] = score(known)
    for what, found in known["score"].items():
        if found:
            print(
                f"{what:36} {found['rows']:3} rows  median {found['median']:.1%}  worst {found['worst']:.1%}"
            )
    save(known)
    if asked.csv:
        write_csv(known, asked.csv)


if __name__ == "__main__":
    main()
