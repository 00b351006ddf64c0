"""Accelerators by name: peak rates, memory, links, power. Facts with sources in `hardware.toml`.

A device is described by what limits a training step: matrix products by dtype, bytes of memory and
their rate, the link to the other devices of its node, and what the whole node sends to others.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from unisono.errors import ConfigError
from unisono.forecast import constants

FILE = Path(__file__).with_name("hardware.toml")

DTYPE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "fp4": 2}
"""Of an activation or weight in memory. fp8 and fp4 are the operands of matrix products only."""


@dataclass(frozen=True)
class Device:
    """One accelerator and its place in a usual node; rates per second, in FLOPs and bytes."""

    name: str
    vendor: str
    peak_flops: Mapping[str, float]
    """Dense, by dtype."""
    achievable: float
    """Best published matrix product as a share of the peak."""
    memory_bytes: float
    memory_bytes_per_s: float
    power_w: float | None
    per_node: int
    link_bytes_per_s: float
    """One direction, to the other devices of the node."""
    node_bytes_per_s: float
    """One direction, what a node sends to other nodes."""
    source: str
    is_cpu: bool = False

    def peak(self, dtype: str) -> float:
        """FLOP/s of `dtype`, or of the nearest that the device has (bf16 -> fp16 -> tf32 -> fp32).

        Raises ConfigError for a dtype that does not exist.
        """
        chain = {
            "fp4": ["fp4", "fp8", "bf16"], "fp8": ["fp8", "bf16"], "bf16": ["bf16", "fp16", "tf32", "fp32"],
            "fp16": ["fp16", "bf16", "tf32", "fp32"], "tf32": ["tf32", "fp32", "bf16"],
            "fp32": ["fp32", "tf32", "bf16"],
        }  # fmt: skip
        for name in chain.get(dtype, []):
            if name in self.peak_flops:
                return self.peak_flops[name]
        raise ConfigError(f"dtype: found {dtype!r}; write one of {', '.join(chain)}")

    def with_node(self, per_node: int | None = None, node_gbit: float | None = None) -> "Device":
        """The same device in another node: `per_node` devices, `node_gbit` Gbit/s a node."""
        return replace(
            self,
            per_node=per_node or self.per_node,
            node_bytes_per_s=node_gbit / 8 * 1e9 if node_gbit else self.node_bytes_per_s,
        )


@lru_cache(1)
def devices() -> dict[str, Device]:
    """All known devices by name."""
    rows = tomllib.loads(FILE.read_text())["device"]
    return {row["name"]: _device(row) for row in rows}


def device(name: str) -> Device:
    """The device called `name`, in any common spelling (H100-80GB, A100-SXM4-40GB, TPU v5p).

    Raises ConfigError with the nearest names.
    """
    found = find(name)
    if found is not None:
        return found
    known = _names()
    near = difflib.get_close_matches(_key(name), known, n=3, cutoff=0.4)
    nearest = list(dict.fromkeys(known[k] for k in near)) or sorted(devices())
    raise ConfigError(f"hardware: {name!r} is not known; nearest: {', '.join(nearest)}")


def find(name: str) -> Device | None:
    """The device whose name or alias is the longest start of `name`; None if there is none.

    A start ends with a word (TPU v4-32) or before no further digit but memory's (A10080GB, not L40S).
    """
    words, known = _words(name), _names()
    key = "".join(words)
    starts = {"".join(words[:n]) for n in range(1, len(words) + 1)}
    starts |= {k for k in known if re.match(re.escape(k) + r"(\d+gb|\D)", key)}
    fits = starts & known.keys()
    return devices()[known[max(fits, key=len)]] if fits else None


@lru_cache(1)
def _names() -> dict[str, str]:
    rows = tomllib.loads(FILE.read_text())["device"]
    return {_key(a): row["name"] for row in rows for a in (row["name"], *row.get("aliases", []))}


def _key(name: str) -> str:
    return "".join(_words(name))


def _words(name: str) -> list[str]:
    for noise in ("nvidia", "amd", "instinct", "google", "geforce", "tesla", "intel"):
        name = re.sub(noise, "", name, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", re.sub(r"^\s*\d+\s*x\s+", "", name.lower()))  # 8 x A100
    if "pcie" in words[2:]:  # H100 80GB PCIe is no H100 80GB
        words.remove("pcie")
        words.insert(1, "pcie")
    return words


def _device(row: Mapping[str, Any]) -> Device:
    return Device(
        name=row["name"],
        vendor=row["vendor"],
        peak_flops={k: v * 1e12 for k, v in row["peak_tflops"].items()},
        achievable=row.get("achievable", constants.ACHIEVABLE),
        memory_bytes=row["memory_GB"] * 1e9,
        memory_bytes_per_s=row["memory_GBps"] * 1e9,
        power_w=row.get("power_W"),
        per_node=row["per_node"],
        link_bytes_per_s=row["link_GBps"] * 1e9,
        node_bytes_per_s=row["node_GBps"] * 1e9,
        source=row["source"],
    )
