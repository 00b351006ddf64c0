"""How fast is the link between the replicas? Measured with the collectives that training uses."""

import math
import time
from dataclasses import dataclass

import torch

from unisono.sync.ledger import Group

SMALL_BYTES, LARGE_BYTES = 1 << 10, 4 << 20
BUSY_S = 1e-3
"""What a collective costs on a CPU beside its time on the wire, where every core computes: gloo's threads
take the cores. Whole gradients of 54 MB in buckets of 1.4 MiB took 28 ms longer than in 8 MiB on a link
that costs nothing."""
NARROW_BUSY_S = 3e-3
"""Likewise of a bucket that is rounded or encoded: many small operations, none of which is quick the first time
that a core sees its memory. 13.5 M parameters at 500 Mbit/s, a step over compute, three repeats: bfloat16 in
buckets of 2.1 and 3 MiB 1.09 and 1.05; int8 of 3 and 6 MiB 1.07 and 1.04, and of 2.1 MiB in a run before 1.18.
A later run, with the sizes that this gives, had 1.09 and 1.11."""
WHOLE_SHARE = 0.1
"""Whole gradients pay where the wire needs less than this of the compute. Then nearly all of it hides
behind the backward pass alone, and the second way's collectives cost more than they hide. Measured with
13.5 M parameters, two hosts of one core, step over the best of DDP: 1.02 whole and 1.03 in shards at
0.03, 0.99 and 0.98 at 0.18, 1.01 and 0.92 at 0.43."""
SLOW_S = 0.25
"""A transfer that takes longer is not repeated: the link is slow, and the figure good enough."""


@dataclass(frozen=True)
class Link:
    """T = latency + bytes / bandwidth of an all-to-all, `bytes` being those that each rank sends."""

    latency_s: float
    bytes_per_s: float
    busy_s: float = 0.0
    """What a collective costs besides, in the midst of a step."""

    def bucket_mb(self, total_bytes: int, wire_bytes: float = 4.0) -> float:
        """The size of buckets at which `total_bytes` of gradients take the least time, in MiB.

        A bucket of s bytes costs c = latency + busy each, S/s of them, and the last one has nothing
        left to hide behind: S c / s + s w / B, with w the bytes of the wire to one of memory, is least at
        s = sqrt(S c B / w). Between 1 and 64 MiB. `wire_bytes`: of a value of 4 bytes.
        """
        narrow = wire_bytes < 4
        busy_s = max(self.busy_s, NARROW_BUSY_S) if narrow and self.busy_s else self.busy_s
        cost_s = self.latency_s + busy_s
        best = math.sqrt(max(1, total_bytes) * cost_s * self.bytes_per_s * 4 / min(4.0, wire_bytes))
        return round(min(64.0, max(1.0, best / 2**20)), 1)

    def hides_whole(self, total_bytes: int, replicas: int, compute_s: float) -> bool:
        """Whether gradients of `total_bytes` travel whole in a small part of a step's compute."""
        wire_s = 2 * total_bytes * (replicas - 1) / replicas / self.bytes_per_s
        return wire_s <= WHOLE_SHARE * compute_s


def measure_link(group: Group, device: str) -> Link | None:
    """Collective: the slowest rank's figures, the same on every rank; None for one rank.

    Takes 10 ms on a fast link and half a second at 100 Mbit/s.
    """
    if group.size == 1:
        return None
    small = _seconds(group, SMALL_BYTES, device, 15)
    large = _seconds(group, LARGE_BYTES, device, 5)
    latency, slow = group.each(small, large).amax(dim=0).tolist()
    sent = LARGE_BYTES * (group.size - 1) / group.size
    busy = BUSY_S if device == "cpu" else 0.0
    return Link(latency, sent / max(1e-6, slow - latency), busy)


def _seconds(group: Group, nbytes: int, device: str, repeats: int) -> float:
    """Collective: the least time of an all-to-all of `nbytes` in all on this rank.

    Not the median: on a shaped link one in three takes twice as long, its directions in turn.
    """
    count = nbytes // 4 // group.size * group.size
    sent = torch.zeros(count, device=device)
    received = torch.empty_like(sent)
    times: list[float] = []
    for _ in range(repeats + 1):
        group.barrier()
        began = time.perf_counter()
        group.all_to_all(received, sent).wait()
        if sent.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if group.sum(float(times[-1] > SLOW_S))[0]:
            break
    return min(times[1:] or times)
