"""README's snippets run as they stand."""

import re
import sys
from pathlib import Path

import yaml

from unisono import config as config_module
from unisono.launch.local import launch

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_snippets_run_on_two_replicas(tmp_path: Path) -> None:
    found = blocks("python")
    assert found
    for number, code in enumerate(found):
        script = tmp_path / f"snippet_{number}.py"
        script.write_text(code)
        assert launch([sys.executable, str(script)], 2, 1, {"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_yaml_snippets_are_configurations() -> None:
    found = blocks("yaml")
    assert found
    for text in found:
        config_module.parse(yaml.safe_load(text))


def test_commands_and_files_exist() -> None:
    from typer.main import get_command

    from unisono.cli import app

    verbs = get_command(app).commands
    for verb in re.findall(r"unisono ([\w-]+)", " ".join(blocks("console"))):
        assert verb in verbs, verb
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target


def test_demo_output_comes_by_line_20() -> None:
    lines = README.splitlines()
    assert any("tokens/s" in line for line in lines[:20])
    assert any("make demo" in line for line in lines[:20])
