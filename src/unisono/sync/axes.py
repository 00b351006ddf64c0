"""Groups of the ranks along each axis of a mesh, and where the nodes begin.

A node is the ranks of one host: its first is the one with local rank 0, as torchrun and our launcher
number them.
"""

from collections.abc import Sequence

from unisono.mesh import AXES, Mesh
from unisono.sync.ledger import Group, Ledger


def nodes_of(world: Group, local_rank: int) -> list[int]:
    """Collective: the node of every rank, counted from 0."""
    first = world.each(float(local_rank == 0))[:, 0].cumsum(0)
    return [max(0, int(node) - 1) for node in first.tolist()]


def axes(
    world: Group, nodes: Sequence[int], mesh: Mesh | None, ledger: Ledger, timeout_s: float
) -> dict[str, Group]:  # fmt: skip
    """Collective: this rank's group along `world`, `node` and each axis of the mesh.

    An axis of one rank, or one that is the whole world, is left out.
    """
    found = {"world": world}
    count = max(nodes) + 1
    parts = {"node": [[r for r, node in enumerate(nodes) if node == k] for k in range(count)]}
    if mesh:
        parts |= {axis: mesh.groups(axis) for axis in AXES}
    for name, ranks in parts.items():
        size = len(ranks[0])
        if 1 < size < world.size and all(len(part) == size for part in ranks):
            found[name] = Group(name, ledger, timeout_s, parts=ranks)
    return found
