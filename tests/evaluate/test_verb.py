"""The verb from the command line: a comparison of two models, its files, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TEXT


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unisono", "eval", *arguments, "--device", "cpu"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)


def test_two_models_compared_on_two_replicas(tiny: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text(TEXT * 8)
    pairs = [{"prompt": f"Who has key {k}?", "chosen": "the owl", "rejected": "a <b>thief</b>"} for k in range(6)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs) + "{\n")
    ended = run(
        tmp_path, str(other), "--text", "held.txt", "--context", "40", "--preferences", "pairs.jsonl",
        "--reference", str(tiny), "--baseline", str(tiny), "--replicas", "2", "--json", "out.json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "pairs.jsonl:7: not JSON" in ended.stdout and "differences are real" in ended.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["baseline"]["name"] == "tiny"
    loss = found["baseline"]["differences"][0]
    assert loss["measure"] == "loss" and loss["verdict"] in ("better", "worse", "no difference")
    (page,) = (tmp_path / "evals").glob("other-*/report.html")
    html = page.read_text()
    assert "What changed since tiny" in html and "<script" not in html and "http" not in html.replace("http-equiv", "")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to evaluate"),
        (["--suite", "refusals"], "--suite: found 'refusals'"),
        (["--text", "absent.txt"], "--text: absent.txt: no such file"),
        (["--suite", "bias", "--reference", "x"], "only preferences have one"),
        (["--suite", "bias", "--dtype", "int8"], "--dtype: found 'int8'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    ended = run(tmp_path, "nowhere", *arguments)
    assert ended.returncode == 2 and words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
