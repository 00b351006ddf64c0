"""Buckets: parameters whose gradients travel together, flat in memory.

A bucket is a matrix of one row for each rank; rank r owns row r. Parameters lie in it one after
another, each at a multiple of ALIGN bytes, with zeros between and behind them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn import Parameter

from unisono.sync.ledger import Handle
from unisono.sync.tree import TreeSum

ALIGN = 64
"""Bytes. Every gradient starts at a multiple, so that kernels treat it alike wherever it lies."""


class Layout:
    """Where the parameters of a bucket lie. Holds no memory."""

    def __init__(
        self, params: Sequence[tuple[int, Parameter]], replicas: int, block: int = 1
    ) -> None:
        """`params`: (index in the model's order, parameter). `block`: values that parameters and rows
        begin at a multiple of, besides ALIGN."""
        first = params[0][1]
        self.dtype, self.device, self.replicas = first.dtype, first.device, replicas
        step = max(ALIGN // first.element_size(), block)
        self.indices = [i for i, _ in params]
        self.shapes = [p.shape for _, p in params]
        self.offsets: list[int] = []
        end = 0
        for _, p in params:
            self.offsets.append(end)
            end += -(-p.numel() // step) * step
        self.row_length = -(-end // (replicas * step)) * step
        self.size = replicas * self.row_length

    def cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's part of a tensor that is laid out as this bucket."""
        return [
            flat[offset : offset + shape.numel()].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(at, begin, end): elements begin to end of each parameter lie in `row` from `at` on.

        begin = end where there are none.
        """
        low = row * self.row_length
        result = []
        for offset, shape in zip(self.offsets, self.shapes, strict=True):
            begin = min(max(low - offset, 0), shape.numel())
            end = min(max(low + self.row_length - offset, 0), shape.numel())
            result.append((offset + begin - low if begin < end else 0, begin, end))
        return result

    def index_at(self, position: int) -> int | None:
        """Index of the parameter that element `position` of the bucket belongs to, if one does."""
        for i, offset, shape in zip(self.indices, self.offsets, self.shapes, strict=True):
            if offset <= position < offset + shape.numel():
                return i
        return None


class Bucket(Layout):
    """A bucket's gradients, and how far they have come in this step."""

    def __init__(
        self, params: Sequence[tuple[int, Parameter]], replicas: int, leaves: int | None = None
    ) -> None:
        super().__init__(params, replicas)
        self.flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.views = self.cut(self.flat)
        # Zeros, so that `blame` finds nothing in what has not been received yet.
        self.received = torch.zeros_like(self.flat).view(replicas, -1) if replicas > 2 else None
        self.tree = TreeSum(leaves) if leaves else None
        self.reset()

    def reset(self) -> None:
        self.missing = set(self.indices)
        """Parameters that have no gradient yet in this micro-batch (or, without a tree, step)."""
        self.pending = len(self.indices)
        """Parameters that the communicating backward pass has yet to reach."""
        self.scatter: Handle | None = None
        self.gather: Handle | None = None

    def fill_missing(self) -> None:
        for i, view in zip(self.indices, self.views, strict=True):
            if i in self.missing:
                view.zero_()


def group_by_size(
    order: Iterable[int], params: Sequence[Parameter], bucket_bytes: int, tail_bytes: int
) -> list[list[tuple[int, Parameter]]]:
    """Cut `order` into lists of one dtype and device and about `bucket_bytes`.

    The last list has about `tail_bytes`: it leaves when nothing is left to hide behind.
    """
    groups: list[list[tuple[int, Parameter]]] = []
    size, limit = 0, tail_bytes
    for i in reversed(list(order)):
        p = params[i]
        nbytes = p.numel() * p.element_size()
        last = groups[-1][-1][1] if groups else None
        same = last is not None and (last.dtype, last.device) == (p.dtype, p.device)
        if not same or size + nbytes > limit:
            limit = bucket_bytes if groups else tail_bytes
            groups.append([])
            size = 0
        groups[-1].append((i, p))
        size += nbytes
    return [group[::-1] for group in reversed(groups)]
