"""Implicit-reward accuracy on preference pairs: does the model, against its reference, prefer as people do?

With log-probabilities summed over the tokens of an answer y to a prompt x, the implicit reward of DPO
(Rafailov et al. 2023, eq. 5) is beta (log pi(y|x) - log ref(y|x)); its sign of chosen minus rejected
does not depend on beta. A tie counts as wrong, as in TRL's rewards/accuracies, so a model compared
with itself has accuracy 0. `per_token` divides each answer's sum by its number of tokens.
Without a reference only `likelier` (log pi of chosen above rejected) is known.

Records: {"prompt", "chosen", "rejected"}, each a text or messages; or {"chosen", "rejected"} as two
conversations whose common beginning is the prompt.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.errors import DataError
from unisono.evaluate.encode import Messages, messages_of, response_likelihood
from unisono.evaluate.items import Answer, Item, Measure, Scores, Suite, id_of
from unisono.evaluate.records import BadRecord, Problems, parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WITH_REFERENCE = (
    Measure("accuracy", "share", "higher", "implicit reward of chosen above rejected"),
    Measure("accuracy_per_token", "share", "higher", "the same, per token of the answer"),
    Measure("margin", "mean", "higher", "implicit reward, chosen - rejected, beta 1", "nats"),
    Measure("margin_per_token", "mean", "higher", "the same, per token", "nats"),
    Measure("tie", "share", "", "pairs with equal rewards; counted as wrong"),
)
ALONE = (
    Measure("likelier", "share", "higher", "chosen more probable than rejected"),
    Measure("likelier_per_token", "share", "higher", "the same, per token"),
)
Pair = tuple[str | Messages, str | Messages, str | Messages]


def parse(record: dict[str, Any]) -> Pair:
    """(prompt, chosen, rejected). Raises BadRecord."""
    for name in ("chosen", "rejected"):
        if record.get(name) in (None, "", []):
            raise BadRecord(f"no `{name}` answer")
    chosen = messages_of(record["chosen"], "chosen")
    rejected = messages_of(record["rejected"], "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("`chosen` and `rejected` are of two kinds; write two texts or two lists")
    if "prompt" in record:
        prompt = messages_of(record["prompt"], "prompt")
    elif isinstance(chosen, str):
        raise BadRecord("no `prompt`")
    else:
        assert not isinstance(rejected, str)  # both are of one kind
        same = _common(chosen, rejected)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not (prompt and chosen and rejected):
            raise BadRecord("`chosen` and `rejected` need a common beginning and different ends")
    if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
        raise BadRecord(f"the prompt ends with the role {prompt[-1]['role']}; it must be user")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        texts = [answer] if isinstance(answer, str) else [m["content"] for m in answer]
        if not all(text.strip() for text in texts):
            raise BadRecord(f"an empty `{name}` answer")
        if not isinstance(answer, str) and answer[0]["role"] != "assistant":
            raise BadRecord(f"`{name}` begins with the role {answer[0]['role']}; it must be assistant")  # fmt: skip
    if chosen == rejected:
        raise BadRecord("`chosen` and `rejected` are the same")
    return prompt, chosen, rejected


def _common(first: Messages, second: Messages) -> int:
    """How many messages two conversations begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(first), len(second)))


def suite(
    path: Path, tokenizer: "PreTrainedTokenizerFast", context: int, reference: str = "",
    limit: int | None = None,
) -> Suite:  # fmt: skip
    """The pairs of a JSON lines file. Raises DataError when none is usable."""
    problems = Problems()
    items = []
    for where, pair in parsed(path, parse, problems, limit):
        prompt, *answers = pair
        try:
            requests = tuple(response_likelihood(tokenizer, prompt, a, context) for a in answers)
        except BadRecord as error:
            problems.add(where, str(error))
            continue
        items.append(Item(id_of("pair", pair), requests, {"where": where}))
    if not items:
        raise DataError(f"{path}: no pair fits: {problems.lines[0]}")
    return Suite(
        f"preferences:{path.name}", items, (*WITH_REFERENCE, *ALONE) if reference else ALONE, score,
        reference=reference, problems=tuple(problems.lines), bad=problems.bad,
        notes=() if reference else ("no --reference: implicit rewards are not known",),
    )  # fmt: skip


def score(item: Item, answers: Sequence[Answer], reference: Sequence[Answer]) -> Scores:
    chosen, rejected = answers
    difference = chosen.logp - rejected.logp
    each = chosen.logp / chosen.tokens - rejected.logp / rejected.tokens
    scores: dict[str, tuple[float, float]] = {
        "likelier": (float(difference > 0), 1),
        "likelier_per_token": (float(each > 0), 1),
    }
    if reference:
        margin = (chosen.logp - reference[0].logp) - (rejected.logp - reference[1].logp)
        per_token = (chosen.logp - reference[0].logp) / chosen.tokens - (
            rejected.logp - reference[1].logp
        ) / rejected.tokens
        scores |= {
            "accuracy": (float(margin > 0), 1),
            "accuracy_per_token": (float(per_token > 0), 1),
            "margin": (margin, 1),
            "margin_per_token": (per_token, 1),
            "tie": (float(margin == 0), 1),
        }
    return scores
