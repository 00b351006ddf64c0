"""The learning rate of a step: a pure function, so a resume needs nothing but the step."""

import math


def factor(kind: str, step: int, warmup: int, steps: int, min_ratio: float, decay: float) -> float:
    """Share of the peak rate for the optimizer step `step` (0 is the first) of `steps`.

    Names and shapes as in transformers.optimization: linear warm-up from 0, then the named decay
    that would reach its end after the last step. `decay`: share of the run that
    warmup_stable_decay spends falling, in a straight line.
    """
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if kind == "constant_with_warmup":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - done)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if kind == "cosine_with_min_lr":
        return min_ratio + (1 - min_ratio) * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    assert kind == "warmup_stable_decay", kind
    start = max(warmup, round(steps * (1 - decay)))
    if step < start:
        return 1.0
    return 1.0 - (1.0 - min_ratio) * (step - start) / max(1, steps - start)
