"""LoRA through peft: small trained matrices beside frozen ones, saved as peft saves them, and merged.

A linear layer W x becomes W x + s B A x with A [r, in] random, B [out, r] zero at the start, s = alpha / r
(rsLoRA: alpha / sqrt(r)); DoRA learns the length of each row besides. Only A and B, and what
`modules_to_save` names, are trained: they alone are communicated, kept in the optimizer, digested and saved. A
linear layer costs r (in + out) trained values.
Sources: Hu et al., LoRA, 2021; Kalajdzievski, rsLoRA, 2023; Liu et al., DoRA, 2024.

Contract: the first weights are a function of `seed`; dropout is torch's, so it follows the step's seed.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.config import KEPT_ATTENTION
from unisono.errors import ConfigError
from unisono.model import quantize

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
OTHER_NAMES = ("alpha", "dropout", "load_in_4bit", "bnb_4bit_use_double_quant")
"""Of the section `lora`, what peft calls something else, or what is the model's."""
SCORES = "SEQ_CLS"
"""peft's task of a reward model: the new head is trained and saved beside the adapters."""


def attach(
    model: "PreTrainedModel",
    wanted: Mapping[str, Any],
    seed: int,
    saved: Path | None = None,
    score: bool = False,
) -> "PeftModel":
    """The model with adapters, everything else frozen; those of the directory `saved` if given.

    `wanted`: the configuration's `lora` section. `score`: its head of one output is trained whole. Raises ConfigError: no peft, a target that the model
    does not have, saved adapters that do not fit.
    """
    peft = _peft()
    import torch

    torch.manual_seed(seed)
    fields = {name: value for name, value in wanted.items() if name not in OTHER_NAMES}
    if not isinstance(fields["target_modules"], str):
        fields["target_modules"] = list(fields["target_modules"])
    fields["modules_to_save"] = list(fields["modules_to_save"]) or None
    config = peft.LoraConfig(
        task_type=SCORES if score else "CAUSAL_LM",
        lora_alpha=wanted["alpha"],
        lora_dropout=wanted["dropout"],
        **fields,
    )
    try:
        with warnings.catch_warnings():  # of peft's own use of transformers
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {_line(error)}") from None
    if saved is not None:
        _load(adapted, saved)
    return adapted.train()


def save(adapted: "PeftModel", folder: Path, weights: Mapping[str, "torch.Tensor"]) -> None:
    """adapter_config.json and adapter_model.safetensors, from a state dict of the whole model."""
    # Otherwise peft asks the hub whether the base's vocabulary was enlarged.
    adapted.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    kept = {
        KEPT_ATTENTION: getattr(adapted.config, KEPT_ATTENTION, None),
        quantize.KEPT: quantize.told(adapted),
    }
    if kept := {name: value for name, value in kept.items() if value}:
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**fields, **kept}, indent=2))
    (folder / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def merge(folder: Path, out: Path, base: str | None = None) -> "PreTrainedModel":
    """Write base model + adapters of `folder` as one model of plain matrices to the new directory `out`.

    `base`: where the base model lies now, if not where it was. Raises ConfigError: no adapters there,
    no base, adapters of another base, `out` not empty.
    """
    peft = _peft()
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: found {out}, which is not empty; name a new directory")
    if not is_adapter(folder):
        raise ConfigError(
            f"RUN: {folder} holds no {CONFIG}; name the run of a `lora:` configuration"
        )
    fields = json.loads((folder / CONFIG).read_text())
    name = base or fields["base_model_name_or_path"]
    local = {
        "dtype": torch.float32,
        "local_files_only": Path(name).is_dir(),
        "use_safetensors": True,
    }
    if (beside := quantize.kept_by(folder)) is not None:
        local |= quantize.loading(beside, "cpu", torch.float32)
    try:
        if fields.get("task_type") == SCORES:
            model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **local)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **local)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"RUN: its base model {name!r} cannot be loaded: {_line(error)}; write --base DIR"
        ) from None
    if beside is not None:
        model = quantize.expanded(model)
    config = peft.LoraConfig.from_pretrained(folder)
    config.inference_mode = False  # or nothing counts as trained, and nothing as missing
    adapted = peft.get_peft_model(model, config)
    _load(adapted, folder)
    merged = adapted.merge_and_unload(safe_merge=True)
    if kept := fields.get(KEPT_ATTENTION):
        setattr(merged.config, KEPT_ATTENTION, kept)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if fields.get("task_type") == SCORES:  # as in training (model/load.py)
        padding = tokenizer.pad_token_id
        merged.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)
    return merged


def _load(adapted: "PeftModel", folder: Path) -> None:
    """Raises ConfigError where one of the two has tensors that the other has not."""
    import peft
    from safetensors.torch import load_file

    try:
        result = peft.set_peft_model_state_dict(
            adapted, load_file(folder / "adapter_model.safetensors")
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: its adapters are not of this model: {_line(error)}") from None
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    missing = sorted(trained & set(result.missing_keys)) or result.unexpected_keys
    if missing:
        raise ConfigError(f"{folder}: its adapters are not of this model: {missing[0]}")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("lora: peft is missing: pip install 'unisono[lora]'") from None
    return peft


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
