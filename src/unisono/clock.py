"""Where the time goes: a clock that is in exactly one phase at any moment.

`with clock("data"):` charges the time inside to that phase and pauses the phase around it, so the
phases of a run sum to its wall time by construction and nothing is counted twice.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

STEP_PHASES = (
    "compute", "recomputation", "generation", "communication", "waiting", "imbalance", "data", "optimizer",
    "other",
)  # fmt: skip
"""Of a step. compute: forward and backward; recomputation: forward again, in the backward pass;
generation: completions and their rewards; communication: exposed, this rank computes nothing meanwhile; waiting: for a slower rank; imbalance: for a
rank that was given more; other: logging, digests, the loop itself."""
PHASES = (*STEP_PHASES[:-1], "checkpoint", "evaluation", "other")
"""Those between steps too, in the order in which they are shown."""
MEANING = {
    "compute": "forward and backward",
    "recomputation": "forward again, for memory",
    "generation": "completions and rewards",
    "communication": "exposed: nothing else ran",
    "waiting": "for a slower replica",
    "imbalance": "for one with more work",
    "data": "reading batches",
    "optimizer": "clip and update",
    "checkpoint": "writing to disk",
    "evaluation": "on the held-out split",
    "other": "logging, checks, the loop",
}
"""In a few words, for tables."""

STANDING_STILL = {
    "communication": "waiting", "compute": "communication", "recomputation": "communication",
}  # fmt: skip


class Clock:
    """Seconds by phase, since `restart`. Not thread-safe: one clock belongs to one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.spans: list[tuple[str, float, float]] | None = None
        """While this is a list, every stretch is noted: (phase, began, ended), time.perf_counter()."""
        self._phase = "other"
        self._since = time.perf_counter()

    def _switch(self, phase: str) -> str:
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        if self.spans is not None:
            self.spans.append((self._phase, self._since, now))
        before, self._phase, self._since = self._phase, phase, now
        return before

    @property
    def phase(self) -> str:
        """The present one; any thread may ask."""
        return self._phase

    @property
    def since(self) -> float:
        """When the present stretch began, or was last read: time.perf_counter()."""
        return self._since

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def standing_still(self) -> contextlib.AbstractContextManager[None]:
        """Blocked on other ranks: `waiting` inside a step's communication, `communication` inside a
        pass (tensor and context axes), else the phase around.

        A rank that waits for another's checkpoint or evaluation spends that time on it too.
        """
        return self(STANDING_STILL.get(self._phase, self._phase))

    def read(self) -> dict[str, float]:
        """Seconds by phase up to this moment."""
        self._switch(self._phase)
        return dict(self.seconds)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Charge `seconds` that were counted as `source` to `target`, when the cause is known later."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def restart(self) -> None:
        self.seconds.clear()
        self._since = time.perf_counter()
