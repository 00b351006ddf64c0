"""Sparse patterns: which blocks of keys a block of queries sees. Combined with `causal` by Mask.

Contract: `blocks(q, k)` takes block numbers as arrays that broadcast, position // block, and says
which pairs of blocks may hold anything visible; without `visible` it is the whole truth: all of such
a pair is visible. `visible(i, j, head)` takes positions (LongTensors [Sq, 1], [1, Sk] and [H, 1, 1])
and is the truth where it is given. Without `blocks` it is evaluated everywhere, which costs S^2
operations, though never S^2 memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Blocks = Callable[[np.ndarray, np.ndarray], np.ndarray]
Visible = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pattern:
    """A sparse pattern; see the module's contract."""

    name: str
    block: int
    """Tokens of a block, of queries and of keys."""
    blocks: Blocks | None = None
    visible: Visible | None = None
    by_head: bool = False
    """`visible` depends on the head."""
    relative: bool = False
    """`visible` depends on i - j alone, so that tiles can share one mask."""


def bigbird(
    block: int = 64, window: int = 3, first: int = 1, random: int = 3, seed: int = 0
) -> Pattern:
    """BigBird (Zaheer et al. 2020), causal: `window` blocks up to one's own, the `first` blocks of the
    sequence, and `random` blocks that a hash of (seed, block of queries) picks among all earlier ones."""

    def blocks(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        seen = ((q - k >= 0) & (q - k < window)) | (k < first)
        for pick in range(random):
            seen |= k == _hash(q * random + pick, seed) % np.maximum(q, 1)
        return seen

    return Pattern("bigbird", block, blocks)


def strided(block: int = 64, stride: int = 8, window: int = 1) -> Pattern:
    """Sparse Transformer (Child et al. 2019), in blocks: `window` blocks up to one's own, and every
    `stride`-th block before it."""

    def blocks(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return (q - k >= 0) & ((q - k < window) | ((q - k) % stride == 0))

    return Pattern("strided", block, blocks)


def dilated(window: int, dilation: int) -> Pattern:
    """Longformer's dilated window (Beltagy et al. 2020): `window` keys, each `dilation` from the next."""

    def blocks(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return (q - k) <= -(-window * dilation // block)

    def visible(i: torch.Tensor, j: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return (i - j < window * dilation) & ((i - j) % dilation == 0)

    block = 64
    return Pattern("dilated", block, blocks, visible, relative=True)


def function(
    visible: Visible, *, block: int = 128, blocks: Blocks | None = None, by_head: bool = False
) -> Pattern:
    """Any rule of one's own, as the module's contract says."""
    return Pattern("function", block, blocks, visible, by_head)


def _hash(x: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014): the same picks on every rank and in every run."""
    z = (np.asarray(x).astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
