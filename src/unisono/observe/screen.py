"""What the person at the terminal sees: the plan, one live line, events, the receipt. Rank 0 only.

On a terminal the line is live; elsewhere (a log file, CI) it is printed every `logging_steps`.
Other ranks use `Quiet`, which has the same methods and prints nothing.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table


def _terminal_may_be_gone() -> AbstractContextManager[None]:
    """A terminal that was closed must not keep a run from committing what it has done."""
    return suppress(OSError)


@dataclass(frozen=True)
class StepLine:
    """What is shown of a step."""

    step: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    exposed: float
    """Share of the time so far that was exposed communication or waiting."""
    metric: str = ""
    """Name and value of the objective's, if it shows one."""


class Screen:
    """Rank 0's. A context manager, so that the terminal is restored however a run ends."""

    def __init__(self, console: Console | None = None, every: int = 10) -> None:
        self.console = console or Console(highlight=False)
        self._every = every
        self._progress: Progress | None = None
        self._last_note = time.monotonic()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_steps()

    def say(self, text: str, style: str = "") -> None:
        """One event, above the live line."""
        with _terminal_may_be_gone():
            self.console.print(escape(text), style=style or None, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(text, "yellow")

    def show(self, what: RenderableType) -> None:
        with _terminal_may_be_gone():
            self.console.print(what)

    def plan(self, rows: Sequence[tuple[str, str, str]]) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title="Plan", title_justify="left", title_style="bold")  # fmt: skip
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(style="dim")
        for row in rows:
            table.add_row(*map(escape, row))
        self.show(table)

    def preparing(self, what: str, share: float) -> None:
        """Progress of the preparation of data, where it takes long: a line every two seconds."""
        now = time.monotonic()
        if share < 1 and now - self._last_note > 2:
            self._last_note = now
            self.say(f"{what} {share:.0%}", "dim")

    def start_steps(self, first: int, total: int) -> None:
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total, completed=first, facts="")
        self._progress.start()

    def step(self, line: StepLine, total: int) -> None:
        facts = (
            f"loss {line.loss:.4f}  {line.metric}{'  ' if line.metric else ''}"
            f"{line.tokens_per_second:,.0f} tok/s  "
            f"left {clock_time(line.seconds_left)}  exposed {line.exposed:.1%}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=line.step, facts=facts)
        elif line.step % self._every == 0 or line.step == total:
            self.say(f"step {line.step}/{total}  {facts}")

    def end_steps(self) -> None:
        if self._progress is not None:
            with _terminal_may_be_gone():
                self._progress.stop()
            self._progress = None


class Quiet(Screen):
    """A screen that shows nothing, for every rank but 0."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))

    def start_steps(self, first: int, total: int) -> None:
        pass


def clock_time(seconds: float) -> str:
    """0:07, 12:30 or 3:07:00."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"
