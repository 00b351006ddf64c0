"""What runs beside what: speeds from two activities whose times are known."""

import pytest

from ranks import run_ranks
from unisono.forecast.probe import Sharing
from unisono.probe import sharing


@pytest.mark.parametrize(
    ("compute_end", "stream_end", "speeds"),
    [
        (0.10, 0.05, (1.0, 1.0)),  # nothing is shared
        (0.15, 0.10, (0.5, 0.5)),  # until 0.1 each at half speed; then the pass alone
        (0.10, 0.125, (1.0, 0.25)),  # the stream waits for the compute
    ],
)
def test_speeds_while_both_run(
    compute_end: float, stream_end: float, speeds: tuple[float, float]
) -> None:
    """Alone the pass takes 0.1 s and the stream 0.05 s."""
    assert sharing.speeds(0.1, compute_end, 0.05, stream_end) == pytest.approx(speeds)


def test_what_is_taken_from_compute() -> None:
    s = Sharing(collective="all_reduce", ranks=2, message_bytes=1, bytes_per_s=1, compute_speed=0.5, transfer_speed=0.5)  # fmt: skip
    assert s.busy == pytest.approx(1.0)
    assert s.model_copy(update={"compute_speed": 0.9, "transfer_speed": 1.0}).busy == pytest.approx(0.1)  # fmt: skip


def measured(world) -> list[dict]:
    from unisono.probe.passes import stand_in
    from unisono.sync.ledger import Group, Ledger

    group = Group("stream", Ledger(), 60)
    return [s.model_dump() for s in sharing.measure_sharing(stand_in("cpu"), 0.1, group, "cpu")]


def test_real_ranks_measure_every_collective_of_training() -> None:
    rows = run_ranks(measured, 2)[0]
    assert [r["collective"] for r in rows] == list(sharing.MESSAGES)
    for r in rows:
        assert 0 < r["compute_speed"] <= 1 and 0 < r["transfer_speed"] <= 1
        assert r["bytes_per_s"] > 0 and r["ranks"] == 2
