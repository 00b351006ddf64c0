"""Bytes that one device holds at the peak of a step, by what they are.

For Psi values in bf16 with float32 master weights and AdamW, 16 Psi bytes (Rajbhandari 2020, arXiv
1910.02054): 2 weights, 2 gradients (4 if summed in float32), 12 optimizer. ZeRO-1 divides the optimizer
by the ranks that own it, ZeRO-2 gradients as well, FSDP all. Activations are counted as in `compute`
(Korthikanti 2022); full recomputation keeps 2 h bytes a token and layer, and one layer whole.
Where codes travel each rank keeps float32 masters of what it owns and, with int4, what codes have left out
(sync/zero.py); with streaming outer weights, their momentum, what codes have left out, and a fragment on its
way and its sum (sync/outer.py).
Frozen matrices in 4 bits (QLoRA, arXiv 2305.14314) take half a byte a value and their scales.
"""

import math
from dataclasses import dataclass, replace

from unisono.forecast.compute import kept_bytes, saved_bytes
from unisono.forecast.constants import DEFAULT, Constants
from unisono.forecast.cost import Run, held_values, owners, trained_values
from unisono.forecast.hardware import DTYPE_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    """Gathered layers, and buckets on the wire."""
    synchronization: float = 0.0
    """Masters, outer weights and their momentum, and what codes have left out."""

    @property
    def total(self) -> float:
        return (
            self.weights + self.gradients + self.optimizer
            + self.activations + self.logits + self.buffers + self.synchronization
        )  # fmt: skip


def memory(run: Run) -> Memory:
    """What `run` holds on one device; the caller adds what the runtime reserves."""
    mesh, model = run.mesh, run.model
    width, weight = DTYPE_BYTES[run.dtype], run.weight_width
    layers = math.ceil(model.layers / mesh.pipeline)
    held, trained, shares = held_values(run), trained_values(run), owners(run)
    master = 8 if weight == 4 else 12
    grad = max(weight, run.gradient_bytes)
    by = {  # (weights, gradients, optimizer) are divided by
        "ddp": (1, 1, 1),
        "exact": (1, 1, shares),
        "zero1": (1, 1, shares),
        "zero2": (1, shares, shares),
        "fsdp": (shares, shares, shares),
        "quantized": (1, 1, shares),
        "streaming": (1, 1, 1),
    }[run.strategy]
    if run.strategy == "fsdp" and run.scatter_once and run.accumulation > 1:
        by = (shares, 1, shares)
    buffers = 0.0
    if run.strategy == "fsdp" and shares > 1:
        # Gathered: two layers (one computes, one arrives) and, for the whole pass, the embeddings;
        # and the whole gradients of either.
        unit = model.layer_parameters / mesh.tensor
        root = held - layers * unit
        buffers = weight * (2 * unit + root) + run.gradient_bytes * max(unit, root)
    elif mesh.holders > 1:
        buffers = 2.0 * min(run.bucket_bytes, trained * run.gradient_bytes)
    kept_apart = 0.0
    if run.strategy == "quantized" and mesh.holders > 1:
        left = (shares - 1) / shares if run.wire == "int4" else 0.0
        kept_apart = 4 * trained * (1 / shares + left)
    elif run.strategy == "streaming" and mesh.holders > 1:
        fragment = max(trained / run.num_fragments, min(trained, model.vocab * model.hidden))
        kept_apart = 4 * (3 * trained + 2 * fragment)
        buffers = 0.0  # the fragment is counted
    weights = weight * held
    if model.quantized:  # and a matrix at a time as wide as it is multiplied
        weights -= (weight - model.quantized) * layers * model.layer_parameters / mesh.tensor
        buffers += width * max(i * o for i, o in model.products.values())
    here = run.micro_batch * run.sequence / mesh.context / mesh.tensor
    one = here * saved_bytes(model, run.sequence, run.flash) * width / 2
    in_flight = min(mesh.pipeline, run.accumulation)
    kept = here * kept_bytes(model, run.sequence, run.flash, run.recompute) * width / 2
    kept = run.recompute_share * kept + (1 - run.recompute_share) * one
    activations = in_flight * layers * kept + (one if run.recompute != "none" else 0)
    # 16 bits, float32 and its gradient; a fused loss keeps 16 bits and their gradient.
    logits = (4 if run.stack == "fused" else 10) * here * model.vocab * model.head_share
    return Memory(
        weights / by[0], grad * trained / by[1], master * trained / by[2], activations, logits,
        buffers, kept_apart,
    )  # fmt: skip


def fits(run: Run, memory_bytes: float, constants: Constants = DEFAULT) -> bool:
    """Whether `run` fits a device of `memory_bytes`, less what the runtime and its gaps take."""
    return memory(run).total <= constants.usable_memory * memory_bytes


def least_recompute(run: Run, memory_bytes: float) -> Run:
    """`run` with no more recomputed than must be to fit: of some layers, selectively or whole."""
    whole = replace(run, recompute="none", recompute_share=1.0)
    room = DEFAULT.usable_memory * memory_bytes
    for kind in ("selective", "full"):
        if memory(whole).total <= room:
            return whole
        tried = replace(run, recompute=kind, recompute_share=1.0)
        most, least = memory(replace(tried, recompute_share=0.0)).total, memory(tried).total
        if least <= room:
            return replace(
                tried, recompute_share=min(1.0, max(0.0, (most - room) / (most - least)))
            )
    return replace(run, recompute="full", recompute_share=1.0)


def largest_micro_batch(run: Run, batch: int, memory_bytes: float) -> int:
    """The largest divisor of `batch` sequences that fits as one micro-batch; 0 if none does."""
    small = [n for n in range(1, math.isqrt(batch) + 1) if batch % n == 0]
    for size in [*(batch // n for n in small), *reversed(small)]:
        if fits(replace(run, micro_batch=size, accumulation=batch // size), memory_bytes):
            return size
    return 0
