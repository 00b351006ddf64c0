"""Seconds that one device computes: counted operations over the rate that their shapes allow.

A matrix product of (M, K) by (K, N) takes its operations at the achievable rate plus its bytes at the
memory's rate, which is a roofline without the corner (Williams 2009); relative to the first term the
second is (P/B) (1/M + 1/N + 1/K), so small widths and few tokens are slow. What lies between products
(norms, activations, residuals, dropout) is memory traffic: a multiple of the activations that the
backward pass keeps, 34 s b h bytes a layer at f = 4 h and 16 bits, and 5 a s^2 b more where attention
writes its scores (Korthikanti 2022, arXiv 2205.05198). The multiple is the software stack's.
"""

from dataclasses import dataclass
from typing import Literal

from unisono.forecast.architecture import Architecture
from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.hardware import DTYPE_BYTES, Device

Recompute = Literal["none", "selective", "full"]
Stack = Literal["eager", "fused", "early", "unfused"]


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch on one device, by layer, and of the output layer and loss."""

    forward: float
    backward: float
    again: float
    """Recomputation inside the backward pass, by layer."""
    head_forward: float
    head_backward: float


def saved_bytes(model: Architecture, sequence: int, flash: bool) -> float:
    """Activations that one token leaves for the backward pass of one layer, in 16 bits.

    h: 18 bytes (two norms' inputs, attention's input, query, key, value, output, residuals, dropout
    masks); f: 4 bytes, or 6 gated; scores: 5 a s unless attention is fused.
    """
    mlp = (6 if model.gated else 4) * model.ffn
    return 18 * model.hidden + mlp + (0 if flash else 5 * model.heads * sequence)


def layer_work(
    model: Architecture,
    device: Device,
    *,
    tokens: int,
    sequence: int,
    dtype: str,
    recompute: Recompute = "none",
    stack: Stack = "fused",
    flash: bool = True,
    tensor: int = 1,
    context: int = 1,
    constants: Constants = DEFAULT,
) -> Work:
    """Time of `tokens` (a micro-batch, all its sequences) on one of tensor x context devices."""
    c = constants
    width = DTYPE_BYTES[dtype]
    best = device.achievable
    wide = "bf16" if dtype in ("fp8", "fp4") else dtype
    wide_rate = device.peak(wide) * {"fp32": c.matmul_fp32, "tf32": best * c.matmul_tf32}.get(
        wide, best * c.matmul
    )
    rate = device.peak(dtype) * best * c.matmul_fp8 if wide != dtype else wide_rate
    memory = device.memory_bytes_per_s
    here = tokens / context

    products = 2 * here * model.layer_parameters / tensor / rate
    edges = _edges(model)
    moved = c.traffic * width * (here * edges + model.layer_parameters) / tensor / memory
    d = model.heads * model.head_size / tensor
    scores = 4.0 * here * sequence * d
    if flash:
        narrow = 1 + c.flash_width / model.head_size
        scores *= narrow / (2 if model.causal else 1)
        kernel = c.flash_new if stack == "fused" and "fp8" in device.peak_flops else c.flash
        attention = scores / (device.peak(wide) * best * kernel)
        attention_back = 2.5 * attention  # scores are computed again (Dao 2022, arXiv 2205.14135)
    else:
        attention = scores / wide_rate
        attention_back = 2 * attention
    passes = {"early": c.early_passes, "unfused": c.unfused_passes}.get(stack, c.passes)
    kept = saved_bytes(model, sequence, flash) * width / 2 / tensor
    between = passes * here * kept / memory
    if stack == "eager":
        between += here * eager_bytes(model) * width / 2 / tensor / memory

    launch = c.launches * c.launch_s
    own, down = products, products  # of the backward pass: weights' gradients, and inputs'
    if model.adapters:  # a frozen weight has none; its adapters have both
        added = products * model.adapters / (model.layers * model.layer_parameters)
        products, down, own = products + added, products + added, added
    expand = 0.0
    if (
        model.quantized
    ):  # read, and written as wide as they are multiplied, before each pass over them
        expand = (model.quantized + width) * model.layer_parameters / tensor / memory
    forward = max(launch, products + moved + attention + between + expand)
    backward = max(2 * launch, own + down + 2 * (moved + between) + attention_back + expand)
    again = {"none": 0.0, "selective": attention, "full": forward}[recompute]
    if recompute == "selective" and flash:
        mlp = model.hidden * model.ffn * (2 if model.gated else 1) / model.layer_parameters
        again = mlp * products + between

    logits = model.head_share * here * model.vocab / tensor
    head = 2 * logits * model.hidden / wide_rate
    loss = 4 * logits * passes / memory  # float32 logits
    return Work(forward, backward, again, head + loss, (1 if model.adapters else 2) * head + loss)


def eager_bytes(model: Architecture) -> float:
    """What a Llama's forward pass moves for one token and layer without fused kernels, beyond that.

    Counted from its operations in 16 bits: each of two RMSNorms casts up, squares, averages, scales,
    casts down, and multiplies by its weight (6 + 8 + 4 + 8 + 6 + 4 = 36 bytes a value); rotary
    embedding casts query and key up, multiplies and casts down (6 + 8 + 6 = 20). LayerNorm is one
    kernel everywhere.
    """
    if not model.gated:
        return 0.0
    return 72 * model.hidden + 20 * model.head_size * (model.heads + model.kv_heads)


def kept_bytes(model: Architecture, sequence: int, flash: bool, recompute: Recompute) -> float:
    """Of `saved_bytes`, what recomputation still keeps.

    Full: a layer's input. Selective: without fused attention all but the scores (Korthikanti 2022);
    with it a layer's input, query, key, value and attention's output, so that norms and the first
    half of the MLP are computed again.
    """
    if recompute == "full":
        return 2.0 * model.hidden
    if recompute == "none":
        return saved_bytes(model, sequence, flash)
    if not flash:
        return saved_bytes(model, sequence, True)
    return 2.0 * (model.hidden + 2 * model.head_size * (model.heads + model.kv_heads))


def optimizer_s(
    model: Architecture, device: Device, values: float, stack: Stack, constants: Constants = DEFAULT
) -> float:
    """AdamW on `values` parameters of this device; early stacks step every tensor by itself."""
    c = constants
    if stack not in ("early", "unfused"):
        return c.optimizer_bytes * values / device.memory_bytes_per_s
    tensors = 16 * model.layers * values / model.parameters
    return c.early_optimizer_bytes * values / device.memory_bytes_per_s + 12 * tensors * c.launch_s


def _edges(model: Architecture) -> int:
    """Sum of input and output widths of a layer's products: values that each token moves."""
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    mlp = (2 if model.gated else 1) * (model.hidden + model.ffn) + model.ffn + model.hidden
    return model.hidden + q + 2 * kv + q + model.hidden + mlp
