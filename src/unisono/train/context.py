"""Sequences over the ranks of the `context` axis: which part of a batch this rank computes, and with whom.

A batch is read whole by every rank of the axis and cut in numpy (attention/shard.py); the model sees this
rank's tokens with their positions, and its attention reaches the others (attention/context.py). Losses and
gradients of the parts are summed as those of any ranks are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from unisono.attention.context import Context
from unisono.attention.hf import Hook
from unisono.attention.mask import Documents
from unisono.attention.schemes import measure_speeds
from unisono.attention.shard import Placement, Shard, shard
from unisono.config import AttentionConfig, Config
from unisono.data.blocks import Batch
from unisono.errors import ConfigError
from unisono.mesh import Mesh
from unisono.sync.ledger import Group, Ledger


@dataclass(frozen=True, eq=False)
class Parts:
    """This rank's parts of sequences, and the attention across them in `hook`'s model."""

    context: Context
    hook: Hook

    def of(self, batch: Batch) -> Shard:
        """What this rank computes of a batch that every rank of the axis has."""
        return shard(batch, self.context.placement, self.context.group.rank)

    @contextmanager
    def reaching(self, part: Shard) -> Iterator[None]:
        """Around the forward pass on `part`: attention reaches the whole sequences."""
        documents = None
        if part.documents is not None:
            documents = Documents.of_ids(torch.from_numpy(part.documents))
        self.hook.context = replace(self.context, documents=documents)
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
    config: Config, mesh: Mesh, hook: Hook | None, ledger: Ledger, device: str
) -> Parts | None:
    """Collective: the groups of the context axis; None where it has one rank. Raises ConfigError."""
    if mesh.context == 1:
        return None
    assert hook is not None  # asked for by name, so it is there or was refused
    size, asked = mesh.context, config.context
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
    return Parts(Context(group, placement, asked.scheme, speeds, inner, outer), hook)
