"""A probe on the terminal, in nccl-tests' terms."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from unisono.forecast.probe import Probe, Timing

UNITS = ((1 << 20, "MiB"), (1 << 10, "KiB"))


def show(probe: Probe) -> RenderableType:
    """All of it; what is slow comes last, where it is read first."""
    parts: list[RenderableType] = [Text(head(probe)), Text()]
    parts += [rates(probe), Text()]
    if probe.collectives:
        parts += [bandwidths(probe), Text(), fits(probe), Text()]
    if probe.sharing:
        parts += [sharing(probe), Text()]
    if probe.pairs:
        parts += [pairs(probe), Text()]
    for note in probe.notes:
        parts.append(Text(note, "bold red" if note.startswith("slow ") else "dim"))
    return Group(*parts)


def head(probe: Probe) -> str:
    places = f"{probe.nodes} host{'s' if probe.nodes > 1 else ''}"
    return f"{probe.device}: {probe.ranks} rank{'s' if probe.ranks > 1 else ''} on {places}, {probe.measured_at}"  # fmt: skip


def rates(probe: Probe) -> Table:
    """What one rank does, all ranks at once."""
    table = _table("one rank, all at once", "measured")
    for name, rate in probe.matmul_flops.items():
        table.add_row(f"{name} products", f"{rate / 1e12:.3g} TFLOP/s")
    table.add_row("memory", f"{probe.memory_bytes_per_s / 1e9:.3g} GB/s, {probe.memory_bytes / 2**30:.3g} GiB")  # fmt: skip
    if (m := probe.model) is not None:
        table.add_row(f"{m.model}", f"{m.parameters / 1e6:.4g} M parameters, {m.micro_batch} x {m.sequence} tokens, {m.dtype}")  # fmt: skip
        for name, seconds in (("forward", m.forward_s), ("backward", m.backward_s), ("optimizer", m.optimizer_s)):  # fmt: skip
            table.add_row(f"  {name}", f"{seconds * 1e3:.4g} ms")
        table.add_row("  spread, slowest rank", f"{m.spread:.1%}, {m.waiting_s * 1e3:+.3g} ms")
        table.add_row("  peak memory", f"{m.peak_memory_bytes / 2**20:,.0f} MiB")
    return table


def bandwidths(probe: Probe) -> Table:
    """A row for each size: time, and bus bandwidth as nccl-tests define it."""
    columns = dict.fromkeys((t.axis, t.operation) for t in probe.collectives)
    cells = {(t.axis, t.operation, t.bytes): t for t in probe.collectives}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("bytes", justify="right", no_wrap=True)
    several = len({axis for axis, _ in columns}) > 1
    for axis, operation in columns:
        where = f"{axis}, " if several else ""
        table.add_column(f"{operation}\n{where}ms, busbw GB/s", justify="right", no_wrap=True)
    for size in sorted({t.bytes for t in probe.collectives}):
        row = [cells.get((*column, size)) for column in columns]
        table.add_row(_size(size), *[_cell(t) for t in row])
    return table


def _cell(t: Timing | None) -> str:
    return "" if t is None else f"{t.seconds * 1e3:.3g}  {t.busbw_GBps:8.3g}"


def fits(probe: Probe) -> Table:
    """T = latency + factor(n) S / B."""
    table = _table("fit", "axis", "latency", "bandwidth", "half latency at", "error")
    for f in probe.links:
        table.add_row(
            f.collective.replace("_", "-"), f"{f.axis} ({f.ranks})", f"{f.latency_s * 1e6:.3g} us",
            f"{f.bytes_per_s / 1e9:.3g} GB/s", _size(f.knee_bytes), f"{f.error:.1%}",
        )  # fmt: skip
    return table


def sharing(probe: Probe) -> Table:
    """What runs beside what, at which speed."""
    table = _table("beside the model's pass", "alone", "collective", "pass", "taken from compute")
    for s in probe.sharing:
        table.add_row(
            f"{s.collective.replace('_', '-')} of {_size(s.message_bytes)}", f"{s.bytes_per_s / 1e9:.3g} GB/s",
            f"{s.transfer_speed:.0%}", f"{s.compute_speed:.0%}", f"{s.busy:.0%} of its time",
        )  # fmt: skip
    return table


def pairs(probe: Probe) -> Table:
    """Hosts by hosts, in Gbit/s."""
    table = _table("from host, Gbit/s", *(f"to {k}" for k in range(probe.nodes)))
    rate = {(p.source, p.target): p.bytes_per_s * 8e-9 for p in probe.pairs}
    for a in range(probe.nodes):
        table.add_row(str(a), *(f"{rate[a, b]:.3g}" if (a, b) in rate else "" for b in range(probe.nodes)))  # fmt: skip
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for k, name in enumerate(names):
        table.add_column(name, justify="right" if k else "left", no_wrap=True)
    return table


def _size(nbytes: float) -> str:
    for limit, unit in UNITS:
        if nbytes >= limit:
            return f"{nbytes / limit:.3g} {unit}"
    return f"{nbytes:.3g} B"
