"""What is shown of the data is what training sees of it."""

import io
import json

import numpy as np
import pytest
from corpus import chat, config, jsonl, prose
from rich.console import Console

from unisono.data.examples import examples, inspect
from unisono.data.order import Order
from unisono.data.prepare import prepare
from unisono.data.show import show

RECORDS = [
    chat("the fox?", "a d\u00f6g \U0001f600 jumps", system="be kind"),
    {"prompt": "seven wizards ", "completion": "box five jugs"},
    {"text": "the quick brown fox\njumps"},
    {"instruction": "jump", "input": "over", "output": "[bold]a dog[/bold]"},
    {"prompt": "seven wizards"},
]


@pytest.fixture
def prepared(tokenizer, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", RECORDS + [chat(prose(3, seed=i), "jugs") for i in range(40)])  # fmt: skip
    asked = config(path, sequence_length=64)
    quarantine = tmp_path / "quarantine.jsonl"
    return asked, prepare(asked, tokenizer, tmp_path, quarantine), quarantine


def test_examples_are_the_first_usable_records_with_their_masks(prepared, tokenizer):
    asked, _, _ = prepared
    found = list(examples(asked, tokenizer, 5))
    assert [(e.line, e.kind) for e in found] == [
        (1, "chat"), (2, "completion"), (3, "text"), (4, "chat"), (6, "chat"),
    ]  # fmt: skip
    learned = ["".join(t.text for t in e.tokens if t.learned) for e in found]
    assert learned[0] == "a d\u00f6g \U0001f600 jumps<|im_end|>"
    assert learned[1] == "box five jugs<|endoftext|>"
    # The first token of a text has nothing before it that would tell it.
    assert (
        "the quick brown fox\njumps<|endoftext|>".endswith(learned[2]) and learned[2][:3] != "the"
    )
    first = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert found[2].num_learned == found[2].num_tokens - 1 and len(first) >= 1
    whole = "".join(t.text for t in found[0].tokens)
    assert whole == tokenizer.apply_chat_template(RECORDS[0]["messages"], tokenize=False)
    assert [t.text for t in found[0].tokens if t.special][:2] == ["<|im_start|>", "<|im_end|>"]


def test_files_take_turns(tokenizer, tmp_path):
    for name in "ab":
        jsonl(tmp_path / f"{name}.jsonl", RECORDS[:2])
    asked = config([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], sequence_length=64)
    found = [(e.file, e.line) for e in examples(asked, tokenizer, 3)]
    assert found == [("a.jsonl", 1), ("b.jsonl", 1), ("a.jsonl", 2)]


def test_figures_are_those_of_the_blocks(prepared, tokenizer):
    asked, made, quarantine = prepared
    found = inspect(asked, tokenizer, made, quarantine, 1)
    assert (found.documents, found.dialogues, found.files) == (44, 43, 1)
    blocks = made.blocks("train")
    batch = blocks.read(np.arange(len(blocks)))
    packing = found.packing
    assert packing.blocks == len(blocks) and packing.learned_tokens == (batch.labels != -100).sum()
    assert packing.tokens + packing.padding_tokens == batch.input_ids.size
    assert found.train_blocks + found.eval_blocks == len(blocks) + made.num_eval_blocks
    first = blocks.read(Order(len(blocks), asked.seed).at(np.arange(6)))
    for spans, labels in zip(packing.first_step, first.labels, strict=True):
        assert sum(s.tokens for s in spans) == 64
        assert sum(s.learned for s in spans) == (labels != -100).sum()
        assert not any(s.padding for s in spans[:-1])
    (problem,) = found.problems
    assert (problem.kind, problem.line) == ("missing field", 5)
    assert [row["line"] for row in found.rejected] == [5]


def test_it_is_shown(prepared, tokenizer):
    asked, made, quarantine = prepared
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(show(inspect(asked, tokenizer, made, quarantine, 4)))
    text = console.export_text(clear=False)
    for part in ("x.jsonl:1 chat", "tokens learned", "[bold]a dog[/bold]", "best_fit", "missing field", "x.jsonl:5", "the prompt has no completion"):  # fmt: skip
        assert part in text, part
    styled = console.export_text(styles=True)
    assert "\x1b[1;3" in styled, "what is learned stands out"


def test_the_verb_prints_values(tokenizer, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from unisono.cli import app

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer.save_pretrained(tmp_path / "model")
    path = jsonl(tmp_path / "x.jsonl", RECORDS)
    done = CliRunner().invoke(
        app, ["inspect-data", str(path), "--model", str(tmp_path / "model"), "sequence_length=64", "--examples", "1", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["documents"] == 4 and len(found["examples"]) == 1
    assert found["problems"][0]["line"] == 5
    assert CliRunner().invoke(app, ["inspect-data", str(path)]).exit_code != 0
