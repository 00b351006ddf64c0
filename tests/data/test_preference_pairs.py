"""Preference pairs from files to batches: what is refused and why, rows of answers, splits."""

import json
from pathlib import Path

import numpy as np
import pytest

from pairs import pairs, write_model, write_pairs
from unisono.config import parse
from unisono.data.examples import inspect
from unisono.data.pairs import MULTIPLE, Pairs
from unisono.data.prepare import Prepared, prepare
from unisono.errors import ConfigError, DataError

USER, KING, ROSE = (
    {"role": role, "content": content}
    for role, content in (("user", "who is dead"), ("assistant", "the king"), ("assistant", "a rose"))
)  # fmt: skip
BAD = [
    ({"prompt": [USER], "chosen": [KING]}, "no answer", "no `rejected` answer"),
    ({"prompt": [USER], "chosen": [KING], "rejected": []}, "no answer", "no `rejected` answer"),
    ({"prompt": [USER], "chosen": "", "rejected": "a"}, "no answer", "no `chosen` answer"),
    ({"chosen": "the king", "rejected": "a rose"}, "bad record", "no `prompt`"),
    ({"prompt": [USER, KING], "chosen": [ROSE], "rejected": [KING]}, "roles", "the prompt ends with the role assistant"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [ROSE]}, "roles", "`chosen` begins with the role user"),
    ({"prompt": [USER, USER], "chosen": [KING], "rejected": [ROSE]}, "roles", "two of the role user in a row"),
    ({"prompt": [USER], "chosen": [{**KING, "content": " \n"}], "rejected": [ROSE]}, "empty answer", "an empty `chosen` answer"),
    ({"prompt": [USER], "chosen": [KING], "rejected": [KING]}, "no difference", "are the same"),
    ({"prompt": [USER], "chosen": "the king", "rejected": [ROSE]}, "bad record", "of two kinds"),
    ({"chosen": [USER, KING], "rejected": [KING]}, "bad record", "a common beginning"),
    ({"messages": [USER, KING]}, "not a pair", "no `chosen` and `rejected` answers; found 'messages'"),
    ({"prompt": [USER], "chosen": [KING], "rejected": [{**ROSE, "content": "a rose " * 60}]}, "too long", "tokens are more than sequence_length 128: it would not stay whole"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pairs"))


def prepared(model: Path, file: Path, folder: Path, **changes) -> tuple[Prepared, object, object]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = parse({
        "model": str(model), "output_dir": "unused", "sequence_length": 128, "dpo": {},
        "data": {"path": str(file), "eval_fraction": 0.2}, **changes,
    })  # fmt: skip
    folder.mkdir(exist_ok=True)
    return prepare(asked, tokenizer, folder / "cache", folder / "bad.jsonl"), asked, tokenizer


def test_every_bad_record_is_counted_with_file_and_line(model: Path, tmp_path: Path) -> None:
    good = pairs(5)
    records = [good[0], *(record for record, _, _ in BAD), *good[1:]]
    data = write_pairs(tmp_path / "pairs.jsonl", records)
    found, _, _ = prepared(model, data, tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in kept) == list(range(2, len(BAD) + 2))
    by_line = {row["line"]: row for row in kept}
    for line, (_, kind, words) in enumerate(BAD, 2):
        assert by_line[line]["kind"] == kind, by_line[line]
        assert words in by_line[line]["reason"]
    assert sum(p.count for p in found.bad_records) == len(BAD)
    assert found.num_blocks + found.num_eval_blocks == len(good)
    with pytest.raises(DataError, match=r"pairs.jsonl:2: no `rejected` answer"):
        prepared(model, data, tmp_path / "strict", strict_data=True)


def test_without_dpo_a_pair_is_named(model: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs(3))
    with pytest.raises(DataError, match=r"a preference pair .* dpo"):
        prepared(model, data, tmp_path, dpo=None)


def test_a_template_that_is_missing_is_named_with_the_line(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    data = write_pairs(tmp_path / "pairs.jsonl", pairs(3))
    asked = parse({"model": str(model), "output_dir": "x", "dpo": {}, "data": str(data)})
    with pytest.raises(ConfigError, match=r"no chat template, but .*pairs.jsonl:1 holds messages"):
        prepare(asked, tokenizer, tmp_path / "cache", tmp_path / "bad.jsonl")


def test_rows_are_prompt_and_answer_and_only_the_answer_is_learned(
    model: Path, tmp_path: Path
) -> None:
    records = pairs(9)
    found, _, tokenizer = prepared(
        model, write_pairs(tmp_path / "pairs.jsonl", records), tmp_path,
        data={"path": str(tmp_path / "pairs.jsonl"), "eval_fraction": 0},
    )  # fmt: skip
    samples = found.blocks("train")
    assert isinstance(samples, Pairs) and len(samples) == 9
    batch = samples.read([4, 2])
    for row, (record, side) in enumerate(
        (records[k], side) for side in ("chosen", "rejected") for k in (4, 2)
    ):
        prompt = tokenizer.apply_chat_template(
            record["prompt"], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(record["prompt"] + record[side], tokenize=False)
        learned = batch.labels[row] != -100
        begin = int(learned.argmax())
        end = begin + int(learned.sum())
        assert learned[begin:end].all()
        assert tokenizer.decode(batch.input_ids[row, :begin]) == prompt
        assert tokenizer.decode(batch.input_ids[row, :end]) == whole
        assert (batch.input_ids[row, end:] == tokenizer.pad_token_id).all()
    assert batch.input_ids.shape[1] % MULTIPLE == 0
    longest = max(int((row != -100).nonzero()[0].max()) + 1 for row in batch.labels)
    assert batch.input_ids.shape[1] - longest < MULTIPLE, "cut to the longest row"


def test_texts_begin_and_end_as_completions_do(model: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "p.jsonl", [{"prompt": "who", "chosen": " king", "rejected": " a rose"}] * 2)  # fmt: skip
    found, _, tokenizer = prepared(model, data, tmp_path, data={"path": str(data), "eval_fraction": 0})  # fmt: skip
    batch = found.blocks("train").read([0])
    for row, text in enumerate((" king", " a rose")):
        learned = batch.input_ids[row][batch.labels[row] != -100].tolist()
        assert learned == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_both_answers_are_held_out_together_and_nothing_is_lost(
    model: Path, tmp_path: Path
) -> None:
    records = pairs(23)
    found, _, _ = prepared(model, write_pairs(tmp_path / "pairs.jsonl", records), tmp_path)
    train, held = found.blocks("train"), found.blocks("eval")
    assert (len(train), len(held)) == (found.num_blocks, found.num_eval_blocks) == (18, 5)
    numbers = [
        split.rows.numbers(np.arange(2 * len(split))).reshape(-1, 2) for split in (train, held)
    ]
    for rows in numbers:
        assert (rows[:, 0] % 2 == 0).all() and (rows[:, 1] == rows[:, 0] + 1).all()
    assert sorted(np.concatenate(numbers).reshape(-1).tolist()) == list(range(46))
    own = write_pairs(tmp_path / "own.jsonl", pairs(4, seed=9))
    other, _, _ = prepared(model, tmp_path / "pairs.jsonl", tmp_path, data={"path": str(tmp_path / "pairs.jsonl"), "eval_path": str(own)})  # fmt: skip
    assert (len(other.blocks("train")), len(other.blocks("eval"))) == (23, 4)
    assert other.digest != found.digest


def test_inspection_shows_both_answers_with_their_masks(model: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from unisono.data.show import show

    data = write_pairs(tmp_path / "pairs.jsonl", [*pairs(8), BAD[0][0]])
    found, asked, tokenizer = prepared(model, data, tmp_path)
    seen = inspect(asked, tokenizer, found, tmp_path / "bad.jsonl", 2)
    assert [(e.line, e.kind) for e in seen.examples] == [(1, "chosen"), (1, "rejected"), (2, "chosen"), (2, "rejected")]  # fmt: skip
    record = pairs(1)[0]
    for example, side in zip(seen.examples, ("chosen", "rejected"), strict=False):
        learned = "".join(t.text for t in example.tokens if t.learned)
        assert learned.startswith(record[side][0]["content"])
    assert seen.packing.documents == 2 * seen.train_blocks
    console = Console(width=120, record=True, force_terminal=True)
    console.print(show(seen))
    text = console.export_text()
    assert "8 in 1 file, each a prompt with a chosen and a rejected answer" in text
    assert "no `rejected` answer" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": {}}, "write either dpo or reward"),
        ({"model": {"model_type": "llama"}}, "dpo tunes a trained model: name a model directory"),
        ({"data": {"path": "x", "packing": "concat"}}, "leave data.packing out"),
        ({"dpo": {"loss_type": "ipo", "label_smoothing": 0.1}}, "label_smoothing needs loss_type: sigmoid"),
        ({"dpo": {"beta": 0}}, "dpo.beta: found 0"),
        ({"dpo": {"bete": 1}}, "did you mean dpo.beta"),
        ({"dpo": None, "reward": {}, "sample_prompt": "x"}, "a reward model writes no text"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse({"model": "m", "output_dir": "x", "data": "x", "dpo": {}, **changes})
