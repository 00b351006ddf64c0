"""The link bench: what it writes, that counted bytes are the formula's, and that it leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "links.py"
SMALL = ["--layers", "2", "--hidden", "128", "--vocab", "1024", "--batch", "2", "--sequence", "32"]


def namespaces(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.split("\n") if line.startswith(f"links-{pid}-")]


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in path.read_text().split()] if path.exists() else []


@pytest.fixture
def dead_run() -> str:
    """A namespace as a killed run leaves it; skips where none can be made."""
    if os.geteuid() or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root and iproute2")
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"links-{gone.pid}-0"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"`ip netns add` is not permitted: {made.stderr.strip()}")
    return name


def bench(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *SMALL, "--rates", "200m", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_it_measures_and_leaves_nothing(dead_run: str, tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    process = bench(
        "--systems", "alone", "ddp", "--steps", "2", "--repeats", "1", "--json", str(file)
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert not namespaces(process.pid)
    assert not Path("/run/netns", dead_run).exists(), "what a dead run left is removed"

    result = json.loads(file.read_text())
    assert result["machine"]["cores"] and result["network"]["hosts"] == 2
    (rate,) = result["rates"]
    assert rate["bits_per_s"] == 200e6
    assert min(rate["measured_tcp_bits_per_s"]) == pytest.approx(200e6, rel=0.1)
    ddp = rate["systems"]["ddp"]
    sent = 4 * result["job"]["parameters"]  # 2 S (n-1)/n
    assert ddp["formula_bytes_per_step"] == sent
    for turn in ddp["turns"]:
        assert len(turn["step_ms"]) == 2
        for host in range(2):
            assert turn["sent_bytes"][host] == pytest.approx(sent, rel=0.03)
            assert turn["received_bytes"][host] == pytest.approx(sent, rel=0.03)
    assert rate["wire_ms"]["float32"] == pytest.approx(8e3 * sent / 200e6)
    assert rate["wire_ms"]["float32"] * 0.9 < ddp["step_ms"], "the link holds it back"
    assert ddp["limit_ms"] >= rate["compute_ms"] > 0
    assert ddp["ratio_to"]["alone"] > 1
    about = result["systems"]["ddp"]
    assert about["replicas_equal"] is True and about["farthest_from_ddp"] == 0
    assert all(peak > 50e6 for peak in about["peak_bytes"])


def test_a_signal_leaves_nothing(dead_run: str) -> None:
    process = bench("--systems", "alone", "ddp", "--steps", "1000")
    try:
        ranks: list[int] = []
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and process.poll() is None:
            line = process.stdout.readline()
            if "ddp: ready" in line:
                time.sleep(2.5)  # past the TCP measurement, into a turn
                ranks = children(process.pid)
                break
        assert ranks and namespaces(process.pid)
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        assert not namespaces(process.pid)
        assert not [p for p in ranks if Path(f"/proc/{p}").exists()]
    finally:
        process.kill()
        process.communicate()
