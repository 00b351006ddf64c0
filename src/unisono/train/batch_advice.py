"""Would a larger batch pay? The measured noise scale and the published law, in a line or two.

A batch of x critical sizes needs 1 + 1/x of the fewest steps and 1 + x of the fewest tokens (McCandlish
et al. 2018, arXiv 1812.06162). Doubling it, on twice the devices, is therefore

    2 (1 + x) / (1 + 2 x) times as fast, for (1 + 2 x) / (1 + x) times the tokens,

with the critical size measured (observe/noise.py) or, where it could not be, the law of
forecast/price.py. Both are proxies: they agree with trials within a factor of two to five, and the law
counts a batch as critical when it needs 20% more tokens, so it may well lie below the noise scale.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from unisono.config import Config
from unisono.forecast.price import critical_batch_tokens
from unisono.observe.noise import NoiseScale
from unisono.plan import Plan
from unisono.train.scaling import scale

PAYS, HARDLY_PAYS = 1.5, 1.2
"""Doubling pays where it is at least this much faster, and not at all below the second: 0.5 and 2
critical sizes."""
UNKNOWN = 4.0
"""High over low: a noise scale that is less certain is told, but gives no advice."""


@dataclass(frozen=True)
class Advice:
    """Tokens are those of blocks, as in the plan. None: not known, or not bounded."""

    batch_tokens: int
    noise_scale_tokens: float | None
    noise_scale_low_tokens: float | None
    noise_scale_high_tokens: float | None
    noise_scale_samples: int
    """Steps that were measured."""
    critical_tokens: float
    """Of the law, for the tokens so far."""
    share: float
    """The batch over the critical size that the advice goes by."""
    doubling_faster: float
    doubling_tokens: float
    lines: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def doubling(share: float) -> tuple[float, float]:
    """(times as fast, times the tokens) of twice a batch that is `share` of the critical size."""
    tokens = (1 + 2 * share) / (1 + share)
    return 2 / tokens, tokens


def halving(share: float) -> tuple[float, float]:
    """(times as long, times the tokens) of half of it."""
    tokens = (1 + share / 2) / (1 + share)
    return 2 * tokens, tokens


def metrics(noise: NoiseScale | None, plan: Plan, tokens: int) -> dict[str, float]:
    """Values of a row of metrics after `tokens`; of the noise scale only those that are known."""
    of_batch = _in_plan_tokens(noise, plan)
    found = {f"batch__{name}": value for name, value in of_batch.items() if value is not None}
    return {**found, "batch__critical_tokens": critical_batch_tokens(tokens)}


def advise(noise: NoiseScale | None, plan: Plan, config: Config, tokens: int) -> Advice:
    """What is to be said after `tokens` of training."""
    batch, law = _batch_tokens(plan), critical_batch_tokens(tokens)
    of_batch = _in_plan_tokens(noise, plan)
    low, high = of_batch["noise_scale_low_tokens"], of_batch["noise_scale_high_tokens"]
    measured = of_batch["noise_scale_tokens"]
    certain = bool(measured and low and high and high <= UNKNOWN * low)
    critical = measured if certain and measured else law
    share = batch / critical
    faster, more = doubling(share)
    lines = [
        f"Batch: {batch:,} tokens are {_short(share)} of the "
        + (
            f"gradient noise scale, {_k(critical)} ({_k(low or 0)} to {_k(high or 0)}); "
            if certain
            else f"published critical batch, {_k(law)} for {_k(tokens)} tokens of training; "
        )
        + _verdict(share)
    ]
    if certain:
        lines.append(
            f"The published law puts the critical batch (20% more tokens than small ones) at {_k(law)} "
            f"for {_k(tokens)} tokens of training: this one is {_short(batch / law)} of it"
        )
    elif measured or low:
        upper = _k(high) if high else "no bound"
        lines.append(
            f"The gradient noise scale is not certain enough to go by: {_k(low or 0)} to {upper}; a "
            f"longer run tells"
        )
    else:
        lines.append(f"The gradient noise scale is not known: {_why_unknown(plan)}")
    if faster >= HARDLY_PAYS:
        lines.append(_larger(plan, config))
    return Advice(
        batch_tokens=batch,
        **of_batch,
        noise_scale_samples=noise.samples if noise else 0,
        critical_tokens=law,
        share=share,
        doubling_faster=faster,
        doubling_tokens=more,
        lines=lines,
    )


def _verdict(share: float) -> str:
    faster, more = doubling(share)
    cost = f"{faster:.1f}x faster for {more:.1f}x the tokens"
    if faster >= PAYS:
        return f"doubling devices at this batch per device still pays: {cost}"
    if faster >= HARDLY_PAYS:
        return f"doubling devices at this batch per device gains little: {cost}"
    longer, fewer = halving(share)
    return (
        f"doubling it does not pay: {cost}; half of it would take {longer:.1f}x as long for "
        f"{fewer:.1f}x the tokens"
    )


def _larger(plan: Plan, config: Config) -> str:
    """How to write twice the batch, and what becomes of the learning rate."""
    base, twice = config.base_batch_size or plan.global_batch_size, 2 * plan.global_batch_size
    larger = scale(config.model_copy(update={"base_batch_size": base, "global_batch_size": twice}))
    return (
        f"To double: global_batch_size={twice} base_batch_size={base}; the learning rate goes from "
        f"{plan.hyper.learning_rate:.3g} to {larger.learning_rate:.3g} ({larger.reason})"
    )


def _why_unknown(plan: Plan) -> str:
    if plan.mesh.inner > 1:
        return "ranks that share samples have no gradient of their own ones to compare"
    if plan.replicas == 1 and plan.accumulation == 1:
        return (
            "one replica with one micro-batch a step has nothing to compare; a smaller "
            "micro_batch_size or a second replica does"
        )
    return "too few steps were measured"


def _batch_tokens(plan: Plan) -> int:
    return plan.global_batch_size * plan.sample_tokens


def _in_plan_tokens(noise: NoiseScale | None, plan: Plan) -> dict[str, float | None]:
    """From target tokens to those of whole blocks, in which the plan counts."""
    names = ("noise_scale_tokens", "noise_scale_low_tokens", "noise_scale_high_tokens")
    if noise is None:
        return dict.fromkeys(names)
    per_target = _batch_tokens(plan) / noise.batch
    values = (noise.tokens, noise.low, noise.high)
    return {
        name: value * per_target if 0 < value < math.inf else None
        for name, value in zip(names, values, strict=True)
    }


def _k(tokens: float) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if tokens >= size:
            return f"{tokens / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{tokens:,.0f}"


def _short(share: float) -> str:
    return f"{share:.2g}" if share < 10 else f"{share:,.0f}"
