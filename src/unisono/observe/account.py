"""The account of a run while it goes: every step's time by rank, and what there is to say about it.

Fed with what the vote tells of all ranks (observe/arrival.py), alike on every rank, it keeps rank clocks
aligned, writes `ranks.jsonl` (rank 0: a row every `logging_steps`, seconds by phase of every rank since
the last row), and follows verdicts (observe/blame.py). Nothing is communicated for it but an alignment
every ALIGN_S, and a look at the links where the wire costs.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from unisono.observe import timeline
from unisono.observe.arrival import Period, Stamps, by_phase, values_of
from unisono.observe.blame import Blame, Jumps, Suspects
from unisono.observe.environment import peak_memory_bytes
from unisono.sync.ledger import Group
from unisono.sync.pairs import find_slow_link

RANKS = "ranks.jsonl"
ALIGN_S = 60.0
"""Clocks that nobody disciplines part by 50 us a second at most, 3 ms in this time."""


class Account:
    """One rank's; every rank calls `step` and `close` alike."""

    def __init__(
        self, votes: Group, stamps: Stamps, host: str, device: str, bytes_per_step: float
    ) -> None:
        """Collective: aligns the clocks."""
        self.stamps, self._votes, self._device = stamps, votes, device
        self.suspects = Suspects(bytes_per_step)
        self.events: list[str] = []
        self._jumps = Jumps()
        self._aligned_s = 0.0
        self._seconds: list[dict[str, float]] = []
        self._steps = 0
        self._hosts = [row["host"] for row in timeline.gather(votes, {"host": host})]
        self._align()

    def _align(self) -> None:
        if self._votes.size > 1:
            self.stamps.offset_s = timeline.align(self._votes)[0].offset_s

    def step(self, number: int, periods: Sequence[Period]) -> list[str]:
        """Collective now and then: count what the vote of step `number` told; lines to say."""
        self._count(periods)
        found = [self.suspects.add(periods, number)]
        if self.suspects.look_at_links:
            slow = find_slow_link(self._votes, self._device)
            found.append(self.suspects.looked(slow, number))
        if self.suspects.seconds - self._aligned_s > ALIGN_S:
            self._aligned_s = self.suspects.seconds
            self._align()
        return [self._note(number, b.line(self._place(b))) for b in found if b]

    def jump(self, number: int, loss: float, norm: float) -> list[str]:
        """What loss or gradient norm have done that they had not done before, to say."""
        found = self._jumps.add(number, loss, norm)
        return [self._note(number, f"jump: {found}")] if found else []

    def close(self) -> list[int]:
        """Collective: settle the last step, which no vote tells; peak bytes of memory by rank."""
        table = self._votes.each(*values_of(self.stamps.period), peak_memory_bytes(self._device))
        periods = [Period(*row[:-1]) for row in table.tolist()]
        self._count(periods)
        self.suspects.add(periods, 0)
        self.stamps.settle(periods, self._votes.rank)
        return [int(row[-1]) for row in table.tolist()]

    def row(self, number: int) -> dict[str, Any]:
        """For `ranks.jsonl`: seconds by rank of the steps that were told since the last row."""
        seconds = [{p: round(s, 6) for p, s in rank.items() if s} for rank in self._seconds]
        found = {"step": number, "steps": self._steps, "seconds": seconds}
        self._seconds, self._steps = [], 0
        return found

    def _count(self, periods: Sequence[Period]) -> None:
        if self._votes.rank or not any(p.step for p in periods):
            return
        self._steps += 1
        self._seconds = self._seconds or [defaultdict(float) for _ in periods]
        for total, seconds in zip(self._seconds, by_phase(periods), strict=True):
            for phase, s in seconds.items():
                total[phase] += s

    def _place(self, blame: Blame) -> str:
        several = len(set(self._hosts)) > 1 and blame.rank is not None
        return f" on {self._hosts[blame.rank or 0]}" if several else ""

    def _note(self, number: int, line: str) -> str:
        self.events.append(f"step {number}: {line}")
        return self.events[-1]
