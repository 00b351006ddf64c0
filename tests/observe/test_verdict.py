"""The judgement on what ranks say about themselves: what is proof, what takes longer, what is nothing."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.observe.verdict import (
    BLOCKED_S,
    GONE,
    LATE_S,
    LOST,
    OVER,
    SILENT_OUTSIDE_S,
    SILENT_S,
    Progress,
    Record,
    Seen,
    Wait,
    judge,
)

GROUP = "votes/1/0"


def record(rank: int, issued: int, **changes) -> Record:
    recent = {s: ("all-reduce", 16, f"loop.py:{s} train") for s in range(max(1, issued - 3), issued + 1)}  # fmt: skip
    made = Record(
        beat=7, pid=100 + rank, machine="m", host="h", phase="compute",
        stack=[f"data.py:{80 + rank} read", "loop.py:3 train"],
        groups={GROUP: Progress((), issued, recent)},
    )  # fmt: skip
    return replace(made, **changes)


def waiting(rank: int, sequence: int, waited_s: float = 6.0, key: str = GROUP, **changes) -> Record:
    wait = Wait(key, key.partition("/")[0], "all-reduce", sequence, 16, waited_s, blocked=True)
    return record(rank, sequence, **({"phase": "waiting", "wait": wait} | changes))


def seen(*records: Record, **about_last) -> dict[int, Seen]:
    found = {r: Seen(record, process="S") for r, record in enumerate(records)}
    last = len(records) - 1
    found[last] = replace(found[last], **about_last)
    return found


def late(**about_last) -> dict[int, Seen]:
    """Ranks 0 and 1 wait in all-reduce 812; rank 2 has begun 811."""
    changes = {k: about_last.pop(k) for k in ("phase", "idle_s", "ended") if k in about_last}
    return seen(waiting(0, 812), waiting(1, 812), record(2, 811, **changes), **about_last)


def test_an_alive_rank_is_slow_and_only_after_long() -> None:
    assert judge(0, late()) is None
    ranks = {r: replace(s, record=replace(s.record, wait=s.record.wait and replace(s.record.wait, waited_s=LATE_S + 1))) for r, s in late().items()}  # fmt: skip
    verdict = judge(0, ranks)
    assert verdict
    assert (verdict.kind, verdict.ranks) == ("slow", (2,))
    assert verdict.line == (
        "slow: rank 2 has not reached all-reduce 812 (16 bytes) of group 'votes'; it is in data.py:82 "
        "read < loop.py:3 train, computing; ranks 0, 1 wait in all-reduce 812 (16 bytes) of group "
        "'votes' for 31 s"
    )
    assert judge(0, ranks, late_s=60) is None
    for phase in ("checkpoint", "evaluation", "other"):
        for who in range(3):  # a checkpoint is one rank's, an evaluation all ranks'
            changed = dict(ranks)
            changed[who] = replace(ranks[who], record=replace(ranks[who].record, phase=phase))
            innocent = who == 0 or (who == 2 and phase != "other")
            assert (judge(0, changed) is None) == innocent, (phase, who)


def test_when_the_wait_has_failed_the_alive_rank_is_named() -> None:
    verdict = judge(0, late(idle_s=5.4), final=True)
    assert verdict
    assert "rank 2 has not reached all-reduce 812" in verdict.text
    assert "without using the processor for 5 s" in verdict.text
    everybody = judge(0, seen(waiting(0, 812), waiting(1, 812)), final=True)
    assert everybody
    assert everybody.ranks == ()
    assert "every rank has reached all-reduce 812" in everybody.text


def test_a_checkpoint_that_takes_longer_than_the_timeout_says_so() -> None:
    verdict = judge(0, late(phase="checkpoint", idle_s=5.4), final=True)
    assert verdict
    assert "writes a checkpoint: raise timeout_s, or write to a faster disk" in verdict.text
    assert judge(0, late(phase="checkpoint", idle_s=5.4)) is None


def test_who_is_late_because_of_another_is_not_named() -> None:
    key = "shard/2/1"
    ranks = seen(waiting(0, 812, 99), waiting(1, 5, 99, key=key), record(2, 811))
    ranks[1] = replace(ranks[1], record=replace(ranks[1].record, groups={GROUP: Progress((), 811), key: Progress((1, 2), 5)}))  # fmt: skip
    verdict = judge(0, ranks)
    assert verdict
    assert verdict.ranks == (2,)


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({"process": "T", "silent_s": 1.1}, True),
        ({"process": "T", "silent_s": 0.9}, False),
        ({"process": "t", "silent_s": 1.1}, True),
        ({"process": "R", "silent_s": 600.0}, False),
        ({"process": "S", "silent_s": 600.0, "computes": True}, False),
        ({"process": "S", "silent_s": BLOCKED_S + 1}, True),
        ({"process": "S", "silent_s": BLOCKED_S - 1}, False),
        ({"process": "D", "silent_s": LATE_S - 1}, False),
        ({"process": "D", "silent_s": LATE_S + 1}, True),
        ({"process": "S", "silent_s": BLOCKED_S + 1, "phase": "checkpoint"}, False),
        ({"process": "D", "silent_s": LATE_S + 1, "phase": "checkpoint"}, False),
        ({"process": "D", "silent_s": SILENT_OUTSIDE_S + 1, "phase": "checkpoint"}, True),
        ({"process": "T", "silent_s": 1.1, "phase": "checkpoint"}, True),
        ({"process": "?", "silent_s": SILENT_S + 0.1}, True),
        ({"process": "?", "silent_s": SILENT_S - 0.1}, False),
        ({"process": "?", "silent_s": SILENT_S + 0.1, "phase": "other"}, False),
        ({"process": "?", "silent_s": SILENT_S + 0.1, "phase": "checkpoint"}, False),
        ({"process": "?", "silent_s": SILENT_OUTSIDE_S + 0.1, "phase": "checkpoint"}, True),
    ],
)
def test_silence(about: dict, named: bool) -> None:
    verdict = judge(0, late(**about))
    assert (verdict is not None) == named
    if verdict and about["process"] != "?":
        assert (verdict.kind, verdict.ranks) == ("stopped", (2,))
        assert verdict.line.startswith("hang: rank 2 (process 102 on h) does not run for")
    elif verdict:  # it may well run: nobody can tell from here, so it is not called a hang
        assert (verdict.kind, verdict.ranks) == ("silent", (2,))
        assert verdict.line.startswith(
            "silent: rank 2 (process 102 on h) gives no sign of life for"
        )
        assert (
            "in one long call that lets no other thread run, or stopped, or its host"
            in verdict.line
        )


def test_of_two_silent_ranks_the_one_that_is_known_to_be_stopped_is_named() -> None:
    ranks = late(process="T", silent_s=4.0)
    ranks[1] = replace(ranks[1], process="?", silent_s=4.0)
    verdict = judge(0, ranks)
    assert verdict
    assert (verdict.kind, verdict.ranks) == ("stopped", (2,))


def test_all_silent_ranks_are_named_together() -> None:
    ranks = late(process="T", silent_s=2.0)
    ranks[1] = replace(ranks[1], process="T", silent_s=3.0)
    verdict = judge(0, ranks)
    assert verdict
    assert verdict.ranks == (1, 2)
    assert "; neither does rank 2; rank 0 waits in" in verdict.text


def test_an_exception_elsewhere() -> None:
    verdict = judge(0, late(ended="ValueError: no"))
    assert verdict
    assert verdict.text.startswith(
        "rank 2 ended with ValueError: no, in data.py:82 read < loop.py:3"
    )


def test_a_program_that_is_over_without_what_others_wait_for() -> None:
    verdict = judge(0, late(ended=OVER))
    assert verdict
    assert verdict.text.startswith("rank 2's program is over, without all-reduce 812")
    fine = seen(waiting(0, 812), record(1, 812, ended=OVER), process=GONE, silent_s=9.0)
    assert judge(0, fine) is None  # its part may still be on its way


def test_who_lost_the_others_is_no_cause() -> None:
    ranks = late(ended=LOST + "rank 3 has ended", process=GONE, silent_s=9.0)
    assert judge(0, ranks) is None
    verdict = judge(0, ranks, final=True)
    assert verdict
    assert verdict.text == "as rank 2 has found, rank 3 has ended"


def test_a_process_that_is_gone_was_seen_twice() -> None:
    """Between reading a record and looking for the process, a rank may have said why it ends."""
    assert judge(0, late(process=GONE, silent_s=0.0)) is None
    verdict = judge(0, late(process=GONE, silent_s=0.2))
    assert verdict
    assert "rank 2 (process 102) has ended without a word" in verdict.text


def other_operation(rank: int) -> Record:
    made = waiting(rank, 812)
    recent = made.groups[GROUP].recent | {812: ("all-gather", 8, "loop.py:99 save")}
    return replace(made, groups={GROUP: Progress((), 812, recent)})


def test_ranks_that_have_parted() -> None:
    verdict = judge(0, seen(waiting(0, 812), waiting(1, 812), other_operation(2)))
    assert verdict
    assert (verdict.kind, verdict.ranks) == ("parted", (2,))
    assert verdict.line == (
        "desynchronized: ranks have parted: as collective 812 of group 'votes' rank 2 began all-gather of "
        "8 bytes in loop.py:99 save, ranks 0, 1 began all-reduce of 16 bytes in loop.py:812 train"
    )


def test_bytes_that_may_differ_part_nobody() -> None:
    made = waiting(2, 812)
    recent = {812: ("all-reduce", -1, "")}
    ranks = seen(waiting(0, 812), waiting(1, 812), replace(made, groups={GROUP: Progress((), 812, recent)}))  # fmt: skip
    assert judge(0, ranks) is None


def test_a_circle_is_proof_and_a_chain_is_not() -> None:
    """0 waits for 1 in A, 1 for 2 in B, and 2 for 0 in C, or computes."""
    keys = ("a/1/0", "b/2/1", "c/3/0")
    pairs = ((0, 1), (1, 2), (0, 2))

    def groups(rank: int) -> dict[str, Progress]:
        own = keys[rank]
        return {k: Progress(p, 5 if k == own else 4) for k, p in zip(keys, pairs) if rank in p}

    def waits(rank: int, waited_s: float = 6.0) -> Record:
        return waiting(rank, 5, waited_s, key=keys[rank], groups=groups(rank))

    circle = judge(0, seen(waits(0), waits(1), waits(2)))
    assert circle
    assert circle.kind == "circle"
    assert "rank 0 in all-reduce 5" in circle.text
    assert "rank 2 in all-reduce 5" in circle.text
    assert judge(0, seen(waits(0), waits(1), record(2, 0, groups=groups(2)))) is None
    assert judge(0, seen(waits(0), waits(1), waits(2, 0.5))) is None  # has just come there
    stream = waits(2)
    assert stream.wait
    stream = replace(stream, wait=replace(stream.wait, blocked=False))
    assert judge(0, seen(waits(0), waits(1), stream)) is None  # it may still go on


def test_records_travel_as_json_and_what_is_none_is_left_out() -> None:
    made = waiting(1, 812, ended="x")
    assert Record.from_json(made.to_json()) == made
    seeing = replace(made, sees={2: ("T", False)})
    assert Record.from_json(seeing.to_json()) == seeing
    for bad in (b"", b"[]", b"{}", b"\xff", b'{"wait": null, "groups": {}}', b'{"wait": 3, "groups": []}'):  # fmt: skip
        assert Record.from_json(bad) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(VALUES, st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 80))
def test_no_record_whatever_breaks_the_judgement(poison, where: list[int], cut: int) -> None:
    """Torn, of another version, or hostile: it is no record, or one that is judged in one line."""
    made = waiting(2, 812, 99.0, ended=None, idle_s=5.0, sees={1: ("T", False)})
    text = json.dumps(poisoned(json.loads(made.to_json()), poison, where)).encode()
    for odd in (text, text[:-cut] if cut else text):
        record = Record.from_json(odd)
        if record is None:
            continue
        for final in (False, True):
            ranks = seen(waiting(0, 813, 99.0), waiting(1, 812, 99.0), record, silent_s=3.5)
            verdict = judge(0, ranks, final=final)
            assert verdict is None or "\n" not in verdict.line


def poisoned(value, poison, where: list[int]):
    """A copy with something inside replaced; `where` chooses a way down."""
    if not where or not isinstance(value, dict | list) or not value:
        return poison
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[where[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = poisoned(value[key], poison, where[1:])
    return copy
