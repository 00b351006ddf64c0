"""What a step takes on average where replicas step alone and come together every H steps (sync/streaming.py).

A fragment, 1/P of what is trained, leaves every H/P steps and is waited for `delay` steps later; every step ends
with a vote. One period of H/P steps is played (overlap.py): what does not hide behind `delay` steps is stood
still for. Besides, deltas are made, coded, decoded and applied once in H steps.
"""

from unisono.forecast.overlap import Segment, Transfer, play

OUTER_BYTES = 104
"""That a value moves through memory in an outer step beside its codes, reading and writing 4 bytes at a time, counted
from sync/streaming.py: weights gathered (8), taken from the outer ones (12), feedback (20), the mean (8), momentum
(20 + 12), the outer weights (12), the own ones drawn towards them (12)."""


def average_step_s(
    step_s: float, transfer: Transfer, *, every: int, fragments: int, delay: int, vote_s: float,
    handling_s: float,
) -> float:  # fmt: skip
    """`step_s`: of a step alone; `transfer`: of one fragment; `handling_s`: of all values, once in H steps."""
    period = max(1, every // fragments)
    segments = [Segment(0.0, sends=(0,))]
    for k in range(period):
        needs = (0,) if k == delay - 1 or (k == 0 and not delay) else ()
        if delay:
            segments += [Segment(step_s), Segment(0.0, needs=needs)]
        else:
            segments += [Segment(0.0, needs=needs), Segment(step_s)]
    total = play(segments, [transfer])
    return (total + handling_s / fragments) / period + vote_s


def sent_values(values: float, ranks: int, only_gather: bool) -> float:
    """Values, coded, that a rank sends for the sum of `values`: the less of n-1 and 2 (n-1)/n of them."""
    if ranks <= 2 or only_gather:
        return values * (ranks - 1)
    return 2 * values * (ranks - 1) / ranks
