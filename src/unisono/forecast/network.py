"""What a collective costs: latency and bandwidth on the links it really uses.

For S bytes over n ranks on a bus of B bytes/s (nccl-tests' bus bandwidth, so 2 (n-1)/n S cross it in
an all-reduce and (n-1)/n S in a reduce-scatter, all-gather or all-to-all):

    T = latency + factor(n) S / B

Latency is a ring's hops; an all-reduce takes a tree between nodes where that is shorter (Thakur 2005;
NCCL). An axis of a mesh is `size` ranks that are `stride` apart. Inside a node it runs at the link's
rate. Else its ring passes through each node once, beside those of the other min(stride, per_node)
groups that share the node's network: B = min(link, node / groups). An all-to-all adds nothing up on its
way: all ranks of a node send to all others outside, which is the node's rate over its ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.hardware import Device

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


@dataclass(frozen=True)
class Line:
    """Seconds of one hop, and bytes/s of the bus."""

    hop_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Fabric:
    """The links of a cluster: inside a node, and all that a node sends to others."""

    per_node: int
    link: Mapping[str, Line]
    """By collective."""
    node: Mapping[str, Line]
    tree_hop_s: float
    contention: float | None = None
    """Measured by a probe: share of a hidden transfer that compute loses to it; None: the constant."""


@dataclass(frozen=True)
class Wire:
    """Collectives over one axis; sizes in bytes of the whole message, times in seconds."""

    size: int
    latency_s: Mapping[str, float]
    bytes_per_s: Mapping[str, float]
    inside_bytes_per_s: float = math.inf
    """Of a bus inside a node."""

    def all_reduce(self, nbytes: float) -> float:
        return 2 * self._share(nbytes, "all_reduce") + self.latency_s["all_reduce"]

    def reduce_scatter(self, nbytes: float) -> float:
        return self._share(nbytes, "reduce_scatter") + self.latency_s["reduce_scatter"]

    def all_gather(self, nbytes: float) -> float:
        return self._share(nbytes, "all_gather") + self.latency_s["all_gather"]

    def all_to_all(self, nbytes: float) -> float:
        return self._share(nbytes, "all_to_all") + self.latency_s["all_to_all"]

    def busy(self, nbytes: float, collective: str) -> float:
        """Seconds that the same bytes take inside a node: a collective's kernels and copies are as many
        as its bytes are, however long a slow network makes it take."""
        trips = 2 if collective == "all_reduce" else 1
        return trips * (self.size - 1) / self.size * nbytes / self.inside_bytes_per_s

    def send(self, nbytes: float) -> float:
        """To a neighbour."""
        if self.size == 1:
            return 0.0
        hop_s = self.latency_s["all_gather"] / (self.size - 1)
        return hop_s + nbytes / self.bytes_per_s["all_gather"]

    def _share(self, nbytes: float, collective: str) -> float:
        return (self.size - 1) / self.size * nbytes / self.bytes_per_s[collective]


def fabric(device: Device, constants: Constants = DEFAULT) -> Fabric:
    """Of published hardware."""
    link = Line(constants.link_hop_s, device.link_bytes_per_s * constants.link_share)
    node = Line(constants.node_hop_s, device.node_bytes_per_s * constants.node_share)
    return Fabric(
        device.per_node,
        dict.fromkeys(COLLECTIVES, link),
        between(node, device.per_node),
        constants.tree_hop_s,
    )


def between(node: Line, per_node: int) -> dict[str, Line]:
    """Of nodes of `per_node` ranks whose network carries `node`, by collective."""
    each = Line(node.hop_s, node.bytes_per_s / per_node)
    return {**dict.fromkeys(COLLECTIVES, node), "all_to_all": each}


def wire(fabric: Fabric, size: int, stride: int = 1) -> Wire:
    """Collectives over `size` ranks that are `stride` apart."""
    inside = max(1, min(size, fabric.per_node // stride))
    nodes = math.ceil(size / inside)
    groups = min(stride, fabric.per_node)
    latency, rate = {}, {}
    for name in COLLECTIVES:
        link, node = fabric.link[name], fabric.node[name]
        hops = (size - nodes if nodes > 1 else size - 1) * link.hop_s
        hops += (nodes if nodes > 1 else 0) * node.hop_s
        if name == "all_reduce":
            hops *= 2
            if nodes > 1:
                tree = 2 * (inside - 1) * link.hop_s + 2 * math.log2(nodes) * fabric.tree_hop_s
                hops = min(hops, tree)
        latency[name] = hops
        rate[name] = link.bytes_per_s
        if nodes > 1:
            shared = node.bytes_per_s / groups
            rate[name] = shared if inside == 1 else min(rate[name], shared)
    usual = rate["all_reduce"]
    if fabric.contention is None:  # a measured one is of the link as it is
        usual = max(usual, fabric.link["all_reduce"].bytes_per_s)
    return Wire(size, latency, rate, usual)
