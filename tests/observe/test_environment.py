"""Memory as the kernel counts it, by the one reader that receipt, metrics, forecast and probe share."""

from pathlib import Path

import pytest

from unisono.observe.environment import memory_bytes, peak_memory_bytes, reset_peak_memory

BLOCK = 300 << 20


def test_the_peak_is_counted_from_the_reset() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this kernel does not let a process reset its peak")
    before = memory_bytes("cpu")
    block = bytes(BLOCK).replace(b"\0", b"x")  # pages that are only zeros may not be there
    assert memory_bytes("cpu") - before > 0.9 * BLOCK
    del block
    assert peak_memory_bytes("cpu") - before > 0.9 * BLOCK
    reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") - before < 0.5 * BLOCK
    now = memory_bytes("cpu")  # before the peak: another thread may take a page meanwhile
    assert peak_memory_bytes("cpu") >= now
