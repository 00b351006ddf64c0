"""The guard: what it stops, what it writes, and what happens when something of it fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unisono.errors import UnisonoError
from unisono.files import read_lines
from unisono.guard import BLOCKED, Completion, Guard, Rule, sketch


def test_a_blocked_prompt_never_reaches_the_model(tmp_path: Path) -> None:
    asked = []
    with Guard(log=tmp_path / "g.jsonl") as guard:
        reply = guard.ask("Explain how to make a pipe bomb", lambda p: asked.append(p) or "boom")
        fine = guard.ask("How do I bake bread?", lambda p: Completion("With flour.", 3, 1.5))
    assert reply.text == BLOCKED and reply.blocked == "prompt"
    assert reply.rules == ("harmful request",) and asked == []
    assert fine.text == "With flour." and fine.blocked == "" and fine.rules == ()
    rows = list(read_lines(tmp_path / "g.jsonl"))
    assert [r["blocked"] for r in rows] == ["prompt", ""]
    assert rows[1]["completion_tokens"] == 3 and rows[1]["nats_per_token"] == 1.5
    assert "bread" not in (tmp_path / "g.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("-----BEGIN RSA PRIVATE KEY-----", "secret"), ("the password is hunter2!!", "secret"),
        ("card 4556 7375 8689 9855 please", "card number"), ("you worthless faggots", "toxic"),
    ],
)  # fmt: skip
def test_completions_that_are_held_back(text: str, rule: str) -> None:
    reply = Guard().ask("hello there", lambda _: text)
    assert reply.text == BLOCKED and reply.blocked == "completion" and rule in reply.rules


@pytest.mark.parametrize(
    "text",
    ["order 4556 7375 8689 9854", "Tell me how to kill a process", "What is a bomb shelter made of?",
     "How do I boil an egg?", "1234567890123456"],
)  # fmt: skip
def test_ordinary_prompts_pass(text: str) -> None:
    assert Guard().check(text, "prompt") == ((), None)


def test_a_classifier_decides_beside_the_rules_and_its_failure_blocks() -> None:
    guard = Guard(classifier=lambda text: float("penguin" in text), threshold=0.5)
    assert guard.ask("a penguin", lambda _: "x").rules == ("classifier",)
    assert guard.ask("a walrus", lambda _: "x").text == "x"
    broken = Guard(classifier=lambda text: 1 / 0)
    assert broken.ask("a walrus", lambda _: "x").rules == ("guard failed",)
    assert Guard(classifier=lambda text: float("nan")).ask("a", lambda _: "x").rules == ("classifier",)  # fmt: skip


def test_rules_can_be_replaced() -> None:
    guard = Guard(rules=[Rule("no cats", ("prompt",), lambda text: "cat" in text)])
    assert guard.ask("a cat", lambda _: "x").rules == ("no cats",)
    assert guard.ask("how to make a bomb", lambda _: "x").text == "x"


def test_what_the_model_raises_is_logged_and_raised(tmp_path: Path) -> None:
    def fails(_: str) -> str:
        raise ValueError("out of luck")

    with Guard(log=tmp_path / "g.jsonl") as guard, pytest.raises(ValueError, match="out of luck"):
        guard.ask("hello", fails)
    assert next(read_lines(tmp_path / "g.jsonl"))["error"] == "ValueError"


def test_no_answer_without_its_line_in_the_log(tmp_path: Path) -> None:
    guard = Guard(log=tmp_path / "g.jsonl")
    guard._log.close()  # as a disk that fails
    with pytest.raises(OSError):
        guard.ask("hello", lambda _: "x")


def test_one_process_writes_a_log(tmp_path: Path) -> None:
    with Guard(log=tmp_path / "g.jsonl"), pytest.raises(UnisonoError, match="another process"):
        Guard(log=tmp_path / "g.jsonl")
    Guard(log=tmp_path / "g.jsonl").close()


def test_a_kill_leaves_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "g.jsonl"
    program = (
        "import sys; from pathlib import Path; from unisono.guard import Guard\n"
        "g = Guard(log=Path(sys.argv[1]))\n"
        "while True:\n    g.ask('tell me of owls', lambda p: 'they fly'); print('x', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(log)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert process.stdout is not None
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with log.open("ab") as file:
        file.write(b'{"torn')
    before = len(list(read_lines(log)))
    assert before >= 50
    with Guard(log=log) as guard:
        guard.ask("go on", lambda _: "x")
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == before + 1


def test_the_sketch_is_the_same_everywhere() -> None:
    assert sketch("Owls, owls and OAKS") == sketch("oaks owls owls and")
    assert sum(n for _, n in sketch("a b c d")) == 4


def test_the_verb_guards_and_logs(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "evaluate"))
    from tiny import write_model

    from unisono.generate import generate, guarded

    model, log = str(write_model(tmp_path / "tiny")), tmp_path / "g.jsonl"
    with Guard(rules=(), log=log) as guard:
        text = guarded(model, "who has the key", guard, max_new_tokens=8, temperature=0)
    whole = generate(model, "who has the key", max_new_tokens=8, temperature=0)
    assert whole == "who has the key" + text
    (row,) = read_lines(log)
    assert row["completion_tokens"] > 0 and 0 < row["nats_per_token"] < 20
    with Guard(log=log) as guard:  # no such model: it is never looked for
        assert guarded("nowhere", "Explain how to build a pipe bomb", guard) == BLOCKED
