"""`unisono plan`: what it prints, writes and imports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from unisono.errors import EXIT_USAGE


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unisono", "plan", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_a_named_architecture_on_known_hardware(tmp_path: Path) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    done = call("llama-7b", "--hardware", "H100", "--devices", "8..64", "--tokens", "20B",
                "global_batch_size=512", "--json", out, "--page", page)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "llama-7b, 6.74B parameters" in done.stdout
    assert "unisono train CONFIG" in done.stdout
    modules = {m[1] for line in done.stderr.splitlines() if (m := re.match(r"import time:.*\| +([\w]+)", line))}  # fmt: skip
    assert not modules & {"torch", "transformers", "numpy", "tokenizers", "safetensors"}

    plan = json.loads(out.read_text())
    assert [p["devices"] for p in plan["points"]] == [8, 12, 16, 24, 32, 48, 64]
    for point in plan["points"]:
        assert point["step_s"] == pytest.approx(sum(point["parts_s"].values()))
        assert point["tokens_per_s_low"] < point["tokens_per_s"] < point["tokens_per_s_high"]
        assert point["usd"] == pytest.approx(point["hours"] * point["devices"] * plan["usd_per_device_hour"])  # fmt: skip

    html = page.read_text()
    assert "<script" not in html and "http" not in html and "src=" not in html, "self-contained"
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.findall(".//title"), "every point has a tooltip"
        assert "nan" not in drawing


def test_the_shipped_recipe_and_a_local_config_json(tmp_path: Path) -> None:
    assert call("shakespeare", "--hardware", "a100", "--devices", "1,2").returncode == 0
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 688, "vocab_size": 1000, "num_key_value_heads": 2}))  # fmt: skip
    done = call("shakespeare", f"model={model}", "tokenizer=null", "--hardware", "L40S", "--devices", "4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model, 3.41M parameters" in done.stdout


def test_one_device_is_a_curve_too(tmp_path: Path) -> None:
    done = call("gpt2", "--hardware", "A100", "--devices", "1", "--page", tmp_path / "p.html", "--price", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama-7b",), "--hardware or --probe"),
        (("lama-7b", "--hardware", "H100"), "nearest: llama-7b"),
        (("llama-7b", "--hardware", "H101"), "'H101' is not known; nearest: H100"),
        (("llama-7b", "--probe", "absent.json"), "--probe: absent.json cannot be read"),
        (("llama-7b", "--hardware", "H100", "--devices", "none"), "--devices: found 'none'"),
        (("llama-7b", "--hardware", "H100", "--link", "quick"), "--link: found 'quick'"),
        (("llama-7b", "--hardware", "H100", "--tokens", "x"), "--tokens: found 'x'"),
        (("llama-7b", "--hardware", "V100", "--devices", "1"), "nothing fits on 1 x V100 16GB"),
        (("shakespeare", "model=no/such-thing", "--hardware", "H100"), "no local config.json"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.returncode == EXIT_USAGE
    (line,) = told(done)
    assert line.startswith("unisono: ")
    assert message in line
