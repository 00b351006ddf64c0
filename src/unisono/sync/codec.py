"""Codecs: float32 values as few bytes, and back.

Every block of 256 values has a scale of its own, its largest magnitude over the largest code, sent as
float32 in front of the codes:

    int8:  codes -127..127, one byte each;    n + 4 ceil(n/256) bytes for n values
    int4:  codes -7..7, two to a byte;        32 ceil(n/32)/2 + 4 ceil(n/256) bytes

A block with one value far above the rest leaves too few codes for the rest. int4 therefore rotates: every
32 values are multiplied by the orthonormal Hadamard matrix before, and after (it is its own inverse), which
spreads such a value over all 32 (as QuaRot, arXiv:2404.00456, and SDP4Bit, arXiv:2410.15526, do). 32 and
not more, because a product with 64 x 64 takes 1.6 times and with 128 x 128 3.2 times as long (0.80, 1.28
and 2.49 ns a value on one core of the AMD EPYC that benchmarks/codec.py ran on).

Rounding is to nearest, half to even, where what it leaves is sent later (error feedback); else stochastic,
floor(y + u) with u uniform in [0, 1), whose mean is y. The noise u is one fixed table, read from a place
that is a hash of the seed and of the position: no generator has a state, and the same values and seed give
the same bytes. A block that holds a value that is not finite comes out with one (what else it held is lost).

Cost: passes over slices that stay in a core's cache; measured by benchmarks/codec.py.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from unisono.errors import ConfigError

BLOCK = 256
"""Values that share a scale."""
ROTATED = 32
"""Values that a rotation mixes."""
SLICE = 1 << 16
"""Values that are coded at a time on a CPU: they and what is made of them stay in a core's cache."""
NOISE = 1 << 16
"""Places in the table of noise at which a slice may begin to read."""
SMALLEST_SCALE = 1e-30
"""Of a block of zeros, or of what may count as zeros: 1 / scale is finite."""
MARGIN = 1 + 2.0**-16
"""Scales are larger by so much, so that noise below 1 lifts no value above the largest code."""


class Codec(Protocol):
    """Deterministic: the same values and seed give the same bytes on the same kind of machine."""

    @property
    def name(self) -> str: ...

    def encoded_bytes(self, values: int) -> int:
        """Exactly what `encode` gives."""
        ...

    def encode(
        self, values: torch.Tensor, seed: int = 0, left: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32 [n], contiguous -> uint8 [encoded_bytes(n)]; `seed` is that of stochastic rounding.

        `left` (float32 [n], perhaps `values` itself) becomes what was not sent: values - decoded.
        """
        ...

    def decode(self, code: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """uint8 [encoded_bytes(n)] -> float32 [n], written to `out` or added to it."""
        ...


@dataclass(frozen=True)
class Int8:
    """One byte a value."""

    stochastic: bool = False
    """Rounding; False: to nearest."""
    name = "int8"

    def encoded_bytes(self, values: int) -> int:
        return values + 4 * -(-values // BLOCK)

    def encode(
        self, values: torch.Tensor, seed: int = 0, left: torch.Tensor | None = None
    ) -> torch.Tensor:
        n = len(values)
        code = torch.empty(self.encoded_bytes(n), dtype=torch.uint8, device=values.device)
        codes = code[len(code) - n :].view(torch.int8)
        scales = torch.empty(-(-n // BLOCK), 1, device=values.device)
        for part, a, b, blocks in _slices(n, values.device):
            x, scale = values[a:b].view(blocks.stop - blocks.start, -1), scales[blocks]
            y = _scaled(x, scale, 127)
            _round(y, (seed, part) if self.stochastic else None)
            codes[a:b].view(y.shape).copy_(y)
            if left is not None:
                torch.addcmul(x, y, scale, value=-1, out=left[a:b].view(x.shape))
        code[: len(code) - n].copy_(scales.view(-1).view(torch.uint8))
        return code

    def decode(self, code: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        n = len(out)
        codes = code[len(code) - n :].view(torch.int8)
        scales = _scales(code, n)
        for _, a, b, blocks in _slices(n, out.device):
            target = out[a:b].view(blocks.stop - blocks.start, -1)
            y = codes[a:b].view(target.shape).float()
            if add:
                target.addcmul_(y, scales[blocks])
            else:
                torch.mul(y, scales[blocks], out=target)


@dataclass(frozen=True)
class Int4:
    """Half a byte a value."""

    stochastic: bool = False
    """Rounding; False: to nearest."""
    rotated: bool = True
    """False: for values without outliers, such as the changes that AdamW makes."""
    name = "int4"

    def encoded_bytes(self, values: int) -> int:
        return ROTATED // 2 * -(-values // ROTATED) + 4 * -(-values // BLOCK)

    def encode(
        self, values: torch.Tensor, seed: int = 0, left: torch.Tensor | None = None
    ) -> torch.Tensor:
        n = len(values)
        code = torch.empty(self.encoded_bytes(n), dtype=torch.uint8, device=values.device)
        num_blocks = -(-n // BLOCK)
        codes = code[4 * num_blocks :].view(torch.int8)
        scales = torch.empty(num_blocks, 1, device=values.device)
        for part, a, b, blocks in _slices(n, values.device):
            x, scale = _padded(values[a:b]), scales[blocks]
            y = x.view(-1, ROTATED) @ _hadamard(x.device) if self.rotated else x
            y = _scaled(y.view(len(scale), -1), scale, 7)
            _round(y, (seed, part) if self.stochastic else None)
            half = y.shape[1] // 2
            # Two codes as one number of -119 to 119: 16 times the second and the first.
            pairs = torch.add(y[:, :half], y[:, half:], alpha=16)
            codes[a // 2 : a // 2 + pairs.numel()].view(pairs.shape).copy_(pairs)
            if left is not None:
                self._add(values[a:b], y.mul_(scale), -1.0, left[a:b])
        code[: 4 * num_blocks].copy_(scales.view(-1).view(torch.uint8))
        return code

    def decode(self, code: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        n = len(out)
        scales = _scales(code, n)
        codes = code[4 * len(scales) :].view(torch.int8)
        for _, a, b, blocks in _slices(n, out.device):
            count = blocks.stop - blocks.start
            width = -(-(b - a) // (count * ROTATED)) * ROTATED
            half = width // 2
            pairs = codes[a // 2 : a // 2 + count * half].view(count, half).float()
            y = torch.empty(count, width, device=out.device)
            second = torch.mul(pairs, 1 / 16, out=y[:, half:]).round_()  # |first| / 16 < 1/2
            torch.sub(pairs, second, alpha=16, out=y[:, :half])
            y.mul_(scales[blocks])
            if not add:
                out[a:b].zero_()
            self._add(out[a:b], y, 1.0, out[a:b])

    def _add(self, x: torch.Tensor, y: torch.Tensor, sign: float, out: torch.Tensor) -> None:
        """out = x + sign y, y rotated back."""
        n, rows = len(x), (-1, ROTATED)
        if not self.rotated:
            torch.add(x, y.view(-1)[:n], alpha=sign, out=out)
        elif n % ROTATED == 0:
            turn = _hadamard(x.device)
            torch.addmm(x.view(rows), y.view(rows), turn, alpha=sign, out=out.view(rows))
        else:
            y = y.view(rows) @ _hadamard(x.device)
            torch.add(x, y.view(-1)[:n], alpha=sign, out=out)


def make_codec(name: str, *, stochastic: bool = False, rotated: bool = True) -> Codec:
    """The codec of that name; `stochastic`: for values whose rounding errors nothing keeps."""
    if name == "int8":
        return Int8(stochastic)
    if name == "int4":
        return Int4(stochastic, rotated)
    raise ConfigError(f"wire: found {name}; there are codecs int8 and int4")


def _slices(n: int, device: torch.device) -> list[tuple[int, int, int, slice]]:
    """(number, begin, end, blocks): whole blocks, then the one that is not whole by itself.

    On a GPU all whole blocks at once, since every slice would be a launch.
    """
    whole = n // BLOCK * BLOCK
    size = SLICE if device.type == "cpu" else max(whole, 1)
    cuts = [(a, min(a + size, whole)) for a in range(0, whole, size)]
    cuts += [(whole, n)] if whole < n else []
    return [(k, a, b, slice(a // BLOCK, -(-b // BLOCK))) for k, (a, b) in enumerate(cuts)]


def _scaled(x: torch.Tensor, scale: torch.Tensor, largest: int) -> torch.Tensor:
    """x / scale, a row at a time; `scale` [rows, 1] becomes such that its largest is `largest`."""
    y = x.abs()
    torch.amax(y, 1, keepdim=True, out=scale)  # a value that is not finite stays that
    scale.mul_(MARGIN / largest).clamp_min_(SMALLEST_SCALE)
    return torch.mul(x, scale.reciprocal(), out=y)


def _round(y: torch.Tensor, noise: tuple[int, int] | None) -> None:
    if noise is None:
        y.round_()
    else:
        y.view(-1).add_(_noise(*noise, y.numel(), y.device))
        y.floor_()


def _scales(code: torch.Tensor, n: int) -> torch.Tensor:
    """float32 [blocks, 1], wherever in memory the code begins."""
    return code[: 4 * -(-n // BLOCK)].clone().view(torch.float32).view(-1, 1)


def _padded(x: torch.Tensor) -> torch.Tensor:
    missing = -len(x) % ROTATED
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _noise(seed: int, part: int, n: int, device: torch.device) -> torch.Tensor:
    """n values of [0, 1) for slice `part`."""
    at = mix(seed, part) % NOISE
    table = _noise_table(device)
    if n <= SLICE:
        return table[at : at + n]
    return table[(torch.arange(n, device=device) + at) % NOISE]


def mix(*numbers: int) -> int:
    """64 bits that depend on all of them, as SplitMix64 mixes (Steele et al., 2014)."""
    x = 0
    for number in numbers:
        x = (x ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x


@lru_cache
def _noise_table(device: torch.device) -> torch.Tensor:
    """Evenly spaced numbers in a fixed random order: their mean is 1/2 to the last bit but one."""
    order = torch.randperm(NOISE, generator=torch.Generator().manual_seed(0))
    table = (order.double() + 0.5).div_(NOISE).float()
    return torch.cat([table, table[:SLICE]]).to(device)


@lru_cache
def _hadamard(device: torch.device) -> torch.Tensor:
    """Orthonormal and symmetric, [ROTATED, ROTATED] (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < ROTATED:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div_(ROTATED**0.5).to(device)
