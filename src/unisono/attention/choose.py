"""Whose attention a model runs, by what the user asked and what the model can; with the reason.

`auto` takes ours where the hook's trial finds it exact (hf.py) and the processor is a CPU, where our
kernels are measured: on a GPU they are only taken when asked for. What was asked by name is honoured or
refused, never replaced.

What narrows a model's layers is part of the model: it is kept as KEPT_ATTENTION in its config.json (of
adapters in adapter_config.json), and whoever of us loads the model follows it. transformers alone does not
know it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unisono.attention.hf import Hook, NotHooked, Wish, hook
from unisono.attention.mask import Mask
from unisono.attention.pattern import Pattern, bigbird, dilated, strided
from unisono.config import KEPT_ATTENTION, AttentionConfig
from unisono.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """Whose attention, and why; shown with the plan."""

    name: str
    reason: str
    hook: Hook | None = None


def choose(model: Any, asked: str | AttentionConfig, device: str) -> Choice:
    """Hook `model`, a float32 PreTrainedModel, where it is to be, and keep in its configuration what was
    asked. Raises ConfigError: asked in vain."""
    native = f"native ({model.config._attn_implementation})"
    given = "as given"
    if (kept := kept_by(vars(model.config))) is not None:
        if asked == "native":
            raise ConfigError(
                f"attention: found native, but the model was trained with {told(kept)}; write attention: "
                f"auto to go on so, or take {KEPT_ATTENTION} out of its config.json"
            )
        if isinstance(asked, str):
            asked, given = kept, "as the model was trained"
        elif not same(asked, kept):
            given = f"as given; the model was trained with {told(kept)}"
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
    if hooked.mixes:
        exact += "; other layers carry state across packed documents"
    if asked == "auto":
        return Choice("flash", exact, hooked)
    if isinstance(asked, AttentionConfig):
        setattr(model.config, KEPT_ATTENTION, asked.model_dump(mode="json", exclude_none=True))
        exact += f"; kept with the model as {KEPT_ATTENTION}, which transformers alone ignores"
    return Choice(told(asked), f"{given}; {exact}", hooked)


def follow(model: Any, folder: Path) -> None:
    """Hook a model that was loaded from `folder` if it, or the adapters there, were trained with less than
    its own attention. Raises ConfigError where that is not possible any more."""
    adapters = folder / "adapter_config.json"
    fields = json.loads(adapters.read_text()) if adapters.is_file() else {}
    kept = kept_by(fields) or kept_by(vars(model.config))
    if kept is None:
        return
    try:
        hook(model, wish_of(kept))
    except NotHooked as error:
        raise ConfigError(
            f"{folder}: trained with attention {told(kept)}, which cannot be run: {error}"
        ) from None
    setattr(model.config, KEPT_ATTENTION, kept.model_dump(mode="json", exclude_none=True))


def kept_by(fields: Mapping[str, Any]) -> AttentionConfig | None:
    """What a model's saved configuration says that it was trained with. Raises ConfigError."""
    if not (kept := fields.get(KEPT_ATTENTION)):
        return None
    try:
        return AttentionConfig.model_validate(kept)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{KEPT_ATTENTION} of the model's configuration: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            f"another version of unisono wrote it"
        ) from None


def same(asked: str | AttentionConfig, before: str | AttentionConfig) -> bool:
    """Whether layers see the same; whose kernels run does not matter."""
    if isinstance(asked, str) or isinstance(before, str):
        return isinstance(asked, str) and isinstance(before, str)
    return asked.model_dump() == before.model_dump()


def windows_of(choice: Choice, own: tuple[int, ...]) -> tuple[int, ...]:
    """By layer the most keys that a query sees, 0 for all, from those of the model itself. What a pattern
    leaves out is not counted."""
    if choice.hook is None:
        return own
    masks = (choice.hook.wish(Mask(window=w or None), n) for n, w in enumerate(own))
    return tuple(m.window + m.sinks if m.window else 0 for m in masks)


def told(asked: str | AttentionConfig) -> str:
    """What was asked, as it was written."""
    if isinstance(asked, str):
        return asked
    fields = asked.model_dump(exclude_defaults=True)
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
