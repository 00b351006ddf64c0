"""Sequences over the ranks of the `context` axis: which part of a batch this rank computes, and with whom.

A batch is read whole by every rank of the axis and cut in numpy (attention/shard.py); the model sees this
rank's tokens with their positions, and its attention reaches the others (attention/context.py). Losses and
gradients of the parts are summed as those of any ranks are.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from unisono.attention.context import Context
from unisono.attention.hf import Hook
from unisono.attention.mask import Mask
from unisono.attention.schemes import Layer, measure_speeds, sent_bytes
from unisono.attention.shard import Placement, Shard, shard
from unisono.config import AttentionConfig, Config
from unisono.data.blocks import Batch
from unisono.errors import ConfigError
from unisono.mesh import Mesh
from unisono.plan import Plan
from unisono.sync.ledger import Group, Ledger
from unisono.sync.tensor import refuse_dropout


@dataclass(frozen=True, eq=False)
class Parts:
    """This rank's parts of sequences, and the attention across them in `hook`'s model."""

    context: Context
    hook: Hook
    layers: tuple[Layer, ...]
    """Each layer's attention over a micro-batch, packed documents left out of account."""

    def sent_bytes(self, recompute: bool) -> int:
        """By the rank that sends most, for the attention of a micro-batch, forward and backward."""
        total = 0
        for layer in self.layers:
            scheme = self.context.choice(layer).scheme
            inner = self.context.inner.size if self.context.inner else None
            forward, backward = sent_bytes(scheme, layer, self.context.placement, inner)
            total += forward * (2 if recompute else 1) + backward
        return total

    def told(self) -> tuple[str, str]:
        """(how many layers by which scheme, why), for the plan."""
        choices = [self.context.choice(layer) for layer in self.layers]
        count = Counter(choice.scheme for choice in choices)
        names = ", ".join(f"{n} {'layer' if n == 1 else 'layers'} {s}" for s, n in count.items())
        reasons = {choice.scheme: choice.reason for choice in choices}
        return names, "; ".join(
            f"{scheme}: {why}" if len(reasons) > 1 else why for scheme, why in reasons.items()
        )

    def of(self, batch: Batch) -> Shard:
        """What this rank computes of a batch that every rank of the axis has."""
        return shard(batch, self.context.placement, self.context.group.rank)

    @contextmanager
    def reaching(self, part: Shard) -> Iterator[None]:
        """Around the forward pass on `part`: attention reaches the whole sequences."""
        self.hook.context = replace(self.context, documents=part.documents)
        try:
            yield
        finally:
            self.hook.context = None


def asked_attention(config: Config, mesh: Mesh) -> str | AttentionConfig:
    """What the run's attention must be: only ours crosses ranks. Raises ConfigError."""
    if mesh.context > 1 and config.attention == "native":
        raise ConfigError(
            f"attention: found native with mesh.context: {mesh.context}, and a model's own attention sees "
            f"this rank's tokens only; write attention: auto"
        ).on_every_rank()
    if mesh.context > 1 and config.attention == "auto":
        return "flash"  # on a GPU too
    return config.attention


def make_parts(
    config: Config,
    mesh: Mesh,
    hook: Hook | None,
    rows: int,
    windows: Sequence[int],
    ledger: Ledger,
    device: str,
) -> Parts | None:
    """Collective: the groups of the context axis; None where it has one rank. Raises ConfigError.

    `rows`: sequences of a micro-batch. `windows`: of the model's own layers, 0 where there is none.
    """
    if mesh.context == 1:
        return None
    assert hook is not None  # asked for by name, so it is there or was refused
    size, asked = mesh.context, config.context
    if hook.mixes:
        raise ConfigError(
            f"mesh.context: found {size}, but other layers of a {type(hook.model).__name__} than attention "
            f"carry state along the sequence, which does not cross ranks; write mesh.context: 1"
        ).on_every_rank()
    refuse_dropout(hook.model, "context", size)
    groups = mesh.groups("context")
    group = Group("context", ledger, config.timeout_s, parts=groups)
    inner = outer = None
    if (u := asked.ulysses) is not None:
        if size % u or u in (1, size):
            raise ConfigError(
                f"context.ulysses: found {u}; write a divisor of mesh.context ({size}) between 1 and {size}, "
                f"or leave it out"
            ).on_every_rank()
        beside = [g[k : k + u] for g in groups for k in range(0, size, u)]
        apart = [g[k::u] for g in groups for k in range(u)]
        inner = Group("ulysses", ledger, config.timeout_s, parts=beside)
        outer = Group("ring", ledger, config.timeout_s, parts=apart)
    speeds = None
    if asked.scheme == "auto":
        speeds = measure_speeds(group, device, torch.bfloat16 if config.bf16 else torch.float32)
    placement = Placement(config.sequence_length, size)
    context = Context(group, placement, asked.scheme, speeds, inner, outer)
    layers = tuple(_layers(config, mesh, hook, rows, windows))
    for layer in layers:
        context.choice(layer)  # what cannot be is refused before the first step
    return Parts(context, hook, layers)


def with_context(plan: Plan, config: Config, parts: Parts) -> Plan:
    """The plan with what attention sends across ranks, and why so."""
    rows = math.ceil(plan.global_batch_size / plan.mesh.data)
    more = parts.sent_bytes(config.gradient_checkpointing) * rows // plan.micro_batch_size
    reasons = {**plan.reasons, "context": ": ".join(parts.told())}
    return replace(
        plan,
        sent_bytes_per_step=plan.sent_bytes_per_step + more,
        across_bytes_per_step=plan.across_bytes_per_step + more,
        reasons=reasons,
    )


def _layers(
    config: Config, mesh: Mesh, hook: Hook, rows: int, windows: Sequence[int]
) -> Iterator[Layer]:
    model: Any = hook.model
    fields = model.config.get_text_config()
    heads = fields.num_attention_heads
    kv_heads = getattr(fields, "num_key_value_heads", None) or heads
    width = getattr(fields, "head_dim", None) or fields.hidden_size // heads
    for number, window in enumerate(windows):
        mask = hook.wish(Mask(window=window or None), number)
        yield Layer(
            rows, heads // mesh.tensor, kv_heads // mesh.tensor, width,
            getattr(fields, "v_head_dim", None) or width, 2 if config.bf16 else 4, mask,
        )  # fmt: skip
