"""What does all the instrumentation of a step cost? At most 0.5% is asked for.

Two ranks train the model of the Shakespeare recipe, steps with and without, in turns of a block each.
Without: the clock switches no phases, no stamps are taken or told, nothing is settled, followed, watched
for, or written. With: all of that, as `unisono train` does it: clock, arrival stamps in the vote,
attribution and verdicts, jumps, rows of metrics and of ranks every 10 steps, the watch's thread.

Steps in turns show no difference below the noise of a machine of two cores, so what they show is given
with its quartiles, and the cost is counted as well: how often each part runs in a step, times what it
takes by itself.

    python benchmarks/overhead.py [--blocks 20] [--steps 20] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from jobs import make_job, write_corpus  # noqa: E402
from machine import machine  # noqa: E402
from ranks import run_ranks  # noqa: E402
from unisono.clock import Clock  # noqa: E402
from unisono.observe.arrival import Stamps  # noqa: E402

RANKS, LOGGING = 2, 10
MODEL = {
    "model_type": "llama", "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4,
    "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip


class NoClock(Clock):
    """Stays in one phase."""

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def standing_still(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class NoStamps(Stamps):
    def arrived(self, work: float) -> None: ...
    def left(self) -> None: ...
    def settle(self, periods, rank: int) -> None: ...


class CountingClock(Clock):
    switches = 0

    def _switch(self, phase: str) -> str:
        CountingClock.switches += 1
        return super()._switch(phase)


def rank(world, config, blocks: int, steps: int) -> dict:
    from unisono.files import JsonLines
    from unisono.observe.account import RANKS as ROWS
    from unisono.observe.account import Account
    from unisono.observe.environment import memory_bytes
    from unisono.observe.flops import count
    from unisono.observe.metrics import Metrics
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
        on, off = Stamps(ledger.clock), NoStamps(ledger.clock)
        on.flops = off.flops = count(job.model).model
        account = Account(votes, on, world.host, world.device, job.plan.sent_bytes_per_step)
        metrics, rows = Metrics(job.run, 0, ()), JsonLines(job.run / f"{ROWS}.{world.rank}")
        clocks = {True: ledger.clock, False: NoClock()}

        def follow(advanced) -> None:
            step = job.progress.step
            account.step(step, advanced.outcome.periods)
            account.jump(step, advanced.outcome.loss, advanced.gradient_norm)
            if step % LOGGING == 0 and world.is_main:
                phases = ledger.clock.read()
                metrics.write(step, **{f"time__{p}_s": s for p, s in phases.items()}, memory=memory_bytes("cpu"))  # fmt: skip
                rows.append(account.row(step))

        def block(instrumented: bool) -> float:
            ledger.clock = clocks[instrumented]
            on.began()
            watch = Watch.begin(ledger) if instrumented else None
            times = []
            for _ in range(steps):
                began = time.perf_counter()
                advanced = advance(job, on if instrumented else off)
                job.progress.step += 1
                if instrumented:
                    follow(advanced)
                times.append(time.perf_counter() - began)
            if watch:
                watch.end()
                spent.append(watch.spent_s / sum(times))
            return statistics.median(times)

        spent: list[float] = []
        block(True)  # lays buckets out
        spent.clear()
        ratios, without = [], []
        for k in range(blocks):
            order = (True, False) if k % 2 else (False, True)
            took = {i: block(i) for i in order}
            ratios.append(took[True] / took[False])
            without.append(took[False])
        step_s = statistics.median(without)

        # Counted: calls of a step x what each takes.
        ledger.clock = clocks[True]
        counting = CountingClock()
        ledger.clock, on.clock = counting, counting
        on.began()
        before, collectives = CountingClock.switches, ledger.collectives
        for _ in range(10):
            advanced = advance(job, on)
            job.progress.step += 1
        switches = (CountingClock.switches - before) / 10
        collectives = (ledger.collectives - collectives) / 10
        ledger.clock = on.clock = clocks[True]

        def phase() -> None:
            with ledger.clock("compute"):
                pass

        def stamp() -> None:
            on.arrived(1.0)
            on.left()
            on.settle(advanced.outcome.periods, world.rank)

        from unisono.train.vote import Ballot, pack, unpack

        def vote() -> None:
            unpack(pack(Ballot(), world.rank, world.size, job.plan.micro_batches), world.size, job.plan.micro_batches)  # fmt: skip

        def account_step() -> None:
            account.suspects._next_look_s = float("inf")
            account._aligned_s = account.suspects.seconds
            account.step(job.progress.step, advanced.outcome.periods)
            account.jump(job.progress.step, advanced.outcome.loss, advanced.gradient_norm)

        def write() -> None:
            phases = ledger.clock.read()
            metrics.write(1, **{f"time__{p}_s": s for p, s in phases.items()}, memory=memory_bytes("cpu"))  # fmt: skip
            rows.append(account.row(1))

        parts = {
            "clock": (switches / 2, seconds_of(phase)),
            "stamps and attribution": (1, seconds_of(stamp)),
            "vote": (1, seconds_of(vote)),
            "verdicts": (1, seconds_of(account_step, mean=True)),
            "rows": (1 / LOGGING, seconds_of(write)),
        }
        counted = {k: n * s / step_s for k, (n, s) in parts.items()}
        counted["watch's thread, of a processor"] = statistics.median(spent)
        metrics.close()
        rows.close()
    return {
        "step_ms": 1e3 * step_s,
        "with_over_without_quartiles": statistics.quantiles(ratios, n=4),
        "with_over_without_standard_error": 1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5,
        "switches_of_a_step": switches,
        "collectives_of_a_step": collectives,
        "microseconds_of_a_step": {k: 1e6 * n * s for k, (n, s) in parts.items()},
        "share_of_a_step": counted,
        "total_share_of_a_step": sum(counted.values()),
    }


def seconds_of(function: Callable[[], None], mean: bool = False) -> float:
    """Of one call. `mean`: over all calls, some of which do more than others."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(100):
            function()
        times.append((time.perf_counter() - began) / 100)
    return statistics.fmean(times) if mean else statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12, help="of each kind")
    parser.add_argument("--steps", type=int, default=15, help="of a block")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "overhead.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name))
        config = make_job(
            corpus, Path(name) / "run", max_steps=100_000, model=MODEL, sequence_length=128,
            global_batch_size=32, micro_batch_size=8, bucket_mb=2, tokenizer={"vocab_size": 2048},
        )  # fmt: skip
        (Path(name) / "run").mkdir()
        cache = {"XDG_CACHE_HOME": str(Path(name) / "cache")}
        found = run_ranks(rank, RANKS, config, args.blocks, args.steps, join=False, timeout=500, env=cache)[0]  # fmt: skip
    result = {"machine": machine(), **found}
    print(json.dumps(result, indent=1))
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
