"""Requests to a model, items that carry them, and suites that score items. Plain frozen values.

A request's key is a digest of what is asked, so that an answer on disk is found again whatever the
suite, the order, or the number of replicas.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from unisono.evaluate.intervals import Pair


@dataclass(frozen=True)
class Likelihood:
    """How probable the last `targets` of `tokens` are, given all before them."""

    tokens: tuple[int, ...]
    targets: int


@dataclass(frozen=True)
class Generation:
    """The greedy continuation of `tokens`, at most `most` tokens."""

    tokens: tuple[int, ...]
    most: int


Request = Likelihood | Generation


@dataclass(frozen=True)
class Answer:
    """Of Likelihood: `logp` in nats over `tokens` targets. Of Generation: `text` of `tokens`."""

    tokens: int
    logp: float = 0.0
    text: str = ""
    ended: bool = True
    """False where a generation was cut at its limit."""


@dataclass(frozen=True)
class Item:
    """One thing that is scored. `id` names its content, alike in every run."""

    id: str
    requests: tuple[Request, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


Kind = Literal["share", "mean", "exp"]


@dataclass(frozen=True)
class Measure:
    """A figure over items. `share`: of 0 or 1 each; `exp`: e to the ratio, of a loss per token."""

    name: str
    kind: Kind
    better: Literal["higher", "lower", "half", ""]
    """`half`: best at 0.5, where a model has no preference; "" where neither is better."""
    meaning: str
    unit: str = ""


Scores = Mapping[str, Pair]


@dataclass(frozen=True)
class Suite:
    """Items, what is measured of each, and what was wrong with the data."""

    name: str
    items: Sequence[Item]
    measures: tuple[Measure, ...]
    score: Callable[[Item, Sequence[Answer], Sequence[Answer]], Scores]
    """(item, the model's answers, the reference's or none) -> (numerator, denominator) by measure."""
    reference: str = ""
    """The model that is asked the same, if any."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """One line each: file:line: what; how many there are is in `bad`."""
    bad: int = 0


def key_of(request: Request) -> str:
    """A digest of what is asked."""
    asked = {"kind": type(request).__name__, **asdict(request)}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def id_of(*content: Any) -> str:
    """A short name for the content of an item."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
