"""Which way keys and queries meet across the context axis: what each costs, and which is chosen.

For a layer, with P ranks, n keys and values of a rank in bytes (float32 gradients g), the link's latency a and
rate w, and the seconds f and r = 2.5 f that a rank computes forward and backward:

- halo       max(f, a + h/w) and max(r, a + (g/n) h/w), where h is what a rank's queries see elsewhere
- ring       f/P + (P-1) max(f/P, a + n/w)  forward;  r/P + (P-1) max(r/P, 2a + (n+g)/w)  backward
- ulysses    f + 2a + m/w and r + 2a + m/w, where m is what queries, keys, values and outputs weigh
- usp        ulysses over U neighbours, then a ring over P / U of U times as many tokens
- allgather  f + a + (P-1) n/w and r + 2a + (P-1) (n+g)/w

The least is chosen, an earlier one in this list if it is within 5%. Halo only where the keys of others
are fewer than a rank's own, as it keeps them for the backward pass. The choice depends only on what all ranks
know alike, so all of them make the same.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from unisono.attention import kernel
from unisono.attention.halo import elsewhere
from unisono.attention.mask import Mask
from unisono.attention.shard import Placement
from unisono.sync.ledger import Group
from unisono.sync.link import measure_link

Scheme = Literal["halo", "ring", "ulysses", "usp", "allgather"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
CLOSE = 1.05
BACKWARD = 2.5
"""Products of the backward pass over those of the forward pass: 5 to 2 (Dao 2022, arXiv 2205.14135)."""


@dataclass(frozen=True)
class Speeds:
    """What the choice depends on, the same on all ranks."""

    latency_s: float
    bytes_per_s: float
    """Of the link, in each direction of a rank."""
    flops_per_s: float
    """Of the attention kernel on one rank."""


@dataclass(frozen=True)
class Layer:
    """One layer's attention over a micro-batch. Tokens are counted by the placement."""

    rows: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    value_bytes: int
    mask: Mask

    @property
    def sizes(self) -> tuple[int, ...]:
        """Everything but the mask."""
        return self.rows, self.heads, self.kv_heads, self.width, self.value_width, self.value_bytes

    @staticmethod
    def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> "Layer":
        return Layer(
            len(q), q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], q.element_size(), mask
        )


@dataclass(frozen=True)
class Choice:
    """How a layer is computed, and why, in words."""

    scheme: Scheme
    reason: str
    seconds: dict[Scheme, float]
    """Of the attention of one layer, forward and backward, by each way that is possible."""


def sent_bytes(
    scheme: Scheme, layer: Layer, placement: Placement, inner: int | None = None
) -> tuple[int, int]:
    """(forward, backward) bytes that the rank that sends most sends in a layer; `inner`: U of usp."""
    p, b = placement.size, layer.value_bytes
    wide = max(4, b)
    widths = layer.width + layer.value_width
    kv = layer.rows * layer.kv_heads * widths  # values of one token's keys
    if scheme in ("ring", "allgather"):
        n = (p - 1) * placement.held * kv
        return n * b, n * (b + wide)
    if scheme == "halo":
        taken, given = elsewhere(layer.mask, placement)
        return given * kv * b, taken * kv * wide
    u = p if scheme == "ulysses" else inner or 1
    length = math.lcm(layer.kv_heads, u)
    traded = layer.rows * placement.held * (layer.heads + length) * widths * b * (u - 1) // u
    ring = (p // u - 1) * placement.held * layer.rows * length * widths
    return traded + ring * b, traded + ring * (b + wide)


def choose(
    layer: Layer,
    placement: Placement,
    speeds: Speeds,
    inner: int | None = None,
    among: tuple[Scheme, ...] = SCHEMES,
) -> Choice:
    """The fastest scheme for a layer, of `among` those that it allows. `inner`: U of usp, if it is set up.

    Remembered with the mask, for the other layers of a pass.
    """
    key = ("choice", layer.sizes, placement, speeds, inner, among)
    if key not in layer.mask.plans:
        seconds = dict(_possible(layer, placement, speeds, inner, among))
        assert seconds, among
        least = min(seconds.values())
        best = next(s for s in SCHEMES if s in seconds and seconds[s] <= CLOSE * least)
        reason = _reason(best, layer, placement, inner, seconds)
        layer.mask.plans[key] = Choice(best, reason, seconds)
    found: Choice = layer.mask.plans[key]
    return found


def _possible(
    layer: Layer, placement: Placement, speeds: Speeds, inner: int | None, among: Iterable[Scheme]
) -> Iterable[tuple[Scheme, float]]:
    p, a, w = placement.size, speeds.latency_s, speeds.bytes_per_s
    pairs = visible_pairs(layer.mask, placement.length) * layer.rows
    f = 2 * pairs * layer.heads * (layer.width + layer.value_width) / p / speeds.flops_per_s
    r = BACKWARD * f

    def ring(ranks: int, forward: float, backward: float) -> float:
        """Seconds of P - 1 steps of `forward` and `backward` bytes each, and of a rank's own block."""
        return sum(
            c / ranks + (ranks - 1) * max(c / ranks, messages * a + sent / w)
            for c, messages, sent in ((f, 1, forward), (r, 2, backward))
        )

    by_head = layer.mask.pattern is not None and layer.mask.pattern.by_head
    for scheme in among:
        u = p if scheme == "ulysses" else inner or 1
        out, back = sent_bytes(scheme, layer, placement, inner)
        if scheme == "ring":
            steps = max(1, p - 1)
            yield scheme, ring(p, out / steps, back / steps)
        elif scheme == "allgather":
            yield scheme, f + r + 3 * a + (out + back) / w
        elif scheme == "halo":
            if elsewhere(layer.mask, placement)[0] < placement.held:
                yield scheme, max(f, a + out / w) + max(r, a + back / w)
        elif u > 1 and layer.heads % u == 0 and not by_head:
            length, steps = math.lcm(layer.kv_heads, u), p // u
            widths = layer.width + layer.value_width
            kv = placement.held * layer.rows * length * widths
            traded = out - (steps - 1) * kv * layer.value_bytes
            pieces = kv * layer.value_bytes, kv * (layer.value_bytes + max(4, layer.value_bytes))
            yield scheme, ring(steps, *pieces) + 4 * a + 2 * traded / w


def explain(
    layers: Sequence[Layer], placement: Placement, speeds: Speeds, inner: int | None = None
) -> list[tuple[str, Choice]]:
    """(which layers, how and why), for the plan: layers of the same mask together."""
    found: dict[Layer, list[int]] = {}
    for number, layer in enumerate(layers):
        found.setdefault(layer, []).append(number)
    return [
        (f"{len(numbers)} of {len(layers)} layers", choose(layer, placement, speeds, inner))
        for layer, numbers in found.items()
    ]


def layers_of(
    config: Any, rows: int, value_bytes: int, narrow: Callable[[Mask, int], Mask] | None = None
) -> list[Layer]:
    """Attention of each layer of a transformers text config, for micro-batches of `rows` sequences.

    `narrow`: what the user asks beyond the model (hf.Wish). Documents are not known before a batch.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    alike = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers
    masks = {
        "sliding_attention": Mask(window=window),
        "chunked_attention": Mask(chunk=getattr(config, "attention_chunk_size", None)),
    }
    full, narrowed = Mask(), dict[tuple[Any, ...], Mask]()
    layers = []
    for number, kind in enumerate(kinds):
        mask = masks.get(kind, full)
        if narrow is not None:
            mask = narrow(mask, number)
        # One object for masks that are alike, as masks are compared by identity.
        mask = narrowed.setdefault((mask.window, mask.sinks, mask.chunk, mask.pattern), mask)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        values = getattr(config, "v_head_dim", None) or width
        layers.append(Layer(rows, heads, kv_heads, width, values, value_bytes, mask))
    return layers


def visible_pairs(mask: Mask, length: int) -> float:
    """How many (query, key) pairs a sequence of `length` has, on average over rows; O(length).

    Without a pattern's holes: those are not counted before tiles are laid.
    """
    i = np.arange(length)
    least = np.zeros((1, length), np.int64)
    if mask.documents is not None:
        least = mask.documents.starts[:, :length].astype(np.int64)
    if mask.chunk is not None:
        least = least + (i - least) // mask.chunk * mask.chunk
    beyond: float | np.ndarray = 0
    if mask.window is not None:
        near = np.maximum(least, i - mask.window + 1)
        beyond = np.minimum(near - least, mask.sinks)
        least = near
    seen = i - least + 1 + beyond
    return float(seen.sum(axis=1).mean()) * (1 if mask.causal else 2)


def measure_speeds(group: Group, device: str, dtype: torch.dtype = torch.float32) -> Speeds:
    """Collective: the link between the ranks and their slowest attention kernel; 0.1 to 1 s."""
    tokens, heads, width = 1024, 4, 64
    q = torch.randn(1, heads, tokens, width, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        kernel.forward(q, q, q, scale=0.125)
        if q.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    slowest = float(group.each(min(times[1:])).max())
    flops = 4 * heads * tokens**2 * width / slowest
    link = measure_link(group, device)
    if link is None:
        return Speeds(0.0, math.inf, flops)
    return Speeds(link.latency_s, link.bytes_per_s, flops)


def _reason(
    best: Scheme,
    layer: Layer,
    placement: Placement,
    inner: int | None,
    seconds: dict[Scheme, float],
) -> str:
    def sent(scheme: Scheme) -> str:
        return f"{sum(sent_bytes(scheme, layer, placement, inner)) / 1e6:,.2f} MB"

    what = {
        "halo": f"a rank's queries see {elsewhere(layer.mask, placement)[0]:,} keys of other ranks",
        "ring": "keys go around behind attention",
        "ulysses": f"{layer.heads} query heads over {placement.size} ranks, four messages",
        "usp": f"heads over {inner} neighbours, keys around {placement.size // (inner or 1)}",
        "allgather": "one message for all keys",
    }
    others = [s for s in seconds if s != best]
    text = f"{what[best]}, {sent(best)} sent in a layer, {1e3 * seconds[best]:,.1f} ms"
    if not others:
        return text
    ranked = sorted(others, key=lambda s: seconds[s])
    return text + "; " + ", ".join(f"{s} {sent(s)}, {1e3 * seconds[s]:,.1f} ms" for s in ranked)
