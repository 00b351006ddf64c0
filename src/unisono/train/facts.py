"""What is known of a step before it is taken: the model's tensors, what one rank computes, its link.

Made of a quick look where no probe has measured more; forecast/replay.py makes a step of them.
"""

from typing import Any

import torch

from unisono.forecast.constants import DEFAULT
from unisono.forecast.cost import slowest
from unisono.forecast.overlap import Lane
from unisono.forecast.probe import FACTOR, Probe
from unisono.forecast.replay import FAIR, Passes, Tensors, lanes_of
from unisono.probe.rates import best_s
from unisono.sync.codec import Codec
from unisono.sync.link import Link
from unisono.train.state import for_muon

GLOO_BYTES_PER_S = 1e9
"""What gloo moves with a core to itself (two unshaped hosts of one core: 0.9 to 1.1 GB/s,
benchmarks/grid.py): a link of as much leaves half a core to the compute beside it. A probe measures it."""
FORWARD = 1 / 3
"""Of a pass, where it was timed as a whole: 2 of 6 operations a value (Kaplan 2020)."""


SAMPLE = 1 << 20
"""Values that are coded to time it."""


def codec_s(codec: Codec, values: int, device: str) -> tuple[float, float]:
    """(seconds to encode, to decode) `values`, as SAMPLE of them were."""
    sample = torch.linspace(-1, 1, SAMPLE, device=device)
    out, code = torch.empty_like(sample), codec.encode(sample)
    encode_s = best_s(lambda: codec.encode(sample, 1), device, repeats=2)
    decode_s = best_s(lambda: codec.decode(code, out), device, repeats=2)
    return encode_s * values / SAMPLE, decode_s * values / SAMPLE


def muon_s(model: torch.nn.Module, device: str) -> float:
    """A step of Muon on all matrices that it steps, one of each shape timed: how fast five products in a row are
    depends on the shape, and on whether bfloat16 is quick here."""
    shapes: dict[torch.Size, int] = {}
    for p in for_muon(model):
        shapes[p.shape] = shapes.get(p.shape, 0) + 1
    total_s = 0.0
    for shape, count in shapes.items():
        matrix = torch.nn.Parameter(torch.ones(shape, device=device))
        matrix.grad = torch.linspace(-1, 1, matrix.numel(), device=device).view(shape)
        optimizer: Any = torch.optim.Muon([matrix], lr=1e-6, adjust_lr_fn="match_rms_adamw")
        total_s += count * best_s(optimizer.step, device, repeats=2)
    return total_s


def tensors_of(
    model: torch.nn.Module, over: int = 1, table_apart: bool = True, blocks: bool = False
) -> Tensors:
    """What is trained, in values. `over`: rows are filled up to multiples of it. `table_apart`: the embedding
    travels by itself. `blocks`: with what each repeated block holds (sync/sharded.py)."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is embedding
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if p is not embedding]

    def values(p: torch.Tensor) -> int:
        return -(-len(p) // over) * over * (p.numel() // len(p)) if p.dim() else 1

    table = values(embedding) if len(rest) < len(trained) else 0
    sizes = [values(p) for p in rest]
    if not table_apart:
        sizes, table = [table, *sizes] if table else sizes, 0
    found: list[int] = []
    if blocks:
        from unisono.sync.sharded import find_blocks

        found = [sum(values(p) for p in b.parameters()) for b in find_blocks(model)]
    return Tensors(tuple(sizes), tuple(found), table, tied)


def quick_passes(
    pass_s: float, accumulation: int, values: int, optim: str, rate: float, ranks: int
) -> Passes:
    """Of a micro-batch that took `pass_s`; `rate`: bytes a second of the memory, for all else."""
    optimizer_s = (28 if optim == "adamw" else 16) * values / rate
    pack_s = 8 * values / rate
    c = DEFAULT
    waiting_s = 0.0
    if ranks > 1:
        waiting_s = slowest(ranks) * (c.jitter * accumulation * pass_s + c.jitter_s)
    return Passes(
        FORWARD * pass_s, (1 - FORWARD) * pass_s, optimizer_s, accumulation, waiting_s, pack_s, pack_s
    )  # fmt: skip


def lanes_on(
    probe: Probe | None, link: Link | None, ranks: int, device: str, per_core: float
) -> tuple[dict[str, Lane], str]:
    """(by collective, where they are from)."""
    if link is None:
        return {}, "one replica"
    if probe and probe.links:
        return lanes_of(probe, ranks, per_core), "the probe"
    busy = min(1.0, link.bytes_per_s / GLOO_BYTES_PER_S) if device == "cpu" else DEFAULT.contention
    beside = min(1.0, FAIR / busy) if device == "cpu" else 1.0
    lane = Lane(link.latency_s, link.bytes_per_s, 1 - busy * beside, beside)
    return dict.fromkeys(FACTOR, lane), "a quick look at the start"
