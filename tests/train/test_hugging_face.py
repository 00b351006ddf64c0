"""The same batches through a plain Hugging Face loop on one process give the same losses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import make_job, run, write_corpus
from ranks import run_ranks

STEPS = 50


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def plain(place: Path) -> list[float]:
    """Losses of transformers' own loss, scheduler and clipping, in a loop of one's own."""
    from transformers import get_scheduler

    from unisono.data.order import Order
    from unisono.data.prepare import prepare
    from unisono.data.tokenizer import load_tokenizer
    from unisono.model.load import load_model

    torch.set_num_threads(1)
    config = make_job(place / "corpus.txt", place / "plain", weight_decay=0.1)
    cache = place / "cache" / "unisono"
    tokenizer = load_tokenizer(config.model, config.tokenizer, config.data, cache)
    blocks = prepare(config, tokenizer, cache, place / "quarantine").blocks("train")
    model = load_model(config.model, tokenizer, seed=config.seed, sequence_length=32)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    scheduler = get_scheduler("cosine", optimizer, 4, STEPS)
    order = Order(len(blocks), config.seed)
    losses = []
    for step in range(STEPS):
        batch = blocks.read(order.at(np.arange(step * 16, step * 16 + 16)))
        loss = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            labels=torch.from_numpy(batch.labels),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_of(place: Path, output: Path, size: int, **changes: object) -> list[float]:
    config = make_job(
        place / "corpus.txt", output, weight_decay=0.1, lr_scheduler_type="cosine",
        max_steps=STEPS, save_steps=STEPS, baseline_steps=2, **changes,
    )  # fmt: skip
    ends = run_ranks(
        run, size, config, None, join=False, env={"XDG_CACHE_HOME": str(place / "cache")}
    )
    assert [end for end, _, _ in ends] == ["done"] * size
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r]


@pytest.mark.parametrize(
    ("sync", "size", "determinism"),
    [("exact", 1, "default"), ("exact", 2, "default"), ("exact", 2, "strict"), ("ddp", 2, "default")],
)  # fmt: skip
def test_losses_of_50_steps_equal_a_plain_loop(
    place: Path, tmp_path: Path, plain: list[float], sync: str, size: int, determinism: str
) -> None:
    found = losses_of(place, tmp_path, size, sync=sync, determinism=determinism)
    assert found == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0] - 0.3, "nothing was learned, so equality would show nothing"


def test_another_learning_rate_is_noticed(place: Path, tmp_path: Path, plain: list[float]) -> None:
    """The control: a rate 0.1% off leaves the bound."""
    found = losses_of(place, tmp_path, 1, learning_rate=3e-3 * 1.001)
    assert found != pytest.approx(plain, rel=1e-5)
