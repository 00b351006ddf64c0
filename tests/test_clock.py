"""The clock is in exactly one phase at any moment, so phases sum to wall time."""

import contextlib

import pytest

from unisono import clock as clock_module
from unisono.clock import PHASES, Clock


class Time:
    """A wall clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(clock_module, "time", fake)
    return fake


def test_inner_phases_pause_outer_ones(time: Time) -> None:
    clock = Clock()
    time.now += 1
    with clock("compute"):
        time.now += 2
        with clock("communication"):
            time.now += 4
            with clock("data"):
                time.now += 8
            time.now += 16
        time.now += 32
    time.now += 64
    assert clock.read() == {"other": 65, "compute": 34, "communication": 20, "data": 8}


def test_phases_sum_to_wall_time_at_any_moment(time: Time) -> None:
    clock = Clock()
    for k, phase in enumerate(PHASES):
        with clock(phase):
            time.now += k + 0.5
            assert sum(clock.read().values()) == time.now - 100
    assert sum(clock.read().values()) == time.now - 100


def test_an_exception_leaves_the_phase(time: Time) -> None:
    clock = Clock()
    with contextlib.suppress(ValueError), clock("compute"):
        time.now += 3
        raise ValueError
    time.now += 5
    assert clock.read() == {"compute": 3, "other": 5}


def test_standing_still_is_waiting_only_inside_a_steps_communication(time: Time) -> None:
    clock = Clock()
    with clock("communication"), clock.standing_still():
        time.now += 1
    with clock("checkpoint"), clock.standing_still():
        time.now += 2
    with clock.standing_still():
        time.now += 4
    assert clock.read() == pytest.approx(
        {"waiting": 1, "checkpoint": 2, "other": 4, "communication": 0}
    )


def test_move_keeps_the_sum(time: Time) -> None:
    clock = Clock()
    with clock("waiting"):
        time.now += 5
    clock.move("waiting", "communication", 2)
    seconds = clock.read()
    assert (seconds["waiting"], seconds["communication"]) == (3, 2)
    assert sum(seconds.values()) == 5


def test_restart_forgets_what_was(time: Time) -> None:
    clock = Clock()
    with clock("data"):
        time.now += 5
        clock.restart()
        time.now += 7
    assert clock.read() == {"data": 7, "other": 0}


def test_reading_gives_a_copy(time: Time) -> None:
    clock = Clock()
    clock.read()["other"] = 1000.0
    time.now += 1
    assert clock.read()["other"] == 1
