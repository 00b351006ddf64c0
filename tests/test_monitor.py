"""The monitor: its tests against known values, its false alarms, and drift that it must see."""

import json
import random
from pathlib import Path

import pytest

from unisono.errors import DataError
from unisono.guard import sketch
from unisono.monitor import Baseline, Tail, command, fisher, mann_whitney, windows

WORDS = [
    "bread",
    "flour",
    "oven",
    "yeast",
    "water",
    "salt",
    "dough",
    "bake",
    "crust",
    "rise",
    "knead",
    "warm",
    "slice",
]
CODE = [
    "python",
    "loop",
    "list",
    "tuple",
    "import",
    "class",
    "method",
    "string",
    "bytes",
    "error",
    "stack",
    "thread",
]


def rows(count: int, seed: int, refused: float = 0.1, nats: float = 2.0, words: list = WORDS, length: int = 12) -> list[dict]:  # fmt: skip
    chooser = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = " ".join(chooser.choices(words, k=chooser.randint(4, 12)))
        found.append({
            "blocked": "", "refused": chooser.random() < refused, "toxicity": 2.0 * (chooser.random() < 0.02),
            "prompt_words": len(prompt.split()), "prompt_sketch": sketch(prompt),
            "completion_words": chooser.randint(length // 2, length * 2), "nats_per_token": chooser.gauss(nats, 0.5),
        })  # fmt: skip
    return found


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def test_fisher_is_the_published_one() -> None:
    assert fisher(3, 4, 1, 4) == pytest.approx(0.4857, abs=1e-4)  # the lady tasting tea
    assert fisher(8, 10, 1, 6) == pytest.approx(0.0350, abs=1e-4)
    assert fisher(5, 50, 5, 50) == 1.0


def test_mann_whitney_against_scipys_value() -> None:
    # scipy.stats.mannwhitneyu(y, x, method="asymptotic").pvalue, and alternative="greater" for x
    x, y = [1.0, 2, 2, 3, 4, 4, 5, 6], [3.0, 4, 5, 6, 6, 7, 8, 9]
    assert mann_whitney(x, y) == pytest.approx(0.02281974, abs=1e-7)
    assert mann_whitney(x, x) == 1.0
    assert mann_whitney([1.0] * 9, [1.0] * 9) == 1.0
    assert mann_whitney(y, x, high_only=True) == pytest.approx(0.99139803, abs=1e-7)


def test_false_alarms_are_as_rare_as_stated() -> None:
    alarms = judged = 0
    for draw in range(12):
        known = Baseline(rows(600, draw), "b")
        for window in windows(iter(rows(2500, 1000 + draw)), 100):
            judged += 1
            alarms += any(f.flagged for f in known.judge(window, 0.05))
    assert judged == 300
    assert alarms / judged <= 0.05 + 2 * (0.05 * 0.95 / judged) ** 0.5


@pytest.mark.parametrize(
    ("change", "signal"),
    [
        ({"refused": 0.35}, "refused"), ({"nats": 2.4}, "nats per token"),
        ({"length": 24}, "completion words"), ({"words": WORDS[:6] + CODE}, "out-of-distribution prompts"),
    ],
)  # fmt: skip
def test_drift_is_named(change: dict, signal: str) -> None:
    known = Baseline(rows(600, 1), "b")
    seen = [
        {f.signal for f in known.judge(w, 0.01) if f.flagged}
        for w in windows(iter(rows(1000, 2, **change)), 100)
    ]
    assert sum(signal in s for s in seen) >= 9
    assert all(s <= {signal} for s in seen)


def test_the_verb_says_what_it_could_not_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    good = write(tmp_path / "good.jsonl", rows(200, 1))
    log = write(tmp_path / "log.jsonl", rows(220, 2, refused=0.6))
    with log.open("a") as file:
        file.write('not json\n{"blocked": "", "refu')
    assert command(log, good, 100, 0.01, False, tmp_path / "out.jsonl") is True
    told = capsys.readouterr().out
    assert "window 1: refused" in told and "2 line(s) not used" in told and "log.jsonl:221" in told
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert command(good, good, 100, 0.001, False, None) is False
    with pytest.raises(DataError, match="at least 40"):
        command(log, write(tmp_path / "short.jsonl", rows(9, 1)), 100, 0.01, False, None)


def test_a_stream_is_followed_line_by_line_and_when_it_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("")
    steps = iter([
        lambda: log.open("a").write('{"blocked": "", "n": 1}\n{"blocked"'),
        lambda: log.open("a").write(': "", "n": 2}\n'),
        lambda: (log.unlink(), log.write_text('{"blocked": "", "n": 3}\n')),
    ])  # fmt: skip
    found = Tail(log).rows(True, sleep=lambda _: next(steps)())
    assert [next(found)["n"] for _ in range(3)] == [1, 2, 3]
    found.close()
