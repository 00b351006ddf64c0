"""What codes cost in time: seconds of a rank to encode and decode what it sends and gets.

On a CPU what benchmarks/codec.py measured, seconds a value. On a GPU, where every operation of
sync/codec.py is one pass over everything, the bytes that these passes read and write over the rate of the
memory; counted from that file and not measured.
"""

from dataclasses import dataclass

from unisono.forecast.hardware import Device


@dataclass(frozen=True)
class Cost:
    """Of one value: in nanoseconds of a CPU's core, and in bytes that cross a GPU's memory bus."""

    cpu_ns: float
    gpu_bytes: float


# Gradients of int8 are rounded stochastically (56 bytes for the noise: arange, place, remainder, look-up); those
# of int4 are turned, and leave what is sent later. float32 values read and written are 4 bytes each.
ENCODE = {
    "bfloat16": Cost(0.26, 6),
    "int8": Cost(0.92, 101),
    "int4": Cost(2.60, 64.5),
}
"""Gradients. CPU: benchmarks/results/codec.json; bfloat16 as a plain copy there."""
DECODE = {
    "bfloat16": Cost(0.26, 10),
    "int8": Cost(0.40, 13),
    "int4": Cost(1.38, 40.5),
}
ENCODE_CHANGE = {
    "bfloat16": Cost(0.26, 6),
    "int8": Cost(0.66, 33),
    "int4": Cost(0.77, 36.5),
}
"""Of weights: rounded to nearest, not turned."""
ADD_CHANGE = {
    "bfloat16": Cost(0.26, 10),
    "int8": Cost(0.43, 17),
    "int4": Cost(0.69, 36.5),
}


def step_s(name: str, values: float, ranks: int, device: Device) -> float:
    """Of a step of `quantized`: a rank encodes and decodes (n-1)/n of the gradients, encodes 1/n of the changes
    of the weights and adds all of them (sync/shard.py)."""
    others = (ranks - 1) / ranks
    parts = (
        (others, ENCODE[name]), (others, DECODE[name]),
        (1 / ranks, ENCODE_CHANGE[name]), (1.0, ADD_CHANGE[name]),
    )  # fmt: skip
    return values * sum(share * _seconds(cost, device) for share, cost in parts)


def round_s(name: str, values: float, ranks: int, device: Device) -> float:
    """Of `values` deltas that come together: encoded; every rank's decoded where all go to all (two ranks), else
    a chunk of each, whose sum is encoded again and decoded everywhere (sync/encoded.py)."""
    encodes, decodes = (1, 2) if ranks == 2 else (1 + 1 / ranks, 2)
    once = encodes * _seconds(ENCODE[name], device) + decodes * _seconds(DECODE[name], device)
    return values * once


def _seconds(cost: Cost, device: Device) -> float:
    return cost.cpu_ns * 1e-9 if device.is_cpu else cost.gpu_bytes / device.memory_bytes_per_s
