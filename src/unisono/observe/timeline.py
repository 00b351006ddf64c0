"""The timeline: what every rank did in a few steps of a run, on one clock.

For a recorded step it keeps the stretches of the clock's phases (what ran), the collectives of the
ledger that were under way (what travelled), and how long each rank stood still for them (who waited).
`timeline.jsonl` has a row for each step and rank; all times in it are milliseconds since rank 0 began
the step, on rank 0's clock.

Clocks are aligned through barriers. Nobody leaves a barrier before all have come, so in every round
came_r - left_0 <= offset_r <= left_r - came_0; the offset is the middle of what all rounds leave, and
half its width bounds the error, whatever the network does. No assumption of symmetry is needed.

Cost: of a step that is not recorded, one comparison for each change of phase; of a recorded one, ten
small collectives and an all-gather of a few kB after the step, which is charged to `other`.
"""

import json
import math
import time
from typing import Any, NamedTuple

import torch

from unisono.sync.ledger import Entry, Group, Ledger

FILE = "timeline.jsonl"
WARM_STEPS, EARLY_STEPS = 5, 3
"""Steps that are left alone at the start (buckets are laid out, caches fill), then steps in a row."""
MOST_LATER = 40
MOST_SPANS, MOST_COLLECTIVES = 400, 300
"""Of one row; the longest are kept and the rest counted."""
ROUNDS = 8


def steps_to_record(first: int, last: int, every: int) -> frozenset[int]:
    """Numbers of the steps after `first` up to `last` to record: some early ones, and those that end
    an interval of `every` steps (all of them, or the newest of each few)."""
    early = range(first + WARM_STEPS, first + WARM_STEPS + EARLY_STEPS)
    later = list(range(last - last % every, first, -every))
    chosen = {*early, *later[:: math.ceil(len(later) / MOST_LATER) or 1]}
    return frozenset(s for s in chosen if first < s <= last) or frozenset({last})


class Alignment(NamedTuple):
    """Seconds to take from this rank's clock to get rank 0's, and the most that may be wrong."""

    offset_s: float
    error_s: float


def align(votes: Group, *values: float) -> tuple[Alignment, list[list[float]]]:
    """Collective: this rank's clock against rank 0's; and every rank's `values`, which travel along."""
    came, left = [], []
    for _ in range(ROUNDS):
        came.append(time.perf_counter())
        votes.barrier()
        left.append(time.perf_counter())
    table: list[list[float]] = votes.each(*came, *left, *values).tolist()
    mine, first = table[votes.rank], table[0]
    low = max(mine[k] - first[ROUNDS + k] for k in range(ROUNDS))
    high = min(mine[ROUNDS + k] - first[k] for k in range(ROUNDS))
    others = [row[2 * ROUNDS :] for row in table]
    if votes.rank == 0:
        return Alignment(0.0, 0.0), others
    return Alignment((low + high) / 2, (high - low) / 2), others


class Timeline:
    """Records steps of one rank. `begin` before a step that is to be recorded, `end` after it."""

    def __init__(self, votes: Group, host: str) -> None:
        self._votes, self._host = votes, host
        self._began = 0.0

    def begin(self) -> None:
        """From here on the clock notes what it sees."""
        self._votes.ledger.clock.read()
        self._votes.ledger.clock.spans = []
        self._began = time.perf_counter()

    def end(self, step: int) -> list[dict[str, Any]]:
        """Collective: the rows of all ranks on rank 0, none elsewhere."""
        ledger = self._votes.ledger
        ended = time.perf_counter()
        ledger.clock.read()
        spans, ledger.clock.spans = ledger.clock.spans or [], None
        entries = [e for e in ledger.entries if e.finished == 0 or e.finished > self._began]
        alignment, began = align(self._votes, self._began)
        zero = began[0][0] + alignment.offset_s
        row = {
            "step": step,
            "rank": self._votes.rank,
            "host": self._host,
            "offset_error_ms": _ms(alignment.error_s),
            "began_ms": _ms(self._began - zero),
            "ended_ms": _ms(ended - zero),
            "groups": _groups(ledger, self._votes.size),
            **_spans(spans, zero),
            **_collectives(entries, zero),
        }
        return gather(self._votes, row)


def _groups(ledger: Ledger, size: int) -> dict[str, list[int]]:
    """Ranks of those groups that not all are in: others of the same name may be elsewhere."""
    positions = list(ledger.whereabouts.positions.values())
    return {p.key.partition("/")[0]: list(p.ranks) for p in positions if len(p.ranks) < size}


def _spans(spans: list[tuple[str, float, float]], zero: float) -> dict[str, Any]:
    merged: list[list[Any]] = []
    for phase, began, ended in spans:
        if merged and merged[-1][0] == phase:
            merged[-1][2] = ended
        elif ended > began:
            merged.append([phase, began, ended])
    kept = sorted(sorted(merged, key=lambda s: s[1] - s[2])[:MOST_SPANS], key=lambda s: s[1])
    return {
        "spans": [[phase, _ms(began - zero), _ms(ended - zero)] for phase, began, ended in kept],
        "spans_left_out": len(merged) - len(kept),
    }


def _collectives(entries: list[Entry], zero: float) -> dict[str, Any]:
    kept = sorted(entries, key=lambda e: -e.sent_bytes)[:MOST_COLLECTIVES]
    return {
        "collectives": [
            {
                "operation": e.operation,
                "group": e.group,
                "sequence": e.sequence,
                "sent_bytes": e.sent_bytes,
                "started_ms": _ms(e.started - zero),
                "waited_ms": _ms(e.waited_s),
                # None: still on its way when the step ended.
                "finished_ms": _ms(e.finished - zero) if e.finished else None,
            }
            for e in sorted(kept, key=lambda e: e.started)
        ],
        "collectives_left_out": len(entries) - len(kept),
    }


def gather(votes: Group, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Collective: every rank's row, in order, on rank 0; none elsewhere."""
    text = json.dumps(row, separators=(",", ":")).encode()
    longest = int(votes.each(float(len(text))).max())
    mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
    table = torch.empty(votes.size, longest, dtype=torch.uint8)
    votes.all_gather(table, mine).wait()
    return [json.loads(bytes(r.tolist())) for r in table] if votes.rank == 0 else []


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
