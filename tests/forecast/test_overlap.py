"""A rank and its link, followed by hand."""

import pytest

from unisono.forecast.overlap import Lane, Segment, Transfer, play

FREE = Lane(0.0, 1e6)
HALF = Lane(0.0, 1e6, compute_speed=0.5, transfer_speed=0.5)
BURST = Lane(0.0, 1e6, burst_s=0.25)


def test_nothing_to_send_takes_the_compute() -> None:
    assert play([Segment(2.0), Segment(3.0)], []) == pytest.approx(5.0)


def test_a_transfer_hides_behind_what_follows_it() -> None:
    segments = [Segment(1.0, sends=(0,)), Segment(2.0), Segment(0.0, needs=(0,))]
    assert play(segments, [Transfer(1.5, FREE)]) == pytest.approx(3.0)
    assert play(segments, [Transfer(2.5, FREE)]) == pytest.approx(3.5)


def test_the_link_carries_one_at_a_time() -> None:
    segments = [Segment(1.0, sends=(0, 1)), Segment(1.0, sends=(2,)), Segment(0.0, needs=(2,))]
    transfers = [Transfer(1.0, FREE)] * 3
    assert play(segments, transfers) == pytest.approx(4.0), "ready at 1, 1, 2; the last ends at 4"


def test_a_core_that_both_need_does_one_second_of_work_a_second() -> None:
    """At half speed each nothing is won by overlapping, and nothing lost."""
    segments = [Segment(0.0, sends=(0,)), Segment(2.0), Segment(0.0, needs=(0,))]
    for transfer in (0.5, 2.0, 5.0):
        assert play(segments, [Transfer(transfer, HALF)]) == pytest.approx(2.0 + transfer)


def test_what_a_later_segment_needs_is_waited_for_alone() -> None:
    segments = [Segment(0.0, sends=(0,)), Segment(1.0, needs=(0,)), Segment(1.0)]
    assert play(segments, [Transfer(0.7, FREE)]) == pytest.approx(2.7)


def chain(transfers: list[Transfer], compute_s: float = 0.0) -> float:
    """Each is needed before the next one is begun."""
    segments = [Segment(0.0, sends=(0,))]
    for n in range(1, len(transfers)):
        segments.append(Segment(compute_s, needs=(n - 1,), sends=(n,)))
    return play([*segments, Segment(0.0, needs=(len(transfers) - 1,))], transfers)


def test_connections_share_the_link() -> None:
    transfers = [Transfer(1.0, FREE, "a"), Transfer(1.0, FREE, "b")]
    segments = [Segment(0.0, sends=(0, 1)), Segment(1.0, needs=(0,)), Segment(0.0, needs=(1,))]
    assert play(segments, transfers) == pytest.approx(3.0), "both end at 2"


def test_a_burst_passes_after_a_pause_of_as_long() -> None:
    transfers = [Transfer(1.0, BURST), Transfer(1.0, BURST)]
    assert chain(transfers) == pytest.approx(2.0), "no pause"
    assert chain(transfers, 0.1) == pytest.approx(2.0), "0.1 computing, 0.9 on the wire"
    assert chain(transfers, 5.0) == pytest.approx(6.75), "no more than the burst"


def test_what_is_offered_waits_for_a_gap() -> None:
    """Offered behind three others, of which two may be under way, after the first one."""
    others = [Transfer(1.0, FREE, "a") for _ in range(4)]
    late = Transfer(1.0, FREE, "b", after=0, beside=(0, 1, 2, 3))
    segments = [
        Segment(0.0, sends=(0, 1, 2, 3), offers=(4,)),
        Segment(0.5, offers=(4,)),
        Segment(1.0, offers=(4,)),
        Segment(0.6, offers=(4,)),
        Segment(0.0, needs=(0, 1, 2, 3)),
    ]
    # At 2.1 two of the four have ended; from then on both connections share the link.
    assert play([*segments, Segment(0.0, needs=(4,))], [*others, late]) == pytest.approx(5.0)
    first = [*segments[:-1], Segment(1.0, needs=(4,))]
    assert play(first, [*others, late]) == pytest.approx(2.1 + 2.0 + 1.0)
