"""What came out: scores by item, figures with intervals, and what differs between two models.

A results file is one JSON document that holds every item's scores, so that it can be compared with any
other later. A difference is called real when its p, adjusted over all differences of the comparison
(Holm), is below 0.05. Shares are tested by McNemar's exact test on the items that changed, means and
losses by a permutation of the pairs; intervals of differences are paired bootstraps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unisono.errors import ConfigError
from unisono.evaluate.intervals import (
    Pair,
    bootstrap,
    holm,
    mcnemar,
    paired,
    ratio,
    wilson,
)
from unisono.evaluate.items import Answer, Measure, Suite, key_of

FORMAT = 1
REAL = 0.05
MOST_EXAMPLES = 12


@dataclass(frozen=True)
class Figure:
    """A measure over `items`, with its 95% interval; None where there are too few items for one."""

    measure: str
    value: float
    low: float | None
    high: float | None
    items: int
    kind: str
    better: str
    meaning: str
    unit: str = ""


@dataclass(frozen=True)
class Difference:
    """after - before of one measure on the items that both have."""

    suite: str
    measure: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    p: float
    adjusted_p: float
    items: int
    kind: str
    better: str

    @property
    def real(self) -> bool:
        return self.adjusted_p < REAL

    @property
    def verdict(self) -> str:
        """better, worse, changed (where neither is better) or no difference."""
        if not self.real:
            return "no difference"
        if self.better == "":
            return "changed"
        if self.better == "half":
            return "better" if abs(self.after - 0.5) < abs(self.before - 0.5) else "worse"
        return "better" if (self.difference > 0) == (self.better == "higher") else "worse"


def scored(
    suite: Suite, answers: Mapping[str, Answer], reference: Mapping[str, Answer]
) -> dict[str, Any]:
    """One suite's part of the results file."""
    items: dict[str, dict[str, Pair]] = {}
    examples: list[dict[str, Any]] = []
    for item in suite.items:
        asked = [key_of(r) for r in item.requests]
        told = [answers[k] for k in asked]
        scores = suite.score(item, told, [reference[k] for k in asked] if suite.reference else [])
        items[_free(item.id, items)] = {name: (float(a), float(b)) for name, (a, b) in scores.items()}  # fmt: skip
        if "prompt" in item.facts and len(examples) < MOST_EXAMPLES:
            examples.append({"prompt": item.facts["prompt"], "answer": told[0].text})
    return {
        "figures": [asdict(f) for m in suite.measures if (f := figure(m, items))],
        "notes": list(suite.notes),
        "problems": list(suite.problems),
        "bad": suite.bad,
        "examples": examples,
        "items": items,
    }


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A second item of the same content gets a number: the first of both models are compared."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def figure(measure: Measure, items: Mapping[str, Mapping[str, Pair]]) -> Figure | None:
    """The figure of one measure, None where no item has it."""
    pairs = [scores[measure.name] for scores in items.values() if measure.name in scores]
    if not pairs:
        return None
    value = ratio(pairs)
    if measure.kind == "share":
        low, high = wilson(sum(p[0] for p in pairs), len(pairs))
    else:
        low, high = bootstrap(pairs)
    if measure.kind == "exp":
        value, low, high = _exp(value), _exp(low), _exp(high)
    return Figure(
        measure.name, value, _finite(low), _finite(high), len(pairs), measure.kind, measure.better,
        measure.meaning, measure.unit,
    )  # fmt: skip


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Difference], list[str]]:  # fmt: skip
    """What differs between two results, and notes on what could not be compared.

    Perplexity is not tested: it is a function of the loss.
    """
    found: list[dict[str, Any]] = []
    notes = []
    for name, suite in after["suites"].items():
        other = before["suites"].get(name)
        if other is None:
            notes.append(f"{name}: not in the baseline")
            continue
        if suite.get("reference") != other.get("reference"):
            notes.append(f"{name}: the two have different references, so implicit rewards are not compared")  # fmt: skip
            continue
        common = [k for k in suite["items"] if k in other["items"]]
        if len(common) < max(len(suite["items"]), len(other["items"])):
            notes.append(f"{name}: {len(common)} items in common, of {len(other['items'])} before and {len(suite['items'])} after")  # fmt: skip
        for fact in suite["figures"]:
            if fact["kind"] == "exp":
                continue
            pairs = [
                (tuple(other["items"][k][fact["measure"]]), tuple(suite["items"][k][fact["measure"]]))
                for k in common
                if fact["measure"] in suite["items"][k] and fact["measure"] in other["items"][k]
            ]  # fmt: skip
            if pairs:
                found.append(_difference(name, fact, [p[0] for p in pairs], [p[1] for p in pairs]))
    adjusted = holm([f["p"] for f in found])
    return [Difference(**f, adjusted_p=p) for f, p in zip(found, adjusted, strict=True)], notes


def _difference(
    suite: str, fact: Mapping[str, Any], before: Sequence[Pair], after: Sequence[Pair]
) -> dict[str, Any]:
    low, high, p = paired(before, after)
    if fact["kind"] == "share":
        only_before = sum(b[0] > a[0] for b, a in zip(before, after, strict=True))
        only_after = sum(b[0] < a[0] for b, a in zip(before, after, strict=True))
        p = mcnemar(only_before, only_after)
    first, second = ratio(before), ratio(after)
    return {
        "suite": suite, "measure": fact["measure"], "before": first, "after": second,
        "difference": second - first, "low": _finite(low), "high": _finite(high), "p": p,
        "items": len(before), "kind": fact["kind"], "better": fact["better"],
    }  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """A results file, or the one in a folder. Raises ConfigError when it is none."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_bytes())
        if found["format"] != FORMAT:
            raise ConfigError(f"{file}: results of format {found['format']}; evaluate again")
        for suite in found["suites"].values():
            for scores in suite["items"].values():
                for above, below in scores.values():
                    float(above), float(below)
            for fact in suite["figures"]:
                Figure(**fact)
        str(found["model"]["name"])
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: no results of unisono eval ({error!r:.80})") from None
    return dict(found)


def is_results(path: Path) -> bool:
    """Whether a path means results rather than a model."""
    return path.suffix == ".json" or (path / "results.json").is_file()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
