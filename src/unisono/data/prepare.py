"""From files to blocks, once: the cache entry of a configuration's data.

Contract: `prepare` returns the same blocks, byte for byte, for the same inputs: contents and names
of the files, tokenizer, sequence length, packing, fields. They are kept under a digest of those, so
that a second call costs a look at the files' modification times. It may be killed at any moment and
goes on where it was; processes that ask at the same time wait for one of them to do the work. A
damaged entry is made anew. What was wrong with the data is kept with the entry and reported again.

Which blocks are held out is not part of the entry: changing `seed` or `eval_fraction` costs nothing.
Cost: the tokenizer's time, 5 MB/s of text on two cores (byte-level BPE of 4,096); a second call 12 ms.
Memory: 180 MB (best_fit 260) beside the imports, for 40 MB of text as for 170; disk: see parts.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unisono.config import Config
from unisono.data import parts
from unisono.data.blocks import FORMAT, Blocks, read_index, write_blocks
from unisono.data.cache import locked, publish, read_json
from unisono.data.encode import Encoder, make_encoder
from unisono.data.fingerprint import Content, contents, digest, marks
from unisono.data.pack import Losses, best_fit, concat, one_a_row
from unisono.data.pairs import Pairs, Samples, rows_of
from unisono.data.problems import Problem, Problems
from unisono.data.source import Source, resolve
from unisono.data.split import held_out
from unisono.data.tokenizer import tokenizer_digest
from unisono.errors import DataError
from unisono.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[str, float], None]
RECORDS = 3
"""Version of how records are read: 2 knows Alpaca and ShareGPT, and keeps chats whole; 3 completions of messages."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where the blocks are, and what the plan says of them."""

    folder: Path
    eval_folder: Path | None
    """Blocks of their own for evaluation (data.eval_path); else some of `folder` are held out."""
    eval_fraction: float
    seed: int
    digest: str
    """Of everything that decides which tokens are sample i: a resume must find it unchanged."""
    num_blocks: int
    """For training; pairs, where that is what a sample is."""
    num_eval_blocks: int
    num_documents: int
    num_dialogues: int
    """Chats and completions among them."""
    num_tokens: int
    """In `folder`, without padding."""
    num_target_tokens: int
    max_token_id: int
    packing: Literal["concat", "best_fit", "pairs"]
    problems: tuple[str, ...]
    """One line for each kind of record that could not be used."""
    bad_records: tuple[Problem, ...]
    """The same, as values."""
    notes: tuple[str, ...]
    """What packing did to documents that do not fit."""

    def told(self) -> str:
        """One line."""
        samples = f"samples of {self.blocks('train').sequence_length} tokens"
        if self.packing == "pairs":
            samples = "pairs of answers"
        return (
            f"{self.num_documents:,} documents, {self.num_tokens:,} tokens, "
            f"{self.num_blocks + self.num_eval_blocks:,} {samples}"
        )

    def blocks(self, split: Literal["train", "eval"]) -> Samples:
        """Open the blocks, or pairs, of a split."""
        pairs = self.packing == "pairs"
        if self.eval_folder is not None:
            whole = Blocks(self.folder if split == "train" else self.eval_folder)
            return Pairs(whole) if pairs else whole
        total = self.num_blocks + self.num_eval_blocks
        apart = held_out(total, self.eval_fraction, self.seed)
        rows = Blocks(self.folder, rows_of(apart) if pairs else apart, inside=split == "eval")
        return Pairs(rows) if pairs else rows


def prepare(
    config: Config,
    tokenizer: "PreTrainedTokenizerFast",
    cache_dir: Path,
    quarantine: Path,
    progress: Progress | None = None,
) -> Prepared:
    """The blocks of `config.data`, made or found. Bad records are copied to the file `quarantine`.

    Raises ConfigError (no such data, no chat template) and DataError (nothing usable in it; with
    strict_data the first bad record).
    """
    tell = progress or (lambda stage, share: None)
    whole = config.sequence_length if config.data.packing != "concat" else None
    encoder = make_encoder(tokenizer, longest=whole)
    cache_dir.mkdir(parents=True, exist_ok=True)
    train = _entry(config, config.data.path, "data.path", encoder, cache_dir, tell)
    entries = [train]
    own_eval = None
    if config.data.eval_path is not None:
        own_eval = _entry(config, config.data.eval_path, "data.eval_path", encoder, cache_dir, tell)
        entries.append(own_eval)
    problems = _collect(entries, quarantine)
    total = train.blocks
    num_eval = (
        own_eval.blocks
        if own_eval
        else len(held_out(total, config.data.eval_fraction, config.seed))
    )
    split: Any = own_eval.digest if own_eval else [config.data.eval_fraction, config.seed]
    return Prepared(
        folder=train.folder,
        eval_folder=own_eval.folder if own_eval else None,
        eval_fraction=config.data.eval_fraction,
        seed=config.seed,
        digest=digest([train.digest, split]),
        num_blocks=total if own_eval else total - num_eval,
        num_eval_blocks=num_eval,
        num_documents=train.about["num_documents"],
        num_dialogues=train.about["num_dialogues"],
        num_tokens=train.about["num_tokens"],
        num_target_tokens=train.about["num_target_tokens"],
        max_token_id=max(e.about["max_token_id"] for e in entries),
        packing=train.about["packing"],
        problems=tuple(problems.summary()),
        bad_records=tuple(problems.by_kind.values()),
        notes=tuple(note for e in entries for note in e.about["notes"]),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A finished cache entry. `about` is its about.json."""

    folder: Path
    digest: str
    blocks: int
    about: dict[str, Any]


def _entry(
    config: Config,
    paths: Sequence[str],
    field: str,
    encoder: Encoder,
    cache_dir: Path,
    progress: Progress,
) -> _Entry:
    sources = resolve(paths, field)
    inputs = contents(sources, cache_dir / "digests.json", lambda x: progress("hash", x))
    made_from = digest(
        {
            "format": [FORMAT, RECORDS],
            "files": [[s.name, content.sha256] for s, content in zip(sources, inputs)],
            "tokenizer": tokenizer_digest(encoder.tokenizer),
            "sequence_length": config.sequence_length,
            "packing": "pairs" if config.wants_pairs else config.data.packing,
            "text_field": config.data.text_field,
            "max_line_bytes": config.data.max_line_bytes,
        }
    )
    folder = cache_dir / f"blocks-{made_from[:16]}"
    found = _finished(folder, made_from)
    if found is None:
        with locked(cache_dir / f"{folder.name}.lock", lambda: progress("wait", 0.0)):
            found = _finished(folder, made_from)  # another process may have made it meanwhile
            if found is None:
                _make(config, sources, inputs, field, encoder, folder, made_from, progress)
                found = _finished(folder, made_from)
    assert found is not None
    problems = [Problem(**p) for p in found.about["problems"]]
    if config.strict_data and problems:
        raise DataError(f"{problems[0].where} (strict_data stops at the first bad record)")
    return found


def _finished(folder: Path, made_from: str) -> _Entry | None:
    about = read_json(folder / "about.json")
    if not isinstance(about, dict) or about.get("made_from") != made_from:
        return None
    try:
        index = read_index(folder)
    except DataError:
        return None  # damaged: made anew
    samples = index.num_blocks // 2 if about["packing"] == "pairs" else index.num_blocks
    return _Entry(folder, made_from, samples, about)


def _make(
    config: Config,
    sources: list[Source],
    inputs: list[Content],
    field: str,
    encoder: Encoder,
    folder: Path,
    made_from: str,
    progress: Progress,
) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    done = parts.tokenize(
        sources,
        encoder,
        partial,
        config.data.text_field,
        config.data.max_line_bytes,
        config.strict_data,
        lambda share: progress("tokenize", share),
        config.wants_pairs,
    )
    if [marks(s.path) for s in sources] != [content.marks for content in inputs]:
        shutil.rmtree(partial)
        raise DataError(f"{field}: files changed while they were prepared: run it again")
    problems = Problems()
    for part in done:
        problems.merge(part.account)
    num_tokens = sum(p.num_tokens for p in done)

    packing: str = config.data.packing
    if config.wants_pairs:
        packing = "pairs"
    elif packing == "auto":
        packing = "best_fit" if any(p.num_dialogues for p in done) else "concat"
    losses = Losses()
    stream = _counted(parts.chunks(partial, done, encoder), num_tokens, progress)
    length, padding = config.sequence_length, encoder.padding
    if packing == "pairs":
        rows = one_a_row(stream, length, padding)
    elif packing == "concat":
        rows = concat(stream, length, padding)
    else:
        rows = best_fit(stream, length, padding, losses)
    building = partial / "blocks"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    dtype = np.dtype(encoder.dtype)
    index = write_blocks(building, rows, length, dtype, num_tokens - losses.dropped_tokens)
    if index.num_target_tokens == 0:
        shutil.rmtree(partial)
        why = "; ".join(problems.summary()) or "the text is too short"
        raise DataError(f"{field}: nothing to learn in {len(sources)} files: {why}")
    with (building / "quarantine.jsonl").open("wb") as kept:
        for path in parts.quarantine(partial, done):
            with path.open("rb") as some:
                shutil.copyfileobj(some, kept)
    write_json(
        building / "about.json",
        {
            "made_from": made_from,
            "packing": packing,
            "num_documents": sum(p.num_documents for p in done),
            "num_dialogues": sum(p.num_dialogues for p in done),
            "num_tokens": index.num_tokens,
            "num_target_tokens": index.num_target_tokens,
            "max_token_id": index.max_token_id,
            "problems": problems.to_json(),
            "notes": _notes(losses, length),
        },
    )
    publish(building, folder)
    shutil.rmtree(partial)


def _counted(
    chunks: Iterator[parts.Chunk], num_tokens: int, progress: Progress
) -> Iterator[parts.Chunk]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk[0])
        progress("pack", done / max(num_tokens, 1))


def _notes(losses: Losses, sequence_length: int) -> list[str]:
    notes = []
    if losses.cut_documents:
        notes.append(
            f"{losses.cut_documents:,} documents are longer than sequence_length"
            f" {sequence_length:,} and were cut into pieces"
        )
    if losses.dropped_pieces:
        notes.append(
            f"{losses.dropped_pieces:,} pieces ({losses.dropped_tokens:,} tokens) hold nothing"
            " to learn (prompts longer than a block) and were left out"
        )
    return notes


def _collect(entries: Sequence[_Entry], quarantine: Path) -> Problems:
    """The account of all entries; their bad records copied to `quarantine` if there are any."""
    problems = Problems(quarantine)
    for entry in entries:
        problems.merge(Problem(**p) for p in entry.about["problems"])
    if not problems.total:
        quarantine.unlink(missing_ok=True)  # what an earlier run found
        return problems
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    # Every rank comes here, perhaps at once, with the same content: whole files replace each other.
    with tempfile.NamedTemporaryFile(dir=quarantine.parent, delete=False) as kept:
        for entry in entries:
            with (entry.folder / "quarantine.jsonl").open("rb") as some:
                shutil.copyfileobj(some, kept)
    os.chmod(kept.name, 0o644)
    os.replace(kept.name, quarantine)
    return problems
