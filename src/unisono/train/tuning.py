"""Buckets that find their own size, on the steps of the run itself.

The link's latency and bandwidth give a first size (sync/link.py). Then halves and doubles of it are
tried for some steps each, and one is kept only when it is faster by more than the noise of the step
times; otherwise the old size returns. What was found is kept for the next run of the same shape on
the same link. Step times are the slowest rank's, which every rank knows from the vote, so that all
decide alike without asking each other.

A change moves optimizer state to new owners, once its bytes; nothing else is lost on it.
"""

import hashlib
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unisono.files import write_json
from unisono.sync.link import Link

STEPS = 12
"""Of each trial, after SETTLING ones that do not count."""
SETTLING = 2
LEAST_GAIN = 0.01
NOISES = 2.0
"""A gain counts when it exceeds so many standard errors of the difference of medians."""
LEAST_MB, MOST_MB = 0.5, 128.0


@dataclass(frozen=True)
class Change:
    """A trial that has ended."""

    from_mb: float
    to_mb: float
    gain: float
    """Share of the step time that the new size saves; negative when it is slower."""
    noise: float
    """What the gain had to exceed."""
    kept: bool

    def __str__(self) -> str:
        did = "kept" if self.kept else f"back to {self.from_mb:g}"
        return (
            f"buckets of {self.to_mb:g} MiB instead of {self.from_mb:g}: {self.gain:+.1%} speed, "
            f"noise {self.noise:.1%}: {did}"
        )


@dataclass
class Tuner:
    """Decides which bucket size the next step has. The same on every rank."""

    bucket_mb: float
    """The size in use."""
    done: bool = False
    key: str = ""
    """Under which the result is kept."""
    changes: list[Change] = field(default_factory=list)
    _waited_s: float = 0.0
    _best_mb: float = 0.0
    _best: list[float] = field(default_factory=list)
    _trial: list[float] = field(default_factory=list)
    _seen: int = 0
    _queue: list[float] | None = None

    @property
    def kept_mb(self) -> float:
        """The best size so far; a trial may be under way with another."""
        return self._best_mb or self.bucket_mb

    def step(self, seconds: float, waited_s: float) -> Change | None:
        """Take a step's time and what of it stood still; a Change when a trial has ended.

        Look at `bucket_mb` afterwards.
        """
        if self.done:
            return None
        self._seen += 1
        if self._seen <= SETTLING:
            return None
        self._trial.append(seconds)
        self._waited_s += waited_s
        if len(self._trial) < STEPS:
            return None
        if self._queue is None:
            self._begin()
            return None
        change = self._judge()
        self.changes.append(change)
        if change.kept:
            # On in the same direction; what lies behind was slower or unknown.
            further = change.to_mb * change.to_mb / change.from_mb
            self._best_mb, self._best = self.bucket_mb, self._trial
            self._queue = [further]
        self._next()
        return change

    def _begin(self) -> None:
        self._best_mb, self._best = self.bucket_mb, self._trial
        self._queue = [self.bucket_mb / 2, self.bucket_mb * 2]
        if self._waited_s < LEAST_GAIN * sum(self._trial):
            self._queue = []  # there is nothing to gain
        self._next()

    def _next(self) -> None:
        assert self._queue is not None
        self._queue = [mb for mb in self._queue if LEAST_MB <= mb <= MOST_MB]
        self.done = not self._queue
        self.bucket_mb = self._queue.pop(0) if self._queue else self._best_mb
        self._trial, self._seen = [], 0

    def _judge(self) -> Change:
        before, after = statistics.median(self._best), statistics.median(self._trial)
        gain = 1 - after / before
        error = math.hypot(_error(self._best), _error(self._trial)) / before
        noise = max(LEAST_GAIN, NOISES * error)
        return Change(self._best_mb, self.bucket_mb, gain, noise, gain > noise)


def _error(values: list[float]) -> float:
    """The standard error of the median: 1.2533 sigma / sqrt(n), sigma from the median deviation."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(v - middle) for v in values)
    return 1.2533 * deviation / math.sqrt(len(values))


# --- kept for the next run


def key_of(facts: dict[str, Any], link: Link) -> str:
    """What a tuned size is good for: the same model and ranks on a link of about the same speed."""
    near = {"bytes_per_s": round(math.log2(link.bytes_per_s)), "latency_s": round(math.log2(link.latency_s))}  # fmt: skip
    text = json.dumps({**facts, **near}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recall(folder: Path, key: str) -> float | None:
    """The size that an earlier run found, if there was one and its file is whole."""
    try:
        found = float(json.loads((folder / f"{key}.json").read_text())["bucket_mb"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return found if LEAST_MB <= found <= MOST_MB else None


def remember(folder: Path, tuner: Tuner) -> None:
    """Keep what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = [asdict(c) for c in tuner.changes]
    write_json(folder / f"{tuner.key}.json", {"bucket_mb": tuner.bucket_mb, "changes": changes})
