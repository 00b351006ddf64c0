"""How near to the speed of the link does each way of training in step come?

Starts hosts as network namespaces (network.py), one rank pinned to a core of each, and trains one job
(peers.py) under every system: ours, and its peers in their documented best practice. Every system
keeps its ranks for the whole run, asleep while another has its turn; a repeat gives each system one
turn of a few steps at the present rate, so that noise of the machine meets all alike. All figures are
ratios within a repeat, then medians over repeats; a turn's is the median of its steps, of systems that send in
some steps only the mean over whole rounds.

The limit of a step is the larger of compute (the system `alone`: the same loop without communication,
on all hosts at once; the slowest host of each step) and wire (what each rank must send, 2 S (n-1)/n
for S bytes of gradients in the type on the wire, over the nominal rate). Times are of steps in full
swing: each turn begins with an untimed step, and what the last one left on its way is completed after
the clock has stopped. Bytes are those of whole turns, from the counters of the interfaces, every
host's beside what the formula says.

All ranks run with one thread, with glibc told to keep freed memory (large tensors come and go every
step, and the kernel would clear their pages each time), and from one process that has imported torch,
so that start-up is cheap. Ours are started anew at each rate, with some untimed steps to tune in.

    python benchmarks/links.py [--rates 1g 100m] [--systems alone ddp exact] [--json FILE]

As it stands that is four systems at seven rates, about ten minutes; `--systems all` about an hour.
Peers besides PyTorch are skipped where they are not installed. To have them all, in a virtual
environment of their own beside unisono:

    pip install torch==2.13.0 && pip install -e . accelerate lightning-fabric deepspeed matplotlib
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from machine import machine
from network import Failed, Network, Worker, gather, remove_stale
from peers import GROUPS, Job, System, digest, make_system, quiet_loggers

HERE = Path(__file__).parent
RATES = ("unshaped", "10g", "2.5g", "1g", "500m", "200m", "100m")
DEFAULT_SYSTEMS = ("alone", "ddp", "exact", "exact-bf16")
SAME_STEPS = 3
"""Taken by every system from equal weights before anything is timed; then weights are compared."""
TURN_S = 10.0
"""Slow links take fewer steps, so that the wire of a turn takes no longer, but two at least."""
SET_UP_TIMEOUT_S = 240.0
REPORT_TIMEOUT_S = 120.0
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


# A rank: everything below until `Team` runs in the process of a host.


def serve(
    pipe: Any, name: str, job: Job, rank: int, size: int, interface: str, folder: Path
) -> None:
    """Set a system up, then do what the pipe says until it closes: take steps, show the weights."""
    log = (folder / f"{name}-{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    keep_freed_memory()
    quiet_loggers()
    os.environ.update(launcher_environment(rank, size, interface))
    torch.set_num_threads(1)
    system = make_system(name)
    if system.replicates:
        store = dist.FileStore(str(folder / f"{name}.store"), size)
        timeout = timedelta(seconds=REPORT_TIMEOUT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    base_bytes = status_bytes("VmRSS")
    model = job.model()
    values = sum(p.numel() for p in model.parameters())
    system.set_up(model, job)
    formula = system.formula_bytes(values, size)
    resettable = reset_peak()
    pipe.send(("ok", {"formula_bytes": formula, "wire_value_bytes": system.wire_value_bytes}))
    taken = 0
    while True:
        verb, *arguments = pipe.recv()
        if verb == "steps":
            warm_up, steps = arguments
            answer = take_turn(system, job, rank, taken, warm_up, steps)
            taken += warm_up + steps
            peak = status_bytes("VmHWM") if resettable else 0
            answer["peak_bytes"] = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            answer["base_bytes"] = base_bytes
        else:
            (path,) = arguments
            weights = dict(system.weights())
            answer = {"digest": digest(weights), "optimizer_bytes": optimizer_bytes()}
            if rank == 0 and path is not None:
                np.savez(path, **{k: v.numpy() for k, v in weights.items()})
            del weights
        ctypes.CDLL(None).malloc_trim(0)  # many systems sleep on this machine at once
        pipe.send(("ok", answer))


def optimizer_bytes() -> int:
    """Of the state of every torch optimizer in this process, of DTensors the part that is here."""
    seen: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, torch.optim.Optimizer):
            for state in found.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor) and value.dim():
                        local = getattr(value, "to_local", lambda value=value: value)()
                        storage = local.untyped_storage()
                        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def take_turn(
    system: System, job: Job, rank: int, taken: int, warm_up: int, steps: int
) -> dict[str, Any]:
    """Collective: `warm_up` untimed steps, then timed ones, then everything on its way completed."""
    batches = [job.batches(rank, taken + k) for k in range(warm_up + steps)]
    counted = system.counted_bytes()
    marks = []
    for k, batch in enumerate(batches):
        if k >= warm_up:
            marks.append(time.perf_counter())
        system.step(batch)
    marks.append(time.perf_counter())
    system.drain()
    after = system.counted_bytes()
    return {
        "step_s": [b - a for a, b in itertools.pairwise(marks)],
        "counted_bytes": None if counted is None or after is None else after - counted,
    }


def launcher_environment(rank: int, size: int, interface: str) -> dict[str, str]:
    """What torchrun would set on hosts of one rank each, which accelerate and others ask for."""
    return {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": interface,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",  # asked for, never used: the ranks meet through a file
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "links",
    }


def keep_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)


def reset_peak() -> bool:
    """Count the peak of memory from here on; False where the kernel does not allow it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


# The bench: everything below runs in the one process that starts the ranks.


class Team:
    """The ranks of one system, one a host. Every method raises Failed when one does not answer.

    Between questions the ranks are stopped: gloo's threads would look about a hundred times a second
    (0.15% of a core for each rank).
    """

    def __init__(self, name: str, job: Job, network: Network, folder: Path) -> None:
        """Start the ranks and set the system up."""
        self.name, self.network = name, network
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        self.workers: list[Worker] = []
        try:
            for rank in range(network.hosts):
                arguments = (name, job, rank, network.hosts, network.interface, self.folder)
                worker = network.start(rank, f"rank {rank} of {name}", serve, *arguments)
                self.workers.append(worker)
            self.about = gather(self.workers, SET_UP_TIMEOUT_S)[0]
            self.signal(signal.SIGSTOP)
        except BaseException as error:
            self.close()
            if isinstance(error, Failed):
                raise Failed(self.explained(error)) from error
            raise

    def ask(self, timeout_s: float, *message: Any) -> list[dict[str, Any]]:
        self.signal(signal.SIGCONT)
        for worker in self.workers:
            with contextlib.suppress(BrokenPipeError):  # `gather` says of whom
                worker.pipe.send(message)
        try:
            answers = gather(self.workers, timeout_s)
        except Failed as error:
            raise Failed(self.explained(error)) from error
        self.signal(signal.SIGSTOP)
        return answers

    def signal(self, number: int) -> None:
        for worker in self.workers:
            if worker.process.is_alive():  # not yet waited for, so that the id is still its own
                os.kill(worker.process.pid, number)

    def explained(self, error: Failed) -> str:
        """With the last line that a rank wrote, if it died without a word."""
        lines = [
            line
            for path in sorted(self.folder.glob("*.log"))
            for line in path.read_text(errors="replace").splitlines()[-1:]
        ]
        silent = "died" not in str(error) or not lines
        return str(error) if silent else f"{error}; last words: {' | '.join(lines)}"

    def close(self) -> None:
        self.network.drop(self.workers)
        self.workers = []


@dataclass
class Turn:
    """What one system did in one repeat at one rate."""

    step_ms: list[float]
    """Of each step: the mean over ranks; for `alone` the slowest rank, which others would wait for."""
    step_ms_by_rank: list[list[float]]
    sent_bytes: list[float]
    """A step, by the counter of each host's interface."""
    received_bytes: list[float]
    counted_bytes: float | None
    """A step, as the system itself says."""
    busy_otherwise: float
    """Share of this machine's time that went to processes which are not of this turn."""
    rounds: bool = False
    """Steps are not alike: they send in some of a round only, so that their mean counts."""

    @property
    def typical_ms(self) -> float:
        return (statistics.mean if self.rounds else statistics.median)(self.step_ms)


@dataclass
class Standing:
    """What is known of one system over the whole run."""

    status: str = "runs"
    reason: str | None = None
    wire_value_bytes: float = 4
    formula_bytes: float = 0.0
    peak_bytes: list[int] = field(default_factory=list)
    """By rank, after set-up; `base_bytes` of it are the interpreter and imports."""
    base_bytes: list[int] = field(default_factory=list)
    optimizer_bytes: list[int] = field(default_factory=list)
    """By rank: the state of all torch optimizers in the process."""
    replicas_equal: bool | None = None
    farthest_from_ddp: float | None = None
    """After SAME_STEPS steps: over all weights, the largest difference over the largest value."""

    def note(self, answers: list[dict[str, Any]]) -> None:
        for key in ("peak_bytes", "base_bytes"):
            before = getattr(self, key) or [0] * len(answers)
            setattr(self, key, [max(b, a[key]) for b, a in zip(before, answers, strict=True)])


class Bench:
    """The systems of one run on one network, and what has been found of them."""

    def __init__(self, job: Job, network: Network, folder: Path, tuning_steps: int) -> None:
        self.job, self.network, self.folder = job, network, folder
        self.tuning_steps = tuning_steps
        self.parameters = sum(p.numel() for p in job.model().parameters())
        self.teams: dict[str, Team] = {}
        self.standings: dict[str, Standing] = {}

    def start(self, names: Sequence[str]) -> None:
        """Start all systems and let each take the same steps; those that cannot are left out."""
        for name in names:
            standing = self.standings[name] = Standing()
            began = time.perf_counter()
            try:
                team = self.teams[name] = Team(name, self.job, self.network, self.folder)
                standing.wire_value_bytes = team.about["wire_value_bytes"]
                standing.formula_bytes = team.about["formula_bytes"]
                standing.note(team.ask(SET_UP_TIMEOUT_S, "steps", 0, SAME_STEPS))
                if make_system(name).replicates:
                    self.look_at_weights(name, save=True)
            except Failed as error:
                ours = name.partition("@")[0] in ("alone", "ddp") or is_ours(name)
                self.lose(name, "failed" if ours else "skipped", str(error))
                continue
            console.print(f"  {name}: ready in {time.perf_counter() - began:.1f} s")
        for name in self.teams:
            self.standings[name].farthest_from_ddp = self.distance_from_ddp(name)

    def lose(self, name: str, status: str, reason: str) -> None:
        self.standings[name].status, self.standings[name].reason = status, reason
        console.print(f"  {name}: {status}: {reason}", markup=False, soft_wrap=True)
        if name in self.teams:
            self.teams.pop(name).close()

    def look_at_weights(self, name: str, save: bool = False) -> None:
        path = self.folder / f"{name}.npz" if save else None
        answers = self.teams[name].ask(REPORT_TIMEOUT_S, "weights", path)
        equal = len({a["digest"] for a in answers}) == 1
        self.standings[name].optimizer_bytes = [a["optimizer_bytes"] for a in answers]
        self.standings[name].replicas_equal = equal and self.standings[name].replicas_equal in (None, True)  # fmt: skip

    def distance_from_ddp(self, name: str) -> float | None:
        mine, theirs = (self.folder / f"{n}.npz" for n in (name, "ddp"))
        if not mine.exists() or not theirs.exists():
            return None
        with np.load(mine) as a, np.load(theirs) as b:
            return max(float(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max()) for k in b.files)

    def tune_in(self, timeout_s: float) -> None:
        """Start those anew that measure the link when they start."""
        for name in list(self.teams):
            if not make_system(name).again_at_each_rate:
                continue
            self.teams.pop(name).close()
            try:
                self.teams[name] = Team(name, self.job, self.network, self.folder)
                self.teams[name].ask(timeout_s, "steps", self.tuning_steps, 0)
            except Failed as error:
                self.lose(name, "failed", str(error))

    def turn(self, name: str, steps: int, timeout_s: float) -> Turn | None:
        """One system's turn; None when it fails, which ends it for this run."""
        warm_up, one_round = 1, make_system(name).round_steps
        steps = -(-steps // one_round) * one_round
        before = self.network.counters()
        pids = [w.process.pid for w in self.teams[name].workers]
        began, busy_before = time.perf_counter(), busy_s() - cpu_s(pids)
        try:
            answers = self.teams[name].ask(timeout_s, "steps", warm_up, steps)
        except Failed as error:
            self.lose(name, "failed", str(error))
            return None
        busy_otherwise = busy_s() - cpu_s(pids) - busy_before
        wall_s = time.perf_counter() - began
        time.sleep(0.02)  # the last acknowledgements
        after = self.network.counters()
        self.standings[name].note(answers)
        by_rank = [[1e3 * s for s in a["step_s"]] for a in answers]
        combine = statistics.mean if make_system(name).replicates else max
        counted = answers[0]["counted_bytes"]
        return Turn(
            step_ms=[combine(together) for together in zip(*by_rank, strict=True)],
            step_ms_by_rank=by_rank,
            sent_bytes=[(b[0] - a[0]) / (warm_up + steps) for a, b in zip(before, after)],
            received_bytes=[(b[1] - a[1]) / (warm_up + steps) for a, b in zip(before, after)],
            counted_bytes=None if counted is None else counted / (warm_up + steps),
            busy_otherwise=busy_otherwise / (wall_s * (os.cpu_count() or 1)),
            rounds=one_round > 1,
        )


TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """CPU time of all processes on this machine since it started; not that of interrupts."""
    user, nice, system, _, _, _, _, steal, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]  # fmt: skip
    return sum(map(int, (user, nice, system, steal))) / TICKS_PER_S


def cpu_s(pids: Sequence[int | None]) -> float:
    fields = (Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in pids)
    return sum(int(f[11]) + int(f[12]) for f in fields) / TICKS_PER_S


def is_ours(name: str) -> bool:
    return make_system(name).again_at_each_rate


def run_rate(bench: Bench, label: str, rate: float | None, repeats: int, steps: int) -> dict:
    """All repeats at one rate; the table is printed, what it says returned."""
    bench.network.shape(rate)
    measured = bench.network.measure_tcp()
    # What any system must send, by the size of a value: a reduce-scatter and an all-gather.
    others = (bench.network.hosts - 1) / bench.network.hosts
    wire_s = {s: 8 * 2 * s * bench.parameters * others / rate if rate else 0.0 for s in (4, 2)}
    steps = max(2, min(steps, int(TURN_S / wire_s[4]))) if wire_s[4] else steps
    timeout_s = SET_UP_TIMEOUT_S + 20 * (steps + 1 + bench.tuning_steps) * wire_s[4]
    bench.tune_in(timeout_s)
    turns: dict[str, list[Turn]] = {name: [] for name in bench.teams}
    for repeat in range(repeats):
        order = list(bench.teams)
        for name in order if repeat % 2 == 0 else order[::-1]:
            done = bench.turn(name, steps, timeout_s)
            if done is not None:
                turns[name].append(done)
        shown = (f"{n} {turns[n][-1].typical_ms:.0f}" for n in bench.teams)
        console.print(
            f"{label}, repeat {repeat + 1}, {steps} steps, ms:", ", ".join(shown), soft_wrap=True
        )
    turns = {name: turns[name] for name in bench.teams}  # those that went through all repeats
    found = summarise(bench, turns, wire_s)
    found = {
        "rate": label,
        "bits_per_s": rate,
        "measured_tcp_bits_per_s": measured,
        "wire_ms": {"float32": 1e3 * wire_s[4], "2 bytes": 1e3 * wire_s[2]},
        **found,
    }
    show_rate(found)
    return found


def summarise(bench: Bench, turns: dict[str, list[Turn]], wire_s: dict[int, float]) -> dict:
    """Ratios within each repeat, medians over them."""
    ms = {name: [t.typical_ms for t in done] for name, done in turns.items()}
    medians = {name: statistics.median(values) for name, values in ms.items()}
    sweep = [n for n in ms if n == "ddp" or n.startswith("ddp@")]
    best_ddp = min(sweep, key=medians.__getitem__, default=None)
    peers = [n for n in ms if n != "alone" and not is_ours(n) and bench.standings[n].wire_value_bytes == 4]  # fmt: skip
    best_peer = min(peers, key=medians.__getitem__, default=None)
    systems = {}
    for name, done in turns.items():
        standing = bench.standings[name]
        on_wire_ms = 1e3 * wire_s[4] * standing.wire_value_bytes / 4
        limits = [max(c, on_wire_ms) for c in ms.get("alone", [])]
        # `alone` sends nothing: it is its own limit.
        limits = ms["alone"] if name == "alone" else limits
        sent = statistics.median(statistics.mean(t.sent_bytes) for t in done)
        counted = [t.counted_bytes for t in done]
        ratios = {other: within(ms[name], ms[other]) for other in ms if other != name}
        if len(sweep) > 1 and best_ddp is not None and name != best_ddp:
            ratios["ddp-best"] = ratios[best_ddp]
        systems[name] = {
            "step_ms": medians[name],
            "limit_ms": statistics.median(limits) if limits else None,
            "ratio_to_limit": within(ms[name], limits) if limits else None,
            "ratio_to": ratios,
            "sent_bytes_per_step": sent,
            "formula_bytes_per_step": standing.formula_bytes,
            "sent_over_formula": sent / standing.formula_bytes if standing.formula_bytes else None,
            # Ours count what they hand to each collective, rows of embeddings included.
            "sent_over_counted": sent / counted[0] if counted and counted[0] else None,
            "step_ms_of_repeats": ms[name],
            "turns": [asdict(t) for t in done],
        }
    return {
        "compute_ms": medians.get("alone"),
        "best_ddp": best_ddp,
        "best_float32_peer": best_peer,
        "systems": systems,
    }


def within(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def show_rate(found: dict) -> None:
    gbps = [b / 1e9 for b in found["measured_tcp_bits_per_s"]]
    nominal = f" of {found['bits_per_s'] / 1e9:g}" if found["bits_per_s"] else ""
    facts = [f"TCP {min(gbps):.3g}{nominal} Gbit/s each way"]
    if found["compute_ms"]:
        facts.append(f"compute {found['compute_ms']:.0f} ms")
    if found["bits_per_s"]:
        facts.append(f"wire {found['wire_ms']['float32']:.0f} ms")
    if not found["systems"]:
        console.print("no system runs")
        return
    turns = [t for row in found["systems"].values() for t in row["turns"]]
    facts.append(f"busy otherwise {100 * max(t['busy_otherwise'] for t in turns):.0f}% at most")
    best = {"/ best ddp": found["best_ddp"], "/ best peer": found["best_float32_peer"]}
    facts += [f"{title.removeprefix('/ ')}: {name}" for title, name in best.items() if name]
    table = Table(title=f"{found['rate']}: {', '.join(facts)}", title_justify="left")
    table.add_column("system", no_wrap=True)
    for title in (
        "step ms",
        "spread",
        "/ limit",
        "/ ddp",
        *best,
        "MB sent",
        "/ formula",
        "/ counted",
    ):
        table.add_column(title, justify="right", no_wrap=True)

    def text(value: float | None, form: str = ".3f") -> str:
        return "" if value is None else format(value, form)

    for name, row in found["systems"].items():
        repeats = row["step_ms_of_repeats"]
        ratio = row["ratio_to"] | {name: 1.0}
        table.add_row(
            name,
            text(row["step_ms"], ".1f"),
            f"{100 * (max(repeats) - min(repeats)) / row['step_ms']:.0f}%",
            text(row["ratio_to_limit"]),
            text(ratio.get("ddp")),
            *(text(ratio.get(other)) if other else "" for other in best.values()),
            text(row["sent_bytes_per_step"] / 1e6, ".2f"),
            text(row["sent_over_formula"]),
            text(row["sent_over_counted"]),
        )
    console.print(table)


def show_standings(standings: dict[str, Standing]) -> None:
    table = Table(title="Systems", title_justify="left")
    for title in ("system", "peak MB by rank", "optimizer MB", "replicas equal", "from ddp"):
        table.add_column(title, no_wrap=True)
    for name, s in standings.items():
        if s.status == "runs":
            table.add_row(
                name,
                " ".join(f"{p / 1e6:.0f}" for p in s.peak_bytes),
                " ".join(f"{b / 1e6:.1f}" for b in s.optimizer_bytes),
                "" if s.replicas_equal is None else "yes" if s.replicas_equal else "[red]NO[/red]",
                "" if s.farthest_from_ddp is None else f"{s.farthest_from_ddp:.1e}",
            )
    console.print(table)
    for name, s in standings.items():
        if s.reason:
            console.print(f"{name}: {s.status}: {s.reason}", markup=False, soft_wrap=True)


def plot(result: dict, path: Path) -> None:
    """Ratio to the limit by rate, a line for each system."""
    try:
        import matplotlib
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(result["rates"], key=lambda r: r["bits_per_s"] or float("inf"))
    if not rows or "alone" not in rows[0]["systems"]:
        console.print("no plot: the limit needs the system `alone`")
        return
    fastest = max((r["bits_per_s"] or 0 for r in rows), default=0) or 1e9
    xs = [r["bits_per_s"] or 4 * fastest for r in rows]
    names = [n for n in rows[0]["systems"] if n != "alone" and not n.startswith("ddp@")]
    lines = {n: [r["systems"].get(n, {}).get("ratio_to_limit") for r in rows] for n in names}
    if any(n.startswith("ddp@") for n in rows[0]["systems"]):
        lines["ddp, best bucket"] = [r["systems"][r["best_ddp"]]["ratio_to_limit"] for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    ours = [n for n in names if is_ours(n)]
    strong = iter(("#0b6e4f", "#c8553d", "#6a4c93", "#1d70a2", "#8f6400"))
    soft = iter(("#333333", "#8c8c8c", "#b8b8b8", "#9bb8d3", "#c9b48f", "#b5c7a3", "#d3a6b4", "#b3a7cf"))  # fmt: skip
    for name, ys in lines.items():
        mine = name in ours
        values = [float("nan") if y is None else y for y in ys]
        axes.plot(
            xs,
            values,
            label=name,
            color=next(strong, "black") if mine else next(soft, "gray"),
            linewidth=2.4 if mine else 1.5,
            marker="o" if mine else ".",
            zorder=3 if mine else 2,
        )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xscale("log")
    labels = [rate_text(r["bits_per_s"]) if r["bits_per_s"] else r["rate"] for r in rows]
    axes.set_xticks(xs, [label.replace(" ", "\n") for label in labels])
    axes.minorticks_off()
    axes.set_ylim(bottom=min(0.95, axes.get_ylim()[0]))
    axes.margins(x=0.06)
    axes.set_xlabel("link, each way")
    axes.set_ylabel("step time / max(compute, wire)")
    axes.set_title(
        f"{result['network']['hosts']} hosts, {result['job']['parameters'] / 1e6:.1f} M parameters, "
        "one core each",
        loc="left",
        fontsize=11,
    )
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def rate_text(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e9:g} Gbit/s" if bits_per_s >= 1e9 else f"{bits_per_s / 1e6:g} Mbit/s"


def parse_rate(text: str) -> float | None:
    """Bits per second; None: unshaped."""
    if text == "unshaped":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([gmk])(?:bit)?", text.lower())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: write unshaped, 2.5g or 100m")
    return float(found[1]) * {"g": 1e9, "m": 1e6, "k": 1e3}[found[2]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Systems by default: {' '.join(DEFAULT_SYSTEMS)}. Groups: "
        + "; ".join(f"{k}: {' '.join(v)}" for k, v in GROUPS.items()),
    )
    parser.add_argument("--rates", nargs="+", default=list(RATES), metavar="RATE")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=list(DEFAULT_SYSTEMS), metavar="NAME[@MB]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn, at most")
    parser.add_argument("--tuning-steps", type=int, default=4, help="untimed, ours, at each rate")
    for name, default in asdict(Job()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mtu", type=int, default=9000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="what FILE has of other rates")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    try:
        args.bits = [parse_rate(r) for r in args.rates]
        names = [n for given in args.systems for n in GROUPS.get(given, [given])]
        args.systems = list(dict.fromkeys(names))
        for name in args.systems:
            make_system(name)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    if args.hosts < 2 or min(args.repeats, args.steps) < 1:
        parser.error("--hosts: at least 2; --repeats and --steps: at least 1")
    return args


def stop(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    args = parse()
    torch.set_num_threads(1)  # before any work: ranks are forked from here
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    remove_stale()
    job = Job(**{name: getattr(args, name) for name in asdict(Job())})
    about = machine()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}"
    )
    result: dict[str, Any] = {"machine": about, "rates": []}
    with (
        tempfile.TemporaryDirectory(prefix="links-") as folder,
        Network(args.hosts, args.mtu) as network,
    ):
        rates = list(zip(args.rates, args.bits))
        if network.why_unshaped:
            console.print(f"unshaped only: {network.why_unshaped}", markup=False)
            rates = [("unshaped", None)]
        crowded = args.hosts > len(network.cores)
        if crowded:
            console.print("more hosts than cores: times say nothing, bytes and weights do")
        result["network"] = {
            "hosts": args.hosts,
            "interface": network.interface,
            "mtu": args.mtu,
            "congestion_control": network.congestion_control,
            "why_unshaped": network.why_unshaped,
            "times_are_meaningful": not crowded,
        }
        bench = Bench(job, network, Path(folder), args.tuning_steps)
        result["job"] = {**asdict(job), "parameters": bench.parameters}

        measured: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        if args.keep and args.json and args.json.exists():
            before = json.loads(args.json.read_text())
            same = ("job", "network")
            if any(before[key] != result[key] for key in same):
                raise SystemExit(f"--keep: {args.json} is of another job or network")
            kept = [r for r in before["rates"] if r["rate"] not in args.rates]

        def save() -> None:
            result["rates"] = sorted(kept + measured, key=lambda r: -(r["bits_per_s"] or math.inf))
            result["systems"] = {n: asdict(s) for n, s in bench.standings.items()}
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")

        bench.start(args.systems)
        for label, rate in rates:
            measured.append(run_rate(bench, label, rate, args.repeats, args.steps))
            save()
        network.shape(None)
        for name in list(bench.teams):
            if make_system(name).replicates:
                try:
                    bench.look_at_weights(name)
                except Failed as error:
                    bench.lose(name, "failed", str(error))
        save()
        show_standings(bench.standings)
    if args.plot:
        plot(result, args.plot)
    wrong = [n for n, s in bench.standings.items() if s.status == "failed" or s.replicas_equal is False]  # fmt: skip
    if wrong:
        console.print(f"failed, or replicas not equal: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
