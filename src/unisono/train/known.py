"""A probe of this hardware, where there is one: what `train` decides by instead of a quick look.

Rank 0 reads it; a file of other hardware is refused when it was named, and passed over when found.
"""

from collections.abc import Callable
from pathlib import Path

from unisono.config import Config
from unisono.errors import ConfigError
from unisono.forecast import probe as probes
from unisono.forecast.probe import Probe
from unisono.observe.environment import device_name
from unisono.sync.link import Link
from unisono.world import World

FOUND = Path("probe.json")
"""In the working directory, where `unisono probe` leaves it."""


def find_probe(config: Config, world: World, warn: Callable[[str], None]) -> Probe | None:
    """The probe to use. Raises ConfigError for a named one that is torn or of other hardware."""
    if config.probe == "none":
        return None
    given = config.probe != "auto"
    path = Path(config.probe) if given else FOUND
    if not given and not path.is_file():
        return None
    try:
        found = probes.read(path)
        _check(found, world, path)
    except ConfigError as error:
        line = str(error).replace("--probe:", "probe:")
        if given:
            raise ConfigError(line) from None
        warn(f"{line}; it is not used")
        return None
    return found


def _check(found: Probe, world: World, path: Path) -> None:
    here = device_name(world.device)
    if found.device != here:
        raise ConfigError(
            f"--probe: {path} was measured on {found.device}, and this is {here}; run unisono probe "
            f"here, or write probe: none"
        )
    nodes = max(1, world.size // world.local_size)
    if world.size > 1 and found.ranks > 1 and (found.nodes > 1) != (nodes > 1):
        raise ConfigError(
            f"--probe: {path} was measured on {found.nodes} host{'s' if found.nodes > 1 else ''}, and "
            f"this run has {nodes}; run unisono probe as the run is started, or write probe: none"
        )


def link_of(probe: Probe, device: str) -> Link | None:
    """The link of buckets: messages under way one after another where that was timed, else the fit."""
    fits = {f.collective: f for f in probe.links if f.axis == "world"}
    fit = fits.get("all_to_all") or fits.get("all_reduce")
    if fit is None:
        return None
    stream = next((s for s in probe.sharing if s.collective == fit.collective), None)
    return Link(fit.latency_s, stream.bytes_per_s if stream else fit.bytes_per_s)
