"""Sparse codec: of every chunk of values the few largest, each as its place and two bits.

    chunk of C values -> k of the largest magnitude -> place (12 bits), sign (1 bit), level (1 bit)

and for each chunk two magnitudes in bfloat16: a level is the mean of the magnitudes it stands for, those above
and those below the middle between the largest and the smallest that are sent. Exactly

    ceil(n/C) (12 k + 2 k) / 8 bytes of places and values, and 4 ceil(n/C) of levels, for n values:

with C = 4096 and k = 64, 0.219 and 0.008 bit a value. What is not sent is to be kept and sent later (error
feedback: SparseLoCo, arXiv:2508.15706, whose sizes these are; its chunks of matrices are tiles of 64 x 64,
here they are rows of memory). Chunks may straddle parameters. The last one is filled up with zeros.

Decoding adds, in the order of the chunks, to different places: deterministic. Cost: a top-k over each chunk,
a pass over the values, and nothing that grows with n in Python.
"""

from dataclasses import dataclass

import torch

PLACE_BITS = 12
SLICE = 1 << 18
"""Values that are looked through at a time on a CPU."""


@dataclass(frozen=True)
class TopK:
    """`k` of every `chunk` values; chunk at most 4096, k a multiple of 4."""

    k: int = 64
    chunk: int = 4096
    name = "topk"

    def encoded_bytes(self, values: int) -> int:
        return -(-values // self.chunk) * (self.k * (PLACE_BITS + 2) // 8 + 4)

    def encode(
        self, values: torch.Tensor, seed: int = 0, left: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32 [n] -> uint8 [encoded_bytes(n)]; `left` becomes values - decoded. Nothing is drawn."""
        size = SLICE if values.device.type == "cpu" else max(1, len(values))
        found = [self._largest(part) for part in values.split(-(-size // self.chunk) * self.chunk)]
        places, kept = (torch.cat(x) for x in zip(*found, strict=True))
        sizes = kept.abs()
        high = sizes * 2 > sizes.amax(1, keepdim=True) + sizes.amin(1, keepdim=True)
        low_mean = _mean(sizes, ~high)
        high_mean = torch.where(high.any(1), _mean(sizes, high), low_mean)
        levels = torch.stack([low_mean, high_mean], 1).bfloat16()
        pairs = places.view(-1, 2)
        first, second = pairs[:, 0], pairs[:, 1]
        place_bytes = torch.stack([first & 255, first >> 8 | (second & 15) << 4, second >> 4], 1)
        bits = ((kept < 0).int() | high.int() << 1).view(-1, 4)
        value_bytes = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
        code = torch.cat([
            levels.view(torch.uint8).view(-1), place_bytes.to(torch.uint8).view(-1), value_bytes.to(torch.uint8),
        ])  # fmt: skip
        if left is not None:
            if left is not values:
                left.copy_(values)
            self.decode(code, left, add=True, sign=-1.0)
        return code

    def _largest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each chunk: places [chunks, k] in order, and the values there."""
        missing = -len(values) % self.chunk
        values = torch.nn.functional.pad(values, (0, missing)) if missing else values
        chunks = values.view(-1, self.chunk)
        places = chunks.abs().topk(self.k, dim=1, sorted=False).indices.sort(dim=1).values
        return places, chunks.gather(1, places)

    def decode(
        self, code: torch.Tensor, out: torch.Tensor, add: bool = False, sign: float = 1.0
    ) -> None:
        """uint8 -> float32 [n], written to `out` or added to it `sign` times."""
        chunks = -(-len(out) // self.chunk)
        levels, places, values = code.split(
            [4 * chunks, chunks * self.k * PLACE_BITS // 8, chunks * self.k // 4]
        )
        a, b, c = places.view(-1, 3).long().unbind(1)
        at = torch.stack([a | (b & 15) << 8, b >> 4 | c << 4], 1).view(chunks, self.k)
        at += torch.arange(0, chunks * self.chunk, self.chunk, device=code.device)[:, None]
        bits = torch.stack([values >> s & 3 for s in (0, 2, 4, 6)], 1).view(chunks, self.k).long()
        sizes = levels.clone().view(torch.bfloat16).view(chunks, 2).float()
        found = sizes.gather(1, bits >> 1) * (sign - 2 * sign * (bits & 1))
        inside = at < len(out)  # what fills up is zeros, and may be among the largest
        if not add:
            out.zero_()
        out.index_add_(0, at[inside], found[inside])


def _mean(sizes: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Of each row's values where it says so; 0 where nowhere."""
    return (sizes * where).sum(1) / where.sum(1).clamp_min(1)
