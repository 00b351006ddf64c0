"""Hugging Face causal language models: from a directory, from the hub, or new from a config.

The model is the user's: nothing is patched. Code that comes with a model is never run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.errors import ConfigError
from unisono.model import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_model(
    model: str | dict[str, Any],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    seed: int,
    sequence_length: int,
    gradient_checkpointing: bool = False,
    score: bool = False,
    quantized: Mapping[str, Any] | None = None,
) -> "PreTrainedModel":
    """A float32 model in training mode on the CPU; new weights are a function of `seed`.

    `score`: a trained model with a head of one output, for rewards, instead of its language head.
    `quantized`: what `quantize.asked` gave; its matrices are then in 4 bits, on the device that it names.

    Raises ConfigError: unknown architecture or field, no such model, a context that is too short.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # for weights that load in milliseconds, and in every checkpoint
    torch.manual_seed(seed)
    if isinstance(model, dict):
        loaded = _new(model, tokenizer)
    else:
        loaded = _pretrained(model, score, quantized or {})
    if score:  # the head looks at the last token that is no padding
        padding = tokenizer.pad_token_id
        loaded.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding
    context = getattr(loaded.config, "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ConfigError(
            f"sequence_length: found {sequence_length}, but the model's context is {context} "
            f"(max_position_embeddings); write at most that"
        )
    if gradient_checkpointing:
        enable = getattr(
            loaded, "activation_checkpointing_enable", loaded.gradient_checkpointing_enable
        )
        # The reentrant kind runs a backward pass inside the backward pass and would report
        # gradients twice.
        enable({"use_reentrant": False})
    loaded.config.use_cache = False
    quantize.keep_layout(loaded)
    return loaded.train()


def _new(fields: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": len(tokenizer), **fields}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    model_type = fields.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ConfigError(f"model.model_type: found {model_type!r}; {_line(error)}") from None
    unknown = sorted(set(fields) - set(config.to_dict()))
    if unknown:
        raise ConfigError(f"model.{unknown[0]}: not a field of a {model_type} configuration")
    try:
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"model: a {model_type} cannot be built: {_line(error)}") from None


def _pretrained(name: str, score: bool, more: Mapping[str, Any]) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    local = Path(name).is_dir()
    try:
        if score:
            return _scorer(name, local, more)
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, local_files_only=local, use_safetensors=True, **more
        )
    except (OSError, ValueError) as error:
        if pickled := _pickled(Path(name)):
            raise ConfigError(
                f"model: {name!r} has its weights as pickle only ({pickled}), which can run code and is not "
                f"read; where you trust it, write them anew with transformers: "
                f"from_pretrained({name!r}).save_pretrained(OUT), and name OUT"
            ) from None
        raise ConfigError(
            f"model: cannot load {name!r}: {_line(error)}; give a directory that save_pretrained "
            f"wrote, or a hub name"
        ) from None


def _pickled(folder: Path) -> str | None:
    """The pickle that a folder has for weights, where it has nothing else."""
    if list(folder.glob("*.safetensors")):
        return None
    found = sorted(f.name for end in ("bin", "pt", "pth") for f in folder.glob(f"*.{end}"))
    return next((name for name in found if "training_args" not in name), None)


def _scorer(name: str, local: bool, more: Mapping[str, Any]) -> "PreTrainedModel":
    """With a head of one output, new where the model has none; everything else must be there."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the language head goes and the new one is new is no news
    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            dtype=torch.float32,
            local_files_only=local,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
    finally:
        logging.set_verbosity(verbosity)
    weights = dict(model.named_parameters())
    if lost := [key for key in told["missing_keys"] if key in weights and len(weights[key]) > 1]:
        raise ConfigError(f"model: {name!r} has no weights for {lost[0]}, beside the new head")
    return model


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
