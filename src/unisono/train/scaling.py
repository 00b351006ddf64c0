"""Hyper-parameters for a batch other than the one they were tuned for.

With k = global_batch_size / base_batch_size:

- SGD, linear: learning rate x k (Goyal et al. 2017, arXiv 1706.02677).
- Adam family, square root: learning rate x sqrt(k), betas to the power k (the same half-life in
  tokens; beta2 not below 0.9), epsilon / sqrt(k) (Malladi et al. 2022, arXiv 2205.10287), weight
  decay x sqrt(k), which keeps learning_rate * weight_decay * k, its timescale in tokens (Wang and
  Aitchison 2024, arXiv 2405.13698).

Both hold while the batch is below the critical batch size. `batch_scaling: linear` on AdamW scales
the learning rate only, as its users expect.
"""

import math
from dataclasses import dataclass

from unisono.config import Config

BETA2_FLOOR = 0.9


@dataclass(frozen=True)
class Hyper:
    """What the optimizer is given, and why."""

    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    reason: str


def scale(config: Config) -> Hyper:
    """The hyper-parameters for `global_batch_size`."""
    as_given = Hyper(
        config.learning_rate,
        config.weight_decay,
        config.adam_beta1,
        config.adam_beta2,
        config.adam_epsilon,
        "as given (no base_batch_size)",
    )
    base, batch = config.base_batch_size, config.global_batch_size
    if base is None:
        return as_given
    k = batch / base
    rule = config.batch_scaling
    if rule == "auto":
        rule = "linear" if config.optim == "sgd" else "sqrt"
    ratio = f"batch {batch} / base_batch_size {base} = {k:g}"
    if rule == "none" or k == 1:
        return Hyper(**{**vars(as_given), "reason": f"as given; {ratio}, rule {rule}"})
    if rule == "linear" or config.optim == "sgd":
        factor, name = (k, "linear") if rule == "linear" else (math.sqrt(k), "square root")
        reason = f"{config.learning_rate:g} x {factor:.4g}: {ratio}, {name} rule"
        return Hyper(
            **{**vars(as_given), "learning_rate": config.learning_rate * factor, "reason": reason}
        )
    root = math.sqrt(k)
    beta2 = config.adam_beta2**k
    if k > 1:
        beta2 = max(beta2, min(BETA2_FLOOR, config.adam_beta2))
    return Hyper(
        learning_rate=config.learning_rate * root,
        weight_decay=config.weight_decay * root,
        beta1=config.adam_beta1**k,
        beta2=beta2,
        epsilon=config.adam_epsilon / root,
        reason=f"{config.learning_rate:g} x sqrt({k:g}): {ratio}, square root rule for AdamW "
        f"(betas, epsilon, weight decay with it)",
    )


def warmup_steps(config: Config, hyper: Hyper, max_steps: int) -> tuple[int, str]:
    """Steps of linear warm-up and the reason. Counts optimizer steps, whatever the batch."""
    asked = config.warmup_steps
    if asked != "auto":
        if asked < 1:
            return math.ceil(asked * max_steps), f"{asked:g} of {max_steps} steps"
        return int(asked), "as given"
    if config.lr_scheduler_type == "constant":
        return 0, "the schedule is constant"
    memory = 0 if config.optim == "sgd" else math.ceil(2 / (1 - hyper.beta2))
    wanted = max(memory, math.ceil(0.01 * max_steps), 100)
    most = max_steps // 10
    if wanted > most:
        return most, f"a tenth of {max_steps} steps (a longer run would take {wanted})"
    return wanted, "the most of 2/(1-beta2), 1% of the steps, and 100"
