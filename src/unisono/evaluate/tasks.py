"""Generation tasks: the greedy answer against the expected ones.

`exact_match`: equal after spaces at the ends are gone. `match`: equal without case, punctuation and
English articles (as SQuAD's evaluation does). `contains`: the expected words stand in the answer, in
order and together, under the same normalization.

Records: `prompt` (a text or messages; or `question`), `answer` (a text or a list of accepted ones),
perhaps `until` (texts that end an answer) and `max_new_tokens`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.data.preferences import Messages, messages_of
from unisono.errors import DataError
from unisono.evaluate.encode import generation
from unisono.evaluate.items import Answer, Item, Measure, Scores, Suite, id_of
from unisono.evaluate.records import BadRecord, Problems, parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEASURES = (
    Measure("exact_match", "share", "higher", "equal to an expected answer"),
    Measure("match", "share", "higher", "equal without case, punctuation, articles"),
    Measure("contains", "share", "higher", "an expected answer stands in it"),
    Measure("cut", "share", "lower", "answers that reached their limit of tokens"),
)
NEW_TOKENS = 64
Task = tuple[str | Messages, list[str], list[str], int]


def parse(record: dict[str, Any]) -> Task:
    """(prompt, accepted answers, ends, most new tokens). Raises BadRecord."""
    prompt = messages_of(record.get("prompt", record.get("question")), "prompt")
    if not prompt:
        raise BadRecord("no `prompt`")
    answers, ends = _texts(record.get("answer"), "answer"), _texts(record.get("until", []), "until")
    if not answers or not all(a.strip() for a in answers):
        raise BadRecord("no `answer`")
    most = record.get("max_new_tokens", NEW_TOKENS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise BadRecord(f"`max_new_tokens` is {most!r:.30}; write a number of at least 1")
    return prompt, answers, ends, most


def _texts(value: Any, name: str) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
        raise BadRecord(f"`{name}` must be a text or a list of texts")
    return found


def suite(
    path: Path, tokenizer: "PreTrainedTokenizerFast", context: int, limit: int | None = None
) -> Suite:
    """The tasks of a JSON lines file. Raises DataError when none is usable."""
    problems = Problems()
    items = []
    for where, task in parsed(path, parse, problems, limit):
        prompt, answers, ends, most = task
        try:
            asked = generation(tokenizer, prompt, most, context)
        except BadRecord as error:
            problems.add(where, str(error))
            continue
        items.append(Item(id_of("task", task), (asked,), {"answers": answers, "until": ends, "where": where}))  # fmt: skip
    if not items:
        raise DataError(f"{path}: no task fits: {problems.lines[0]}")
    return Suite(f"tasks:{path.name}", items, MEASURES, score, problems=tuple(problems.lines), bad=problems.bad)  # fmt: skip


def score(item: Item, answers: Sequence[Answer], reference: Sequence[Answer]) -> Scores:
    text, ended = answers[0].text, answers[0].ended
    for end in item.facts["until"]:
        if end and end in text:
            text, ended = text.split(end, 1)[0], True
    accepted = item.facts["answers"]
    words = f" {normal(text)} "
    return {
        "exact_match": (float(text.strip() in [a.strip() for a in accepted]), 1),
        "match": (float(words.strip() in [normal(a) for a in accepted]), 1),
        "contains": (float(any(normal(a) and f" {normal(a)} " in words for a in accepted)), 1),
        "cut": (float(not ended), 1),
    }


def normal(text: str) -> str:
    """Lower case words without punctuation and articles, one space between."""
    words = re.sub(r"[^\w\s]", "", text.casefold()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the"))
