"""A model directory and a file of preference pairs, both small and the same every time."""

import json
import random
from pathlib import Path

from jobs import job_fields, write_corpus
from unisono import config as config_module
from unisono.config import Config, DataConfig, TokenizerConfig
from unisono.data.pairs import Pairs
from unisono.data.prepare import prepare

LEXICON = ["hark", "the", "king", "is", "dead", "long", "live", "a", "rose", "by", "any", "other"]


def write_model(folder: Path) -> Path:
    """A Llama of two layers with a chat template and dropout nowhere."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from unisono.data.tokenizer import load_tokenizer

    data = DataConfig(path=str(write_corpus(folder, 2000)))
    tokenizer = load_tokenizer(
        {"model_type": "llama"}, TokenizerConfig(vocab_size=300), data, folder / "tokenizers"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def pairs(count: int, seed: int = 3) -> list[dict]:
    """Chats whose rejected answers speak of roses; lengths differ a lot."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(LEXICON, k=rng.randint(1, most)))

    return [
        {
            "prompt": [{"role": "user", "content": words(9)}],
            "chosen": [{"role": "assistant", "content": "the king " + words(9)}],
            "rejected": [{"role": "assistant", "content": "a rose " + words(14)}],
        }
        for _ in range(count)
    ]


def write_pairs(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def pair_fields(model: Path, data: Path, output_dir: Path, **changes: object) -> dict:
    fields = {
        **job_fields(data, output_dir),
        "model": str(model),
        "sequence_length": 128,
        "dpo": {"beta": 0.5},
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        **changes,
    }
    del fields["tokenizer"]
    return fields


def make_pair_job(model: Path, data: Path, output_dir: Path, **changes: object) -> Config:
    return config_module.parse(pair_fields(model, data, output_dir, **changes))


def load(model: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded, AutoTokenizer.from_pretrained(model)


def read_pairs(model: Path, data: Path, folder: Path, **changes: object) -> Pairs:
    asked = config_module.parse({
        "model": str(model), "output_dir": "unused", "sequence_length": 128, "dpo": {},
        "data": {"path": str(data), "eval_fraction": 0}, **changes,
    })  # fmt: skip
    _, tokenizer = load(model)
    found = prepare(asked, tokenizer, folder / "cache", folder / "quarantine.jsonl").blocks("train")
    assert isinstance(found, Pairs)
    return found


def apart(place: Path) -> dict:
    return {"join": False, "env": {"XDG_CACHE_HOME": str(place / "cache")}}


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
