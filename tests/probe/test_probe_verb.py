"""The verb end to end on two real ranks, and who reads its file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import job_fields, write_corpus
from unisono.forecast.probe import FACTOR, read


def unisono(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")}
    return subprocess.run([sys.executable, "-m", "unisono", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=150, check=False)  # fmt: skip


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("probe")
    fields = job_fields(write_corpus(folder), folder / "run", global_batch_size=8, max_steps=6)
    (folder / "job.yaml").write_text(yaml.safe_dump(fields))
    done = unisono("probe", "job.yaml", "--replicas", "2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_it_writes_a_readable_file_and_a_table(probed: tuple[Path, str]) -> None:
    folder, shown = probed
    probe = read(folder / "probe.json")
    assert (probe.ranks, probe.nodes, probe.threads) == (2, 1, 1)
    assert probe.model is not None and probe.model.micro_batch == 2
    assert probe.model.forward_s > 0 and probe.model.peak_memory_bytes > probe.model.base_memory_bytes > 0  # fmt: skip
    assert {f.collective for f in probe.links} == set(FACTOR)
    assert {s.collective for s in probe.sharing} == {"all_reduce", "all_gather", "all_to_all"}
    assert min(t.bytes for t in probe.collectives) == 4096
    assert "fp32 products" in shown and "busbw" in shown and "beside the model's pass" in shown
    assert not (folder / "run").exists(), "a probe leaves the run folder alone"


def test_train_chooses_buckets_by_it_and_is_foretold(probed: tuple[Path, str]) -> None:
    folder, _ = probed
    done = unisono("train", "job.yaml", "--replicas", "2", "output_dir=trained", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((folder / "trained/plan.json").read_text())
    assert "as probed" in plan["reasons"]["bucket_mb"]
    forecast = json.loads((folder / "trained/forecast.json").read_text())
    assert forecast["sources"] == {
        "pass": "the probe of this model and micro-batch", "link": "the probe",
    }  # fmt: skip
    assert (folder / "trained/probe.json").is_file(), "for the report page"
    assert "forecast:" in done.stdout and "measured" in done.stdout


def test_plan_reads_it(probed: tuple[Path, str]) -> None:
    folder, _ = probed
    done = unisono("plan", "job.yaml", "--probe", "probe.json", "--devices", "1..2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measured by the probe" in done.stdout


def test_a_probe_of_other_hardware_is_one_line(probed: tuple[Path, str]) -> None:
    folder, _ = probed
    raw = json.loads((folder / "probe.json").read_text())
    (folder / "other.json").write_text(json.dumps({**raw, "device": "NVIDIA H100"}))
    done = unisono("train", "job.yaml", "probe=other.json", "output_dir=other", cwd=folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "other.json was measured on NVIDIA H100" in line and "run unisono probe" in line
    (folder / "torn.json").write_text('{"version": 1, "dev')
    done = unisono("train", "job.yaml", "probe=torn.json", "output_dir=other", cwd=folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("unisono: probe: torn.json is torn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning_rate=3"], "write it before overrides"),
        (["nothing.yaml"], "no such file"),
        (["-o", "no/folder/p.json"], "--output: no/folder is no folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = unisono("probe", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
