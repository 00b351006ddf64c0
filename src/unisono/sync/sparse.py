"""Sparse deltas every H steps: SparseLoCo (Sarfi et al. 2025, arXiv:2508.15706).

    e <- b e + delta,   c = the largest of e (sync/topk.py),   e <- e - c,   W <- W - r mean(c)

which is sync/streaming.py with one fragment, no outer momentum (what is kept of e takes its place), a codec
that keeps k of every chunk, and all-gather only: a sum of sparse values is not sparse. A rank sends
(n-1) ceil(v/C) (14 k / 8 + 4) bytes in H steps for v values over n replicas: at C = 4096, k = 64 and two
replicas 0.227 bit a parameter, 141 times less than float32. It receives as much from each.
"""

from unisono.sync.outer import Outer
from unisono.sync.topk import TopK


def sparse_outer(
    *, sync_every: int, top_k: int, chunk: int, feedback_decay: float, learning_rate: float
) -> Outer:
    """The rule of this file, for the strategy of sync/streaming.py."""
    return Outer(
        codec=TopK(top_k, chunk),
        sync_every=sync_every,
        learning_rate=learning_rate,
        feedback_decay=feedback_decay,
        only_gather=True,
    )
