"""Implicit-reward accuracy on preference pairs: does the model, against its reference, prefer as people do?

With log-probabilities summed over the tokens of an answer y to a prompt x, the implicit reward of DPO
(Rafailov et al. 2023, eq. 5) is beta (log pi(y|x) - log ref(y|x)); its sign of chosen minus rejected
does not depend on beta. A tie counts as wrong, as in TRL's rewards/accuracies, so a model compared
with itself has accuracy 0. `per_token` divides each answer's sum by its number of tokens.
Without a reference only `likelier` (log pi of chosen above rejected) is known.

Records: as data/preferences.py reads them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.data.preferences import parse
from unisono.errors import DataError
from unisono.evaluate.encode import response_likelihood
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
