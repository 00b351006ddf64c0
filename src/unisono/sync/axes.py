"""Groups of the ranks along each axis of a mesh, and where the nodes begin.

Ranks are `replica x shard`, a row of the mesh being neighbours (as in sync/sharded.py). A node is the
ranks of one host: its first is the one with local rank 0, as torchrun and our launcher number them.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from unisono.sync.ledger import Group, Ledger, yielding_threads


def nodes_of(world: Group, local_rank: int) -> list[int]:
    """Collective: the node of every rank, counted from 0."""
    first = world.each(float(local_rank == 0))[:, 0].cumsum(0)
    return [max(0, int(node) - 1) for node in first.tolist()]


def axes(
    world: Group, nodes: Sequence[int], mesh: tuple[int, int] | None, ledger: Ledger, timeout_s: float
) -> dict[str, Group]:  # fmt: skip
    """Collective: this rank's group along `world`, `node`, `replica` and `shard`.

    An axis of one rank, or one that is the whole world, is left out. `mesh`: (replica, shard).
    """
    found = {"world": world}
    count = max(nodes) + 1
    parts = {"node": [[r for r, node in enumerate(nodes) if node == k] for k in range(count)]}
    if mesh and min(mesh) > 1:
        replica, shard = mesh
        parts["replica"] = [[c * shard + k for c in range(replica)] for k in range(shard)]
        parts["shard"] = [[c * shard + k for k in range(shard)] for c in range(replica)]
    for name, ranks in parts.items():
        size = len(ranks[0])
        if 1 < size < world.size and all(len(part) == size for part in ranks):
            found[name] = _own(name, ranks, world.rank, ledger, timeout_s)
    return found


def _own(
    name: str, parts: Sequence[Sequence[int]], rank: int, ledger: Ledger, timeout_s: float
) -> Group:
    """Every rank makes all groups, in the same order, and keeps its own."""
    timeout = timedelta(seconds=timeout_s)
    with yielding_threads():
        made = [dist.new_group(list(part), timeout=timeout) for part in parts]
    own = next(group for group, part in zip(made, parts, strict=True) if rank in part)
    return Group(name, ledger, timeout_s, own)
