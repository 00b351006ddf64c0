"""What a checkpoint holds, and back: weights as Hugging Face saves them, optimizer state by name.

Only safetensors and JSON. Optimizer tensors are whole and keyed `exp_avg.<parameter>`, so that any
strategy, any number of replicas and any order of parameters reads them. Nothing else needs saving:
the order of samples and all randomness are functions of seed and step.
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from unisono.config import Config
from unisono.errors import CheckpointError
from unisono.files import fsync_file, fsync_folder
from unisono.model import adapter
from unisono.sync import Strategy
from unisono.sync.update import OWN, OptimizerFactory
from unisono.train.scaling import Hyper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

OPTIMIZER_FILES = "optimizer-*.safetensors"
FILE_BYTES = 1 << 30
"""Optimizer state is written as it is gathered, in files of about this size, so that no rank needs
memory for all of it."""

HEADS = ("config.json", adapter.CONFIG)
"""The file by which a folder is known as a model, or as adapters."""

Weights = dict[str, torch.Tensor]


def optimizer_factory(config: Config, hyper: Hyper) -> OptimizerFactory:
    """torch's fused optimizer; as in Hugging Face's Trainer, vectors (norms, biases) do not decay."""

    def make(matrices: list[Parameter], vectors: list[Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": matrices, "weight_decay": hyper.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        if config.optim == "sgd":
            return torch.optim.SGD(
                groups, lr=hyper.learning_rate, momentum=config.momentum, fused=True
            )
        return torch.optim.AdamW(
            groups,
            lr=hyper.learning_rate,
            betas=(hyper.beta1, hyper.beta2),
            eps=hyper.epsilon,
            fused=True,
        )

    return make


def save_model(
    folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", weights: Weights
) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load; of a model with
    adapters only those, as peft saves them."""
    if hasattr(model, "peft_config"):
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        adapter.save(model, folder, _apart({n: t for n, t in weights.items() if n in trained}))
    else:
        model.save_pretrained(folder, state_dict=_apart(weights))
    tokenizer.save_pretrained(folder)


def _apart(weights: Weights) -> Weights:
    """Tensors on the CPU with a storage of their own each, shared only by those that are tied."""
    copies: dict[object, torch.Tensor] = {}
    result = {}
    for name, t in weights.items():
        key = (t.data_ptr(), t.shape) if t.numel() else name
        if key not in copies:
            copies[key] = t.detach().to("cpu", copy=True).contiguous()
        result[name] = copies[key]
    return result


def publish_model(
    run: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", weights: Weights
) -> None:
    """`save_model` at the root of a run folder: each file whole or not at all, HEADS last."""
    temporary = run / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_model(temporary, model, tokenizer, weights)
    for name in HEADS:
        (run / name).unlink(missing_ok=True)  # without it no half of two models is one
    for path in sorted(temporary.iterdir(), key=lambda p: p.name in HEADS):
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
    weights: Weights,
    optimizer: Iterator[tuple[str, torch.Tensor]],
    trainer_state: dict[str, object],
) -> None:
    """Write weights, tokenizer, optimizer state and `trainer_state.json` into `folder`."""
    save_model(folder, model, tokenizer, weights)
    batch: Weights = {}
    number = 0
    for key, value in optimizer:
        batch[key] = value.detach().to("cpu", copy=True).contiguous()
        if sum(t.numel() * t.element_size() for t in batch.values()) >= FILE_BYTES:
            _save_optimizer(folder, number, batch)
            batch, number = {}, number + 1
    if batch or not number:
        _save_optimizer(folder, number, batch)
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state, indent=1))


def _save_optimizer(folder: Path, number: int, tensors: Weights) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / OPTIMIZER_FILES.replace("*", f"{number:05}"))


def exhaust(iterator: Iterator[object]) -> None:
    """Collective with what the iterator does: run it to its end, keeping nothing."""
    deque(iterator, maxlen=0)


def load_optimizer(folder: Path, sync: Strategy) -> str:
    """Put the saved state back; what to tell the user of it, if anything.

    Raises CheckpointError when it belongs to another model.
    """
    from safetensors.torch import load_file

    shapes = {name: sync.slices.shape(name, p.shape) for name, p in sync.named_parameters()}
    tensors: Weights = {}
    for path in sorted(folder.glob(OPTIMIZER_FILES)):
        for key, value in load_file(path).items():  # mapped, not read
            state, _, name = key.partition(".")
            shape = shapes.get(name)
            # What one replica has of its own may have a shape of its own.
            if shape is None or (value.dim() and value.shape != shape and OWN not in state):
                raise CheckpointError(
                    f"{path}: {key} {tuple(value.shape)} has no parameter of that name and shape "
                    f"in this model"
                )
            tensors[key] = value
    own = {key: value for key, value in tensors.items() if OWN in key.partition(".")[0]}
    sync.load_optimizer_state({key: value for key, value in tensors.items() if key not in own})
    return sync.load_own_state(own)
