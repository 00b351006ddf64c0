"""Results at the terminal: one table of figures with intervals, and one of what differs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unisono.evaluate.results import Difference

_STYLE = {"better": "green", "worse": "red", "changed": "yellow", "no difference": "dim"}
SHOWN_PROBLEMS = 5


def number(value: float | None, kind: str) -> str:
    """As a share in percent, otherwise with four significant digits."""
    if value is None:
        return "?"
    return f"{value:.1%}" if kind == "share" else f"{value:,.4g}"


def interval(fact: Mapping[str, Any]) -> str:
    """The 95% interval in words."""
    if fact["low"] is None or fact["high"] is None:
        return "needs two items"
    return f"{number(fact['low'], fact['kind'])} to {number(fact['high'], fact['kind'])}"


def figures(found: Mapping[str, Any]) -> RenderableType:
    """Every figure of every suite, then notes and what was wrong with the data."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"Evaluation of {escape(found['model']['name'])}", title_justify="left", title_style="bold")  # fmt: skip
    for name in ("suite", "measure", "value", "95% interval", "items", "", ""):
        right = name in ("value", "items")
        table.add_column(name, justify="right" if right else "left", no_wrap=bool(name), header_style="dim")  # fmt: skip
    for name, suite in found["suites"].items():
        for row, fact in enumerate(suite["figures"]):
            aim = {"higher": "▲", "lower": "▼", "half": "50%"}.get(fact["better"], "")
            table.add_row(
                f"[cyan]{escape(name)}[/cyan]" if row == 0 else "", escape(fact["measure"]),
                f"[bold]{number(fact['value'], fact['kind'])}[/bold]", interval(fact),
                f"{fact['items']:,}", f"[dim]{aim}[/dim]", f"[dim]{escape(fact['meaning'])}[/dim]",
            )  # fmt: skip
    lines: list[RenderableType] = [table]
    for name, suite in found["suites"].items():
        lines += [Text(f"{name}: {note}", style="dim") for note in suite["notes"]]
        if suite["bad"]:
            lines.append(Text(f"{name}: {suite['bad']} record(s) not used", style="yellow"))
            lines += [Text(f"  {line}", style="yellow") for line in suite["problems"][:SHOWN_PROBLEMS]]  # fmt: skip
            if suite["bad"] > SHOWN_PROBLEMS:
                lines.append(Text("  ... the rest in results.json", style="yellow"))
    return Group(*lines)


def differences(
    name: str, other: str, rows: Sequence[Difference], notes: Sequence[str]
) -> RenderableType:
    """Before and after, and which differences are real."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"{escape(other)} -> {escape(name)}", title_justify="left", title_style="bold")  # fmt: skip
    for title in ("suite", "measure", "before", "after", "difference", "95% interval", "p (Holm)", "verdict"):  # fmt: skip
        right = title in ("before", "after", "difference", "p (Holm)")
        table.add_column(title, justify="right" if right else "left", no_wrap=True, header_style="dim")  # fmt: skip
    last = ""
    for row in rows:
        table.add_row(
            f"[cyan]{escape(row.suite)}[/cyan]" if row.suite != last else "", escape(row.measure),
            number(row.before, row.kind), number(row.after, row.kind), signed(row.difference, row.kind),
            difference_interval(row), f"{row.adjusted_p:.2g}",
            f"[{_STYLE[row.verdict]}]{row.verdict}[/]",
        )  # fmt: skip
        last = row.suite
    real = sum(row.real for row in rows)
    said = Text(f"{real} of {len(rows)} differences are real (p below 0.05 after Holm's correction for {len(rows)})")  # fmt: skip
    return Group(table, said, *(Text(note, style="yellow") for note in notes))


def signed(value: float, kind: str) -> str:
    return f"{value:+.1%}" if kind == "share" else f"{value:+.4g}"


def difference_interval(row: Difference) -> str:
    if row.low is None or row.high is None:
        return "needs two items"
    return f"{signed(row.low, row.kind)} to {signed(row.high, row.kind)}"


def places(folder: Path) -> str:
    """Where to find the rest."""
    return f"{folder / 'report.html'}, every item's scores in {folder / 'results.json'}"
