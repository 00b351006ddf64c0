"""The Shakespeare recipe as a job whose steps a benchmark takes itself, on ranks of their own."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def recipe(out: Path, *overrides: str) -> Iterator:
    """Collective: the job (train/job.py) of this rank, on a CPU with one thread."""
    from unisono import config as config_module
    from unisono.observe.screen import Quiet
    from unisono.sync.ledger import Group, Ledger
    from unisono.train.job import set_up
    from unisono.train.stopping import watching
    from unisono.world import from_env, joined

    asked = config_module.load("shakespeare", [f"output_dir={out}", "device=cpu", *overrides])
    world = from_env(asked.device, 1, asked.timeout_s)
    with watching() as stop, joined(world):
        ledger = Ledger()
        votes = Group("votes", ledger, 600)
        out.mkdir(parents=True, exist_ok=True)
        yield set_up(asked, world, Quiet(), stop, ledger, votes)


def on_ranks(replicas: int, *arguments: object) -> dict:
    """Run this script again, as `replicas` workers with `arguments`; what rank 0 gave to `tell`."""
    from unisono.launch.local import launch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, sys.argv[0], "--worker", *map(str, arguments), "--out", folder]
        code = launch(command, replicas, threads=1)
        if code:
            raise SystemExit(f"{replicas} replicas ended with code {code}")
        return json.loads((Path(folder) / "result.json").read_text())


def tell(out: Path, result: dict) -> None:
    (out / "result.json").write_text(json.dumps(result))
