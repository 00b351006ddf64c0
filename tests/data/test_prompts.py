"""Prompts of online tuning: what a record is, what is left out and said, and rows of their completions."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpus import SENTENCE, config, jsonl

from unisono.data.blocks import NO_LABEL
from unisono.data.encode import make_encoder
from unisono.data.prompts import prepare_prompts, rollout
from unisono.errors import ConfigError, DataError

GRPO = {"reward_funcs": "a:b", "max_completion_length": 24, "num_generations": 3}


def prepared(path: Path, tokenizer, tmp_path: Path, made_by: str = "", **changes: object):
    asked = config(path, sequence_length=64, grpo=GRPO, **changes)
    return prepare_prompts(asked, tokenizer, tmp_path / "quarantine.jsonl", made_by)


def test_texts_and_messages_are_what_generation_reads(tokenizer, tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the fox?"}]
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "the dog", "answer": 3, "more": ["x"]}, {"prompt": talk}])  # fmt: skip
    text, chat = prepared(path, tokenizer, tmp_path, data={"eval_fraction": 0}).train.items
    assert text.columns == {"answer": 3, "more": ["x"]} and text.prompt == "the dog"
    expected = [*make_encoder(tokenizer).prefix, *tokenizer("the dog", add_special_tokens=False)["input_ids"]]  # fmt: skip
    assert list(text.ids) == expected
    assert chat.prompt == talk and not chat.columns
    rendered = tokenizer.decode(chat.ids)
    assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n") and "the fox?" in rendered


def test_what_cannot_be_used_is_named_and_kept(tokenizer, tmp_path: Path) -> None:
    wrong = [
        {"prompt": ""},
        {"question": "no prompt"},
        {"prompt": 3},
        {"prompt": [{"role": "assistant", "content": "first"}]},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": " ".join([SENTENCE] * 9)},
        "no object",
    ]
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "good"}, *wrong, {"prompt": "good too"}])
    found = prepared(path, tokenizer, tmp_path, data={"eval_fraction": 0})
    assert [p.line for p in found.train.items] == [1, 9]
    kept = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in kept] == [2, 3, 4, 5, 6, 7, 8]
    said = "\n".join(found.problems)
    assert "tokens; sequence_length - grpo.max_completion_length leaves 40" in said
    assert "prompt must be text, found a number 3" in said
    with pytest.raises(DataError, match=r"p\.jsonl:2: prompt is empty"):
        prepared(path, tokenizer, tmp_path, strict_data=True)


def test_held_out_prompts_and_the_digest(tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": f"{word} {k}"} for k, word in enumerate(SENTENCE.split())])  # fmt: skip
    one = prepared(path, tokenizer, tmp_path)
    again = prepared(path, tokenizer, tmp_path)
    assert one.digest == again.digest
    names = [p.prompt for p in (*one.train.items, *one.held.items)]
    assert sorted(names) == sorted(json.loads(line)["prompt"] for line in path.read_text().splitlines())  # fmt: skip
    assert len(one.held) == len(one.blocks("eval")) == 1
    others = [
        prepared(path, tokenizer, tmp_path, "other rewards"),
        prepared(path, tokenizer, tmp_path, data={"eval_fraction": 0.5}),
        prepared(path, tokenizer, tmp_path, data={"eval_path": str(path)}),
    ]
    assert len({one.digest, *(o.digest for o in others)}) == 4
    assert len(others[2].held) == len(others[2].train) == 15


def test_files_that_hold_no_prompts(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="prompts are records of"):
        prepared(tmp_path / "a.txt", tokenizer, tmp_path)
    with pytest.raises(DataError, match="no prompt to use: 1 record: missing field"):
        prepared(jsonl(tmp_path / "p.jsonl", [{"text": "x"}]), tokenizer, tmp_path)


def test_rows_of_completions() -> None:
    batch = rollout([[7, 8], [9], []], [[1, 2, 3], [4], [5, 6]], padding=0)
    expected = [[7, 8, 1, 2, 3], [9, 4, 0, 0, 0], [5, 6, 0, 0, 0]]
    np.testing.assert_array_equal(batch.input_ids, expected)
    none = NO_LABEL
    labels = [[none, none, 1, 2, 3], [none, 4, none, none, none], [5, 6, none, none, none]]
    np.testing.assert_array_equal(batch.labels, labels)
    np.testing.assert_array_equal(batch.position_ids, [range(5)] * 3)
    assert batch.completions == 3
    one = rollout([[7, 8]], [[1]], padding=0)
    assert all(t.flags.writeable for t in (one.input_ids, one.labels, one.position_ids))
    empty = rollout([], [], padding=0)
    assert empty.completions == 0 and (empty.labels == NO_LABEL).all() and empty.labels.shape[1] > 1
