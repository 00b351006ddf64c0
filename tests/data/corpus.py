"""What the data tests share: small corpora, a tokenizer trained on one, a configuration."""

import json
import random
from pathlib import Path
from typing import Any

from unisono.config import Config, parse
from unisono.data.problems import Problems
from unisono.data.source import Source, resolve

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards box five jugs"
WORDS = SENTENCE.split()


def prose(num_words: int, seed: int = 0) -> str:
    """Lines of four to twelve words, some with accents, a blank line now and then."""
    rng = random.Random(seed)
    lines = []
    while num_words > 0:
        count = rng.randint(4, 12)
        line = " ".join(rng.choice(WORDS) for _ in range(count))
        lines.append(
            line.replace("dog", "d\u00f6g").capitalize() + rng.choice([".", "!", ".\n", "  "])
        )
        num_words -= count
    return "\n".join(lines) + "\n"


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """User and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
    ]
    return {"messages": messages}


def config(path: Path | str | list[str], **changes: Any) -> Config:
    data = {"path": str(path) if isinstance(path, Path) else path, **changes.pop("data", {})}
    raw = {
        "model": {"model_type": "llama"},
        "data": data,
        "output_dir": "unused",
        "sequence_length": 32,
    }
    return parse({**raw, **changes})


def source(path: Path) -> Source:
    return resolve([str(path)])[0]


def read_all(path: Path, limit: int = 2**20, field: str = "text") -> tuple[list[Any], Problems]:
    from unisono.data.documents import read

    problems = Problems()
    return list(read(source(path), field, limit, problems)), problems
