"""QLoRA: the frozen weights of linear layers in 4 bits (nf4), through bitsandbytes; adapters beside them.

A weight is one of 16 values, the quantiles of a normal distribution, times the largest value of its block of 64:
4 + 32/64 bits, or 4 + 8/64 + 32/(64 256) where those scales are quantized as well. A pass expands one matrix at a
time to the dtype that it computes in. All else is float32, as peft.prepare_model_for_kbit_training makes it:
embeddings, norms, the output layer; so nothing is to be cast after loading. Inputs of recomputed layers need no
gradient, as layers are recomputed without reentry.

Contract: the same weights give the same bits on every host of one kind of device; replicas are compared with
their scales. What a run was trained beside is written into its adapters' configuration (KEPT), and `generate`
and `eval` quantize their base again, `merge` expands that: beside other weights they would answer otherwise.
Source: Dettmers et al., QLoRA, 2023 (arXiv 2305.14314).
"""

import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.config import LoraConfig
from unisono.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

KEPT = "unisono_load_in_4bit"
"""In the configuration of adapters: how the weights were quantized that they were trained beside."""
WHOLE = ("lm_head", "embed_out", "score")
"""Modules that stay as they are: output layers, and the new head of a reward model."""


def asked(lora: LoraConfig | None, device: str, bf16: bool) -> dict[str, Any]:
    """`loading` of what a configuration's `lora` section asks for: nothing where it wants no quantization."""
    import torch

    if lora is None or not lora.load_in_4bit:
        return {}
    wanted = fields(lora.bnb_4bit_use_double_quant, lora.modules_to_save)
    return loading(wanted, device, torch.bfloat16 if bf16 else torch.float32)


def fields(double: bool, whole: Sequence[str] = ()) -> dict[str, Any]:
    """transformers' names of what decides the bits. `whole`: more modules that stay as they are."""
    return {"bnb_4bit_use_double_quant": double, "llm_int8_skip_modules": sorted({*WHOLE, *whole})}


def loading(wanted: Mapping[str, Any], device: str, dtype: "torch.dtype") -> dict[str, Any]:
    """Arguments of from_pretrained that give a quantized model on `device`, computing in `dtype`.

    `wanted`: as `fields` gives it. Raises ConfigError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "lora.load_in_4bit: found true, but bitsandbytes is missing: pip install 'unisono[qlora]'"
        )
    from transformers import BitsAndBytesConfig

    # On a CPU it recommends kernels that are fetched from a hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **wanted
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: "nn.Module") -> None:
    """On a CPU. bitsandbytes packs weights anew for a CPU with AVX512-BF16 when they are evaluated, and
    such weights have no backward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def beside(folder: Path, device: str, dtype: "torch.dtype") -> dict[str, Any]:
    """`loading` of the base of the adapters in `folder`, as it was when they were trained."""
    kept = kept_by(folder)
    return {} if kept is None else loading(kept, device, dtype)


def expanded(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same values in plain float32 matrices."""
    import torch

    return model.dequantize(dtype=torch.float32)


def kept_by(folder: Path) -> Mapping[str, Any] | None:
    """What the adapters in `folder` were trained beside, as `fields`; None: weights as they are."""
    file = folder / "adapter_config.json"
    return json.loads(file.read_text()).get(KEPT) if file.is_file() else None


def told(model: "nn.Module") -> dict[str, Any] | None:
    """`fields` of a loaded model; None where it is not quantized."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if not getattr(config, "load_in_4bit", False):
        return None
    return fields(config.bnb_4bit_use_double_quant, config.llm_int8_skip_modules or ())


def values(weight: "torch.Tensor") -> int:
    """How many it stands for."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def spared_bytes(model: "nn.Module") -> int:
    """Of 4 bytes a weight, what this model does not take."""
    states = list(scales(model))
    whole = sum(4 * values(p) - p.numel() * p.element_size() for p in model.parameters())
    return whole - sum(t.numel() * t.element_size() for _, t in states)


def scales(model: "nn.Module") -> Iterator[tuple[str, "torch.Tensor"]]:
    """What quantized weights are multiplied by: of each block, or quantized, with scales of their own."""
    for name, p in model.named_parameters():
        if (state := getattr(p, "quant_state", None)) is not None:
            yield f"{name}.absmax", state.absmax
            if state.nested:
                yield f"{name}.nested_absmax", state.state2.absmax
                yield f"{name}.offset", state.offset.reshape(1)
