"""Whose attention a model runs, by what the user asked and what the model can; with the reason.

`auto` takes ours where the hook's trial finds it exact (hf.py) and the processor is a CPU, where our
kernels are measured: on a GPU they are only taken when asked for. What was asked by name is honoured or
refused, never replaced.
"""

from dataclasses import dataclass
from typing import Any

from unisono.attention.hf import Hook, NotHooked, Wish, hook
from unisono.attention.pattern import Pattern, bigbird, dilated, strided
from unisono.config import AttentionConfig
from unisono.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """Whose attention, and why; shown with the plan."""

    name: str
    reason: str
    hook: Hook | None = None


def choose(model: Any, asked: str | AttentionConfig, device: str) -> Choice:
    """Hook `model`, a float32 PreTrainedModel, where it is to be. Raises ConfigError: asked in vain."""
    native = f"native ({model.config._attn_implementation})"
    if asked == "native":
        return Choice(native, "as given")
    if asked == "auto" and not device.startswith("cpu"):
        return Choice(native, "ours is measured on CPUs only; write attention: flash to take it")
    if isinstance(asked, AttentionConfig) and asked.layers is not None:
        layers = model.config.get_text_config().num_hidden_layers
        if beyond := [x for x in asked.layers if not 0 <= x < layers]:
            raise ConfigError(
                f"attention.layers: found {beyond[0]}; the model's layers are 0 to {layers - 1}"
            )
    try:
        hooked = hook(model, wish_of(asked))
    except NotHooked as error:
        if asked == "auto":
            return Choice(native, f"ours is not possible: {error}")
        raise ConfigError(
            f"attention: found {told(asked)}, but a {model.config.model_type} cannot run it: {error}; "
            f"write attention: auto for the model's own"
        ) from None
    exact = f"exact in a trial, {hooked.num_layers} layers"
    if hooked.native_leaks:
        exact += "; its own lets packed documents leak"
    if asked == "auto":
        return Choice("flash", exact, hooked)
    return Choice(told(asked), f"as given; {exact}", hooked)


def told(asked: str | AttentionConfig) -> str:
    """What was asked, as it was written."""
    if isinstance(asked, str):
        return asked
    fields = asked.model_dump(exclude_unset=True)
    return "{" + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}"


def wish_of(asked: str | AttentionConfig) -> Wish:
    """The configuration as what the hook narrows layers by."""
    if isinstance(asked, str):
        return Wish()
    window, sinks = asked.window, asked.sinks
    if asked.pattern == "longformer":
        window, sinks = asked.window_blocks * asked.block, asked.first_blocks * asked.block
    return Wish(window, sinks, pattern_of(asked), asked.layers)


def pattern_of(asked: AttentionConfig) -> Pattern | None:
    """The block pattern, where one is asked for."""
    if asked.pattern == "bigbird":
        return bigbird(
            asked.block, asked.window_blocks, asked.first_blocks, asked.random_blocks
        )  # fmt: skip
    if asked.pattern == "strided":
        return strided(asked.block, asked.stride, asked.window_blocks)
    if asked.pattern == "dilated":
        return dilated(asked.window_blocks * asked.block, asked.dilation)
    return None
