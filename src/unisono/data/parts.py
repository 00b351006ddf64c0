"""The tokenized stream as numbered part files: what makes a long preparation resumable.

Contract: part k holds what was encoded of a contiguous range of documents: part-k.tokens,
part-k.flags, part-k.quarantine, and last of all part-k.json, whose existence with matching sizes
says that the part is complete. After a kill `tokenize` goes on at the first part that is not. A part
carries its own account of problems, so nothing is reported twice or forgotten.

Cost: documents of the source in which a kill fell are read again, at the reader's speed and without
tokenizing. Disk: 3 or 5 bytes a token until the blocks are published. Memory: one part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unisono.data.cache import read_json
from unisono.data.documents import Completion, Document, Pair, Text, read
from unisono.data.encode import Encoder, encode
from unisono.data.pack import Chunk
from unisono.data.preferences import as_messages
from unisono.data.problems import Problem, Problems
from unisono.data.source import Source
from unisono.errors import DataError
from unisono.files import replacing, write_json

PART_BYTES = 16 * 2**20
"""Text of a part."""
_BATCH_BYTES = 2 * 2**20
"""Text of one call of the tokenizer, which needs some 40 bytes of memory for each."""


@dataclass(frozen=True, slots=True)
class Part:
    """A complete part (part-k.json)."""

    num_tokens: int
    num_documents: int
    num_dialogues: int
    """Chats and completions."""
    source: int
    """Where the next part begins: the source's number,"""
    taken: int
    """and how many of its documents (segments, for plain text) are behind."""
    last: bool
    problems: list[dict[str, Any]]

    @property
    def account(self) -> list[Problem]:
        return [Problem(**p) for p in self.problems]


def tokenize(
    sources: Sequence[Source],
    encoder: Encoder,
    folder: Path,
    text_field: str,
    max_line_bytes: int,
    strict: bool,
    progress: Callable[[float], None],
    pairs: bool = False,
) -> list[Part]:
    """Complete the parts in `folder`. Raises DataError at the first bad record when strict."""
    parts = _complete_parts(folder, encoder)
    for part in parts:
        if strict and part.problems:
            raise DataError(f"{part.account[0].where} (strict_data stops at the first bad record)")
    begin = parts[-1] if parts else Part(0, 0, 0, 0, 0, False, [])
    if begin.last:
        return parts
    behind = list(accumulate((s.path.stat().st_size for s in sources), initial=0))
    problems = Problems(folder / _name(len(parts), "quarantine"), strict)
    stream = _documents(sources, begin, text_field, max_line_bytes, problems, pairs)
    writer = _Writer(folder, len(parts), encoder, problems)
    with problems:
        while batch := _batch(stream):
            source, taken, document = batch[-1]
            writer.add([d for _, _, d in batch])
            progress((behind[source] + document.consumed) / max(behind[-1], 1))
            if writer.num_chars >= PART_BYTES:
                parts.append(writer.commit(source, taken, last=False))
        parts.append(writer.commit(len(sources), 0, last=True))
    return parts


def chunks(folder: Path, parts: Sequence[Part], encoder: Encoder) -> Iterator[Chunk]:
    """The token stream, a part at a time."""
    for i in range(len(parts)):
        tokens = np.fromfile(folder / _name(i, "tokens"), encoder.dtype)
        yield tokens, np.fromfile(folder / _name(i, "flags"), np.uint8)


def quarantine(folder: Path, parts: Sequence[Part]) -> Iterator[Path]:
    """The files of records set aside, in order."""
    for i, part in enumerate(parts):
        if part.problems:
            yield folder / _name(i, "quarantine")


class _Writer:
    """Collects one part after the other."""

    def __init__(self, folder: Path, number: int, encoder: Encoder, problems: Problems) -> None:
        self.folder = folder
        self.number = number
        self.encoder = encoder
        self.problems = problems
        self._clear()

    def _clear(self) -> None:
        self.num_chars = self.num_documents = self.num_dialogues = 0
        self.tokens: list[npt.NDArray[np.unsignedinteger]] = [np.empty(0, self.encoder.dtype)]
        self.flags: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)]

    def add(self, documents: list[Document]) -> None:
        ids, flags = encode(documents, self.encoder, self.problems)
        self.tokens.append(ids.astype(self.encoder.dtype))
        self.flags.append(flags)
        self.num_chars += sum(map(_size, documents))
        self.num_documents += sum(not isinstance(d, Text) or d.last for d in documents)
        self.num_dialogues += sum(not isinstance(d, Text) for d in documents)

    def commit(self, source: int, taken: int, last: bool) -> Part:
        tokens, flags = np.concatenate(self.tokens), np.concatenate(self.flags)
        part = Part(
            len(tokens), self.num_documents, self.num_dialogues, source, taken, last,
            self.problems.to_json(),
        )  # fmt: skip
        for kind, array in (("tokens", tokens), ("flags", flags)):
            with replacing(self.folder / _name(self.number, kind)) as file:
                file.write(array.data)
        self.problems.close()
        write_json(self.folder / _name(self.number, "json"), asdict(part))
        self.number += 1
        self.problems.begin(self.folder / _name(self.number, "quarantine"))
        self._clear()
        return part


def _complete_parts(folder: Path, encoder: Encoder) -> list[Part]:
    parts: list[Part] = []
    while not (parts and parts[-1].last):
        k = len(parts)
        try:
            part = Part(**read_json(folder / _name(k, "json")))
            num_tokens = (folder / _name(k, "tokens")).stat().st_size // np.dtype(
                encoder.dtype
            ).itemsize
            num_flags = (folder / _name(k, "flags")).stat().st_size
        except (TypeError, OSError):
            break
        if not num_tokens == num_flags == part.num_tokens:
            break
        parts.append(part)
    return parts


def _documents(
    sources: Sequence[Source],
    begin: Part,
    text_field: str,
    max_line_bytes: int,
    problems: Problems,
    pairs: bool,
) -> Iterator[tuple[int, int, Document]]:
    """(source, documents of it so far, document) from where `begin` ended."""
    for i in range(begin.source, len(sources)):
        documents = read(sources[i], text_field, max_line_bytes, problems, pairs)
        skipped = begin.taken if i == begin.source else 0
        problems.muted = True  # the part that holds these documents has reported what lies between
        for _ in islice(documents, skipped):
            pass
        problems.muted = False
        for taken, document in enumerate(documents, skipped + 1):
            yield i, taken, document


def _batch(
    stream: Iterator[tuple[int, int, Document]],
) -> list[tuple[int, int, Document]]:
    """Documents of about _BATCH_BYTES together."""
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += _size(item[2])
        # Not one document more: what the reader reports next belongs to the next part.
        if size >= _BATCH_BYTES or len(batch) >= 8192:
            break
    return batch


def _size(document: Document) -> int:
    """Characters, near enough to bytes to bound memory by."""
    if isinstance(document, Text):
        return len(document.text)
    if isinstance(document, Pair | Completion):
        whole = (
            (document.prompt, document.completion)
            if isinstance(document, Completion)
            else (document.prompt, document.prompt, document.chosen, document.rejected)
        )
        return sum(len(m["content"]) for part in whole for m in as_messages(part, ""))
    return sum(len(content) for _, content in document.messages)


def _name(number: int, kind: str) -> str:
    return f"part-{number:06}.{kind}"
