"""Watch a guard's log for drift: windows of requests, each compared with a log of when all was well.

Signals and their tests, two-sided unless said:

    refused, blocked, toxic completions         share       Fisher's exact test (1935)
    prompt and completion length, perplexity    ranks       Mann and Whitney's U (1947), ties corrected
    out-of-distribution prompts (one-sided)     ranks       U on each prompt's surprise, below

The surprise of a prompt is the mean -log2 share of its words' buckets (guard.sketch) in the first half of
the baseline, with one count added to every bucket; the second half's surprises are what windows are
compared with, so that baseline prompts are judged as new ones are.

False alarms: a signal is flagged in a window when its p is below `alarms` / number of signals
(Bonferroni), so at most a share `alarms` of windows has any false flag while nothing drifts, on average
over baselines. Windows do not overlap. With 100 requests and 1%, a refusal rate that goes from 5% to 20% is flagged
in most windows; smaller changes need larger windows. Requests are taken as independent.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unisono.errors import ConfigError, DataError
from unisono.evaluate.toxicity import TOXIC
from unisono.files import JsonLines
from unisono.guard import SKETCH

Row = dict[str, Any]
POLL_S = 0.5


@dataclass(frozen=True)
class Signal:
    """What is read of a request; None where the request has none."""

    name: str
    test: str
    read: Callable[[Row], float | None]
    high_only: bool = False


@dataclass(frozen=True)
class Finding:
    """One signal in one window: means, p, and whether it is flagged."""

    signal: str
    test: str
    baseline: float
    window: float
    p: float
    threshold: float
    requests: int

    @property
    def flagged(self) -> bool:
        return self.p < self.threshold


def _number(name: str) -> Callable[[Row], float | None]:
    def read(row: Row) -> float | None:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value)

    return read


def _refused(row: Row) -> float | None:
    return float(row["refused"]) if isinstance(row.get("refused"), bool) else None


def _blocked(row: Row) -> float | None:
    return float(bool(row["blocked"])) if isinstance(row.get("blocked"), str) else None


def _toxic(row: Row) -> float | None:
    severity = _number("toxicity")(row)
    return None if severity is None else float(severity >= TOXIC)


SIGNALS = (
    Signal("refused", "fisher", _refused),
    Signal("blocked", "fisher", _blocked),
    Signal("toxic", "fisher", _toxic),
    Signal("prompt words", "mann-whitney", _number("prompt_words")),
    Signal("completion words", "mann-whitney", _number("completion_words")),
    Signal("nats per token", "mann-whitney", _number("nats_per_token")),
)


class Baseline:
    """What a good log looks like. Raises DataError when it is too short to compare with."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        if len(rows) < 40:
            raise DataError(f"{name}: {len(rows)} requests; a baseline needs at least 40")
        # Alternately, so that both halves are of the same time.
        self._shares = _bucket_shares(rows[::2])
        self._surprise = [s for r in rows[1::2] if (s := surprise(r, self._shares)) is not None]
        self._values = {s.name: _values(s, rows) for s in SIGNALS}

    def judge(self, window: Sequence[Row], alarms: float) -> list[Finding]:
        """Every signal that both logs have, flagged or not."""
        ood = Signal("out-of-distribution prompts", "mann-whitney", lambda r: surprise(r, self._shares), True)  # fmt: skip
        pairs = [(s, self._values[s.name], _values(s, window)) for s in SIGNALS]
        pairs.append((ood, self._surprise, _values(ood, window)))
        usable = [(s, before, now) for s, before, now in pairs if len(before) >= 20 and len(now) >= 10]  # fmt: skip
        return [
            Finding(s.name, s.test, _mean(before), _mean(now), p_of(s, before, now), alarms / len(pairs), len(now))
            for s, before, now in usable
        ]  # fmt: skip


def p_of(signal: Signal, before: Sequence[float], now: Sequence[float]) -> float:
    """The p of no drift, by the signal's test."""
    if signal.test == "fisher":
        return fisher(int(sum(before)), len(before), int(sum(now)), len(now))
    return mann_whitney(before, now, signal.high_only)


def fisher(hits: int, count: int, new_hits: int, new_count: int) -> float:
    """The two-sided exact p that two shares are one: tables no likelier than the one seen."""
    all_hits, total = hits + new_hits, count + new_count
    whole = _log_choose(total, all_hits)
    least, most = max(0, all_hits - count), min(all_hits, new_count)
    logs = [_log_choose(new_count, k) + _log_choose(count, all_hits - k) - whole for k in range(least, most + 1)]  # fmt: skip
    seen = logs[new_hits - least]
    return min(1.0, math.fsum(math.exp(x) for x in logs if x <= seen + 1e-9))


def mann_whitney(before: Sequence[float], now: Sequence[float], high_only: bool = False) -> float:
    """The p that two samples are one, by the normal approximation with ties and continuity corrected."""
    n, m = len(before), len(now)
    ordered = sorted([(v, 0) for v in before] + [(v, 1) for v in now])
    rank_sum = ties = 0.0
    first = 0
    while first < len(ordered):
        last = first
        while last + 1 < len(ordered) and ordered[last + 1][0] == ordered[first][0]:
            last += 1
        same = last - first + 1
        rank_sum += (first + last + 2) / 2 * sum(which for _, which in ordered[first : last + 1])
        ties += same**3 - same
        first = last + 1
    u = rank_sum - m * (m + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    above = u - n * m / 2
    if high_only:
        return 0.5 * math.erfc((above - 0.5) / math.sqrt(2 * variance))
    return min(1.0, math.erfc(max(0.0, abs(above) - 0.5) / math.sqrt(2 * variance)))


def surprise(row: Row, shares: Sequence[float]) -> float | None:
    """Mean bits of a prompt's words under the baseline's shares of buckets."""
    counts = _sketch(row)
    words = sum(counts.values())
    return -sum(n * math.log2(shares[b]) for b, n in counts.items()) / words if words else None


def _bucket_shares(rows: Sequence[Row]) -> list[float]:
    counts = [1.0] * SKETCH
    for row in rows:
        for bucket, count in _sketch(row).items():
            counts[bucket] += count
    total = sum(counts)
    return [c / total for c in counts]


def _sketch(row: Row) -> dict[int, int]:
    found: dict[int, int] = {}
    pairs = row.get("prompt_sketch")
    for pair in pairs if isinstance(pairs, list) else []:
        match pair:
            case [int(bucket), int(count)] if 0 <= bucket < SKETCH and count > 0:
                found[bucket] = found.get(bucket, 0) + count
    return found


def _values(signal: Signal, rows: Sequence[Row]) -> list[float]:
    return [v for r in rows if (v := signal.read(r)) is not None and math.isfinite(v)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# --- logs


@dataclass
class Tail:
    """The rows of a log, also those that come later. `bad` counts lines that are no rows."""

    path: Path
    bad: int = 0
    first_bad: str = ""

    def rows(self, follow: bool, sleep: Callable[[float], None] = time.sleep) -> Iterator[Row]:
        """Whole lines only: one that is being written is read when it is complete.

        With `follow` it does not end by itself. A log that is replaced or cut is read anew.
        """
        number = 0
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from None
        try:
            while True:
                place = file.tell()
                line = file.readline()
                if line.endswith(b"\n"):
                    number += 1
                    row = self._row(line, number)
                    if row is not None:
                        yield row
                    continue
                if not follow:
                    if line:
                        self._note(number + 1, "a torn last line")
                    return
                file.seek(place)
                sleep(POLL_S)
                try:
                    there = self.path.stat()
                except FileNotFoundError:
                    continue
                here = file.fileno()
                if there.st_ino != _inode(here) or there.st_size < place:
                    file.close()
                    file, number = self.path.open("rb"), 0
        finally:
            file.close()

    def _row(self, line: bytes, number: int) -> Row | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("blocked"), str):
            self._note(number, "no request of a guard's log")
            return None
        return row

    def _note(self, number: int, why: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or f"{self.path}:{number}: {why}"


def _inode(fd: int) -> int:
    import os

    return os.fstat(fd).st_ino


def windows(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Rows in windows of `size`; what is left at the end is not judged."""
    window: list[Row] = []
    for row in rows:
        window.append(row)
        if len(window) == size:
            yield window
            window = []


def command(
    log: Path, baseline: Path, size: int, alarms: float, follow: bool, json_file: Path | None
) -> bool:
    """The verb: judge every window and print it; returns whether any was flagged."""
    from rich.console import Console

    if not 0 < alarms < 1:
        raise ConfigError(f"--alarms: found {alarms}; write a share between 0 and 1, as 0.01")
    console = Console(highlight=False, soft_wrap=True)
    good = Tail(baseline)
    known = Baseline(list(good.rows(follow=False)), str(baseline))
    _tell_bad(console, good)
    console.print(
        f"windows of {size} requests; a false alarm in at most {alarms:.2g} of them, over all signals",
        style="dim",
    )
    tail, drifted, judged = Tail(log), False, 0
    out = JsonLines(json_file) if json_file is not None else None
    try:
        for number, window in enumerate(windows(tail.rows(follow), size), 1):
            judged = number
            found = known.judge(window, alarms)
            drifted |= any(f.flagged for f in found)
            _tell(console, number, found)
            if out is not None:
                out.append({"window": number, "findings": [{**asdict(f), "flagged": f.flagged} for f in found]})  # fmt: skip
    except KeyboardInterrupt:
        pass
    finally:
        if out is not None:
            out.close()
    _tell_bad(console, tail)
    if judged == 0:
        raise DataError(f"{log}: fewer than {size} requests: no window to judge; take a smaller --window")  # fmt: skip
    return drifted


def _tell(console: Any, number: int, found: Sequence[Finding]) -> None:
    flagged = [f for f in found if f.flagged]
    if not flagged:
        worst = min(found, key=lambda f: f.p, default=None)
        least = f" (least p {worst.p:.2g}, {worst.signal})" if worst else ": no signal to compare"
        console.print(f"window {number}: no drift{least}", style="dim" if worst else "yellow")
    for f in flagged:
        console.print(
            f"window {number}: [bold red]{f.signal}[/bold red] {f.baseline:.4g} -> {f.window:.4g}  "
            f"p {f.p:.2g} < {f.threshold:.2g}, {f.test}"
        )


def _tell_bad(console: Any, tail: Tail) -> None:
    if tail.bad:
        console.print(f"{tail.bad} line(s) not used; the first: {tail.first_bad}", style="yellow")
