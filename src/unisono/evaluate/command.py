"""The verb `eval`: from what was typed to tables, files and a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from unisono.errors import ConfigError
from unisono.evaluate.run import Asked, check, evaluate
from unisono.files import write_json
from unisono.observe.screen import Quiet, Screen
from unisono.world import World, cache_folder

DTYPES = ("float32", "bfloat16", "float16", "auto")


def asked(
    model: str, *, suites: Sequence[str] | None, text: Sequence[Path] | None,
    preferences: Sequence[Path] | None, reference: str, choices: Sequence[Path] | None,
    tasks: Sequence[Path] | None, baseline: str, limit: int | None, context: int | None,
    stride: int | None, dtype: str, wheels: Path | None, output: Path | None,
) -> Asked:  # fmt: skip
    """Checked, before any replica starts. Raises ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: found {dtype!r}; write one of {', '.join(DTYPES)}")
    found = Asked(
        model=model, suites=tuple(suites or ()), text=tuple(text or ()),
        preferences=tuple(preferences or ()), reference=reference, choices=tuple(choices or ()),
        tasks=tuple(tasks or ()), baseline=baseline, limit=limit, context=context, stride=stride,
        dtype=dtype, wheels=wheels or cache_folder() / "wheels", output=output,
    )  # fmt: skip
    check(found)
    return found


def command(asked: Asked, world: World, json_file: Path | None) -> None:
    """Collective: evaluate and show; rank 0 writes results.json and report.html."""
    from unisono.evaluate import page, show

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    screen = Screen(console) if world.is_main else Quiet()
    came = evaluate(asked, world, screen)
    if came is None:
        return
    found, differences, notes, folder = came
    screen.show(show.figures(found))
    if "baseline" in found:
        screen.show(show.differences(found["model"]["name"], found["baseline"]["name"], differences, notes))  # fmt: skip
    (folder / "report.html").write_text(page.render(found, differences), encoding="utf-8")
    screen.say(show.places(folder), "dim")
    if json_file is not None:
        write_json(json_file, found)
