"""Loss and perplexity of held-out texts: every token is predicted once, from as much context as fits.

A document of n tokens is read in windows of W = `context` tokens. The first starts from the model's
beginning (or end) token and predicts W tokens; each later one predicts the next `stride` tokens with
the W - stride tokens before them as context. stride = W is the cheapest and what lm-eval's rolling
log-likelihood does; stride = W / 2 (the default) costs twice that and leaves no token but a document's
first W with less than W / 2 of context, which lowers the loss a little.

Figures: nats per token and its exponential (perplexity), bits per byte of UTF-8, which can be compared
across tokenizers. Items are windows; documents are joined neither with each other nor with a template.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import ConfigError
from unisono.evaluate.items import Answer, Item, Likelihood, Measure, Scores, Suite, id_of
from unisono.evaluate.records import Problems, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEASURES = (
    Measure("loss", "mean", "lower", "nats per token, every token once", "nats"),
    Measure("perplexity", "exp", "lower", "e to the loss"),
    Measure("bits_per_byte", "mean", "lower", "of UTF-8 text, comparable across tokenizers", "bits"),
)  # fmt: skip


def suite(
    path: Path, tokenizer: "PreTrainedTokenizerFast", context: int, stride: int | None = None,
    limit: int | None = None,
) -> Suite:  # fmt: skip
    """The windows of a file or folder of texts; `limit` takes the first windows only."""
    stride = stride or max(1, context // 2)
    if not 0 < stride <= context:
        raise ConfigError(f"--stride: found {stride}; write 1 to {context}, the window")
    problems = Problems()
    items: list[Item] = []
    byte_count = token_count = documents = 0
    for where, text in texts(path, problems):
        documents += 1
        for item in windows(text, tokenizer, context, stride):
            if limit is not None and len(items) >= limit:
                break
            items.append(item)
            byte_count += item.facts["bytes"]
            token_count += item.facts["tokens"]
        if limit is not None and len(items) >= limit:
            break
        if not items:
            problems.add(where, "no token in this text")
    if not items:
        raise ConfigError(f"{path}: no text to read{': ' + problems.lines[0] if problems.lines else ''}")  # fmt: skip
    note = (
        f"{token_count:,} tokens, {byte_count:,} bytes of {documents} document(s), "
        f"windows of {context} with a stride of {stride}"
    )
    return Suite(
        f"text:{path.name}", items, MEASURES, score, notes=(note,),
        problems=tuple(problems.lines), bad=problems.bad,
    )  # fmt: skip


def windows(
    text: str, tokenizer: "PreTrainedTokenizerFast", context: int, stride: int
) -> Iterator[Item]:
    """Items whose targets are the tokens of `text`, each once, and whose bytes sum to the text's."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    prefix = prefix_of(tokenizer)
    done = characters = 0
    while done < len(ids):
        end = min(len(ids), done + (context if done == 0 else stride))
        start = end - context - 1
        tokens = ids[start:end] if start >= 0 else [prefix, *ids[:end]]
        reached = len(text) if end == len(ids) else max(characters, offsets[end - 1][1])
        size = len(text[characters:reached].encode("utf-8", "surrogatepass"))
        yield Item(
            id_of("text", tokens, end - done),
            (Likelihood(tuple(tokens), end - done),),
            {"bytes": size, "tokens": end - done},
        )
        done, characters = end, reached


def prefix_of(tokenizer: "PreTrainedTokenizerFast") -> int:
    """What stands before the first token: the beginning token, or the end token (as lm-eval does)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("the tokenizer has neither a beginning nor an end token")


def score(item: Item, answers: Sequence[Answer], reference: Sequence[Answer]) -> Scores:
    nats = -answers[0].logp
    return {
        "loss": (nats, answers[0].tokens),
        "perplexity": (nats, answers[0].tokens),
        "bits_per_byte": (nats / math.log(2), item.facts["bytes"]),
    }
