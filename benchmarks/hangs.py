"""Is a hang named within five seconds, ten times of ten, and nothing in ten clean runs? At what cost?

Real jobs of three gloo ranks (a small Llama), forked from a server that has imported torch. In each
trial one rank, another one each time, meets a fault at a random step:

- stopped: SIGSTOP. Timed until the line that names it; then it must be in what all others raise.
- parted: it evaluates or saves at a step of its own, or calls a collective more or one less.
- failed: an exception where no vote protects it. Timed until the last of the others has raised it.

Clean runs are late for good reasons, most for longer than LATE_S: preparing, loading, compiling,
checkpoints, evaluation, a call that holds the interpreter, a busy machine, one that sleeps.

The cost is what the thread used of a processor in a run, and a collective's share of the ledger's
and the tape's records, measured alone; and steps with and without the watch, in turns.

    python benchmarks/hangs.py [--trials 10] [--sync quantized streaming ...] [--json FILE]

With `--sync` trials take turns between those strategies.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from machine import machine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from jobs import make_job, write_corpus  # noqa: E402
from ranks import Ranks, run_ranks, started  # noqa: E402

RANKS = 3
FAULTS = {
    "stopped": ["SIGSTOP"],
    "parted": ["evaluates alone", "saves alone", "one more", "one less", "one more alike"],
    "failed": ["raises"],
}
STRATEGIES: dict[str, dict] = {
    "exact": {},
    "sharded": {"sync": "sharded"},
    "quantized": {"sync": "quantized", "wire": "int4"},
    "powersgd": {"sync": "powersgd"},
    "streaming": {"sync": "streaming", "streaming": {"sync_every": 10}},
    "sparse": {"sync": "sparse", "sparse": {"sync_every": 10}},
}
LONG_S = 35.0
CLEAN = [
    "nothing", "long checkpoint", "long evaluation", "long preparation", "long loading",
    "long compilation", "holds the interpreter", "busy machine", "sleeps 5 s", "sleeps 20 s",
]  # fmt: skip
AT_STEP = 7
WORDS = ("hang", "silent", "lost", "desynchronized", "slow", "went on")


# --- on a rank


def rank(world, config, fault: str, culprit: int, folder: Path) -> None:
    """One rank of a job; everything that it says goes to `said-RANK`, its end to `end-RANK`."""
    from unisono.errors import UnisonoError
    from unisono.observe.screen import Quiet
    from unisono.train.loop import train

    class Told(Quiet):
        def warn(self, text: str) -> None:
            print(text, file=sys.stderr, flush=True)

    sys.stderr = (folder / f"said-{world.rank}").open("a")
    if world.rank == culprit:
        inject(fault, folder)
    from unisono.train import advance

    count(advance, folder / f"step-{world.rank}")
    try:
        train(config, world, Told())
        end = "done"
    except (UnisonoError, RuntimeError) as error:
        end = f"{type(error).__name__}: {error}"
    new = folder / f"new-{world.rank}"
    new.write_text(end)
    new.rename(folder / f"end-{world.rank}")
    os._exit(0)


def count(advance, path: Path) -> None:
    step = advance.take_step

    def counted(number: int, *args: object, **options: object) -> object:
        path.write_text(str(number))
        return step(number, *args, **options)

    advance.take_step = counted


def inject(fault: str, folder: Path) -> None:
    from unisono.train import checkpoint, job, loop

    def slowly(function: Callable, wait: Callable[[], object]) -> Callable:
        def slow(*args: object, **options: object) -> object:
            wait()
            return function(*args, **options)

        return slow

    def once(wait: Callable[[], object]) -> Callable[[], object]:
        left = [wait]
        return lambda: left.pop()() if left else None

    def long() -> None:
        time.sleep(LONG_S)

    def hold() -> None:
        began = time.monotonic()
        while time.monotonic() - began < 8:
            sum(range(400_000_000))

    def at_step(act: Callable) -> None:
        """`act(job)` between two steps, where no vote protects it."""
        samples = loop.own_samples

        def acting(job: object) -> object:
            if job.progress.step == AT_STEP:
                (folder / "fault").touch()
                act(job)
            return samples(job)

        loop.own_samples = acting

    def raise_(job: object) -> None:
        raise RuntimeError("injected")

    def change(**fields: int) -> Callable:
        def act(job: object) -> None:
            job.plan = replace(job.plan, **fields)

        return act

    alone = AT_STEP + 1
    match fault:
        case "evaluates alone":
            take_steps = loop.take_steps

            def otherwise(job):
                job.plan = replace(job.plan, eval_steps=alone)
                return take_steps(job)

            loop.take_steps = otherwise
            at_step(lambda job: None)
        case "saves alone":
            take_steps = loop.take_steps

            def otherwise(job):
                job.plan = replace(job.plan, save_steps=alone)
                return take_steps(job)

            loop.take_steps = otherwise
            at_step(lambda job: None)
        case "one more":
            at_step(lambda job: job.votes.each(1.0))
        case "one more alike":
            at_step(lambda job: job.votes.barrier())
        case "one less":
            check, calls = loop.check_replicas, []

            def skipped(*args: object) -> None:
                calls.append(1)
                if len(calls) == 2:
                    (folder / "fault").touch()
                else:
                    check(*args)

            loop.check_replicas = skipped
        case "raises":
            at_step(raise_)
        case "long checkpoint":
            checkpoint.save = slowly(checkpoint.save, once(long))
        case "long evaluation":
            loop.evaluate = slowly(loop.evaluate, once(long))
        case "long preparation":
            job.prepare = slowly(job.prepare, once(long))
        case "long loading":
            job.load_model = slowly(job.load_model, once(long))
        case "long compilation":
            job.causal_lm = slowly(job.causal_lm, once(long))
        case "holds the interpreter":
            loop.evaluate = slowly(loop.evaluate, once(hold))


# --- trials


def trial(
    kind: str, fault: str, culprit: int, chooser: random.Random, corpus: Path, strategy: str
) -> dict:
    """Seconds from the fault to the line that names it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_job(
            corpus, folder / "run", max_steps=1_000_000, timeout_s=8, eval_steps=1000,
            save_steps=1000, check_replicas_every=5, **STRATEGIES[strategy],
        )  # fmt: skip
        env = {"XDG_CACHE_HOME": str(corpus.parent / "cache")}
        with started(rank, RANKS, config, fault, culprit, folder, env=env) as ranks:
            began = inject_and_wait(ranks, folder, fault, culprit, chooser)
            others = [r for r in range(RANKS) if r != culprit]
            named_s, over = None, False
            while not over and time.time() - began < 60:
                # gloo may abort a rank that receives more than it asked for.
                over = all((folder / f"end-{r}").exists() or ranks.gone(r) for r in others)
                ends = [p.read_text() for r in others if (p := folder / f"end-{r}").exists()]
                told = ends if kind == "failed" else [*said(folder), *ends]
                if kind == "failed" and len(ends) < len(others):
                    told = []
                if named_s is None and names(kind, told, culprit):
                    named_s = time.time() - began
                time.sleep(0.01)
        lines = said(folder)
    every = bool(ends) and all(names(kind, [end], culprit) for end in ends)
    return {
        "kind": kind, "fault": fault, "sync": strategy, "rank": culprit, "named_s": named_s, "on_every_exit": every,
        "line": (lines or ends or [""])[0],
        "exits": ends,
    }  # fmt: skip


def inject_and_wait(
    ranks: Ranks, folder: Path, fault: str, culprit: int, chooser: random.Random
) -> float:
    """When the fault came: time.time()."""
    if fault == "SIGSTOP":
        wait_for(lambda: steps(folder) >= chooser.randint(3, 60))
        time.sleep(chooser.random() * 0.2)  # at any moment of a step
        began = time.time()
        ranks.signal(signal.SIGSTOP, rank=culprit)
        return began
    wait_for((folder / "fault").exists)
    return (folder / "fault").stat().st_mtime


def clean(what: str, culprit: int, corpus: Path) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_job(
            corpus, folder / "run", max_steps=60, timeout_s=120, eval_steps=25, save_steps=30
        )
        # Its own cache, so that data is prepared.
        env = {"XDG_CACHE_HOME": str(folder / "cache")}
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6 if what == "busy machine" else 0)]  # fmt: skip
        try:
            with started(rank, RANKS, config, what, culprit, folder, env=env) as ranks:
                if what.startswith("sleeps"):
                    wait_for(lambda: steps(folder) >= 5)
                    ranks.signal(signal.SIGSTOP)
                    time.sleep(float(what.split()[1]))
                    ranks.signal(signal.SIGCONT)
                wait_for(lambda: len(list(folder.glob("end-*"))) == RANKS, 200)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        ends = sorted(p.read_text() for p in folder.glob("end-*"))
        return {"run": what, "rank": culprit, "ends": ends, "named": said(folder)}


def said(folder: Path) -> list[str]:
    lines = [line for p in sorted(folder.glob("said-*")) for line in p.read_text().splitlines()]
    lines = [line.partition("]: ")[2] if line.startswith("unisono [") else line for line in lines]
    return [line for line in lines if line.startswith(WORDS)]


def names(kind: str, lines: list[str], culprit: int) -> bool:
    wanted = {
        "stopped": (f"rank {culprit} (process ",),
        "parted": (f"rank {culprit} began ", f"wait for one another: rank {culprit} in "),
        "failed": (f"rank {culprit} ended with RuntimeError: injected, in ",),
    }[kind]
    return any(word in line for line in lines for word in wanted)


def steps(folder: Path) -> int:
    taken = [p.read_text() for p in folder.glob("step-*")]
    return min(int(t or 0) for t in taken) if len(taken) == RANKS else -1


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("a trial did not come as far as its fault, or to its end")
        time.sleep(0.005)


# --- the cost


def cost(world, config, blocks: int, steps: int) -> dict:
    """Steps with and without the watch in turns, and what the watch itself says that it used."""
    from unisono.observe.screen import Quiet
    from unisono.observe.watch import Watch
    from unisono.sync.ledger import Group, Ledger
    from unisono.train.advance import advance
    from unisono.train.job import set_up
    from unisono.train.stopping import watching
    from unisono.world import joined

    with watching() as stop, joined(world):
        ledger = Ledger()
        votes = Group("votes", ledger, 600)
        job = set_up(config, world, Quiet(), stop, ledger, votes)
        means: dict[bool, list[float]] = {False: [], True: []}
        spent_s, wall_s, collectives = 0.0, 0.0, 0
        for block in range(2 * blocks):
            on = block % 2 == (block // 2) % 2
            watch = Watch.begin(ledger) if on else None
            before, began = ledger.collectives, time.perf_counter()
            times = []
            for _ in range(steps):
                start = time.perf_counter()
                advance(job)
                job.progress.step += 1
                times.append(time.perf_counter() - start)
            means[on].append(statistics.fmean(times))
            if watch:
                watch.end()
                spent_s += watch.spent_s
                wall_s += time.perf_counter() - began
                collectives += ledger.collectives - before
        issue_us = {}
        for on in (False, True):
            watch = Watch.begin(ledger) if on else None
            issue_us[on] = 1e6 * seconds_of_a_record(votes)
            if watch:
                watch.end()
    step_s = statistics.median(means[False])
    ratios = [a / b for a, b in zip(means[True], means[False])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    per_step = collectives / (blocks * steps)
    record_us = issue_us[True] - issue_us[False]
    thread, records = spent_s / wall_s, per_step * record_us * 1e-6 / step_s
    return {
        "step_ms": 1e3 * step_s,
        "with_over_without_quartiles": [low, middle, high],
        "thread_share_of_a_processor": thread,
        "collectives_of_a_step": per_step,
        "record_us": record_us,
        "records_share_of_a_step": records,
        "share_of_a_step": thread + records,
    }


def seconds_of_a_record(group) -> float:
    """What the ledger does for a collective, without the collective. Not collective."""
    import torch

    tensor, times = torch.zeros(4), []
    sequence = group._sequence
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            group._issue("all-reduce", 0, tensor, lambda: None)
        times.append((time.perf_counter() - began) / 200)
    group._sequence = sequence
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="of each fault")
    parser.add_argument("--only", nargs="+", default=[*FAULTS, "clean", "cost"])
    parser.add_argument("--sync", nargs="+", choices=[*STRATEGIES], default=["exact"])
    parser.add_argument("--json", type=Path, default=HERE / "results" / "hangs.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    about, chooser = machine(), random.Random(3)
    result: dict = {"machine": about, "trials": [], "clean": []}
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name))
        for kind in [k for k in FAULTS if k in args.only]:
            for number in range(args.trials):
                fault = FAULTS[kind][number % len(FAULTS[kind])]
                strategy = args.sync[number % len(args.sync)]
                row = trial(kind, fault, number % RANKS, chooser, corpus, strategy)
                result["trials"].append(row)
                took = "not named" if row["named_s"] is None else f"{row['named_s']:.1f} s"
                print(f"{kind} {number + 1}: {strategy}: {fault} on rank {row['rank']}: {took}, on every exit: {row['on_every_exit']}", flush=True)  # fmt: skip
            rows = [r for r in result["trials"] if r["kind"] == kind]
            good = sum(r["on_every_exit"] and r["named_s"] is not None and r["named_s"] <= 5 for r in rows)  # fmt: skip
            slowest = max((r["named_s"] or 99) for r in rows)
            result[kind] = {"named_in_5_s": good, "of": len(rows), "slowest_s": slowest}
            print(f"{kind}: {good} of {len(rows)} named within 5 s, slowest {slowest:.1f} s")
        for number, what in enumerate(CLEAN if "clean" in args.only else []):
            row = clean(what, number % RANKS, corpus)
            result["clean"].append(row)
            print(f"clean {number + 1}: {what}: {row['ends']}, named {row['named']}", flush=True)
        if "cost" in args.only:
            (Path(name) / "cost").mkdir()
            config = make_job(corpus, Path(name) / "cost", max_steps=1_000_000, bucket_mb=4.0)
            env = {"XDG_CACHE_HOME": str(Path(name) / "cache")}
            [result["cost"], *_] = run_ranks(
                cost, 2, config, 40, 60, join=False, timeout=400, env=env
            )
            print(result["cost"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
