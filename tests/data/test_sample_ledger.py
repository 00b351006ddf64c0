"""src/unisono/data/ledger.py. Named apart from the ledger of collectives."""

import numpy as np
import pytest

from unisono.data.ledger import Ledger, audit, read, truncate
from unisono.data.order import Order

ORDER = Order(50, 9)


def write(folder, world_size, steps, batch=8, last=None):
    """What `world_size` ranks record that divide each global batch evenly."""
    ledgers = [Ledger(folder, r) for r in range(world_size)]
    for step in steps:
        end = min(step * batch, last if last is not None else step * batch)
        samples = ORDER.at(np.arange((step - 1) * batch, end))
        for rank, share in enumerate(np.array_split(samples, world_size)):
            ledgers[rank].commit(step, share)
    for ledger in ledgers:
        ledger.sync()
        ledger.close()


def test_a_run_without_fault_has_no_complaints_and_reads_back(tmp_path):
    write(tmp_path, 3, range(1, 21))
    assert audit(tmp_path, ORDER, 8, 160) == []
    assert read(tmp_path)[20] == ORDER.at(np.arange(152, 160)).tolist()


def test_the_last_step_may_be_short(tmp_path):
    write(tmp_path, 2, range(1, 7), last=45)
    assert audit(tmp_path, ORDER, 8, 45) == []
    assert len(read(tmp_path)[6]) == 5


def test_resume_at_another_world_size(tmp_path):
    write(tmp_path, 4, range(1, 11))
    truncate(tmp_path, 6)
    assert list(read(tmp_path)) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, 2, range(7, 13))
    assert audit(tmp_path, ORDER, 8, 96) == []


def test_forgetting_to_truncate_is_seen(tmp_path):
    write(tmp_path, 2, range(1, 6))
    write(tmp_path, 2, range(4, 8))
    complaints = audit(tmp_path, ORDER, 8, 56)
    assert [c.split(":")[0] for c in complaints] == ["step 4", "step 5"]
    assert "twice" in complaints[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s[1:], "skipped [{0}]"),
        (lambda s: [*s, s[2]], "twice [{2}]"),
        (lambda s: [s[1], *s[1:]], "skipped [{0}], twice [{1}]"),
        (lambda s: [1000, *s[1:]], "skipped [{0}], not of this step [1000]"),
    ],
)
def test_complaints_name_what_is_wrong(tmp_path, change, complaint):
    write(tmp_path, 1, [1, 3])
    right = ORDER.at(np.arange(8, 16)).tolist()
    ledger = Ledger(tmp_path, 0)
    ledger.commit(2, change(right))
    ledger.close()
    assert audit(tmp_path, ORDER, 8, 24) == [f"step 2: {complaint.format(*right)}"]


def test_missing_and_surplus_steps(tmp_path):
    write(tmp_path, 1, [1, 3, 4])
    assert audit(tmp_path, ORDER, 8, 24) == [
        "step 4: recorded, but the run has 3 steps",
        "step 2: missing",
    ]
    assert audit(tmp_path / "nowhere", ORDER, 8, 8) == ["step 1: missing"]


def test_a_torn_last_line_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    write(tmp_path, 1, [1, 2])
    path = tmp_path / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert list(read(tmp_path)) == [1]
    write(tmp_path, 1, [2, 3])
    assert audit(tmp_path, ORDER, 8, 24) == []


def test_ranks_come_in_numeric_order(tmp_path):
    for rank in (10, 2, 0):
        ledger = Ledger(tmp_path, rank)
        ledger.commit(1, [rank])
        ledger.close()
    assert read(tmp_path) == {1: [0, 2, 10]}
