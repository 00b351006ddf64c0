"""Operations that a model asks for, counted from the model itself, and which peak they are held against.

Model FLOPs as in PaLM (Chowdhery 2022, arXiv:2204.02311, appendix B): each value of a weight matrix
that a token meets costs 2 operations forward and 4 backward (2 where the matrix is frozen); an embedding
that is looked up costs none, the output layer does, also where it is tied; of experts only the chosen
ones count. Attention costs 4 (heads x head size) a pair of query and key forward and twice that
backward; a causal layer has (S + 1) / 2 keys a query, one with a window at most the window, which is what
kernels that skip do (PaLM counts all S; its figure is higher). Norms, activations, the softmax and the
optimizer are not counted.

Model FLOPs utilization (MFU) does not count recomputation, hardware FLOPs utilization (HFU) does:
with `gradient_checkpointing` every layer, not the output layer, runs forward once more.

A peak comes from the table of hardware (dense, by dtype), or from a probe of this machine; where there
is neither, none is invented.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unisono.model import quantize

if TYPE_CHECKING:
    from torch import nn

    from unisono.config import Config
    from unisono.forecast.probe import Probe

CONV1D = "Conv1D"
"""transformers' linear layer of GPT-2, whose weight is transposed."""


@dataclass(frozen=True)
class Flops:
    """What one token of a model costs, and one pair of query and key."""

    layers: float
    """Values of trained matrices that a token meets in the layers."""
    frozen_layers: float
    head: float
    """Of the output layer; 2/3 of them where it is frozen."""
    pair: float
    """4 x heads x head size."""
    windows: tuple[int, ...]
    """By layer with attention, the most keys a query sees; 0: all before it."""
    causal: bool = True
    recomputes: bool = False

    def model(self, rows: int, length: int) -> float:
        """FLOPs of forward and backward of `rows` sequences of `length` tokens."""
        tokens = rows * length
        matrices = 6 * (self.layers + self.head) + 4 * self.frozen_layers
        return tokens * matrices + 3 * rows * self._attention(length)

    def hardware(self, rows: int, length: int) -> float:
        """The same with what is computed twice."""
        again = 0.0
        if self.recomputes:
            again = 2 * rows * length * (self.layers + self.frozen_layers)
            again += rows * self._attention(length)
        return self.model(rows, length) + again

    def _attention(self, length: int) -> float:
        """Of one sequence, forward."""
        return self.pair * sum(pairs(length, window, self.causal) for window in self.windows)


def pairs(length: int, window: int, causal: bool = True) -> float:
    """Of query and key in a sequence: sum over i of min(i + 1, window)."""
    if not causal:
        return float(length * min(length, window or length))
    full = min(length, window or length)
    return full * (full + 1) / 2 + (length - full) * full


def count(model: "nn.Module", recomputes: bool = False) -> Flops:
    """Of a Hugging Face model, before or after it was sharded."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    output = getattr(model, "get_output_embeddings", lambda: None)()
    chosen = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_top_k")
    experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts")
    share = chosen / experts if chosen and experts else 1.0
    trained = frozen = 0.0
    for name, weight in _matrices(model):
        if output is not None and weight is getattr(output, "weight", None):
            continue
        one_of = ".experts." in f".{name}."
        values = quantize.values(weight) * (share if one_of else 1.0)
        trained += values * weight.requires_grad
        frozen += values * (not weight.requires_grad)
    head = 0.0
    if output is not None and getattr(output, "weight", None) is not None:
        head = output.weight.numel() * (1.0 if output.weight.requires_grad else 4 / 6)
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    size = _number(config, "head_dim") or (hidden // heads if heads else 0)
    return Flops(
        layers=trained,
        frozen_layers=frozen,
        head=head,
        pair=4.0 * heads * size,
        windows=_windows(config),
        causal=not getattr(config, "is_encoder_decoder", False),
        recomputes=recomputes,
    )


def _matrices(model: "nn.Module") -> Iterator[tuple[str, Any]]:
    """What tokens are multiplied by: weights of linear layers, and stacks of experts."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == CONV1D:
            yield f"{name}.weight", module.weight
        else:
            for own, p in module.named_parameters(recurse=False):
                if p.dim() == 3:  # [experts, rows, columns]
                    yield f"{name}.{own}" if "experts" in name else f"{name}.experts.{own}", p


def _windows(config: Any) -> tuple[int, ...]:
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers")
    window = _number(config, "sliding_window")
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * layers
    )
    spans = {"full_attention": 0, "sliding_attention": window}
    return tuple(spans[kind] for kind in kinds if kind in spans)


def _number(config: Any, *names: str) -> int:
    """The first of these fields that holds a whole number, else 0."""
    found = (getattr(config, name, None) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool)), 0)


# --- the peak


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, None where nobody knows it, and where the figure is from."""

    flops: float | None
    source: str


def find_peak(config: "Config", device: str, name: str, probe: "Probe | None") -> Peak:
    """Of a device called `name`, in the dtype that its matrix products have."""
    from unisono.forecast import hardware

    dtype = _dtype(config, device)
    known = hardware.find(name) if device != "cpu" else None
    if known is not None:
        return Peak(known.peak(dtype), f"published peak of {known.name}, {dtype}")
    if probe is None:
        return Peak(None, f"no known peak of {name}; unisono probe measures one")
    if dtype not in probe.matmul_flops:
        return Peak(None, f"no known peak of {name} in {dtype}; the probe has none")
    return Peak(probe.matmul_flops[dtype], f"best matrix product of the probe, {dtype}")


def _dtype(config: "Config", device: str) -> str:
    import torch

    if config.bf16:
        return "bf16"
    tf32 = device != "cpu" and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "fp32"
