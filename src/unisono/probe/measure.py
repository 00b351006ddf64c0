"""All measurements of `unisono probe`, in order, on every rank: one Probe, the same on all of them."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from unisono.config import Config
from unisono.errors import ConfigError
from unisono.files import replacing
from unisono.forecast.probe import Probe, Timing
from unisono.mesh import Mesh
from unisono.observe.environment import device_name
from unisono.observe.screen import Screen
from unisono.plan import mesh_of
from unisono.probe import links, rates
from unisono.probe.passes import Own, own, pass_of, stand_in, time_model
from unisono.probe.sharing import measure_sharing
from unisono.probe.show import show
from unisono.sync.axes import axes, nodes_of
from unisono.sync.ledger import Group, Ledger
from unisono.train.together import attempt
from unisono.world import World, joined


def run(config: Config | None, world: World, screen: Screen, output: Path) -> Probe:
    """Collective: measure, and on rank 0 write the file and show it."""
    with joined(world):
        began = time.perf_counter()
        votes = Group("probe", Ledger(), world.timeout_s, duplex=True)
        mine = None
        if config is not None:
            screen.say("data and model ...", "dim")
            mine = own(config, world, votes)
        mesh = _mesh(config, world.size)
        probe = measure(mine, mesh, world, votes, lambda what: screen.say(f"{what} ...", "dim"))

        def save() -> None:
            try:
                with replacing(output) as file:
                    file.write((json.dumps(probe.model_dump(), indent=1) + "\n").encode())
            except OSError as error:
                raise ConfigError(f"--output: {output} cannot be written: {error}") from None

        attempt(votes, save, world.is_main)
        screen.show(show(probe))
        took = time.perf_counter() - began
        screen.say(f"{output}: measured in {took:.0f} s; unisono plan --probe and train use it")
        return probe


def measure(
    mine: Own | None,
    mesh: Mesh | None,
    world: World,
    votes: Group,
    say: Callable[[str], None],
) -> Probe:
    """Collective: everything but the user's data; `say` is told what comes next, on rank 0."""
    device = world.device
    say("matrix products and memory")
    votes.barrier()
    flops = rates.matmul_flops(device)
    memory = rates.memory_bytes_per_s(device)
    table = votes.each(*flops.values(), memory)
    names = [f"{name} products" for name in flops] + ["memory bandwidth"]
    notes = [
        line
        for name, column in zip(names, table.T.tolist(), strict=True)
        for line in links.slow_ranks(name, column)
    ]
    middle = table.median(dim=0).values.tolist()

    times, run = None, stand_in(device)
    if mine is not None:
        say("the model's own pass")
        times, run = time_model(mine, votes, device), pass_of(mine, device)
    pass_s, speeds = _passes(run, votes)
    notes += links.slow_ranks("speed of a pass", speeds)

    timings: list[Timing] = []
    fits, sharing, pairs = [], [], []
    burst = 0.0
    nodes = nodes_of(votes, world.local_rank)
    if world.size > 1:
        for axis, group in axes(votes, nodes, mesh, Ledger(), world.timeout_s).items():
            say(f"collectives over {axis}, {group.size} ranks")
            found, left_out = links.time_collectives(group, axis, votes, device)
            timings += found
            notes += left_out
        say("communication beside compute")
        stream = Group("stream", Ledger(), world.timeout_s, duplex=True)
        sharing = measure_sharing(run, pass_s, stream, device)
        burst = links.burst_bytes(stream, device)
        stream.close()
        fits = links.fit(timings, max(nodes) + 1, burst)
        if burst:
            notes.append(f"the link is shaped: {burst / 1024:.0f} KiB pass at once after a pause")
    if max(nodes) > 0:
        say("pairs of hosts")
        pairs = links.time_pairs(votes, nodes, device)
        notes += links.slow_pairs(pairs)
    return Probe(
        device=device_name(device),
        ranks=world.size,
        nodes=max(nodes) + 1,
        memory_bytes=_memory_bytes(world),
        memory_bytes_per_s=middle[-1],
        matmul_flops=dict(zip(flops, middle)),
        model=times,
        links=tuple(fits),
        collectives=tuple(timings),
        sharing=tuple(sharing),
        burst_bytes=burst,
        pairs=tuple(pairs),
        threads=world.threads or 1,
        notes=tuple(notes),
        measured_at=time.strftime("%Y-%m-%d %H:%M:%S"),
        torch=torch.__version__,
    )


def _passes(run: Callable[[], None], votes: Group) -> tuple[float, list[float]]:
    """Collective: seconds of a pass on the slowest rank, and passes a second of every rank."""
    votes.barrier()
    seconds = votes.each(statistics.median(_one(run) for _ in range(3)))[:, 0]
    return float(seconds.max()), (1 / seconds).tolist()


def _one(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _mesh(config: Config | None, ranks: int) -> Mesh | None:
    """Where the configuration divides the ranks."""
    if config is None or config.mesh is None:
        return None
    try:
        return mesh_of(config, ranks)
    except ConfigError:  # of another number of ranks: only what is common to all meshes is measured
        return None


def _memory_bytes(world: World) -> float:
    if world.device != "cpu":
        return float(torch.cuda.mem_get_info()[1])
    return psutil.virtual_memory().total / world.local_size
