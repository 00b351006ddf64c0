"""Reward models: TRL's loss and gradients, replicas, resumes, and a directory that loads again."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import run
from pairs import apart, make_pair_job, pairs, read_pairs, rows, write_model, write_pairs
from ranks import run_ranks
from unisono.config import RewardConfig
from unisono.model.load import load_model
from unisono.train.reward import reward


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    write_model(folder)
    write_pairs(folder / "pairs.jsonl", pairs(90))
    return folder


def tokenizer_of(model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def scorer(model: Path):
    return load_model(str(model), tokenizer_of(model), seed=1, sequence_length=128, score=True)


def test_the_loss_is_the_formula(place: Path, tmp_path: Path) -> None:
    """Each answer scored alone, without padding, by Hugging Face's own pooling."""
    model = scorer(place / "model").eval()
    batch = read_pairs(place / "model", place / "pairs.jsonl", tmp_path).read(np.arange(6))
    found = reward(RewardConfig(center_rewards_coefficient=0.1, margin=0.2)).measure(model, batch, "cpu", False)  # fmt: skip
    scores = []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        end = int(np.flatnonzero(labels != -100).max()) + 1
        scores.append(float(model(input_ids=torch.tensor(ids[None, :end])).logits.detach()))
    pairs_of = list(zip(scores[:6], scores[6:], strict=True))
    expected = sum(
        -math.log(1 / (1 + math.exp(-(c - r - 0.2)))) + 0.1 * (c + r) ** 2 for c, r in pairs_of
    )
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert found.count == 6
    ahead, count = found.sums["accuracy"]
    assert (float(ahead), count) == (sum(c > r for c, r in pairs_of), 6)


@pytest.mark.parametrize("centre", [None, 0.05])
def test_loss_and_gradients_are_trls(centre: float | None, place: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    records = pairs(7, seed=5)
    path = write_pairs(tmp_path / "pairs.jsonl", records)
    model = scorer(place / "model")
    batch = read_pairs(place / "model", path, tmp_path).read(np.arange(7))
    found = reward(RewardConfig(center_rewards_coefficient=centre)).measure(model, batch, "cpu", False)  # fmt: skip
    loss = found.loss / found.count
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=None,
        per_device_train_batch_size=7, center_rewards_coefficient=centre, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer_of(place / "model"),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model.train(), inputs)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            scale = float(p.grad.abs().max())
            assert float((ours[name] - p.grad).abs().max()) <= 1e-5 * scale, name
    for name in ("accuracy", "margin", "mean_reward"):
        total, count = found.sums[name]
        logged = trainer._metrics["train"][name][-1]
        assert float(total) / count == pytest.approx(logged, rel=1e-4, abs=1e-6)


def finish(place: Path, output: Path, size: int, **changes: object) -> dict:
    fields = {
        "dpo": None, "reward": {"center_rewards_coefficient": 0.01}, "determinism": "strict",
        "max_steps": 6, "micro_batch_size": 1, "learning_rate": 3e-3, **changes,
    }  # fmt: skip
    config = make_pair_job(place / "model", place / "pairs.jsonl", output, **fields)
    ends = run_ranks(run, size, config, **apart(place))
    assert all(end == "done" for end, _, _ in ends), ends
    return json.loads((output / "receipt.json").read_text())


def test_replicas_equal_one_and_a_resume_is_exact(place: Path, tmp_path: Path) -> None:
    fields = {"lr_scheduler_type": "constant", "save_steps": 3}
    one = finish(place, tmp_path / "1", 1, **fields)
    assert finish(place, tmp_path / "2", 2, **fields)["digest"] == one["digest"]
    finish(place, tmp_path / "part", 4, max_steps=3, **fields)
    assert finish(place, tmp_path / "part", 2, **fields)["digest"] == one["digest"]
    other = finish(place, tmp_path / "c", 1, reward={}, **fields)
    assert other["digest"] != one["digest"], "the loss decides the weights"


@pytest.mark.parametrize("sync", ["ddp", "sharded"])
def test_other_strategies_give_the_same_model(sync: str, place: Path, tmp_path: Path) -> None:
    changes = {"determinism": "default", "micro_batch_size": 4, "global_batch_size": 15, "learning_rate": 1e-4}  # fmt: skip
    finish(place, tmp_path / "one", 1, **changes)
    finish(place, tmp_path / sync, 2, sync=sync, **changes)
    ours, theirs = rows(tmp_path / sync), rows(tmp_path / "one")
    for name in ("eval/loss", "eval/accuracy", "eval/margin"):
        a = next(r[name] for r in reversed(ours) if name in r)
        b = next(r[name] for r in reversed(theirs) if name in r)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_what_is_saved_loads_again_and_scores_as_in_training(
    lora: dict | None, place: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    output = tmp_path / "run"
    if lora:
        pytest.importorskip("peft")
    rate = 2e-2 if lora else 3e-3
    finish(place, output, 2, lora=lora, max_steps=25, determinism="default", learning_rate=rate)
    last = next(r for r in reversed(rows(output)) if "eval/loss" in r)
    assert last["eval/accuracy"] > 0.8
    folder = output
    if lora:
        from unisono.model.adapter import merge

        folder = tmp_path / "merged"
        merge(output, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tokenizer_of(folder)
    assert model.config.num_labels == 1 and model.config.pad_token_id is not None
    right = 0
    for record in pairs(40, seed=77):
        chats = [record["prompt"] + record[side] for side in ("chosen", "rejected")]
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            chosen, rejected = model(**inputs).logits[:, 0].tolist()
        right += chosen > rejected
    assert right > 30
