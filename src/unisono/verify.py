"""Proof on the user's own configuration that N replicas, or a mesh of ranks, train what one replica trains.

Runs the first steps of the job at several numbers of replicas and on meshes, each from the same start in a
scratch folder, and compares samples and their order, losses, and parameters; in strict mode the
SHA-256 of weights and optimizer state must be equal. With `sync: streaming` or `sparse` the number of
replicas is part of the method: what must hold is that every run used the same samples in the same order,
and that its replicas' outer weights are the same bits. How far the runs are apart is shown and not judged.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unisono.config import Config
from unisono.errors import EXIT_DONE, EXIT_STOPPED, Stopped, UnisonoError
from unisono.launch.local import launch
from unisono.mesh import Mesh
from unisono.plan import LOCAL
from unisono.world import World

LOSS_BOUND = {"float32": 1e-5, "bf16": 1e-2}
PARAMETER_BOUND = {"float32": 1e-4, "bf16": 5e-2}
"""Relative. Sums in another order differ in the last bits; AdamW divides by the size of a gradient,
so where one is nearly zero it carries such a difference into a whole step of that weight."""


@dataclass(frozen=True)
class Row:
    """One number of replicas, or one mesh, beside the first one."""

    replicas: int
    """Ranks."""
    samples_identical: bool
    loss_difference: float
    """Largest relative difference of a step's loss."""
    parameter_difference: float
    """Largest relative difference of a tensor, in the L2 norm."""
    digest: str
    digest_equal: bool
    holds: bool
    mesh: str = ""


@dataclass(frozen=True)
class Verdict:
    steps: int
    strict: bool
    loss_bound: float
    parameter_bound: float
    rows: list[Row]
    local: bool = False
    """Replicas step alone: only samples, and the outer weights within each run, must be equal."""

    @property
    def holds(self) -> bool:
        return all(r.holds for r in self.rows)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def verify(
    source: str,
    overrides: Sequence[str],
    config: Config,
    replicas: Sequence[int],
    steps: int,
    meshes: Sequence[Mesh] = (),
) -> Verdict:
    """Run the job at each number of replicas, then on each of `meshes`, and compare with the first.

    `source`, `overrides`: as given to `config.load`, of which `config` is the result. Raises
    UnisonoError when a run fails; it has then said why.
    """
    strict = config.determinism == "strict"
    local = config.sync in LOCAL
    threads = config.threads or 1  # the same for every number, for a fair comparison
    with tempfile.TemporaryDirectory(prefix="unisono-verify-") as scratch:
        results = []
        runs = [(count, "", "mesh=null") for count in replicas]
        runs += [(mesh.size, str(mesh), f"mesh={json.dumps(asdict(mesh))}") for mesh in meshes]
        for number, (count, mesh, layout) in enumerate(runs):
            out = Path(scratch) / str(number)
            command = [
                sys.executable, "-m", "unisono", "verify-worker", source, *overrides,
                f"output_dir={out}", "resume=never", f"replicas={count}", layout,
                "--steps", str(steps),
            ]  # fmt: skip
            code = launch(command, count, threads)
            if code == EXIT_STOPPED:
                raise Stopped("verify: stopped by a signal")
            if code != EXIT_DONE:
                what = f"on {mesh}" if mesh else f"with {count} replicas"
                raise UnisonoError(f"verify: the run {what} failed, see above")
            results.append(_read(out))
        kind = "bf16" if config.bf16 else "float32"
        loss_bound, parameter_bound = LOSS_BOUND[kind], PARAMETER_BOUND[kind]
        rows = [
            replace(
                _compare(count, result, results[0], strict, loss_bound, parameter_bound, local),
                mesh=mesh,
            )
            for (count, mesh, _), result in zip(runs, results, strict=True)
        ]
    return Verdict(steps, strict, loss_bound, parameter_bound, rows, local)


def worker(config: Config, world: World, steps: int) -> None:
    """Collective: the first `steps` steps of the job; rank 0 writes what is compared."""
    from safetensors.torch import save_file

    from unisono.files import write_json
    from unisono.observe.screen import Quiet
    from unisono.sync.digest import check_replicas
    from unisono.sync.ledger import Group, Ledger
    from unisono.train.advance import advance
    from unisono.train.job import own_samples, set_up, weights_digest
    from unisono.train.stopping import watching
    from unisono.world import joined

    with watching() as stop, joined(world):
        ledger = Ledger()
        votes = Group("votes", ledger, config.timeout_s)
        out = Path(config.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        job = set_up(config, world, Quiet(), stop, ledger, votes)
        losses, samples = [], []
        while job.progress.step < min(steps, job.plan.max_steps):
            advanced = advance(job)
            assert advanced is not None
            if advanced.repeat:
                continue
            samples.append(own_samples(job))
            losses.append(advanced.outcome.loss)
            job.progress.step += 1
        if config.sync in LOCAL:
            check_replicas(job.sync.replicated(), votes, job.progress.step)
        weights = job.sync.state_dict()
        digest = weights_digest(job, weights)
        write_json(out / f"samples-{world.rank}.json", samples)
        if world.is_main:
            write_json(out / "result.json", {"losses": losses, "digest": digest})
            names = {n for n, _ in job.model.named_parameters()}
            tensors = {n: t.cpu().contiguous() for n, t in weights.items() if n in names}
            save_file(tensors, out / "parameters.safetensors")
        votes.barrier()


@dataclass(frozen=True)
class _Result:
    losses: list[float]
    digest: str
    samples: list[list[list[int]]]
    """By rank and step."""
    parameters: Any


def _read(out: Path) -> _Result:
    from safetensors.numpy import load_file

    result = json.loads((out / "result.json").read_text())
    files = sorted(out.glob("samples-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    samples = [json.loads(f.read_text()) for f in files]
    parameters = load_file(out / "parameters.safetensors")
    return _Result(result["losses"], result["digest"], samples, parameters)


def _compare(
    count: int, mine: _Result, first: _Result, strict: bool, loss_bound: float, bound: float,
    local: bool = False,
) -> Row:  # fmt: skip
    import numpy as np

    identical = _by_step(mine) == _by_step(first)

    def difference(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))

    # np.max, because Python's max passes over what is not a number.
    losses = float(np.max([difference(np.float64(a), np.float64(b)) for a, b in zip(mine.losses, first.losses, strict=True)]))  # fmt: skip
    parameters = float(
        np.max(
            [
                difference(mine.parameters[n].astype(np.float64), b.astype(np.float64))
                for n, b in first.parameters.items()
            ]
        )
    )
    equal = mine.digest == first.digest
    near = losses <= loss_bound and parameters <= bound and (equal or not strict)
    holds = identical and (near or local)
    return Row(count, identical, losses, parameters, mine.digest, equal, holds)


def _by_step(result: _Result) -> list[list[int]]:
    """Each step's samples in the order of the global batch: ranks hold contiguous rows."""
    return [[x for mine in ranks for x in mine] for ranks in zip(*result.samples, strict=True)]


def render(verdict: Verdict) -> Any:
    """The table that the command prints."""
    from rich.table import Table

    mode = "strict: digests must be equal" if verdict.strict else "default: equal up to rounding"
    if verdict.local:
        mode = "replicas step alone: equal samples, and equal outer weights within a run"
    table = Table(title=f"{verdict.steps} steps, {mode}", title_justify="left")
    for heading in ("replicas", "samples", "loss +-", "parameters +-", "digest", "holds"):  # fmt: skip
        table.add_column(heading, justify="right" if "+-" in heading else "left")
    for r in verdict.rows:
        same = "equal" if r.digest_equal else "differs"
        table.add_row(
            f"{r.replicas}: {r.mesh}" if r.mesh else str(r.replicas),
            "same order" if r.samples_identical else "[red]DIFFERENT[/red]",
            f"{r.loss_difference:.1e}",
            f"{r.parameter_difference:.1e}",
            f"{r.digest[:8]} {same}",
            "[green]yes[/green]" if r.holds else "[red]NO[/red]",
        )
    first = verdict.rows[0].replicas
    table.caption = f"+-: the largest relative difference from the run with {first}"
    return table
