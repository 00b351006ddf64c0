"""The command: exit codes, one line an error, no torch before it is needed, stop and go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from jobs import job_fields, make_job, run, write_corpus
from ranks import run_ranks
from test_world import is_loopback, listening
from unisono import cli
from unisono.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, ConfigError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_corpus(folder)
    fields = job_fields(folder / "corpus.txt", folder / "run")
    (folder / "job.yaml").write_text(yaml.safe_dump(fields))
    return folder


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "COLUMNS": "160"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "unisono", *map(str, arguments)]


def call(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(place), capture_output=True, text=True, timeout=100
    )


# --- light until it matters


def imports_of(place: Path, *arguments: str) -> tuple[int, set[str], list[str]]:
    """Exit code, imported top-level modules, and the other lines on stderr."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unisono", *arguments],
        env=environment(place), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    modules = {m[1] for line in lines if (m := re.match(r"import time:.*\| +([\w]+)", line))}
    return done.returncode, modules, [x for x in lines if not x.startswith("import time:")]


HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "nothing.yaml"], EXIT_USAGE),
        (["train", "shakespeare", "lerning_rate=1"], EXIT_USAGE),
        (["train", "shakespeare", "replicas=0"], EXIT_USAGE),
        (["verify", "shakespeare", "--replicas", "one"], EXIT_USAGE),
        (["no-such-verb"], EXIT_USAGE),
    ],
)
def test_help_and_usage_errors_import_nothing_heavy(
    place: Path, arguments: list[str], code: int
) -> None:
    found, modules, told = imports_of(place, *arguments)
    assert found == code
    assert "typer" in modules, "the lines are understood"
    assert not modules & HEAVY
    assert not any("Traceback" in line for line in told)
    if code and "verb" not in arguments[0]:
        assert len(told) == 1
        assert told[0].startswith("unisono: ")


@pytest.mark.parametrize("replicas", ["0", "-1", "two"])
def test_replicas_must_be_a_number_of_them(replicas: str) -> None:
    result = CliRunner().invoke(cli.app, ["train", "shakespeare", "--replicas", replicas])
    assert result.exit_code == EXIT_USAGE
    assert "Invalid value for '--replicas'" in result.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, unisono, unisono.config, unisono.launch.local; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {m.split(".")[0] for m in done.stdout.split()} & HEAVY


def test_verbs_and_options_are_frozen() -> None:
    """A new option is a decision: change it here too."""
    import typer

    group = typer.main.get_command(cli.app)
    found = {
        name: sorted(o for p in verb.params for o in p.opts if o.startswith("--"))
        for name, verb in group.commands.items()
        if not verb.hidden
    }
    assert found == {
        "fields": [],
        "train": ["--replicas", "--serve"],
        "generate": [
            "--guard", "--guard-log", "--guard-model", "--guard-threshold", "--log-text",
            "--max-new-tokens", "--prompt", "--seed", "--temperature", "--top-p",
        ],
        "eval": [
            "--baseline", "--choices", "--context", "--device", "--dtype", "--json", "--limit", "--lm-eval",
            "--output", "--preferences", "--reference", "--replicas", "--stride", "--suite", "--tasks",
            "--text", "--wheels",
        ],
        "import-model": ["--dtype"],
        "inspect-data": ["--examples", "--json", "--model"],
        "merge": ["--base"],
        "monitor": ["--alarms", "--baseline", "--follow", "--json", "--window"],
        "verify": ["--json", "--mesh", "--replicas", "--steps", "--strict"],
        "report": ["--output"],
        "probe": ["--output", "--replicas"],
        "plan": [
            "--batch-per-device", "--detail", "--devices", "--hardware", "--json", "--link", "--page",
            "--per-node", "--price", "--probe", "--tokens",
        ],
    }  # fmt: skip


# --- errors


def main_with(monkeypatch: pytest.MonkeyPatch, error: Exception, rank: str | None) -> int:
    def fail() -> None:
        raise error

    left: list[int] = []
    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "_leave", left.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    cli.main()
    [code] = left
    return code


@pytest.mark.parametrize(
    ("rank", "lines"),
    [
        (None, ["unisono: first", "unisono: second"]),
        ("0", ["unisono: first", "unisono: second"]),
        ("3", ["unisono [rank 3]: first", "unisono [rank 3]: second"]),
    ],
)
def test_an_error_is_its_lines_and_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: str, lines: list[str]
) -> None:
    assert main_with(monkeypatch, ConfigError("first\nsecond"), rank) == EXIT_USAGE
    assert capsys.readouterr().err.splitlines() == lines


def test_a_rank_that_stops_for_another_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from unisono.errors import Elsewhere

    assert main_with(monkeypatch, Elsewhere(1, EXIT_USAGE), "0") == EXIT_USAGE
    assert capsys.readouterr().err == ""


def test_a_bug_is_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main_with(monkeypatch, KeyError("oops"), None) == EXIT_FAILED
    assert "Traceback" in capsys.readouterr().err


# --- generate


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    output = place / "trained"
    config = make_job(place / "corpus.txt", output, max_steps=4)
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    [(end, _, _)] = run_ranks(run, 1, config, join=False, env=env)
    assert end == "done"
    return output


def test_generate(trained: Path) -> None:
    def text(*options: object, folder: Path = trained) -> str:
        arguments = ["generate", str(folder), "--prompt", "Abc", "--max-new-tokens", "12"]
        result = CliRunner().invoke(cli.app, [*arguments, *map(str, options)])
        assert result.exit_code == 0, result.exception
        return result.stdout

    greedy = text("--temperature", 0)
    assert greedy.startswith("Abc")
    assert len(greedy) > 4
    assert text("--temperature", 0, "--seed", 7) == greedy
    assert text("--temperature", 2, "--seed", 1) == text("--temperature", 2, "--seed", 1)
    assert text("--temperature", 2, "--seed", 1) != text("--temperature", 2, "--seed", 2)
    assert text("--temperature", 0, folder=trained / "checkpoint-4") == greedy


def test_generate_from_what_is_no_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["generate", str(tmp_path), "--prompt", "x"])
    assert isinstance(result.exception, ConfigError)
    assert "neither a model nor a checkpoint" in str(result.exception)


# --- verify


def test_verify_strict(place: Path, tmp_path: Path) -> None:
    table = tmp_path / "verdict.json"
    done = call(
        place, "verify", place / "job.yaml", "--replicas", "1,2", "--steps", 2, "--strict",
        "--json", table,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("yes") == 2
    verdict = json.loads(table.read_text())
    assert verdict["holds"] is True
    assert verdict["strict"] is True
    assert verdict["steps"] == 2
    one, two = verdict["rows"]
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert one["digest"] == two["digest"]
    assert len(one["digest"]) == 64
    assert two["samples_identical"] and two["digest_equal"]
    assert two["loss_difference"] == two["parameter_difference"] == 0
    assert not (place / "run").exists(), "the user's run folder is left alone"


def test_verify_that_does_not_hold_exits_with_1(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What broken synchronization gives is in test_verify; here only what the command makes of it."""
    from unisono import verify as verify_module

    row = verify_module.Row(2, True, 0.1, 0.2, "0" * 64, False, False)
    verdict = verify_module.Verdict(3, False, 1e-5, 1e-4, [row])
    monkeypatch.setattr(verify_module, "verify", lambda *args: verdict)
    table = tmp_path / "verdict.json"
    arguments = ["verify", str(place / "job.yaml"), "--json", str(table)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == EXIT_FAILED
    assert "NO" in result.stdout
    assert json.loads(table.read_text())["holds"] is False


@pytest.mark.parametrize("replicas", ["one", "", "0", "1,-2", "1,,2", "1.5"])
def test_verify_refuses_what_is_no_number(replicas: str) -> None:
    result = CliRunner().invoke(cli.app, ["verify", "shakespeare", "--replicas", replicas])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"--replicas: found '{replicas}'")


# --- train: stopped and gone on with


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_train_is_stopped_by_a_signal_and_goes_on(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    metrics = output / "metrics.jsonl"
    train = ["train", place / "job.yaml", f"output_dir={output}", "save_steps=100000"]
    process = subprocess.Popen(
        command(*train, "max_steps=50000", "--replicas", 2),
        env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 5)
        replicas = psutil.Process(process.pid).children()
        assert len(replicas) == 2
        for replica in [process, *replicas]:
            assert all(map(is_loopback, listening(replica.pid))), "open to other machines"
        assert all(listening(replica.pid) for replica in replicas), "gloo does listen"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == EXIT_STOPPED
    assert "stopped by a signal after step" in told
    assert "run the same command again to go on" in told
    assert not any(replica.is_running() for replica in replicas)
    [checkpoint] = output.glob("checkpoint-*")
    last = int(checkpoint.name.split("-")[1])
    done = call(place, *train, f"max_steps={last + 2}", "--replicas", 2)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {checkpoint} (step {last})" in done.stdout
    assert (output / "model.safetensors").exists()
    assert (output / "receipt.json").exists()
