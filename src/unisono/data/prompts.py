"""Prompts for online tuning: records of a prompt and whatever its reward needs, and batches of their completions.

A record has `prompt`, a text or messages that end with the user's; its other fields are handed to the reward
functions. A text is encoded as the prompt of a completion record is (encode.py), messages by the chat
template with its generation prompt. A prompt longer than `sequence_length - max_completion_length`
tokens is reported and left out, as every record is that cannot be used.

Contract: the same prompts in file order for the same files and tokenizer. Everything is in memory: about 1 KB a
prompt. Which are held out is decided as for blocks (split.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from unisono.config import Config
from unisono.data.blocks import NO_LABEL, Batch
from unisono.data.documents import _messages, _parse, _string
from unisono.data.encode import Encoder, make_encoder
from unisono.data.fingerprint import digest
from unisono.data.lines import elements, is_list, lines
from unisono.data.problems import KEPT_BYTES, BadRecord, Problem, Problems
from unisono.data.source import Source, resolve
from unisono.data.split import held_out
from unisono.data.tokenizer import tokenizer_digest
from unisono.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Floats = npt.NDArray[np.float32]
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One record. `prompt` and `columns` as they stand there."""

    file: str
    line: int
    prompt: str | Messages
    columns: Mapping[str, Any]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rollout(Batch):
    """Prompts with their completions [n, S], padded on the right; labels are the completions' tokens."""

    advantages: Floats
    """[n]"""
    drawn: Floats
    """[n, S - 1] log-probability with which each label was drawn."""
    reference: Floats | None
    """[n, S - 1] and by the reference; None without one in the loss."""
    completions: int
    """Rows that count: n, or 0 of a micro-batch that holds no prompt."""
    sums: Mapping[str, tuple[float, float]]
    """Metrics that are known before the loss."""


def rollout(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], padding: int
) -> Rollout:
    """Rows of a prompt and its completion, without advantages; a row of padding where there are none."""
    pairs = list(zip(prompts, completions, strict=True))
    shape = max(len(pairs), 1), max((len(p) + len(c) for p, c in pairs), default=2)
    ids, labels = np.full(shape, padding, np.int64), np.full(shape, NO_LABEL, np.int64)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[row, :end] = (*prompt, *completion)
        labels[row, len(prompt) : end] = completion
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    apart = np.zeros((shape[0], shape[1] - 1), np.float32)
    return Rollout(
        ids, labels, positions, False, np.zeros(shape[0], np.float32), apart,
        None, len(pairs), {},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one split, numbered from 0. Beside `Blocks` where a run generates."""

    items: Sequence[Prompt]
    sequence_length: int
    """Of a prompt and its completion, at most."""
    longest: int
    """Tokens of a completion at most."""
    generations: int
    padding: int

    def __len__(self) -> int:
        return len(self.items)

    def lengths(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of each prompt."""
        return np.array([len(self.items[s].ids) for s in samples], np.int64)

    def read(self, samples: npt.ArrayLike) -> Rollout:
        """What a micro-batch of these costs at most, for timing: every completion as long as it may be."""
        ids = [self.items[s].ids for s in np.asarray(samples) for _ in range(self.generations)]
        return rollout(ids, [[self.padding] * self.longest] * len(ids), self.padding)


@dataclass(frozen=True)
class PreparedPrompts:
    """The prompts of a run; beside `Prepared`, with those of its fields that a run needs."""

    train: Prompts
    held: Prompts
    digest: str
    """Of everything that decides which prompt is sample i, and how it is rewarded."""
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    bad_records: tuple[Problem, ...] = ()
    num_dialogues: int = field(default=0, init=False)

    @property
    def num_blocks(self) -> int:
        return len(self.train)

    def blocks(self, split: Literal["train", "eval"]) -> Prompts:
        return self.train if split == "train" else self.held

    def told(self) -> str:
        """One line."""
        sizes = sorted(len(p.ids) for p in self.train.items)
        return (
            f"{len(self.train):,} prompts of {sizes[0]} to {sizes[-1]} tokens (median "
            f"{sizes[len(sizes) // 2]}), {len(self.held):,} held out"
        )


def prepare_prompts(
    config: Config, tokenizer: "PreTrainedTokenizerFast", quarantine: Path | None, made_by: str = ""
) -> PreparedPrompts:
    """The prompts of `config.data`. Bad records are copied to the file `quarantine`.

    `made_by`: digest of what else the run depends on. Raises ConfigError (no such data, no chat template)
    and DataError (nothing usable; with strict_data the first bad record).
    """
    asked = config.grpo
    assert asked is not None
    most = config.sequence_length - asked.max_completion_length
    if most < 1:
        raise ConfigError(
            f"sequence_length: found {config.sequence_length}, which holds prompt and completion, with "
            f"grpo.max_completion_length {asked.max_completion_length}; write more than that"
        )
    encoder = make_encoder(tokenizer)
    if quarantine is not None:
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        quarantine.unlink(missing_ok=True)  # what an earlier run found
    with Problems(quarantine, config.strict_data) as problems:
        items = list(_read(config, config.data.path, "data.path", encoder, most, problems))
        own = None
        if config.data.eval_path is not None:
            own = list(_read(config, config.data.eval_path, "data.eval_path", encoder, most, problems))  # fmt: skip
    if not items:
        raise DataError(f"data.path: no prompt to use: {'; '.join(problems.summary())}")
    held = set(held_out(len(items), config.data.eval_fraction, config.seed).tolist()) if own is None else set()  # fmt: skip
    train = [p for k, p in enumerate(items) if k not in held]
    apart = [p for k, p in enumerate(items) if k in held] if own is None else own

    def split(some: list[Prompt]) -> Prompts:
        return Prompts(
            some, config.sequence_length, asked.max_completion_length, asked.num_generations,
            encoder.padding,
        )  # fmt: skip

    made_from = [
        [[[p.prompt, p.columns, p.ids] for p in some] for some in (train, apart)],
        tokenizer_digest(tokenizer), made_by,
    ]  # fmt: skip
    return PreparedPrompts(
        split(train), split(apart), digest(made_from), tuple(problems.summary()),
        bad_records=tuple(problems.by_kind.values()),
    )  # fmt: skip


def _read(
    config: Config,
    paths: Sequence[str],
    name: str,
    encoder: Encoder,
    most: int,
    problems: Problems,
) -> Iterator[Prompt]:
    for source in resolve(paths, name):
        if source.format not in ("json", "jsonl"):
            raise ConfigError(
                f"{name}: found {source.name}; prompts are records of .jsonl or .json: {{'prompt': ...}}"
            )
        yield from _of_file(source, config.data.max_line_bytes, encoder, most, problems)


def _of_file(
    source: Source, limit: int, encoder: Encoder, most: int, problems: Problems
) -> Iterator[Prompt]:
    split = elements if source.format == "json" and is_list(source) else lines
    for line in split(source, limit, problems):
        if not line.content.strip():
            continue
        try:
            record = _parse(line)
            prompt = _prompt(record)
            ids = _encode(prompt, encoder)
            if not 0 < len(ids) <= most:
                raise BadRecord(
                    f"the prompt has {len(ids):,} tokens; sequence_length - grpo.max_completion_length "
                    f"leaves {most:,}",
                    "too long",
                )
            columns = {k: v for k, v in record.items() if k != "prompt"}
            yield Prompt(source.name, line.number, prompt, columns, ids)
        except BadRecord as bad:
            problems.add(bad.kind, source.name, line.number, str(bad), line.content[:KEPT_BYTES])


def _prompt(record: Mapping[str, Any]) -> str | Messages:
    value = record.get("prompt")
    if not isinstance(value, list):
        return _string(record, "prompt")
    answered = _messages(
        [*value, {"role": "assistant", "content": "?"}]
    )  # as they must be to be answered
    return [{"role": role, "content": content} for role, content in answered[:-1]]


def _encode(prompt: str | Messages, encoder: Encoder) -> tuple[int, ...]:
    tokenizer = encoder.tokenizer
    if isinstance(prompt, str):
        return (*encoder.prefix, *tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not tokenizer.chat_template:
        raise ConfigError(
            "tokenizer: it has no chat template, but a prompt holds messages: use the tokenizer of a chat "
            "model, or write prompts as texts"
        )
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything: it is a program of its own
        reason = f"the chat template refuses it: {' '.join(str(error).split())}"
        raise BadRecord(reason, "chat template") from None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
