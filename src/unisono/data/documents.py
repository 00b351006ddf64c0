"""What a file says: its records as documents, streamed; whatever cannot be used is reported.

Contract: `read` yields every usable record of a source in file order and hands each unusable one to
`problems`, so that records read = documents + problems. JSON is read strictly: no NaN, no duplicate
key, no lone surrogate, because each of them means that another reader would see other data.

With `pairs` every record is to be a preference pair (data/preferences.py), and nothing else is used.
Otherwise, what a record is, the first of these that it has: `messages`, a chat; `conversations` (ShareGPT: from,
value), a chat; `prompt` and `completion`, two texts or two lists of messages, a completion; `instruction` and `output` (Alpaca, with `input`
if there is one), a chat of one exchange; the text field, text. A plain text file is one document; as it may be larger than memory it comes in
segments of SEGMENT_CHARS or some more, cut at line ends, which are tokenized apart. Line ends become
`\\n`, as for any text file in Python.

Cost, one thread: 280 MB/s of JSON lines, 200 MB/s of text, 140 from gzip, 60 of one JSON list; memory
a few `max_line_bytes`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unisono.data.lines import Group, Line, elements, groups, is_list, lines, lines_of
from unisono.data.preferences import Messages, parse
from unisono.data.problems import KEPT_BYTES, BadRecord, Problems
from unisono.data.source import Source

SEGMENT_CHARS = 32 * 1024
_SEAM = re.compile(r"\S\n(?=\S)")
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
FIELDS = ("chosen", "rejected", "messages", "conversations", "system", "prompt", "completion", "instruction", "input", "output", "history")  # fmt: skip
"""That decide what a record is, beside the text field."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, or one segment of it. Everything is learned."""

    file: str
    line: int
    consumed: int
    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion, two texts or messages. The completion is learned."""

    file: str
    line: int
    consumed: int
    prompt: str | Messages
    completion: str | Messages

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages as (role, content). What the assistant says is learned."""

    file: str
    line: int
    consumed: int
    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two answers, texts or messages. The answers are learned, each in a row of its own."""

    file: str
    line: int
    consumed: int
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages

    @property
    def is_chat(self) -> bool:
        return not (isinstance(self.prompt, str) and isinstance(self.chosen, str))


Document = Text | Completion | Chat | Pair


def read(
    source: Source, text_field: str, max_line_bytes: int, problems: Problems, pairs: bool = False
) -> Iterator[Document]:
    """The documents of `source`, streamed. Raises DataError only through strict `problems`."""
    if source.format == "text" and pairs:
        problems.add("not a pair", source.name, 0, "plain text holds no preference pairs")
        return iter(())
    if source.format == "text":
        return _read_text(source, max_line_bytes, problems)
    if source.format == "parquet":
        return _read_parquet(source, text_field, max_line_bytes, problems, pairs)
    split = elements if source.format == "json" and is_list(source) else lines
    return _read_json(source, split(source, max_line_bytes, problems), text_field, problems, pairs)


def _bad(kind: str, reason: str) -> BadRecord:
    return BadRecord(reason, kind)


def _read_text(source: Source, limit: int, problems: Problems) -> Iterator[Text]:
    text, consumed, first = "", 0, True
    for group in groups(source, limit, problems):
        text += _group_text(group, source, limit, problems)
        consumed = group.consumed
        begin = 0
        while cut := _cut(text, begin):
            # More white space than a segment holds before the first word is dropped.
            if not first or not text[begin:cut].isspace():
                yield Text(source.name, 1, consumed, text[begin:cut], first, last=False)
                first = False
            begin = cut
        text = text[begin:]
    if not first or (text and not text.isspace()):
        yield Text(source.name, 1, consumed, text, first, last=True)
    elif text:
        problems.add("empty text", source.name, 0, "the file holds nothing but white space")


def _group_text(group: Group, source: Source, limit: int, problems: Problems) -> str:
    """The text of some lines, without those that are none."""
    if len(group.content) <= limit and b"\0" not in group.content:
        try:
            return group.content.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            pass  # find the line
    good = []
    for line in lines_of(group, source, limit, problems):
        try:
            good.append(_decode(line) + "\n" * line.ended)
            if b"\0" in line.content:
                good.pop()
                reason = (
                    f"byte {line.start + line.content.index(0)} is NUL: UTF-16 or no text at all?"
                )
                raise _bad("NUL byte", reason)
        except BadRecord as bad:
            problems.add(bad.kind, source.name, line.number, str(bad), line.content[:KEPT_BYTES])
    return "".join(good)


def _cut(text: str, begin: int) -> int:
    """Where the segment from `begin` ends, or 0 where the text is too short to tell.

    Depends on the text alone, not on how it was read, so that its tokens do not either.
    """
    if len(text) - begin <= SEGMENT_CHARS:
        return 0
    # Between a visible character, a line end and a visible character, the tokenizers in use (GPT-2's
    # splitting and its descendants) would cut too.
    found = _SEAM.search(text, begin + SEGMENT_CHARS, begin + 2 * SEGMENT_CHARS)
    return found.end() if found else text.find("\n", begin + 2 * SEGMENT_CHARS - 1) + 1


def _read_json(
    source: Source, records: Iterator[Line], text_field: str, problems: Problems, pairs: bool
) -> Iterator[Document]:
    for line in records:
        if not line.content.strip():
            continue  # a blank line between records is no record
        try:
            record = _parse(line)
            yield _document(record, source.name, line.number, line.consumed, text_field, pairs)
        except BadRecord as bad:
            problems.add(bad.kind, source.name, line.number, str(bad), line.content[:KEPT_BYTES])


def _read_parquet(
    source: Source, text_field: str, limit: int, problems: Problems, pairs: bool
) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            names = {*FIELDS, text_field}
            columns = [name for name in file.schema_arrow.names if name in names]
            disk_bytes, num_rows = source.path.stat().st_size, file.metadata.num_rows
            if num_rows == 0:
                problems.add("empty file", source.name, 0, "the file has no rows")
            # Few rows at a time: a row may be large, and nothing bounds it before it is decoded.
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    # A column exists for all rows; null in one row says that this row lacks it.
                    record = {k: v for k, v in record.items() if v is not None}
                    try:
                        if sum(len(v) for v in record.values() if isinstance(v, str)) > limit:
                            reason = (
                                f"the row has more than data.max_line_bytes={limit:,} characters"
                            )
                            raise _bad("line too long", reason)
                        consumed = disk_bytes * row // num_rows
                        yield _document(record, source.name, row, consumed, text_field, pairs)
                    except BadRecord as bad:
                        head = repr(record)[:KEPT_BYTES].encode("utf-8", "backslashreplace")
                        problems.add(bad.kind, source.name, row, str(bad), head)
    except (OSError, pyarrow.ArrowException) as error:
        reason = f"cannot be read after row {row}: {' '.join(str(error).split())}"
        problems.add("damaged file", source.name, row, reason)


def _decode(line: Line) -> str:
    try:
        return line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line.content[error.start]
        reason = f"byte {line.start + error.start} of the file is 0x{found:02x}: {error.reason}"
        raise _bad("not UTF-8", reason) from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _bad("duplicate key", f"the key {twice!r} stands twice in one object")
    return record


def _no_constant(name: str) -> Any:
    raise _bad("not valid JSON", f"{name} is no JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _parse(line: Line) -> Mapping[str, Any]:
    text = _decode(line)
    try:
        record = _JSON.decode(text)
    except json.JSONDecodeError as error:
        if not line.ended:
            reason = f"the file ends inside a record: {error.msg} at column {error.colno}"
            raise _bad("torn last line", reason) from None
        raise _bad("not valid JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _bad("not valid JSON", "nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise _bad("not valid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise _bad("not an object", f"a record is an object, found {_kind(record)}")
    return record


def _document(
    record: Mapping[str, Any], file: str, line: int, consumed: int, text_field: str, pairs: bool
) -> Document:
    if pairs:
        if "chosen" not in record and "rejected" not in record:
            found = ", ".join(map(repr, list(record)[:6])) or "nothing"
            raise BadRecord(f"no `chosen` and `rejected` answers; found {found}", "not a pair")
        return Pair(file, line, consumed, *parse(record))
    if "messages" in record:
        return Chat(file, line, consumed, _messages(record["messages"]))
    if "conversations" in record:
        return Chat(file, line, consumed, _sharegpt(record))
    if "prompt" in record and "completion" in record:
        return Completion(file, line, consumed, *_completion(record))
    if "instruction" in record and "output" in record:
        return Chat(file, line, consumed, _alpaca(record))
    if text_field not in record:
        raise _bad("missing field", _what_is_missing(record, text_field))
    return Text(file, line, consumed, _string(record, text_field))


def _what_is_missing(record: Mapping[str, Any], text_field: str) -> str:
    found = ", ".join(map(repr, list(record)[:6])) or "nothing"
    if "prompt" in record and "chosen" in record:
        return (
            "a preference pair (prompt, chosen) is nothing to imitate: write prompt and completion, or "
            "tune on it with dpo: {}"
        )
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        if question in record:
            return f"the {question} has no {answer}; found {found}"
    kinds = "messages, conversations, prompt and completion, or instruction and output"
    return f"no field {text_field!r}, {kinds}; found {found}"


def _alpaca(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """One exchange; the input, which may be empty, stands below the instruction, a blank line between."""
    if record.get("history"):
        raise _bad("bad chat", "history is not read: write the whole chat as messages")
    asked = _string(record, "instruction")
    if record.get("input") is not None and (more := _string(record, "input", may_be_empty=True)):
        asked = f"{asked}\n\n{more}"
    exchange = ("user", asked), ("assistant", _string(record, "output"))
    return (*_system(record), *exchange)


def _sharegpt(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise _bad("wrong type", f"conversations must be a list, found {_kind(turns)}")
    messages: list[tuple[str, str]] = [*_system(record)]
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise _bad("wrong type", f"{where} must be an object, found {_kind(turn)}")
        said = turn.get("from")
        role = SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise _bad("bad chat", f"{where}.from must be one of {known}, found {_kind(said)}")
        content = _string(turn, "value", where + ".", may_be_empty=role == "system")
        messages.append((role, content))
    shift = len(_system(record))
    _in_turn([role for role, _ in messages], lambda i: f"conversations[{i - shift}]")
    return tuple(messages)


def _system(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The system message that some Alpaca and ShareGPT records have beside the turns."""
    if record.get("system") is None:
        return ()
    content = _string(record, "system", may_be_empty=True)
    return (("system", content),) if content.strip() else ()


def _completion(record: Mapping[str, Any]) -> tuple[str | Messages, str | Messages]:
    """Two texts, or two lists of messages that make one chat."""
    if not any(isinstance(record[name], list) for name in ("prompt", "completion")):
        return _string(record, "prompt"), _string(record, "completion")
    asked = _turns(record["prompt"], "prompt")
    said = _turns(record["completion"], "completion")
    roles = [role for role, _ in (*asked, *said)]
    if not asked or not said:
        raise _bad("bad chat", f"{'completion' if asked else 'prompt'} holds no message")
    if asked[-1][0] != "user":
        reason = f"prompt[{len(asked) - 1}] is {asked[-1][0]}: a prompt ends with user"
        raise _bad("bad chat", reason)
    shift = len(asked)
    _in_turn(roles, lambda i: f"prompt[{i}]" if i < shift else f"completion[{i - shift}]")
    prompt, completion = (
        [{"role": role, "content": content} for role, content in turns] for turns in (asked, said)
    )
    return prompt, completion


def _messages(value: Any, name: str = "messages") -> tuple[tuple[str, str], ...]:
    messages = _turns(value, name)
    _in_turn([role for role, _ in messages], lambda i: f"{name}[{i}]")
    return messages


def _turns(value: Any, name: str) -> tuple[tuple[str, str], ...]:
    """(role, content) of each message, in whatever order."""
    if not isinstance(value, list):
        raise _bad("wrong type", f"{name} must be a list, found {_kind(value)}")
    messages = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise _bad("wrong type", f"{where} must be an object, found {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            reason = f"{where}.role must be system, user or assistant, found {_kind(role)}"
            raise _bad("bad chat", reason)
        content = _string(message, "content", where + ".", may_be_empty=role == "system")
        messages.append((role, content))
    return tuple(messages)


def _in_turn(roles: list[str], name: Callable[[int], str]) -> None:
    """A system message first, if any, then user and assistant in turn, and something to learn."""
    previous = None
    for i, role in enumerate(roles):
        after_user = previous == "user"
        if (role == "system" and i > 0) or (role != "system" and after_user == (role == "user")):
            reason = f"{name(i)} is {role} after {previous or 'nothing'}: a system message comes first, then user and assistant in turn"
            raise _bad("bad chat", reason)
        previous = role
    if "assistant" not in roles:
        raise _bad("bad chat", "no assistant message: nothing to learn")


def _string(
    record: Mapping[str, Any], field: str, where: str = "", may_be_empty: bool = False
) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        kind = "missing field" if field not in record else "wrong type"
        found = "nothing" if field not in record else _kind(value)
        raise _bad(kind, f"{where}{field} must be text, found {found}")
    if not may_be_empty and not value.strip():
        raise _bad("empty text", f"{where}{field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        reason = f"{where}{field} holds the lone surrogate \\u{code:04x} at character {error.start}"
        raise _bad("lone surrogate", reason) from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    name = names.get(type(value), "an object")
    return f"{name} {value!r:.40}" if isinstance(value, str | int | float) else name
