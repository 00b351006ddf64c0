"""What a checkpoint holds, and back: weights as Hugging Face saves them, optimizer state by name.

Only safetensors and JSON. Optimizer tensors are keyed `exp_avg.<parameter>`, so that any number of
replicas and any order of parameters reads them. Nothing else needs saving: the order of samples and
all randomness are functions of seed and step.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from unisono.config import Config
from unisono.errors import CheckpointError
from unisono.files import fsync_file, fsync_folder
from unisono.train.scaling import Hyper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

OPTIMIZER_FILE = "optimizer.safetensors"


def make_optimizer(
    named: list[tuple[str, Parameter]], config: Config, hyper: Hyper
) -> torch.optim.Optimizer:
    """torch's fused optimizer; as in Hugging Face's Trainer, vectors (norms, biases) do not decay."""
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": hyper.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=hyper.learning_rate, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(
        groups,
        lr=hyper.learning_rate,
        betas=(hyper.beta1, hyper.beta2),
        eps=hyper.epsilon,
        fused=True,
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, Parameter]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(state.parameter, tensor) of every tensor of the optimizer's state, in a fixed order."""
    for name, p in named:
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            if isinstance(value, torch.Tensor):
                yield f"{key}.{name}", value


def save_model(
    folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish_model(
    run: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """`save_model` at the root of a run folder: each file whole or not at all, config.json last."""
    temporary = run / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_model(temporary, model, tokenizer)
    (run / "config.json").unlink(missing_ok=True)  # without it no half of two models is one
    for path in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
        if path.is_file():
            path.chmod(0o644)
            fsync_file(path)
            path.replace(run / path.name)
    shutil.rmtree(temporary)
    fsync_folder(run)


def save_state(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    optimizer: torch.optim.Optimizer,
    named: list[tuple[str, Parameter]],
    trainer_state: dict[str, object],
) -> None:
    """Write weights, tokenizer, optimizer state and `trainer_state.json` into `folder`."""
    from safetensors.torch import save_file

    save_model(folder, model, tokenizer)
    tensors = {k: v.detach().cpu().contiguous() for k, v in optimizer_tensors(optimizer, named)}
    save_file(tensors, folder / OPTIMIZER_FILE)
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state, indent=1))


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, named: list[tuple[str, Parameter]]
) -> None:
    """Put the saved state back. Raises CheckpointError when it belongs to another model."""
    from safetensors.torch import load_file

    tensors = load_file(folder / OPTIMIZER_FILE)
    by_name = dict(named)
    for key, value in tensors.items():
        state, _, name = key.partition(".")
        p = by_name.get(name)
        if p is None or (value.dim() and value.shape != p.shape):
            raise CheckpointError(
                f"{folder / OPTIMIZER_FILE}: {key} {tuple(value.shape)} has no parameter of that "
                f"name and shape in this model"
            )
        # torch keeps the step count of a fused optimizer on the parameter's device.
        optimizer.state[p][state] = value.to(p.device)
