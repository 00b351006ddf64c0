"""From what a user types to an outlook: `unisono plan` without its printing."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from unisono.config import RECIPES, Config, apply_overrides, load, parse
from unisono.errors import ConfigError
from unisono.forecast import probe as probes
from unisono.forecast.architecture import NAMED, named
from unisono.forecast.hardware import device
from unisono.forecast.network import fabric
from unisono.forecast.outlook import (
    Outlook,
    job_of,
    outlook,
    parse_devices,
    parse_link,
    parse_tokens,
)
from unisono.forecast.price import dated_prices
from unisono.forecast.search import Machine

DEFAULT_TOKENS = 1e9
"""Where neither --tokens nor max_steps says: prices per billion tokens."""


def plan(
    config: str,
    overrides: Sequence[str] = (),
    *,
    hardware: str = "",
    probe: Path | None = None,
    devices: str = "1..1024",
    link: str = "",
    per_node: int | None = None,
    tokens: str = "",
    batch_per_device: int | None = None,
    price: float | None = None,
) -> Outlook:
    """Raises ConfigError for whatever does not exist or does not fit together."""
    asked = configuration(config, overrides)
    numbers = parse_devices(devices)
    machine = machine_of(hardware, probe, parse_link(link) if link else None, per_node, numbers[-1])
    price_from = "as given"
    if price is None:
        date, known = dated_prices()
        price, price_from = known.get(machine.device.name), f"on demand, {date}"
    if tokens:
        total = parse_tokens(tokens)
    elif asked.max_steps is not None:
        total = float(asked.max_steps * asked.global_batch_size * asked.sequence_length)
    else:
        total = DEFAULT_TOKENS
    return outlook(job_of(asked, batch_per_device), machine, numbers, total, price, price_from)


def configuration(source: str, overrides: Sequence[str]) -> Config:
    """A file, a recipe, or a named architecture in bf16 with everything else by default."""
    is_file = Path(source).is_file() or (RECIPES / f"{source}.yaml").is_file()
    if not is_file and named(source) is None:
        near = get_close_matches(source.lower(), list(NAMED), 3, 0.5)
        if near:
            raise ConfigError(
                f"{source}: no such file or recipe, and no architecture of that name; nearest: "
                f"{', '.join(near)}"
            )
    if is_file or named(source) is None:
        asked = load(source, overrides)
        if asked.grpo:
            raise ConfigError(
                f"{source}: grpo: how long completions will be is not known, so nothing is foretold; write "
                f"grpo=null to plan the training of given text"
            )
        return asked
    raw = {"model": source, "data": {"path": "-"}, "output_dir": "-", "bf16": True}
    return parse(apply_overrides(raw, overrides), origin=source)


def machine_of(
    hardware: str, probe: Path | None, link: float | None, per_node: int | None, most: int
) -> Machine:
    """Published or measured, with what the user states of nodes and their links (bytes/s)."""
    if bool(hardware) == (probe is not None):
        raise ConfigError(
            "--hardware or --probe: write one of them, for example --hardware H100, or --probe FILE "
            "with what unisono probe measured"
        )
    if probe is None:
        found = device(hardware).with_node(per_node)
        if link is not None:
            found = replace(found, node_bytes_per_s=link)
        return Machine(found, fabric(found))
    seen = probes.read(probe)
    if per_node is not None and per_node != seen.per_node:
        raise ConfigError(
            f"--per-node: found {per_node}, but {probe} was measured with {seen.per_node} a node; leave "
            f"it out"
        )
    between = link is not None or any(fit.nodes > 1 for fit in seen.links)
    if not between and most > seen.per_node:
        raise ConfigError(
            f"--link: {probe} saw one node of {seen.per_node} ranks; say what a node sends to others, "
            f"e.g. --link 100Gbit, or ask for --devices 1..{seen.per_node}"
        )
    return Machine(probes.device_of(seen), probes.fabric_of(seen, link), seen)
