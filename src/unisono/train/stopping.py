"""SIGTERM and SIGINT: asked to end, a run commits what it has done first.

Before the first step there is nothing to commit, and the signal ends the process at once. During
training it only sets a flag, which the step's vote carries to all ranks. A second signal does not
wait.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from unisono.errors import Stopped


class Stop:
    """Whether a signal has asked for the end. `graceful`: finish the step and commit."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.graceful = False

    def is_asked(self) -> bool:
        return self.asked is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked is None and self.graceful:
            self.asked = name
            return
        again = " twice" if self.asked else " before there was a step to commit"
        raise Stopped(f"stopped by {name}{again}; run the same command again to go on")


@contextmanager
def watching() -> Iterator[Stop]:
    """Handle both signals inside; the former handlers are back afterwards. Main thread only."""
    stop = Stop()
    before = {s: signal.signal(s, stop._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
