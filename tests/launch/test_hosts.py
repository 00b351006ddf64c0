"""Two hosts as network namespaces with a cable between them; torchrun on each trains one job."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs import job_fields, make_job, run, write_corpus
from ranks import run_ranks

STEPS = 6
MASTER = "10.199.77.1"


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, at 10.199.77.1 and .2; nothing of them is left afterwards."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (iproute2)")
    names = [f"unisono-{os.getpid()}-a", f"unisono-{os.getpid()}-b"]
    try:
        for name in names:
            made = ip("netns", "add", name, check=False)
            if made.returncode:
                pytest.skip(f"`ip netns add` is not permitted: {made.stderr.strip()}")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])  # fmt: skip
        for k, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.199.77.{k + 1}/30", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            for pid in ip("netns", "pids", name, check=False).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name, check=False)


def losses(output: Path) -> list[float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_two_hosts_train_what_one_process_trains(hosts: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    env = {k: v for k, v in os.environ.items() if "SOCKET_IFNAME" not in k}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    alone = tmp_path / "alone"
    config = make_job(corpus, alone, max_steps=STEPS)
    cache = {"XDG_CACHE_HOME": env["XDG_CACHE_HOME"]}
    assert run_ranks(run, 1, config, join=False, env=cache)[0][0] == "done"

    together = tmp_path / "together"
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(job_fields(corpus, together, max_steps=STEPS)))
    processes = []
    for k, name in enumerate(hosts):
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(k),
            "--master-addr", MASTER, "--master-port", "29517",
            "-m", "unisono", "train", str(job),
        ]  # fmt: skip
        log = (tmp_path / f"host-{k}.log").open("w")
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [p.wait(timeout=90) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    logs = [(tmp_path / f"host-{k}.log").read_text() for k in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert json.loads((together / "plan.json").read_text())["replicas"] == 2
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(alone)) == STEPS
    assert "receipt" in logs[0], "rank 0 shows how it went"
    assert "step" not in logs[1], "the other says nothing"
