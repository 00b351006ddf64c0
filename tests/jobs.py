"""A job small enough for tests: a corpus, a configuration, and how a rank runs it."""

import io
import random
from pathlib import Path

from unisono import config as config_module
from unisono.config import Config
from unisono.errors import Stopped, UnisonoError


def write_corpus(folder: Path, words: int = 9000) -> Path:
    """A text file of made-up prose, the same every time."""
    chooser = random.Random(5)
    lexicon = ["".join(chooser.choices("abcdefghilmnoprstuvw", k=chooser.randint(2, 8))) for _ in range(150)]  # fmt: skip
    lines, line = [], []
    for _ in range(words):
        line.append(chooser.choice(lexicon))
        if len(line) >= chooser.randint(4, 14):
            lines.append(" ".join(line).capitalize() + ".")
            line = []
    path = folder / "corpus.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def job_fields(corpus: Path, output_dir: Path, **changes: object) -> dict:
    return {
        "model": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        "tokenizer": {"vocab_size": 320},
        "data": {"path": str(corpus), "eval_fraction": 0.1},
        "sequence_length": 32,
        "output_dir": str(output_dir),
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "baseline_steps": 0,
        "eval_steps": 1000,
        "save_steps": 8,
        "logging_steps": 1,
        "check_replicas_every": 5,
        "timeout_s": 60,
        "device": "cpu",
        **changes,
    }


def make_job(corpus: Path, output_dir: Path, **changes: object) -> Config:
    return config_module.parse(job_fields(corpus, output_dir, **changes))


def run(world, config: Config, patch=None) -> tuple[str, list[str], dict | None]:
    """One rank of the job: how it ended, what rank 0 was told, the receipt."""
    from rich.console import Console

    from unisono.observe.screen import Quiet, Screen
    from unisono.train.loop import train

    if patch is not None:
        patch(world)
    console = Console(record=True, width=200, file=io.StringIO())
    screen = Screen(console) if world.is_main else Quiet()
    try:
        receipt = train(config, world, screen)
        end, facts = "done", receipt.as_json() if receipt else None
    except Stopped as error:
        end, facts = f"stopped: {error}", None
    except UnisonoError as error:
        end, facts = f"{type(error).__name__}: {error}", None
    told = console.export_text().splitlines() if world.is_main else []
    return end, told, facts
