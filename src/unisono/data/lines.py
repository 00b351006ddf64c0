"""Bytes of a file as lines or as list elements, in bounded memory whatever the file holds.

Contract: a line (or element) longer than `limit` bytes is passed over in pieces and reported, never
held whole; a damaged or cut compressed file yields what comes before the damage and is reported. So
memory stays near `limit` even for a gzip bomb. Line ends are stripped (LF and CRLF), a UTF-8 byte
order mark at the start too. Cost: one copy; gzip and zstd decompress in this thread.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

from unisono.data.problems import KEPT_BYTES, Problems
from unisono.data.source import Source

_CHUNK = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file, or one element of a JSON list."""

    number: int
    """Counted from 1."""
    start: int
    """Byte offset in the decompressed file."""
    consumed: int
    """Bytes of the file on disk read so far: progress."""
    content: bytes
    ended: bool
    """False for a last line without its line end: it may be torn."""


@dataclass(frozen=True, slots=True)
class Group:
    """Some whole lines in a row, with their line ends: cheaper to handle than one by one."""

    number: int
    start: int
    consumed: int
    content: bytes


def groups(source: Source, limit: int, problems: Problems) -> Iterator[Group]:
    """All of `source` but lines that are too long; those inside a group are `lines_of`'s to find."""
    number, start, content = 1, 0, b""
    try:
        with _opened(source) as (stream, disk):
            if not _is_text(stream, source, problems):
                return
            if stream.peek(3)[:3] == _BOM:
                start = len(stream.read(3))
            while content := stream.read1(_CHUNK):
                if not content.endswith(b"\n"):
                    content += stream.readline(limit + 2)  # a line end does not count
                whole, head = content, b""
                if not content.endswith(b"\n") and stream.peek(1):
                    cut = content.rfind(b"\n") + 1
                    whole, head = content[:cut], content[cut:]
                if whole:
                    yield Group(number, start, disk.tell(), whole)
                number += whole.count(b"\n")
                start += len(whole)
                content = b""
                if head:
                    size = len(head) + _skip_line(stream)
                    _report_long(source, number, size, limit, head, problems)
                    number += 1
                    start += size
    except _damage() as error:
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            yield Group(number, start, start, whole)
        _report_damage(source, number + whole.count(b"\n"), error, problems)


def lines_of(group: Group, source: Source, limit: int, problems: Problems) -> Iterator[Line]:
    """The lines of a group."""
    start = group.start
    pieces = group.content.split(b"\n")
    last = len(pieces) - 1
    for i, content in enumerate(pieces):
        ended = i < last
        if ended or content:
            stripped = content[:-1] if ended and content.endswith(b"\r") else content
            if len(stripped) > limit:
                size = len(content) + ended
                _report_long(source, group.number + i, size, limit, stripped, problems)
            else:
                yield Line(group.number + i, start, group.consumed, stripped, ended)
        start += len(content) + 1


def lines(source: Source, limit: int, problems: Problems) -> Iterator[Line]:
    """The lines of `source`; those that cannot be had are reported to `problems`."""
    for group in groups(source, limit, problems):
        yield from lines_of(group, source, limit, problems)


def elements(source: Source, limit: int, problems: Problems) -> Iterator[Line]:
    """The elements of a file that is one JSON list, each with the number of its first line."""
    number = 0
    try:
        with _opened(source) as (stream, disk):
            if not _is_text(stream, source, problems):
                return
            scanner = _ListScanner(limit)
            while chunk := stream.read1(_CHUNK):
                for line in scanner.feed(chunk, disk.tell()):
                    number = line.number
                    if len(line.content) > limit:
                        _report_long(
                            source, number, len(line.content), limit, line.content, problems
                        )
                    else:
                        yield line
            head = bytes(scanner.element[:KEPT_BYTES])
            if scanner.depth == 0 and head.strip():
                reason = "the list is closed, but more follows"
                problems.add("not valid JSON", source.name, scanner.element_line, reason, head)
            if scanner.depth > 0:
                reason = "the list is not closed: the file is cut short, or a quote is missing"
                problems.add("torn last line", source.name, scanner.element_line, reason, head)
    except _damage() as error:
        _report_damage(source, number, error, problems)


def is_list(source: Source) -> bool:
    """Whether a .json file is one list, and not JSON lines."""
    try:
        with _opened(source) as (stream, _):
            return stream.peek(_CHUNK).removeprefix(_BOM).lstrip()[:1] == b"["
    except _damage():
        return False


class _ListScanner:
    """Cuts `[a, b]` at its commas. Keeps only strings, escapes and depth apart: that a, b are JSON
    is the parser's business. An element beyond the limit is counted on but no longer kept."""

    _OUTSIDE = re.compile(rb'["\[\]{},]')
    _INSIDE = re.compile(rb'["\\]')

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.depth = 0
        self.element = bytearray()
        self.element_line = 1
        self._visible = False
        self._element_start = 0
        self._in_string = False
        self._escaped = False
        self._line = 1
        self._offset = 0
        self._count = 0

    def feed(self, chunk: bytes, consumed: int) -> Iterator[Line]:
        at = 0  # up to here the chunk is taken
        look = 1 if self._escaped else 0
        self._escaped = False
        while match := (self._INSIDE if self._in_string else self._OUTSIDE).search(chunk, look):
            look = match.end()
            byte = match.group()
            if byte == b"\\":
                look += 1
                self._escaped = look > len(chunk)
            elif byte == b'"':
                self._in_string = not self._in_string
            elif byte in b"[{":
                self.depth += 1
                if self.depth == 1:
                    self._take(chunk[at:look])
                    at = look
                    self._begin()
            elif byte == b"," and self.depth == 1:
                self._take(chunk[at : look - 1])
                at = look
                yield self._finish(consumed)
                self._offset += 1
                self._begin()
            elif byte in b"]}":
                closes = self.depth == 1
                self.depth = max(self.depth - 1, 0)
                if closes:
                    self._take(chunk[at : look - 1])
                    at = look
                    if self._count or self._visible:
                        yield self._finish(consumed)
                    self._offset += 1
                    self._begin()
        self._take(chunk[at:])

    def _begin(self) -> None:
        self.element.clear()
        self._visible = False
        self.element_line = self._line
        self._element_start = self._offset

    def _take(self, piece: bytes) -> None:
        if not self._visible:
            # The element's line is where its first visible byte stands.
            blank = len(piece) - len(piece.lstrip())
            self._visible = blank < len(piece)
            self.element_line = self._line + piece.count(b"\n", 0, blank)
        room = self.limit + 1 - len(self.element)
        self.element += piece[: max(room, 0)]
        self._line += piece.count(b"\n")
        self._offset += len(piece)

    def _finish(self, consumed: int) -> Line:
        self._count += 1
        content = bytes(self.element.strip())
        return Line(self.element_line, self._element_start, consumed, content, True)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[io.BufferedReader[Any], BinaryIO]]:
    """The decompressed stream, and the file on disk under it, whose position is the progress."""
    with open(source.path, "rb", buffering=_CHUNK) as disk:
        stream = cast("io.BufferedReader[Any]", disk)
        if source.compression == ".gz":
            stream = io.BufferedReader(_GzipFile(disk), _CHUNK)
        elif source.compression == ".zst":
            stream = io.BufferedReader(_ZstdFile(disk), _CHUNK)
        yield stream, disk


class _GzipFile(io.RawIOBase):
    """A decompressed view that gives what there is before it raises for a file that is cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))  # readinto would fill the buffer or raise
        buffer[: len(data)] = data
        return len(data)


class _ZstdFile(io.RawIOBase):
    """A decompressed view that, unlike zstandard's own reader, notices a file that is cut short."""

    # Four bytes of zstd can stand for 128 KiB: small inputs bound what one call can produce (16 MiB).
    _INPUT = 512

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._output:
            data = self._input or self._file.read(self._INPUT)
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the zstd frame is cut short")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _is_text(stream: io.BufferedReader[Any], source: Source, problems: Problems) -> bool:
    head = stream.peek(4)[:4]
    if not head:
        problems.add("empty file", source.name, 0, "the file is empty")
        return False
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        reason = "byte 0: a UTF-16 byte order mark; convert the file to UTF-8 (iconv -f UTF-16)"
        problems.add("not UTF-8", source.name, 0, reason, head)
        return False
    return True


def _skip_line(stream: io.BufferedReader[Any]) -> int:
    """Pass over the rest of a line, however long, and count it."""
    size = 0
    while piece := stream.readline(_CHUNK):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _report_long(
    source: Source, number: int, size: int, limit: int, head: bytes, problems: Problems
) -> None:
    reason = f"{size:,} bytes are more than data.max_line_bytes={limit:,}"
    problems.add("line too long", source.name, number, reason, head[:KEPT_BYTES])


def _damage() -> tuple[type[Exception], ...]:
    import zstandard

    return (OSError, EOFError, zlib.error, zstandard.ZstdError)


def _report_damage(source: Source, line: int, error: Exception, problems: Problems) -> None:
    reason = f"cannot be read after line {line}: {' '.join(str(error).split())}"
    problems.add("damaged file", source.name, line, reason)
