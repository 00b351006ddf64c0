"""Rewards: a user's functions and models, and each way in which one can fail, in one line."""

from pathlib import Path

import pytest
import torch

from unisono.errors import ConfigError, UnisonoError
from unisono.train.reward_funcs import load_rewards

SOURCE = """
from dataclasses import dataclass

@dataclass  # which looks its module up
class Point:
    x: float = 0.5

def lengths(completions, extra=None, **_):
    return [len(c) for c in completions]

def picky(prompts, answer):
    return [Point().x if a == "yes" else 0 for a in answer]

def texts(completions, **_):
    return ["high" for _ in completions]

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_functions_get_what_they_take(file: Path) -> None:
    lengths, picky = load_rewards([f"{file}:lengths", f"{file}:picky"])
    columns = {"answer": "yes", "other": 1}
    assert lengths("p", ["a", "bcd"], columns, "") == [1.0, 3.0]
    assert picky("p", ["a", "bcd"], columns, "") == [0.5, 0.5]
    assert (lengths.name, picky.name) == ("lengths", "picky") and lengths.digest != picky.digest
    again = load_rewards([f"{file}:lengths"])[0]
    assert again.digest == lengths.digest
    file.write_text(SOURCE + "\n")
    assert load_rewards([f"{file}:lengths"])[0].digest != lengths.digest
    assert load_rewards(["unisono.recipes.verse:syllables"])[0].name == "syllables"


def test_a_function_that_fails_is_named_with_its_prompt(file: Path) -> None:
    texts, picky = load_rewards([f"{file}:texts", f"{file}:picky"])
    with pytest.raises(UnisonoError) as caught:
        texts("x" * 90, ["c"], {}, "step 3, p.jsonl:7")
    line = str(caught.value)
    assert line.startswith("reward texts, step 3, p.jsonl:7, prompt '...xxx") and len(line) < 200
    assert "could not convert string to float: 'high'" in line
    with pytest.raises(UnisonoError, match=r"reward picky, s, prompt 'hi': TypeError.*answer"):
        picky([{"role": "user", "content": "hi"}], ["c"], {}, "s")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mine", "write file.py:function, package.module:function, or the directory"),
        ("nowhere.py:f", "no file nowhere.py here"),
        ("no.such.module:f", "no.such.module is no module"),
        ("{file}:missing", "has no function missing"),
        ("{file}:number", "has no function number"),
        ("{bad}:f", "cannot be run: SyntaxError"),
        ("{folder}", "no reward model can be loaded"),
    ],
)
def test_what_cannot_be_loaded(spec: str, reason: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:")
    (tmp_path / "folder").mkdir()
    named = spec.format(file=file, bad=tmp_path / "bad.py", folder=tmp_path / "folder")
    with pytest.raises(ConfigError) as caught:
        load_rewards([named])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_two_of_one_name(file: Path) -> None:
    with pytest.raises(ConfigError, match="two are called lengths"):
        load_rewards([f"{file}:lengths", f"{file}:lengths"])


def classifier(folder: Path, labels: int) -> tuple[Path, object]:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from unisono.config import DataConfig, TokenizerConfig
    from unisono.data.tokenizer import load_tokenizer

    (folder / "text.txt").write_text("the cat sat on the mat and the dog did not " * 50)
    data = DataConfig(path=str(folder / "text.txt"))
    tokenizer = load_tokenizer({"model_type": "llama"}, TokenizerConfig(vocab_size=280), data, folder / "cache")  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_labels=labels,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return folder / "judge", tokenizer


def test_a_model_scores_prompt_and_completion(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder, tokenizer = classifier(tmp_path, labels=1)
    judge = load_rewards([str(folder)])[0]
    assert judge.name == "judge"
    found = judge("the cat", [" sat", " did not sit on the mat", ""], {"unused": 1}, "")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for said, value in zip((" sat", " did not sit on the mat", ""), found):
        parts = tokenizer(["the cat", said], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*parts[0], *parts[1], tokenizer.eos_token_id]])
        with torch.no_grad():
            assert value == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-6)
    talk = [{"role": "user", "content": "cat?"}]
    said = [{"role": "assistant", "content": "dog"}]
    text = tokenizer.apply_chat_template([*talk, *said], tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = float(model(ids).logits[0, 0])
    assert judge(talk, [said], {}, "") == [pytest.approx(expected, abs=1e-6)]
    with pytest.raises(UnisonoError, match="tokens, beyond the reward model's 64"):
        judge("the cat " * 90, ["x"], {}, "")


def test_a_classifier_of_several_labels_is_no_reward(tmp_path: Path) -> None:
    folder, _ = classifier(tmp_path, labels=3)
    with pytest.raises(ConfigError, match="a classifier of 3 labels"):
        load_rewards([str(folder)])
