"""One optimizer step: this replica's micro-batches, the vote, and who is to blame if it fails."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from unisono.data.order import Order
from unisono.data.pairs import Samples
from unisono.observe.arrival import Stamps
from unisono.observe.noise import Meter
from unisono.plan import Plan
from unisono.sync import Strategy
from unisono.sync.ledger import Group
from unisono.train.objective import Measured, flat
from unisono.train.trial import is_out_of_memory
from unisono.train.vote import FAILED, FINE, OUT_OF_MEMORY, Ballot, Outcome, pack, unpack

Measure = Callable[[Any], Measured]
"""Of a batch, as the samples are read."""

SLOW_STEP_S = 1.0
"""When steps take longer, a signal is also looked for between micro-batches."""


@dataclass
class Feed:
    """Which samples a micro-batch holds: a pure function of step and micro-batch."""

    blocks: Samples
    order: Order
    plan: Plan
    seed: int

    def samples(self, step: int, leaf: int) -> np.ndarray:
        """Sample numbers of micro-batch `leaf` of the global batch; the last step's may be empty."""
        positions = self.plan.positions(step)
        rows = self.plan.rows(leaf)
        return self.order.at(np.asarray(positions[rows.start : rows.stop], dtype=np.int64))

    def begin(self, step: int, leaves: range) -> float:
        """What this rank must make before it can read `leaves`; what it cost, in rows of one token."""
        return 0.0

    def batch(self, step: int, leaf: int) -> Any:
        """The micro-batch. An empty one is a row without targets, so that every rank computes."""
        samples = self.samples(step, leaf)
        if len(samples):
            return self.blocks.read(samples)
        return self.blocks.read(np.zeros(1, dtype=np.int64)).blank()

    def seed_for(self, step: int, leaf: int) -> int:
        """Seed of dropout and the like: the same whichever rank runs the micro-batch."""
        state = np.random.SeedSequence((self.seed, step, leaf)).generate_state(2)
        return int(state[0]) << 31 ^ int(state[1])


@dataclass(frozen=True)
class Taken:
    """What became of a step on all ranks. `outcome` None: given up for a signal, nothing sent."""

    outcome: Outcome | None
    error: BaseException | None = None
    """What failed on this rank, if it did."""
    counts: list[int] = field(default_factory=list)
    """Of each of this rank's micro-batches, what the loss is divided by."""


def take_step(
    step: int,
    feed: Feed,
    measure: Measure,
    metrics: tuple[str, ...],
    sync: Strategy,
    votes: Group,
    *,
    stop: Callable[[], bool],
    stamps: Stamps,
    noise: Meter,
) -> Taken:
    """Collective: forward and backward of step `step` (0 is the first) and its synchronization.

    Afterwards gradients are complete, unless the outcome tells of trouble; then they are to be
    discarded, on every rank alike.
    """
    plan = feed.plan
    leaves = plan.leaves(votes.rank)
    # Tensor ranks have the same losses, context ranks each a part.
    tells = plan.mesh.tensor_rank(votes.rank) == 0
    ballot = Ballot(period=stamps.period)
    clock = sync.ledger.clock
    slow = stamps.slowest_s > SLOW_STEP_S
    work = drawn = 0.0
    error: BaseException | None = None
    measured: list[Measured] = []

    def failed_by(caught: Exception) -> None:
        nonlocal error
        if not sync.can_give_up:
            raise caught
        if is_out_of_memory(caught):
            # Not kept: its traceback holds the activations that have to go.
            ballot.trouble = OUT_OF_MEMORY
        else:
            ballot.trouble, error = FAILED, caught

    try:
        drawn = feed.begin(step, leaves)
    except Exception as caught:
        failed_by(caught)
    # Ranks that share samples have no gradient of their own ones alone.
    sync.parts.begin(measure=noise.due() and plan.mesh.inner == 1)
    for k in range(plan.accumulation):
        if slow:
            with clock(
                "communication"
            ):  # where one waits here for another's completions, it is told
                asked, failed = votes.sum(float(stop()), float(ballot.trouble != FINE))
            if failed:
                break
            if asked:
                sync.discard()
                return Taken(None)
        elif ballot.trouble != FINE:
            break
        leaf = leaves[k]
        found = None
        try:
            # Entered even if reading fails: the others may wait for this rank in it.
            with clock("compute"), sync.micro_batch(last=k == plan.accumulation - 1):
                with clock("data"):
                    batch = feed.batch(step, leaf)
                work += stamps.flops(*batch.input_ids.shape)
                torch.manual_seed(feed.seed_for(step, leaf))
                found = measure(batch)
                found.loss.backward()
            if tells:
                measured.append(replace(found, loss=found.loss.detach()))
            sync.parts.after(k + 1, plan.accumulation, sync.local_gradients())
        except Exception as caught:
            failed_by(caught)
    found = None
    with clock("compute"):  # on a GPU this is where the backward pass is waited for
        ballot.losses = [float(m.loss) for m in measured]
        ballot.counts = [m.count for m in measured]
        each = [flat(metrics, m.sums) for m in measured]
        ballot.sums = [math.fsum(s) for s in zip(*each, strict=True)] or [0.0] * 2 * len(metrics)
    ballot.stop = stop()
    vote = pack(ballot, votes.rank, votes.size, plan.micro_batches, leaves.start)
    stamps.arrived(work, drawn)
    values = sync.finish(*vote, *noise.told())
    stamps.left()
    noise.hear(values[len(vote) :])
    outcome = unpack(values[: len(vote)], votes.size, plan.micro_batches)
    stamps.slowest_s = outcome.step_s
    stamps.settle(outcome.periods, votes.rank)
    return Taken(outcome, error, ballot.counts)


def find_culprit(step: int, feed: Feed, measure: Measure, sync: Strategy, votes: Group) -> str:
    """Collective: why the gradient of `step` was not finite: rank, tensor, samples, in words.

    Repeats this rank's micro-batches without communication and looks at each one's own gradients,
    which for the same samples, weights and random numbers come out the same. What does not come
    back was a passing fault; then the pieces that were received tell at least the rank.
    """
    seen = sync.blame() or (-1, "")
    names = [n for n, _ in sync.named_parameters()]
    leaf, tensor = -1, -1
    for k in range(feed.plan.accumulation):
        candidate = feed.plan.leaves(votes.rank)[k]
        bad = None
        # What fails here costs the explanation, not the run.
        with suppress(Exception), sync.micro_batch(last=False):
            torch.manual_seed(feed.seed_for(step, candidate))
            measure(feed.batch(step, candidate)).loss.backward()
            bad = next(_not_finite(sync), None)
        if bad is not None and leaf < 0:
            leaf, tensor = candidate, names.index(bad)
        if leaf >= 0 and not sync.lockstep:
            break
    sync.discard()
    table = votes.each(
        float(leaf), float(tensor), float(seen[0]), float(names.index(seen[1]) if seen[1] else -1)
    ).long()
    for rank, (leaf, tensor, _, _) in enumerate(table.tolist()):
        if leaf >= 0:
            samples = feed.samples(step, leaf).tolist()
            shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
            return f"rank {rank}, first in {names[tensor]}, samples {shown}"
    for _, _, rank, tensor in table.tolist():
        if rank >= 0:
            return (
                f"rank {rank}, in {names[tensor]}; it did not come back when the step was repeated, "
                f"so look at that host's hardware"
            )
    return "no rank, when the step was repeated: a passing fault, so look at the hardware"


def _not_finite(sync: Strategy) -> Iterator[str]:
    for name, gradient in sync.local_gradients():
        if not torch.isfinite(gradient).all():
            yield name
