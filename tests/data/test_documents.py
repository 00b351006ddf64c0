"""The reader: every record becomes a document or a problem, in bounded memory."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from corpus import chat, jsonl, prose, read_all, source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisono.data import documents
from unisono.data.documents import Chat, Completion, Text, read
from unisono.data.problems import Problems
from unisono.errors import DataError

GOOD = b'{"text": "fine"}'


def test_kinds_of_records(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        [
            {"text": "a"},
            {"prompt": "p", "completion": "c"},
            chat("hi", "ho", system="be kind"),
            {"body": "b"},
        ],
    )
    found, problems = read_all(path)
    assert isinstance(found[0], Text) and (found[0].text, found[0].line) == ("a", 1)
    assert isinstance(found[1], Completion) and found[1].completion == "c"
    assert isinstance(found[2], Chat)
    assert found[2].messages == (("system", "be kind"), ("user", "hi"), ("assistant", "ho"))
    assert problems.by_kind["missing field"].line == 4
    assert [d.text for d in read_all(path, field="body")[0] if isinstance(d, Text)] == ["b"]


def test_alpaca_records_are_chats_of_one_exchange(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        [
            {"instruction": "add", "input": "1 and 2", "output": "3"},
            {"instruction": "greet", "input": "", "output": "hi", "text": "### Instruction: ..."},
            {"instruction": "greet", "output": "hi", "system": "be kind", "history": []},
            {"instruction": "greet", "input": None, "output": "hi", "system": " "},
        ],
    )
    found, problems = read_all(path)
    assert not problems.total and all(isinstance(d, Chat) for d in found)
    assert found[0].messages == (("user", "add\n\n1 and 2"), ("assistant", "3"))
    assert found[1].messages == (("user", "greet"), ("assistant", "hi"))
    assert found[2].messages == (("system", "be kind"), *found[1].messages)
    assert found[3].messages == found[1].messages


def test_sharegpt_records_are_chats(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    told = [{"from": "system", "value": "be kind"}, {"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]  # fmt: skip
    records = [{"conversations": turns * 2, "id": 7}, {"conversations": told}, {"conversations": turns, "system": "be kind"}]  # fmt: skip
    found, problems = read_all(jsonl(tmp_path / "x.jsonl", records))
    assert not problems.total
    assert found[0].messages == (("user", "a"), ("assistant", "b")) * 2
    assert found[1].messages == found[2].messages
    assert found[2].messages == (("system", "be kind"), ("user", "a"), ("assistant", "b"))


def turns(*who):
    return json.dumps({"conversations": [{"from": w, "value": "x"} for w in who]}).encode()


def asked(prompt, *completion):
    both = {"prompt": prompt, "completion": completion}
    chats = {name: [{"role": r, "content": "x"} for r in roles] for name, roles in both.items()}
    return json.dumps(chats).encode()


def messages(*roles):
    return json.dumps({"messages": [{"role": r, "content": "x"} for r in roles]}).encode()


BAD = {
    b"{": ("not valid JSON", "column 2"),
    b'{"text": NaN}': ("not valid JSON", "NaN"),
    b'{"text": "x", "n": -Infinity}': ("not valid JSON", "-Infinity"),
    b'{"text": "x", "text": "y"}': ("duplicate key", "'text' stands twice"),
    b'{"text": "x", "n": {"k": 1, "k": 2}}': ("duplicate key", "'k'"),
    b'{"text": "\\ud800"}': ("lone surrogate", "\\ud800 at character 0"),
    b'{"text": "\xff"}': ("not UTF-8", "0xff"),
    b"[1]": ("not an object", "a list"),
    b"3": ("not an object", "a number 3"),
    b"null": ("not an object", "null"),
    b"{}": ("missing field", "found nothing"),
    b'{"txt": "x"}': ("missing field", "found 'txt'"),
    b'{"text": null}': ("wrong type", "must be text, found null"),
    b'{"text": 3}': ("wrong type", "a number 3"),
    b'{"text": ["x"]}': ("wrong type", "a list"),
    b'{"text": ""}': ("empty text", "text is empty"),
    b'{"text": " \\n"}': ("empty text", "text is empty"),
    b'{"text": "tab\there"}': ("not valid JSON", "Invalid control character"),
    b'{"prompt": "x"}': ("missing field", "the prompt has no completion; found 'prompt'"),
    b'{"prompt": "x", "chosen": "y", "rejected": "z"}': ("missing field", "a preference pair"),
    b'{"instruction": "x", "input": "y"}': ("missing field", "the instruction has no output"),
    b'{"instruction": "x", "output": ""}': ("empty text", "output is empty"),
    b'{"instruction": "", "output": "x"}': ("empty text", "instruction is empty"),
    b'{"instruction": "x", "input": 3, "output": "x"}': ("wrong type", "input must be text"),
    b'{"instruction": "x", "output": "y", "history": [["a", "b"]]}': ("bad chat", "history"),
    b'{"conversations": "x"}': ("wrong type", "conversations must be a list"),
    b'{"conversations": []}': ("bad chat", "no assistant"),
    b'{"conversations": ["x"]}': ("wrong type", "conversations[0] must be an object"),
    b'{"conversations": [{"from": "human"}]}': ("missing field", "conversations[0].value"),
    b'{"conversations": [{"value": "x"}]}': ("bad chat", "conversations[0].from must be one of"),
    turns("human", "tool"): ("bad chat", "conversations[1].from"),
    turns("gpt"): ("bad chat", "conversations[0] is assistant after nothing"),
    turns("human"): ("bad chat", "no assistant"),
    turns("human", "human"): ("bad chat", "conversations[1] is user after user"),
    b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}': (
        "empty text",
        "conversations[1].value is empty",
    ),
    b'{"prompt": "x", "completion": ""}': ("empty text", "completion is empty"),
    b'{"prompt": "x", "completion": null}': ("wrong type", "completion must be text"),
    b'{"prompt": "x", "completion": []}': ("wrong type", "prompt must be a list, found text 'x'"),
    b'{"prompt": [], "completion": "x"}': ("wrong type", "completion must be a list"),
    asked([], "assistant"): ("bad chat", "prompt holds no message"),
    asked(["user"]): ("bad chat", "completion holds no message"),
    asked(["user", "assistant"], "user", "assistant"): (
        "bad chat",
        "prompt[1] is assistant: a prompt ends with user",
    ),
    asked(["user", "user"], "assistant"): ("bad chat", "prompt[1] is user after user"),
    asked(["user"], "user"): ("bad chat", "completion[0] is user after user"),
    asked(["user"], "assistant", "assistant"): (
        "bad chat",
        "completion[1] is assistant after assistant",
    ),
    asked(["user"], "tool"): ("bad chat", "completion[0].role must be"),
    b'{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": " "}]}': (
        "empty text",
        "completion[0].content is empty",
    ),
    b'{"messages": "x"}': ("wrong type", "must be a list"),
    b'{"messages": []}': ("bad chat", "no assistant"),
    b'{"messages": ["x"]}': ("wrong type", "messages[0] must be an object"),
    b'{"messages": [{"role": ["user"]}]}': ("bad chat", "messages[0].role"),
    b'{"messages": [{"role": "user"}]}': ("missing field", "messages[0].content"),
    b'{"messages": [{"role": "user", "content": null}]}': ("wrong type", "messages[0].content"),
    messages("user"): ("bad chat", "no assistant"),
    messages("assistant"): ("bad chat", "assistant after nothing"),
    messages("user", "user"): ("bad chat", "user after user"),
    messages("user", "assistant", "assistant"): ("bad chat", "assistant after assistant"),
    messages("user", "system", "assistant"): ("bad chat", "system after user"),
    messages("user", "tool"): ("bad chat", "must be system, user or assistant"),
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": ("not valid JSON", "digits"),
    b'{"text": "x", "n": ' + b"[" * 100_000 + b"}": ("not valid JSON", "deep"),
}


@pytest.mark.parametrize("record", BAD, ids=lambda r: r[:40].decode("latin-1"))
def test_a_bad_record_is_reported_with_its_line_and_the_others_are_read(tmp_path, record):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n" + record + b"\n" + GOOD + b"\n")
    found, problems = read_all(path)
    kind, reason = BAD[record]
    assert [d.line for d in found] == [1, 3]
    assert list(problems.by_kind) == [kind]
    problem = problems.by_kind[kind]
    assert (problem.file, problem.line, problem.count) == ("x.jsonl", 2, 1)
    assert reason in problem.reason


def test_strict_stops_at_the_first_with_file_line_and_reason(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b'\n{"text": NaN}\n')
    with pytest.raises(DataError, match=r"x.jsonl:2: NaN is no JSON"):
        list(read(source(path), "text", 2**20, Problems(strict=True)))


def test_the_quarantine_keeps_the_record_and_the_summary_counts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{\n" + GOOD + b'\n{"text": "\xff' + b"z" * 5000 + b'"}\n{\n')
    with Problems(tmp_path / "quarantine.jsonl") as problems:
        assert len(list(read(source(path), "text", 2**20, problems))) == 1
    kept = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(k["file"], k["line"], k["kind"]) for k in kept] == [
        ("x.jsonl", 1, "not valid JSON"),
        ("x.jsonl", 3, "not UTF-8"),
        ("x.jsonl", 4, "not valid JSON"),
    ]
    assert kept[1]["record"].startswith('{"text": "\\xffzzz') and len(kept[1]["record"]) < 2010
    assert problems.summary()[0].startswith("2 records: not valid JSON (first: x.jsonl:1: ")
    assert problems.summary()[0].endswith("; kept in quarantine.jsonl")
    assert problems.summary()[1].startswith("1 record: not UTF-8 (first: x.jsonl:3: byte 29 ")


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD)
    found, problems = read_all(path)
    assert [d.line for d in found] == [1, 3] and not problems.total


def test_a_torn_last_line_is_called_that(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-5])
    found, problems = read_all(path)
    assert len(found) == 1 and problems.by_kind["torn last line"].line == 2


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.jsonl", b"", "empty file"),
        ("x.txt", b"", "empty file"),
        ("x.txt", b" \n\n", "empty text"),
        ("x.txt", "hello".encode("utf-16"), "not UTF-8"),
        ("x.txt", "hello".encode("utf-16-le"), "NUL byte"),
        ("x.txt.gz", b"no gzip", "damaged file"),
        ("x.txt.zst", b"no zstd", "damaged file"),
        ("x.parquet", b"no parquet", "damaged file"),
        ("x.json", b"[", "torn last line"),
    ],
)
def test_files_without_a_record(tmp_path, name, content, kind):
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    found, problems = read_all(tmp_path / name)
    assert found == [] and list(problems.by_kind) == [kind]


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gz", "zst"]
)
class TestCompressed:
    def name(self, pack):
        return "x.jsonl.gz" if pack is gzip.compress else "x.jsonl.zst"

    def test_read_like_plain_members_and_frames_joined(self, tmp_path, pack):
        path = tmp_path / self.name(pack)
        path.write_bytes(pack(GOOD + b"\n") + pack(GOOD + b"\n" + GOOD))
        found, problems = read_all(path)
        assert [d.line for d in found] == [1, 2, 3] and not problems.total

    def test_cut_short_is_noticed_and_what_came_before_is_kept(self, tmp_path, pack):
        path = tmp_path / self.name(pack)
        path.write_bytes(pack((GOOD + b"\n") * 3 + GOOD)[:-2])
        found, problems = read_all(path)
        assert list(problems.by_kind) == ["damaged file"]
        # gzip gives what it has, zstd whole blocks only; a line that may be torn is not used.
        assert len(found) == (3 if pack is gzip.compress else 0)

    def test_a_cut_late_in_a_large_file_keeps_the_beginning(self, tmp_path, pack):
        lines = b"".join(
            json.dumps({"text": prose(20, seed=i)}).encode() + b"\n" for i in range(4000)
        )
        path = tmp_path / self.name(pack)
        path.write_bytes(pack(lines)[:-2000])
        found, problems = read_all(path)
        assert len(found) > 100 and list(problems.by_kind) == ["damaged file"]
        assert [d.line for d in found] == list(range(1, len(found) + 1))


def test_json_list(tmp_path):
    path = tmp_path / "x.json"
    tricky = {"text": 'br]ack},et "quoted" \\ \u00e9', "more": [1, {"a": [2]}]}
    path.write_text(
        "[\n " + json.dumps(tricky) + ",\n{},\n  " + json.dumps(chat("a", "b"), indent=2) + "\n]\n"
    )
    found, problems = read_all(path)
    assert found[0].text == tricky["text"] and found[0].line == 2
    assert isinstance(found[1], Chat) and found[1].line == 4
    assert problems.by_kind["missing field"].line == 3


def test_json_list_does_not_depend_on_where_the_chunks_fall(tmp_path, monkeypatch):
    records = [{"text": '\\"' * i + "]},x"} for i in range(1, 40)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records))
    for chunk in (2, 3, 7):
        monkeypatch.setattr("unisono.data.lines._CHUNK", chunk)
        found, problems = read_all(path)
        assert [{"text": d.text} for d in found] == records and not problems.total


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(GOOD + b"\n" + GOOD + b"\n")
    assert len(read_all(path)[0]) == 2


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"[" + GOOD + b",]", "not valid JSON"),
        (b"[" + GOOD + b"] trailing", "not valid JSON"),
        (b"[" + GOOD + b', {"text": "x', "torn last line"),
    ],
)
def test_damaged_json_list_keeps_what_came_before(tmp_path, content, kind):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    found, problems = read_all(path)
    if kind == "not valid JSON" and content.endswith(b",]"):
        assert len(found) == 1 and not problems.total  # a comma too many hides no record
    else:
        assert len(found) == 1 and list(problems.by_kind) == [kind]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [
        {"text": "a", "messages": None},
        {"text": None, "messages": None},
        {"text": "ignored", "messages": chat("hi", "ho")["messages"]},
    ]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found, problems = read_all(path)
    assert isinstance(found[0], Text) and isinstance(found[1], Chat)
    assert problems.by_kind["missing field"].line == 2
    assert read_all(path, limit=3)[1].by_kind["line too long"].line == 3


def test_a_long_line_is_set_aside_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    long = json.dumps({"text": "y" * 200_000}).encode()
    path.write_bytes(GOOD + b"\n" + long + b"\n" + GOOD + b"\n" + long)
    found, problems = read_all(path, limit=1024)
    assert [d.line for d in found] == [1, 3]
    assert problems.by_kind["line too long"].count == 2
    assert f"{len(long) + 1:,} bytes" in problems.by_kind["line too long"].reason
    exact = tmp_path / "exact.jsonl"
    exact.write_bytes(long + b"\r\n" + long)
    assert len(read_all(exact, limit=len(long))[0]) == 2
    assert len(read_all(exact, limit=len(long) - 1)[0]) == 0


MEMORY = """
import sys
from pathlib import Path
from unisono.data.documents import read
from unisono.data.problems import Problems
from unisono.data.source import resolve
problems = Problems()
def peak():  # ru_maxrss would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak()
for path in sys.argv[1:]:
    found = list(read(resolve([path])[0], "text", 2**20, problems))
    assert len(found) == 1 and problems.total == 1, (path, len(found), problems.summary())
    problems = Problems()
print((peak() - before) / 1024)
"""


def test_a_line_of_64_mib_is_passed_over_in_bounded_memory_even_compressed(tmp_path):
    names = ("x.jsonl", "x.txt", "x.jsonl.gz", "x.jsonl.zst", "x.json")
    for name in names:
        begin, end = (b"[", b"]") if name == "x.json" else (b"", b"\n")
        between = b"," if name == "x.json" else b"\n"
        content = begin + b'{"text": "' + b"y" * (64 * 2**20) + b'"}' + between + GOOD + end
        if name.endswith(".gz"):
            content = gzip.compress(content, 1)
        elif name.endswith(".zst"):
            content = zstandard.ZstdCompressor().compress(content)
        (tmp_path / name).write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *(str(tmp_path / n) for n in names)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(result.stdout) < 48, f"{result.stdout} MiB more"


def test_plain_text_comes_in_segments_that_are_the_text(tmp_path):
    text = prose(40_000, seed=3)
    path = tmp_path / "x.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    found, problems = read_all(path)
    assert "".join(d.text for d in found) == text and not problems.total
    assert len(found) > 3
    assert [d.first for d in found] == [True] + [False] * (len(found) - 1)
    assert [d.last for d in found] == [False] * (len(found) - 1) + [True]
    assert all(d.text.endswith("\n") for d in found)
    assert max(len(d.text) for d in found) < 3 * documents.SEGMENT_CHARS


def test_segments_do_not_depend_on_how_the_file_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SEGMENT_CHARS", 200)
    path = tmp_path / "x.txt"
    path.write_text(prose(2000, seed=4))
    expected = [d.text for d in read_all(path)[0]]
    for chunk in (2, 17, 1000):
        monkeypatch.setattr("unisono.data.lines._CHUNK", chunk)
        assert [d.text for d in read_all(path)[0]] == expected


def test_segments_end_where_a_tokenizer_would_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SEGMENT_CHARS", 200)
    # Most lines end in blanks or are followed by an empty one; one in six is a seam.
    text = "".join(
        f"line {i}" + ("  \n", "\n\n", "\n\n\n", " \n", "\n  ", "\n")[i % 6] for i in range(600)
    )
    (tmp_path / "x.txt").write_text(text)
    found, _ = read_all(tmp_path / "x.txt")
    ends = np.cumsum([len(d.text) for d in found])[:-1].tolist()
    assert len(ends) > 10
    assert all(text[e - 1] == "\n" and text[e - 2] > " " and text[e] > " " for e in ends)


def test_bad_lines_of_a_text_are_left_out_with_their_byte_offset(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\ntw\xffo\nth\0ree\nfour")
    found, problems = read_all(path)
    assert [d.text for d in found] == ["one\nfour"]
    assert problems.by_kind["not UTF-8"].reason.startswith("byte 6 of the file is 0xff")
    assert problems.by_kind["not UTF-8"].line == 2
    assert problems.by_kind["NUL byte"].reason.startswith("byte 11 ")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.just(GOOD),
            st.sampled_from(list(BAD)[:20]),
            st.just(b"y" * 3000),
        ),
        max_size=8,
    ).map(b"\n".join),
    suffix=st.sampled_from(["jsonl", "json", "txt", "jsonl.gz", "jsonl.zst"]),
    packed=st.booleans(),
)
def test_whatever_the_bytes_each_line_is_a_document_or_a_problem(tmp_path, content, suffix, packed):
    path = tmp_path / f"x.{suffix}"
    if packed and suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif packed and suffix.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(content))
    else:
        path.write_bytes(content)
    found, problems = read_all(path, limit=1024)
    plain = suffix == "jsonl" or (packed and suffix.startswith("jsonl."))
    if plain and content and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        body = content.removeprefix(b"\xef\xbb\xbf")
        visible = [line for line in body.split(b"\n") if line.strip() or len(line) > 1024]
        assert len(found) + problems.total == len(visible)
