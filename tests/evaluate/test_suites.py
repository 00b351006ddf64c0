"""Suites on records, good and bad: what is scored, and what is said of what is not."""

import json
from pathlib import Path

import pytest

from unisono.errors import ConfigError, DataError
from unisono.evaluate import choices, model, preferences, results, tasks
from unisono.evaluate.encode import response_likelihood
from unisono.evaluate.items import Answer, key_of
from unisono.evaluate.records import BadRecord


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ASK = [{"role": "user", "content": "who has the key?"}]


def test_bad_pairs_are_counted_and_named_with_their_line(tiny: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "pairs.jsonl",
        {"prompt": ASK, "chosen": said("the owl"), "rejected": said("the thief")},
        {"prompt": ASK, "chosen": said("the owl")},
        {"prompt": ASK, "chosen": said("the owl"), "rejected": said("  ")},
        {"prompt": said("no"), "chosen": said("a"), "rejected": said("b")},
        {"prompt": [*ASK, *ASK], "chosen": said("a"), "rejected": said("b")},
        "{not json",
        {"prompt": ASK, "chosen": said("word " * 600), "rejected": said("b")},
        {"chosen": [*ASK, *said("x")], "rejected": [*ASK, *said("y")]},
    )
    found = preferences.suite(file, model.tokenizer_of(model.find(str(tiny))), 512, "")
    assert len(found.items) == 2
    assert found.bad == 6
    text = "\n".join(found.problems)
    for line, words in {2: "no `rejected` answer", 3: "an empty `rejected`", 4: "role assistant; it must be user",
                        5: "two of the role user", 6: "not JSON", 7: "the model's context is 512"}.items():  # fmt: skip
        assert f"{file}:{line}: " in text and words in text


def test_no_usable_record_is_an_error_that_names_the_first(tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", {"prompt": "x"})
    with pytest.raises(DataError, match=r"pairs.jsonl: no usable record, 1 bad: .*:1: no `chosen`"):
        preferences.suite(file, model.tokenizer_of(model.find(str(tiny))), 512)


def test_conversations_need_a_template(tmp_path: Path) -> None:
    from tiny import write_model

    folder = write_model(tmp_path / "bare", template=None)
    file = write(tmp_path / "p.jsonl", {"prompt": ASK, "chosen": said("a"), "rejected": said("b")})
    with pytest.raises(ConfigError, match="no chat template"):
        preferences.suite(file, model.tokenizer_of(model.find(str(folder))), 512)


def test_only_the_answer_is_scored(tiny: Path) -> None:
    tokenizer = model.tokenizer_of(model.find(str(tiny)))
    request = response_likelihood(tokenizer, ASK, said("the owl"))
    assert tokenizer.decode(request.tokens[-request.targets :]) == "the owl<|end|>"
    assert tokenizer.decode(request.tokens).endswith("<|assistant|>the owl<|end|>")


def test_implicit_rewards_by_hand(tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", *({"prompt": f"{k}: ", "chosen": "yes", "rejected": "oh no no"} for k in range(2)))  # fmt: skip
    suite = preferences.suite(file, model.tokenizer_of(model.find(str(tiny))), 512, "other")
    answers = {key_of(r): Answer(len(r.tokens), -10.0) for i in suite.items for r in i.requests}
    first, _ = (tuple(key_of(r) for r in i.requests) for i in suite.items)
    answers[first[0]], answers[first[1]] = Answer(2, -4.0), Answer(4, -6.0)
    reference = dict(answers)
    reference[first[0]], reference[first[1]] = Answer(2, -5.0), Answer(4, -9.0)
    part = results.scored(suite, answers, reference)
    scores = list(part["items"].values())
    # chosen gained 1, rejected 3: per token 0.5 and 0.75
    assert scores[0]["margin"] == (-2.0, 1.0) and scores[0]["margin_per_token"] == (-0.25, 1.0)
    assert scores[0]["accuracy"] == (0.0, 1.0) and scores[0]["likelier"] == (1.0, 1.0)
    assert scores[1]["tie"] == (1.0, 1.0) and scores[1]["accuracy"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "Q?", "options": "A. one\nB. two", "answer": "B. two"}, ("Question: Q?\nAnswer:", ("one", "two"), 1)),
        ({"context": "C", "choices": ["x", "y"], "answer": 0}, ("C", ("x", "y"), 0)),
        ({"query": "C", "endings": ["x", "y", "z"], "label": "2"}, ("C", ("x", "y", "z"), 2)),
        ({"question": "Q", "passage": "P.", "choices": ["x", "y"], "answer": "B"}, ("P.\nQuestion: Q\nAnswer:", ("x", "y"), 1)),
    ],
)  # fmt: skip
def test_forms_of_questions(record: dict, expected: tuple) -> None:
    found = choices.parse(record)
    assert (found.context, found.options, found.answer) == expected


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "Q", "choices": ["x", "y"], "answer": 2}, "none of 2 choices"),
        ({"question": "Q", "choices": ["x", "y"]}, "none of 2 choices"),
        ({"question": "Q", "choices": ["x"], "answer": 0}, "at least two"),
        ({"choices": ["x", "y"], "answer": 0}, "no question"),
        ({"question": "Q", "choices": ["x", "y"], "answer": True}, "none of 2 choices"),
    ],
)
def test_bad_questions(record: dict, words: str) -> None:
    with pytest.raises(BadRecord, match=words):
        choices.parse(record)


def test_matches(tiny: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"prompt": "p", "answer": ["The Owl."], "until": "\n"}, {"prompt": "", "answer": "x"})  # fmt: skip
    suite = tasks.suite(file, model.tokenizer_of(model.find(str(tiny))), 512)
    assert suite.bad == 1 and suite.problems[0].endswith(":2: no `prompt`")

    def scores(text: str, ended: bool = True) -> list[float]:
        found = suite.score(suite.items[0], [Answer(3, text=text, ended=ended)], [])
        return [found[k][0] for k in ("exact_match", "match", "contains", "cut")]

    assert scores(" The Owl.\nand more", ended=False) == [1, 1, 1, 0]
    assert scores("owl!") == [0, 1, 1, 0]
    assert scores("It is an owl, I think", ended=False) == [0, 0, 1, 1]
    assert scores("owlet") == [0, 0, 0, 0]


def figures_of(values: list[tuple[float, float]]) -> dict:
    items = {str(k): {"refusal": (a, 1.0), "loss": (b, 2.0)} for k, (a, b) in enumerate(values)}
    measures = [
        {"measure": m, "value": 0, "low": 0, "high": 1, "items": 2, "kind": k, "better": b, "meaning": "", "unit": ""}
        for m, k, b in (("refusal", "share", "higher"), ("loss", "mean", "lower"))
    ]  # fmt: skip
    return {"suites": {"s": {"items": items, "figures": measures, "notes": []}}}


def test_a_comparison_tells_real_differences_from_chance() -> None:
    before = figures_of([(float(k % 2), 4.0 + 0.1 * (k % 7)) for k in range(60)])
    after = figures_of([(1.0 if k % 2 or k < 30 else 0.0, 4.0 + 0.1 * (k % 7) + 0.01 * (-1) ** (k // 2)) for k in range(60)])  # fmt: skip
    found, notes = results.compare(before, after)
    refusal, loss = found
    assert refusal.verdict == "better" and refusal.difference == pytest.approx(0.25)
    assert refusal.p == pytest.approx(2 * 0.5**15)
    assert loss.verdict == "no difference" and not notes
    same, _ = results.compare(after, after)
    assert [d.adjusted_p for d in same] == [1.0, 1.0]


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"format": 1, "suites": {"s": {}}, "model": {"name": "x"}}', '{"format": 9}'):  # fmt: skip
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ConfigError, match=r"results\.json"):
            results.read(tmp_path)
