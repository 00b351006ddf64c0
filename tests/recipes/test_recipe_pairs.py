"""Pairs out of multiple choice: the right answer before each wrong one, held-out questions left out."""

import json

from unisono.data.preferences import parse
from unisono.recipes import pairs

QUESTION = {"passage": "It rains.", "question": "What now?", "options": "A. swim\nB. go in\nC. go in", "answer": "A. swim"}  # fmt: skip
OTHER = {"passage": "P.", "question": "Q?", "options": "A. x\nB. y", "answer": "B. y"}


def test_each_wrong_option_makes_a_pair() -> None:
    lines = "\n".join(json.dumps(q) for q in (QUESTION, OTHER))
    found = list(pairs.pairs(lines))
    told = [(p["prompt"][0]["content"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in found]  # fmt: skip
    assert told == [
        ("It rains. What now?", "swim", "go in"),
        ("It rains. What now?", "swim", "go in"),
        ("P. Q?", "y", "x"),
    ]
    for pair in found:
        parse(pair)
    assert len(list(pairs.pairs(lines, without=json.dumps(QUESTION)))) == 1
