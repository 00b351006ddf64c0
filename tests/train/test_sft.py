"""Tuning on chats: TRL's loss and gradients, one replica's weights at any number, exact resumes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import make_job, run
from ranks import run_ranks
from unisono.config import DataConfig, TokenizerConfig, parse
from unisono.data.prepare import prepare
from unisono.data.tokenizer import load_tokenizer
from unisono.train.objective import causal_lm

UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LEXICON = ["hark", "the", "king", "is", "dead", "long", "live", "a", "rose", "by", "any", "other"]


def chats(count: int, exchanges: int, seed: int = 3) -> list[dict]:
    """Made-up chats of very different lengths."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(rng.choices(LEXICON, k=rng.randint(1, 14)))

    return [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": words()} for k in range(2 * rng.randint(1, exchanges))]}
        for _ in range(count)
    ]  # fmt: skip


def sharegpt(record: dict) -> dict:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in record["messages"]]
    return {"conversations": turns}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    write(folder / "chats.jsonl", [*chats(120, 3), *map(sharegpt, chats(120, 3, seed=4))])
    return folder


# --- against TRL


@pytest.mark.parametrize(
    "kind",
    [
        "messages, marked template",
        "prompt-completion, unmarked",
        "the last reply, marked template",
        "the last reply, unmarked",
        "several turns, unmarked",
    ],
)
def test_loss_and_gradients_are_trls(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM

    records = chats(9, 1 if kind.startswith("prompt") else 3)
    if "repl" in kind or "turns" in kind:  # all that stands after the prompt is learned
        cut = -1 if "repl" in kind else 1
        records = [
            {"prompt": r["messages"][:cut], "completion": r["messages"][cut:]} for r in records
        ]
    path = write(tmp_path / "chats.jsonl", records)
    data = DataConfig(path=str(path))
    tokenizer = load_tokenizer(
        {"model_type": "llama"}, TokenizerConfig(vocab_size=300), data, tmp_path / "cache"
    )
    if "unmarked" in kind:
        tokenizer.chat_template = UNMARKED
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    # Ours: packed blocks, a sum over targets, divided once.
    asked = parse({
        "model": {"model_type": "llama"}, "output_dir": "unused", "sequence_length": 160,
        "data": {"path": str(path), "eval_fraction": 0},
    })  # fmt: skip
    prepared = prepare(asked, tokenizer, tmp_path / "cache", tmp_path / "quarantine.jsonl")
    blocks = prepared.blocks("train")
    assert len(blocks) < len(records), "some blocks hold several chats"
    batch = blocks.read(np.arange(len(blocks)))
    count = int(blocks.target_tokens(np.arange(len(blocks))).sum())
    loss = causal_lm(model, batch, "cpu", bf16=False) / count
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    # TRL's: its own tokenization, mask and collation, one padded row a chat.
    if kind.startswith("prompt"):
        records = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in records]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=None,
        per_device_train_batch_size=len(records), assistant_only_loss=kind.startswith("messages"),
        gradient_checkpointing=False, dataset_num_proc=None, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    assert int((inputs["labels"][:, 1:] != -100).sum()) == count
    theirs = trainer.compute_loss(model.train(), inputs)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, p in model.named_parameters():
        scale = float(p.grad.abs().max())
        assert float((ours[name] - p.grad).abs().max()) <= 1e-5 * scale, name


# --- at any number of replicas


def finish(place: Path, output: Path, size: int, **changes: object) -> dict:
    fields = {"data": {"path": str(place / "chats.jsonl"), "eval_fraction": 0.1}, "sequence_length": 64, "max_steps": 8, "save_steps": 4, **changes}  # fmt: skip
    config = make_job(place / "chats.jsonl", output, **fields)
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    ends = run_ranks(run, size, config, join=False, env=env)
    assert [end for end, _, _ in ends] == ["done"] * size
    return json.loads((output / "receipt.json").read_text())


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_replicas_train_what_one_would(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    changes = {"optim": "sgd", "learning_rate": 0.1}
    for size in (1, 2, 4):
        finish(place, tmp_path / str(size), size, **changes)
    one = load_file(tmp_path / "1/model.safetensors")
    for size in (2, 4):
        assert losses(tmp_path / str(size)) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        for name, value in load_file(tmp_path / f"{size}/model.safetensors").items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-6)


def test_strict_gives_the_same_bits_and_a_resume_too(place: Path, tmp_path: Path) -> None:
    strict = {"determinism": "strict"}
    whole = finish(place, tmp_path / "whole", 2, **strict)
    finish(place, tmp_path / "parts", 1, max_steps=4, lr_scheduler_type="constant", **strict)
    again = finish(place, tmp_path / "one", 1, **strict)
    assert whole["digest"] == again["digest"]
    constant = {"lr_scheduler_type": "constant", **strict}
    straight = finish(place, tmp_path / "straight", 1, **constant)
    resumed = finish(place, tmp_path / "parts", 4, **constant)
    assert straight["digest"] == resumed["digest"] != whole["digest"]
