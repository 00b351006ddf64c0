"""Goodput over sessions that ended, were killed, or were taken back."""

from pathlib import Path

import pytest

from unisono.observe.goodput import Goodput, Sessions, goodput


def row(event: str, time: float, step: int = 0, stepping_s: float = 0.0) -> dict[str, object]:
    found: dict[str, object] = {"event": event, "time": time}
    return found if event == "seen" else {**found, "step": step, "stepping_s": stepping_s}


def test_one_session() -> None:
    rows = [row("began", 100), row("saved", 150, 10, 40), row("ended", 160, 12, 48)]
    assert goodput(rows) == Goodput(0.8, 48, 60, 0, 0, 1)


def test_a_killed_session_loses_what_was_not_committed() -> None:
    rows = [
        row("began", 100), row("saved", 120, 10, 15), row("seen", 130),
        row("began", 200, 10), row("saved", 230, 25, 25), row("ended", 240, 30, 35),
    ]  # fmt: skip
    # 30 s and 40 s lived, 70 s apart; what ran after the checkpoint is not in any row.
    assert goodput(rows) == Goodput(pytest.approx(50 / 70), 50, 70, 0, 70, 2)


def test_steps_that_are_done_again_count_once() -> None:
    """The newest checkpoint was damaged, so the second session began at an older one."""
    rows = [
        row("began", 0), row("saved", 20, 10, 15), row("saved", 40, 20, 30), row("seen", 45),
        row("began", 50, 10), row("ended", 70, 20, 15),
    ]  # fmt: skip
    found = goodput(rows)
    assert (found.committed_s, found.lost_s, found.wall_s) == (30, 15, 65)


def test_a_session_that_was_undone_by_a_later_one_counts_for_nothing() -> None:
    rows = [
        row("began", 0), row("saved", 10, 10, 8), row("began", 10, 10), row("saved", 30, 30, 18),
        row("began", 30, 0), row("ended", 60, 30, 28),
    ]  # fmt: skip
    assert goodput(rows).committed_s == 28


def test_rows_that_are_none_are_passed_over(tmp_path: Path) -> None:
    good = [row("began", 100), row("saved", 150, 10, 40), row("ended", 160, 12, 48)]
    odd = [{}, {"event": "began"}, {"event": 3}, row("saved", 155, "x", 1), row("seen", None), {"event": "seen", "time": float("nan")}]  # fmt: skip
    assert goodput([*odd, good[0], *odd, *good[1:], *odd]) == goodput(good)
    (tmp_path / "metrics.jsonl").write_text('{"step": "x", "time": [1]}\n')
    Sessions(tmp_path, 1020.0, 0, "metrics.jsonl").close()


def test_the_last_sign_of_life_is_kept_before_metrics_are_cut(tmp_path: Path) -> None:
    first = Sessions(tmp_path, 1000.0, 0, "metrics.jsonl")
    first.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "time": 1010.0}\n{"step": 7, "ti')
    second = Sessions(tmp_path, 1020.0, 0, "metrics.jsonl")
    found = second.ended(9, 3.0)
    second.close()
    assert found.sessions == 2 and found.down_s == pytest.approx(10)
    assert found.wall_s > 10
