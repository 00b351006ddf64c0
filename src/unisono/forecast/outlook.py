"""The answer to a user: for every number of devices speed, memory, hours, money; and where it stops paying.

An `Outlook` is plain values; `as_json`, `show` (terminal) and `page` (HTML) only print it. Efficiency is
the throughput of a device relative to the best that this or any smaller number of devices reaches.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unisono.config import Config, TokenizerConfig
from unisono.errors import ConfigError
from unisono.forecast.architecture import of_model
from unisono.forecast.constants import UNCERTAINTY
from unisono.forecast.ladder import TARGET, choose
from unisono.forecast.price import critical_batch_tokens, token_cost
from unisono.forecast.search import (
    Found,
    Job,
    Machine,
    Option,
    counts,
    overrides,
    required_link,
    runs_here,
    search,
)

EFFICIENCIES = (0.95, 0.90, 0.85)
SHOWN = 8
"""Options of one number of devices that are listed."""


@dataclass(frozen=True)
class Point:
    """The recommended option of one number of devices, and what it means."""

    devices: int
    option: Option
    best: Option
    """The fastest of all, whether or not `unisono train` does it."""
    found: Found
    efficiency: float
    low: float
    """Tokens/s with the error bar taken off."""
    high: float
    hours: float
    usd: float | None
    kwh: float | None
    usd_per_billion: float | None
    """Or device-hours, without a price."""
    critical_share: float
    """The batch over the critical batch."""
    link_bytes_per_s: float | None
    """For 95%; None: no link suffices."""
    within: Option
    """What `sync: auto` would take within the loss budget: `option`, or one of `found.others` that is faster."""
    within_why: str


@dataclass(frozen=True)
class Outlook:
    """Everything `unisono plan` says."""

    job: Job
    machine: Machine
    tokens: float
    price: float | None
    price_from: str
    critical_tokens: float
    points: tuple[Point, ...]
    impossible: tuple[Found, ...]
    """Numbers of devices on which nothing fits."""
    evaluated: int


def job_of(config: Config, per_device: int | None = None) -> Job:
    """What a configuration asks for, without torch or the data. Raises ConfigError."""
    vocab = config.tokenizer.vocab_size if isinstance(config.tokenizer, TokenizerConfig) else None
    narrow = config.wire == "bfloat16"
    fixed = config.micro_batch_size
    model = of_model(config.model, vocab)
    if config.lora is not None:
        asked = config.lora
        targets = None if asked.target_modules == "all-linear" else asked.target_modules
        model = model.with_adapters(asked.r, targets, asked.modules_to_save)
        if asked.load_in_4bit:
            model = model.in_4_bits(asked.bnb_4bit_use_double_quant)
    return Job(
        model=model,
        sequence=config.sequence_length,
        global_batch=config.global_batch_size,
        per_device=per_device,
        micro_batch=None if fixed == "auto" else fixed,
        dtype="bf16" if config.bf16 else "fp32",
        gradient_bytes=2 if narrow else 4,
        recompute="full" if config.gradient_checkpointing else None,
        bucket_bytes=None if config.bucket_mb == "auto" else config.bucket_mb * 2**20,
        loss_budget=config.loss_budget if _may_differ(config) else None,
    )


def _may_differ(config: Config) -> bool:
    """Whether there is anything but exact mathematics; as `sync: auto` has it."""
    return config.determinism != "strict" and config.optim == "adamw" and config.lora is None


def outlook(
    job: Job, machine: Machine, devices: Sequence[int], tokens: float,
    price: float | None, price_from: str = "",
) -> Outlook:  # fmt: skip
    """Search every number of devices. Raises ConfigError where nothing fits on any of them."""
    found = [search(job, machine, n) for n in devices]
    can = [f for f in found if f.options]
    if not can:
        last = found[-1]
        least = min(last.misfits, key=lambda m: m.needs_bytes, default=None)
        why = least.reason if least else "no mesh divides the model"
        raise ConfigError(
            f"devices: nothing fits on {devices[-1]} x {machine.device.name}: {why}; use more devices "
            f"or a smaller model"
        )
    critical = critical_batch_tokens(tokens)
    points: list[Point] = []
    smaller = [search(job, machine, n) for n in counts(1, can[0].devices) if n < can[0].devices]
    alike = [_recommended(f) for f in smaller if any(runs_here(o.run) for o in f.options)]
    base = max((o.tokens_per_s / o.devices for o in alike), default=0.0)
    for f in can:
        base = max(base, _recommended(f).tokens_per_s / f.devices)
        points.append(_point(f, base, critical, tokens, price, job, machine))
    return Outlook(
        job, machine, tokens, price, price_from, critical, tuple(points),
        tuple(f for f in found if not f.options), sum(f.evaluated for f in [*smaller, *found]),
    )  # fmt: skip


def _recommended(found: Found) -> Option:
    """The fastest that `unisono train` runs, or of all where it runs none."""
    return next((o for o in found.options if runs_here(o.run)), found.options[0])


def _point(
    found: Found, base: float, critical: float, tokens: float, price: float | None, job: Job,
    machine: Machine,
) -> Point:  # fmt: skip
    option = _recommended(found)
    n, speed = found.devices, option.tokens_per_s
    hours = tokens / speed / 3600
    error = uncertainty(option, machine)
    power = machine.device.power_w
    faster = [o for o in found.others if o.tokens_per_s > speed]
    within, why = choose([option, *faster], job.loss_budget or 0.0, TARGET)
    return Point(
        devices=n,
        option=option,
        best=found.options[0],
        found=found,
        efficiency=speed / n / base,
        low=speed / (1 + error),
        high=speed * (1 + error),
        hours=hours,
        usd=n * hours * price if price is not None else None,
        kwh=n * hours * power / 1e3 if power else None,
        usd_per_billion=n * (price or 1.0) * 1e9 / speed / 3600,
        critical_share=option.batch * option.run.sequence / critical,
        link_bytes_per_s=required_link(option, machine),
        within=within,
        within_why=why,
    )


def uncertainty(option: Option, machine: Machine) -> float:
    """Relative error of the throughput, one standard deviation.

    Published hardware: what leaving a source out has shown. A probe of this model: its own spread, and
    the error of its link fits on the share of the step that is communication.
    """
    seen = machine.probe
    if seen is None or seen.model is None:
        return UNCERTAINTY
    link = max((f.error for f in seen.links), default=UNCERTAINTY)
    share = option.step.communication / option.step.total
    return math.hypot(seen.model.spread, share * link)


@dataclass(frozen=True)
class Knee:
    """Numbers of devices; None where it is not reached."""

    efficiency: dict[str, int | None]
    """The most devices whose efficiency is at least 95, 90, 85%; None if the most asked for is, 0 if none."""
    batch_passes_critical: int | None
    money_doubles: int | None


def knee(outlook: Outlook) -> Knee:
    """Where more devices stop paying."""
    kept: dict[str, int | None] = {}
    for limit in EFFICIENCIES:
        last = max((p.devices for p in outlook.points if p.efficiency >= limit), default=0)
        kept[f"{limit:.0%}"] = None if last == outlook.points[-1].devices else last
    least = min(p.devices / p.option.tokens_per_s for p in outlook.points)
    double = (p.devices for p in outlook.points if p.devices / p.option.tokens_per_s >= 2 * least)
    past = (p.devices for p in outlook.points if p.critical_share > 1)
    return Knee(kept, next(past, None), next(double, None))


def as_json(outlook: Outlook) -> dict[str, Any]:
    """Plain values for --json; seconds, bytes, tokens, US dollars."""
    job, machine = outlook.job, outlook.machine
    return {
        "model": job.model.name,
        "parameters": job.model.parameters,
        "sequence_length": job.sequence,
        "hardware": machine.device.name,
        "source": "probe" if machine.probe else machine.device.source,
        "tokens": outlook.tokens,
        "usd_per_device_hour": outlook.price,
        "price_from": outlook.price_from,
        "critical_batch_tokens": outlook.critical_tokens,
        "loss_budget": job.loss_budget,
        "knee": asdict(knee(outlook)),
        "evaluated": outlook.evaluated,
        "points": [_point_json(point) for point in outlook.points],
        "impossible": [
            {"devices": f.devices, "why": _misfits(f)} for f in outlook.impossible
        ],
    }  # fmt: skip


def _point_json(point: Point) -> dict[str, Any]:
    return {
        "devices": point.devices,
        **_option_json(point.option),
        "tokens_per_s_low": point.low,
        "tokens_per_s_high": point.high,
        "efficiency": point.efficiency,
        "hours": point.hours,
        "usd": point.usd,
        "kwh": point.kwh,
        "critical_batch_share": point.critical_share,
        "tokens_needed_factor": token_cost(1, 1 / point.critical_share),
        "link_bytes_per_s_for_95": point.link_bytes_per_s,
        "ranked": [_option_json(o) for o in point.found.options[:SHOWN]],
        "other_mathematics": [_option_json(o) for o in point.found.others],
        "within_loss_budget": {**_option_json(point.within), "why": point.within_why},
        "misfits": _misfits(point.found),
    }


def _option_json(option: Option) -> dict[str, Any]:
    run = option.run
    return {
        "strategy": option.name,
        "runs_in_unisono": runs_here(run),
        "exact": option.is_exact,
        "loss_cost": option.loss_cost,
        "utilization": option.utilization,
        "mesh": asdict(run.mesh),
        "global_batch_size": option.batch,
        "micro_batch_size": run.micro_batch,
        "accumulation": run.accumulation,
        "recompute": run.recompute,
        "bucket_mb": run.bucket_bytes / 2**20,
        "tokens_per_s": option.tokens_per_s,
        "step_s": option.step.total,
        "parts_s": asdict(option.step),
        "memory_bytes": {**asdict(option.memory), "total": option.memory.total},
        "command": overrides(option) if runs_here(run) else None,
    }


def _misfits(found: Found) -> list[dict[str, str]]:
    return [{"strategy": m.name, "reason": m.reason} for m in found.misfits]


def parse_link(text: str) -> float:
    """Bytes/s from `100Gbit`, `12.5GB/s`, `800 Mbit/s`. Raises ConfigError."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(bit|b|byte)(?:/?s|ps)?\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or not 0 < number < 1e9:
        raise ConfigError(
            f"--link: found {text!r}; write what a node sends, e.g. 100Gbit or 12.5GB/s"
        )
    scale = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2].lower()]
    bits = found[3].lower() == "bit" or found[3] == "b"
    return number * scale / (8 if bits else 1)


def parse_devices(text: str) -> tuple[int, ...]:
    """`1..1024`, `8`, `8,16,64`; a range becomes powers of two and what lies between."""
    try:
        if ".." in text:
            low, high = (int(part) for part in text.split(".."))
            numbers = tuple(counts(low, high)) if 1 <= low <= high <= 2**17 else ()
        else:
            numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise ConfigError(f"--devices: found {text!r}; write a range 1..1024, or numbers 8,16,64")
    return numbers


def parse_tokens(text: str) -> float:
    """`20B`, `300M`, `1e9`. Raises ConfigError."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmbtKMBT]?)\s*", text)
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if not found or value <= 0:
        raise ConfigError(f"--tokens: found {text!r}; write a number of tokens, e.g. 20B or 3e8")
    return value * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2].lower()]
