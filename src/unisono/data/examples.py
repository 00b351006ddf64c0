"""What training will see of the data: examples with their masks, how blocks are packed, what is wrong.

Contract: examples are the first usable records of the files in turn, encoded by the code that preparation
uses, so a token shown as learned is a token whose loss counts. A token is learned when its flag says so
and it is not the first of its document (nothing stands before it). Figures of packing come from the
prepared blocks themselves, at most MEASURED of them, at equal distances.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unisono.config import Config
from unisono.data.blocks import NO_LABEL, Batch
from unisono.data.documents import Completion, Document, Pair, Text, read
from unisono.data.encode import ENDS, LEARNED, encode, make_encoder
from unisono.data.order import Order
from unisono.data.pairs import Pairs, rows_of
from unisono.data.prepare import Prepared
from unisono.data.problems import Problem, Problems
from unisono.data.source import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEASURED = 4096
"""Blocks whose packing is looked at."""
SHOWN_BLOCKS = 6
REJECTED = 20
"""Records that cannot be used are named one by one, at most so many."""
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Token:
    """One token, or the few that make one character together."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One document as the model sees it."""

    file: str
    line: int
    kind: str
    num_tokens: int
    num_learned: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A document, a piece of one, or padding, in a block."""

    tokens: int
    learned: int
    padding: bool


@dataclass(frozen=True, slots=True)
class Packing:
    """How documents lie in the blocks that were looked at."""

    blocks: int
    documents: int
    """Or pieces of documents."""
    tokens: int
    learned_tokens: int
    padding_tokens: int
    median_tokens: int
    """Of a document."""
    longest_tokens: int
    first_step: tuple[tuple[Span, ...], ...]
    """The first few blocks of the run, span by span."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that `inspect-data` shows."""

    files: int
    documents: int
    dialogues: int
    """Chats and completions among them."""
    tokens: int
    learned_tokens: int
    sequence_length: int
    packing_kind: str
    train_blocks: int
    eval_blocks: int
    packing: Packing
    examples: tuple[Example, ...]
    problems: tuple[Problem, ...]
    """One for each kind, with its count."""
    rejected: tuple[dict[str, Any], ...]
    """The first records that cannot be used: file, line, kind, reason, record."""
    notes: tuple[str, ...]


def inspect(
    config: Config,
    tokenizer: "PreTrainedTokenizerFast",
    prepared: Prepared,
    quarantine: Path,
    count: int,
) -> Inspection:
    """What `prepared` holds, with `count` examples and some of the records it left in `quarantine`."""
    return Inspection(
        files=len(resolve(config.data.path)),
        documents=prepared.num_documents,
        dialogues=prepared.num_dialogues,
        tokens=prepared.num_tokens,
        learned_tokens=prepared.num_target_tokens,
        sequence_length=config.sequence_length,
        packing_kind=prepared.packing,
        train_blocks=prepared.num_blocks,
        eval_blocks=prepared.num_eval_blocks,
        packing=_packing(prepared, config.seed),
        examples=tuple(examples(config, tokenizer, count)),
        problems=prepared.bad_records,
        rejected=tuple(islice(_rows(quarantine), REJECTED)),
        notes=prepared.notes,
    )


def examples(config: Config, tokenizer: "PreTrainedTokenizerFast", count: int) -> Iterator[Example]:
    """The first `count` documents that can be used, from each file in turn; of a pair both answers."""
    encoder = make_encoder(tokenizer, longest=config.sequence_length)
    unreported = Problems()  # preparation has reported them
    special = set(tokenizer.all_special_ids)

    def found() -> Iterator[Example]:
        for document in _in_turn(config, unreported):
            all_ids, all_flags = encode([document], encoder, unreported)
            ends = np.flatnonzero(all_flags & ENDS)[:-1] + 1  # where a pair's second answer begins
            kinds = ("chosen", "rejected") if isinstance(document, Pair) else (_kind(document),)
            for ids, flags, kind in zip(np.split(all_ids, ends), np.split(all_flags, ends), kinds):
                if not len(ids):
                    continue
                learned = (flags & LEARNED) != 0
                learned[0] = False
                tokens = _tokens(ids.tolist(), learned.tolist(), special, tokenizer)
                yield Example(
                    document.file, document.line, kind, len(ids), int(learned.sum()), tuple(tokens)
                )

    return islice(found(), 2 * count if config.wants_pairs else count)


def _in_turn(config: Config, problems: Problems) -> Iterator[Document]:
    readers = [
        read(
            source, config.data.text_field, config.data.max_line_bytes, problems, config.wants_pairs
        )
        for source in resolve(config.data.path)
    ]
    for row in zip_longest(*readers):
        yield from (document for document in row if document is not None)


def _kind(document: Document) -> str:
    if isinstance(document, Text):
        return "text"
    return "completion" if isinstance(document, Completion) else "chat"


def _tokens(
    ids: list[int], learned: list[bool], special: set[int], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Token]:
    """Decoded one by one; tokens that are part of a character wait for the rest of it."""
    waiting: list[int] = []
    for i, (token, counts) in enumerate(zip(ids, learned)):
        waiting.append(token)
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        last = i + 1 == len(ids) or learned[i + 1] != counts
        if not text.endswith("\ufffd") or last or len(waiting) > 4:
            yield Token(text, counts, token in special)
            waiting = []


def _rows(quarantine: Path) -> Iterator[dict[str, Any]]:
    if quarantine.is_file():
        with quarantine.open(encoding="ascii") as file:
            yield from map(json.loads, file)


def _packing(prepared: Prepared, seed: int) -> Packing:
    samples = prepared.blocks("train")
    blocks = samples.rows if isinstance(samples, Pairs) else samples
    measured = min(len(blocks), MEASURED)
    numbers = np.linspace(0, len(blocks) - 1, measured).astype(np.int64)
    lengths: list[int] = []
    tokens = learned = padding = 0
    for begin in range(0, measured, _AT_ONCE):
        batch = blocks.read(numbers[begin : begin + _AT_ONCE])
        for spans in _spans(batch):
            lengths += [span.tokens for span in spans if not span.padding]
            tokens += sum(span.tokens for span in spans if not span.padding)
            learned += sum(span.learned for span in spans)
            padding += sum(span.tokens for span in spans if span.padding)
    first = Order(len(samples), seed).at(np.arange(min(SHOWN_BLOCKS, len(samples))))
    if isinstance(samples, Pairs):
        first = rows_of(first)[:SHOWN_BLOCKS]
    return Packing(
        blocks=measured,
        documents=len(lengths),
        tokens=tokens,
        learned_tokens=learned,
        padding_tokens=padding,
        median_tokens=int(np.median(lengths)) if lengths else 0,
        longest_tokens=max(lengths, default=0),
        first_step=tuple(_spans(blocks.read(first))),
    )


def _spans(batch: Batch) -> Iterator[tuple[Span, ...]]:
    """The documents of each block. Padding is the last one, of one token over and over, unlearned."""
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids):
        bounds = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        spans = []
        for begin, end in pairwise(bounds):
            learned = int(np.count_nonzero(labels[begin:end] != NO_LABEL))
            padding = end == len(ids) and not learned and bool((ids[begin:] == ids[begin]).all())
            spans.append(Span(end - begin, learned, padding))
        yield tuple(spans)
