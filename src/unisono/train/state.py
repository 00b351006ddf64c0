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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import Parameter

from unisono.config import Config
from unisono.errors import CheckpointError, ConfigError
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


class Several(torch.optim.Optimizer):
    """Optimizers of different parameters as one, which share groups and state."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([g for o in optimizers for g in o.param_groups], {})
        self.param_groups = [g for o in optimizers for g in o.param_groups]
        self._optimizers = optimizers
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Each steps its own."""
        for optimizer in self._optimizers:
            optimizer.step()


def for_muon(model: nn.Module) -> list[Parameter]:
    """What Muon steps: trained matrices that are no embeddings and no output layer."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    output: Any = getattr(model, "get_output_embeddings", lambda: None)
    heads = [output(), getattr(model, "score", None)]
    others = {id(p) for m in (*tables, *heads) if m is not None for p in m.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in others]  # fmt: skip


def optimizer_factory(
    config: Config, hyper: Hyper, model: nn.Module | None = None
) -> OptimizerFactory:
    """torch's fused optimizer; as in Hugging Face's Trainer, vectors (norms, biases) do not decay.

    With `optim: muon` whole parameters of `model` must be handed in. Its step is made as long as AdamW's
    (0.2 sqrt(max(rows, columns)), Liu et al. 2025, arXiv:2502.16982), so that one learning rate is for both.
    """
    if config.optim == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optim: found muon, which needs torch 2.9, found {torch.__version__}; write adamw"
            ).on_every_rank()
        assert model is not None
        orthogonal = {id(p) for p in for_muon(model)}
    else:
        orthogonal = set()

    def make_muon(matrices: list[Parameter], vectors: list[Parameter]) -> torch.optim.Optimizer:
        muon = torch.optim.Muon(
            [p for p in matrices if id(p) in orthogonal],
            lr=hyper.learning_rate,
            weight_decay=hyper.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        return Several(muon, make([p for p in matrices if id(p) not in orthogonal], vectors))

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

    return make_muon if orthogonal else make


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
