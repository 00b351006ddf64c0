"""Who waited for whom, from stamps alone."""

from dataclasses import replace

import pytest

from unisono.clock import PHASES, Clock
from unisono.observe.arrival import NAMES, Period, Stamps, by_phase, split, values_of


def lockstep(*compute: float, wire: float = 0.01, work: tuple[float, ...] = ()) -> list[Period]:
    """Ranks that begin together, compute, and leave `wire` seconds after the last has come."""
    end = max(compute) + wire
    works = work or (1.0,) * len(compute)
    return [
        Period(compute=c, late=end - c, arrived=c, work=w)
        for c, w in zip(compute, works, strict=True)
    ]


def test_waiting_is_what_lies_before_the_last_arrival() -> None:
    assert split(lockstep(0.10, 0.12, 0.10)) == [
        (pytest.approx(0.02), 0, pytest.approx(0.01)),
        (0, 0, pytest.approx(0.01)),
        (pytest.approx(0.02), 0, pytest.approx(0.01)),
    ]


def test_equal_phase_lengths_do_not_hide_the_slow_rank() -> None:
    """traceml #252: all ranks end together, so each one's compute and standing still have one sum."""
    periods = lockstep(0.1, 0.3)
    assert periods[0].step == pytest.approx(periods[1].step)
    assert split(periods)[0][0] == pytest.approx(0.2)


def test_who_comes_late_because_of_the_wire_is_not_waited_for() -> None:
    """Rank 0 stood still in its forward pass for weights from a slow link; rank 1 did not."""
    first = Period(compute=0.1, early=0.05, late=0.01, arrived=0.15, work=1)
    second = Period(compute=0.1, early=0.0, late=0.06, arrived=0.10, work=1)
    assert split([first, second]) == [
        (0, 0, pytest.approx(0.06)),
        (0, 0, pytest.approx(0.06)),
    ]


def test_a_rank_that_was_busy_longer_but_came_first_is_not_waited_for() -> None:
    """Its clock started earlier: it left the step before earlier."""
    periods = [
        Period(compute=0.10, late=0.02, arrived=0.12, work=1),
        Period(compute=0.11, late=0.03, arrived=0.11, work=1),
    ]
    waiting, _, wire = split(periods)[0]
    assert waiting == 0 and wire == pytest.approx(0.02)


def test_blocks_in_lockstep_are_waited_for_before_the_arrival() -> None:
    """FSDP: the ranks meet in every block, so all arrive at the end at once."""
    periods = [
        Period(compute=0.1, early=0.05, late=0.01, arrived=0.16, work=1),
        Period(compute=0.14, early=0.01, late=0.01, arrived=0.16, work=1),
    ]
    assert split(periods)[0] == (pytest.approx(0.04), 0, pytest.approx(0.02))


def test_more_work_is_load_and_slower_work_is_not() -> None:
    heavy = lockstep(0.1, 0.15, work=(100, 150))
    assert split(heavy)[0] == (
        pytest.approx(0, abs=1e-12),
        pytest.approx(0.05),
        pytest.approx(0.01),
    )
    both = lockstep(0.1, 0.18, work=(100, 150))
    assert split(both)[0][:2] == (pytest.approx(0.03), pytest.approx(0.05))


def test_phases_of_every_rank_sum_to_its_period() -> None:
    period = Period(*(0.01 * (k + 1) for k in range(len(NAMES))))
    other = replace(period, compute=0.5, late=0.2, arrived=2.0, work=3.0)
    for p, seconds in zip([period, other], by_phase([period, other]), strict=True):
        assert set(seconds) == set(PHASES)
        assert sum(seconds.values()) == pytest.approx(p.step + p.checkpoint + p.evaluation)
        assert min(seconds.values()) >= 0
    assert Period(*values_of(period)) == period


class Time:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


def test_stamps_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = Clock()
    stamps = Stamps(clock)
    stamps.offset_s = 50.0
    stamps.began()

    def step() -> Period:
        with clock("compute"):
            time.now += 1.0
            with clock("data"):
                time.now += 0.25
            with clock("communication"):
                time.now += 0.125
                with clock.standing_still():
                    time.now += 0.5
        stamps.arrived(7.0)
        with clock("communication"):
            with clock.standing_still():
                time.now += 2.0
            time.now += 0.0625
        stamps.left()
        return stamps.period

    first = step()
    assert first == Period(
        compute=1.0, packing=0.125, data=0.25, early=0.5, late=2.0, adding=0.0625,
        arrived=51.875, work=7.0,
    )  # fmt: skip
    # What is settled of the first step while the second one goes is no part of the second.
    stamps.settle([first, replace(first, compute=2.5, late=0.5, arrived=53.375)], 0)
    assert clock.read()["waiting"] == pytest.approx(1.5)
    assert clock.read()["communication"] == pytest.approx(0.1875 + 1.0)
    assert replace(step(), arrived=first.arrived) == first


def test_longer_completions_are_imbalance_and_a_slow_rank_is_not() -> None:
    """Rank 1 drew twice as many tokens; rank 0 of the second pair took twice as long for as many."""
    longer = [
        Period(compute=0.1, work=1.0, generation=0.2, drawn=100.0, late=0.21, arrived=0.3),
        Period(compute=0.1, work=1.0, generation=0.4, drawn=200.0, late=0.01, arrived=0.5),
    ]
    waiting, load, wire = split(longer)[0]
    assert (waiting, load, wire) == (pytest.approx(0.0), pytest.approx(0.2), pytest.approx(0.01))
    slow = [
        Period(compute=0.1, work=1.0, generation=0.4, drawn=100.0, late=0.01, arrived=0.5),
        Period(compute=0.1, work=1.0, generation=0.2, drawn=100.0, late=0.21, arrived=0.3),
    ]
    waiting, load, _ = split(slow)[1]
    assert (waiting, load) == (pytest.approx(0.2), pytest.approx(0.0))
    assert by_phase(longer)[1]["generation"] == 0.4
    assert sum(by_phase(longer)[1].values()) == pytest.approx(longer[1].step)
