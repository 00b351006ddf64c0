"""Outer weights: what replicas that step by themselves agree on, and how it moves.

Every H steps each replica has gone from the outer weights W to weights w of its own. The mean over replicas
of the deltas W - w is taken for a gradient of W, by SGD with Nesterov momentum (DiLoCo, Douillard et al. 2023,
arXiv:2311.08105):

    u <- m u + d,   W <- W - r (d + m u),   own weights <- a own + (1 - a) W

Known special cases, which are settings: r = 1, m = 0 is local SGD or FedAvg (W becomes the mean of the
replicas); one replica is SNOO (arXiv:2510.15830); m = 0 with sparse deltas and error feedback is SparseLoCo.

Parameters are divided into P fragments, each synchronized at an offset of its own (Streaming DiLoCo,
arXiv:2501.18512), so that 1/P of the bytes travels at a time. Nothing here communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unisono.errors import ConfigError
from unisono.sync.codec import Codec, make_codec

FULL = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outer:
    """How replicas come together. Steps are the run's, counted from 1 as they are done."""

    codec: Codec
    """Of the deltas."""
    sync_every: int = 30
    """H: steps from one synchronization of a fragment to its next; a multiple of `num_fragments`."""
    num_fragments: int = 1
    fragment_sync_delay: int = 0
    """Steps that a fragment may take to arrive, fewer than from one fragment to the next."""
    fragment_update_alpha: float = 0.0
    """What stays of a replica's own weights when the new outer ones have arrived."""
    learning_rate: float = 1.0
    momentum: float = 0.0
    feedback_decay: float = 0.0
    """Of what encoding has left out, so much is added to the next delta."""
    only_gather: bool = False
    """A sum of what is encoded cannot be encoded as well (sparse)."""
    first_step: int = 0
    """Steps that were done before: of a resume."""
    last_step: int = 0
    """At its end everything is synchronized."""

    def begins(self, fragment: int, step: int) -> bool:
        """Whether the round of `fragment` ends with `step`: the last one's with every H-th."""
        return (step - (fragment + 1) * self._apart) % self.sync_every == 0

    def due(self, fragment: int, step: int) -> int:
        """The step with whose end the newest delta of `fragment`, at the end of `step`, arrives."""
        since = (step - (fragment + 1) * self._apart) % self.sync_every
        return step - since + self.fragment_sync_delay

    def times(self, fragment: int) -> int:
        """That `fragment` travels between `first_step` and the end: with each round, and with the last step."""
        offset, every = (fragment + 1) * self._apart, self.sync_every
        turns = (self.last_step - offset) // every - (self.first_step - offset) // every
        return turns + (not self.begins(fragment, self.last_step))

    @property
    def _apart(self) -> int:
        return self.sync_every // self.num_fragments

    def sent_bytes(self, sizes: Sequence[int], replicas: int) -> int:
        """By each rank in a round of H steps; `sizes`: values of each parameter."""
        fragments = divide(sizes, self.num_fragments)
        return sum(
            sent_bytes(sum(sizes[i] for i in f), replicas, self.codec, self.only_gather)
            for f in fragments
        )

    def state_values(self, sizes: Sequence[int]) -> int:
        """float32 values that each rank holds beside its own weights: outer weights, momentum, feedback,
        and at most one fragment's delta and sum on their way."""
        largest = max(sum(sizes[i] for i in f) for f in divide(sizes, self.num_fragments))
        kept = 1 + (self.momentum > 0) + (self.feedback_decay > 0)
        return kept * sum(sizes) + 2 * largest


def sent_bytes(values: int, replicas: int, codec: Codec, only_gather: bool = False) -> int:
    """By each rank for the sum of `values` over n `replicas`, E(v) bytes being the code of v values:
    the less of (n-1) E(values), all-gather, and 2 (n-1) E(ceil(values/n)), reduce-scatter and all-gather."""
    one = (replicas - 1) * codec.encoded_bytes(values)
    return one if gathers(values, replicas, codec, only_gather) else _two_trips(values, replicas, codec)  # fmt: skip


def gathers(values: int, replicas: int, codec: Codec, only_gather: bool = False) -> bool:
    """Whether every rank gets all codes and adds them up itself."""
    one = (replicas - 1) * codec.encoded_bytes(values)
    return only_gather or replicas <= 2 or one <= _two_trips(values, replicas, codec)


def _two_trips(values: int, replicas: int, codec: Codec) -> int:
    return 2 * (replicas - 1) * codec.encoded_bytes(-(-values // replicas))


def divide(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of whole parameters for each fragment, in order; every parameter is in exactly one.

    The largest first, always to the fragment with the fewest values so far. Parameters of one size, the
    same one of every layer, so go to the fragments in turn: the strided order of the paper.
    """
    if parts > len(sizes):
        raise ConfigError(
            f"streaming.num_fragments: found {parts}, but the model has {len(sizes)} trained parameters; "
            f"write at most that"
        ).on_every_rank()
    fragments: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = filled.index(min(filled))
        fragments[least].append(i)
        filled[least] += sizes[i]
    return [sorted(f) for f in fragments]


def default_rate(replicas: int, sync_every: int, momentum: float) -> tuple[float, str]:
    """(outer learning rate, why). Without momentum 1, the mean of the replicas.

    With it what was tuned at H = 30 and m = 0.9 for 1, 2, 4 and 8 replicas (arXiv:2503.09799, where it
    rises with H): 0.4, 0.6, 0.6, 0.8. The factors 0.6 up to H = 10 and 1.25 from H = 100 are ours.
    """
    if not momentum:
        return 1.0, "no momentum: the mean of the replicas"
    rate = 0.4 if replicas == 1 else 0.6 if replicas <= 4 else 0.8
    factor = 0.6 if sync_every <= 10 else 1.25 if sync_every >= 100 else 1.0
    found = round(rate * factor, 4)
    of = "1 replica" if replicas == 1 else f"{replicas} replicas"
    return found, f"{rate:g} for {of}" + (f" x {factor:g} for H {sync_every}" if factor != 1 else "")  # fmt: skip


def delta_codec(wire: str, feedback: bool = True) -> Codec:
    """Of deltas as `wire` names it. Codes whose rounding nothing keeps are rounded stochastically."""
    return Full(wire) if wire in FULL else make_codec(wire, stochastic=not feedback)


@dataclass(frozen=True)
class Full:
    """Values as they are, or rounded to bfloat16: 4 or 2 bytes each."""

    name: str

    def encoded_bytes(self, values: int) -> int:
        return FULL[self.name].itemsize * values

    def encode(
        self, values: torch.Tensor, seed: int = 0, left: torch.Tensor | None = None
    ) -> torch.Tensor:
        sent = values.to(FULL[self.name], copy=True)
        if left is not None:
            torch.sub(values, sent, out=left)
        return sent.view(torch.uint8)

    def decode(self, code: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        values = code.view(FULL[self.name])
        if add:
            out.add_(values)
        else:
            out.copy_(values)
