"""SIGTERM and SIGINT: asked to end, a run commits what it has done first.

Before the first step there is nothing to commit, and the signal ends the process at once. During
training it only sets a flag, which the step's vote carries to all ranks. A second signal does not
wait; one that follows at once is the same request, delivered by two senders. SIGHUP, from a terminal
that is gone, counts too.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from unisono.errors import Interrupted, Stopped

SAME_REQUEST_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Whether a signal has asked for the end. `graceful`: finish the step and commit."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.graceful = False
        self._asked_at = 0.0

    def is_asked(self) -> bool:
        return self.asked is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked is None and self.graceful:
            self.asked, self._asked_at = name, time.monotonic()
            return
        if self.asked is None:
            raise Stopped(f"stopped by {name} before there was a step to commit")
        if time.monotonic() - self._asked_at > SAME_REQUEST_S:
            raise Interrupted(f"stopped by a second signal ({name}); the last checkpoint stands")


@contextmanager
def watching() -> Iterator[Stop]:
    """Handle both signals inside; the former handlers are back afterwards. Main thread only."""
    stop = Stop()
    before = {s: signal.signal(s, stop._on_signal) for s in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
