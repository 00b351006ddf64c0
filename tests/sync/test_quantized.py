"""Codes on the wire (sync: quantized): near to exact, the same bits everywhere, nothing lost on the way.

`Alone` of test_zero.py is what is right. Tables are on, so that every way there is carries codes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_rows import Text, tables_on, text_loss, words
from test_zero import (
    RATE,
    Alone,
    Boom,
    Odd,
    adamw,
    difference,
    plain_sgd,
    rows,
    sgd,
    take,
    tower,
    weights,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from unisono.sync import make_strategy, wire
from unisono.sync import shard as shard_file
from unisono.sync.codec import make_codec
from unisono.sync.digest import sha256
from unisono.sync.ledger import Ledger
from unisono.sync.update import MASTER, OWN
from unisono.sync.zero import Zero

BOTH = ["int8", "int4"]


def quantized(model: nn.Module, wire: str, optimizer: Callable = adamw, **changes: Any) -> Zero:
    options: dict = {"bucket_mb": 0.003, "timeout_s": 60, **changes}
    sync = make_strategy("quantized", model, Ledger(), optimizer=optimizer, wire=wire, **options)
    assert isinstance(sync, Zero)
    return sync


def digest_of(sync: Zero) -> str:
    sync.settle()
    return sha256(dict(sync.replicated()))


def feedback_of(sync: Zero) -> dict[str, torch.Tensor]:
    """Collective: of all replicas."""
    return {k: v.clone() for k, v in sync.optimizer_state() if OWN in k}


# --- near to exact, and equal everywhere


def text_steps(world: Any, sync: Zero, alone: Alone, steps: range, mine: int) -> list[str]:
    """A digest after each."""
    digests = []
    for step in steps:
        take(sync, [lambda k=k, s=step: text_loss(sync.model, words(s, world.rank, k)) for k in range(mine)])  # fmt: skip
        alone.step([lambda r=r, k=k, s=step: text_loss(alone.model, words(s, r, k)) for r in range(world.size) for k in range(mine)])  # fmt: skip
        digests.append(digest_of(sync))
    return digests


def near(world, code: str, kind: str, mine: int, wrong: bool) -> tuple[list[str], float]:
    tables_on()
    if wrong:
        encode = wire.Coded.encode
        wire.Coded.encode = lambda self, rows, *rest: encode(self, rows * 1.5, *rest)
    sync, alone = quantized(Text(kind), code), Alone(Text(kind))
    digests = text_steps(world, sync, alone, range(20), mine)
    assert sync._tables
    return digests, difference(weights(sync.model), weights(alone.model))


NEAR = {"int8": 0.004, "int4": 0.05}
"""Largest relative distance of a parameter after 20 steps that move it by about its own length."""


@pytest.mark.parametrize("code", BOTH)
@pytest.mark.parametrize(
    ("size", "kind", "mine"), [(2, "tied", 1), (3, "untied", 2), (4, "tied", 1), (8, "tied", 1)]
)
def test_near_to_exact_and_equal_after_every_step(
    size: int, kind: str, mine: int, code: str
) -> None:
    found = run_ranks(near, size, code, kind, mine, False, timeout=120)
    assert all(f == found[0] for f in found), "replicas differ"
    assert len(set(found[0][0])) == 20
    assert 0 < found[0][1] <= NEAR[code]


@pytest.mark.parametrize("code", BOTH)
def test_a_wrong_scale_is_noticed(code: str) -> None:
    """The control."""
    assert run_ranks(near, 2, code, "tied", 1, True)[0][1] > NEAR[code]


def odd(world, code: str, optimizer: Callable, mine: int) -> str:
    """Tied, frozen, unused, empty, of other types; unequal numbers of rows."""
    sync, alone = quantized(Odd(), code, optimizer, bucket_mb=0.001), Alone(Odd(), optimizer)
    before = weights(alone.model)
    for step in range(world.size + 2):

        def loss(model: nn.Module, r: int, k: int, step: int = step) -> torch.Tensor:
            return model(rows(step, r, k), r == step and k == 0).square().mean()

        take(sync, [lambda k=k: loss(sync.model, world.rank, k) for k in range(mine)], max_norm=0.0)
        alone.step([lambda r=r, k=k: loss(alone.model, r, k) for r in range(world.size) for k in range(mine)], 1e9)  # fmt: skip
    sync.settle()
    after = weights(sync.model)
    for name in ("never.weight", "frozen.weight", "empty"):
        assert torch.equal(after[name], before[name]), name
    # Of what moves, most of the way is the right one.
    for name in ("inner.weight", "wide.weight", "huge"):
        way, wanted = after[name] - before[name], weights(alone.model)[name] - before[name]
        assert (way - wanted).norm() <= (0.1 if code == "int8" else 0.5) * wanted.norm(), name
    return digest_of(sync)


@pytest.mark.parametrize("code", BOTH)
@pytest.mark.parametrize(("size", "optimizer", "mine"), [(2, adamw, 2), (3, sgd, 1)])
def test_odd_models(size: int, code: str, optimizer: Callable, mine: int) -> None:
    assert len(set(run_ranks(odd, size, code, optimizer, mine))) == 1


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tower()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def recomputed(world, code: str) -> list[str]:
    found = []
    for model in (tower(), Recomputed()):
        sync = quantized(model, code)
        for step in range(4):
            take(sync, [lambda s=step, m=model: m(rows(s, world.rank)).square().sum()])
        sync.settle()
        found.append(sha256({str(k): p.detach() for k, p in enumerate(model.parameters())}))
    return found


@pytest.mark.parametrize("code", BOTH)
def test_gradient_checkpointing_changes_nothing(code: str) -> None:
    plain, checkpointed = run_ranks(recomputed, 2, code)[0]
    assert plain == checkpointed


# --- what is lost on the way


class Pull(nn.Module):
    """Each rank pulls every weight with a force of its own, the same in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(40, 50))


def pulled(world, forgetful: bool) -> float:
    """How far 40 steps of plain SGD end from where they should, in steps of an int4 code."""
    if forgetful:
        shard_file.Shard.step = _forgetting(shard_file.Shard.step)
    g = torch.Generator().manual_seed(0)
    forces = torch.randn(world.size, 40, 50, generator=g)
    sync = quantized(Pull(), "int4", plain_sgd)
    for _ in range(41):
        take(sync, [lambda: (sync.model.weight * forces[world.rank]).sum()], 1.0, max_norm=0.0)
    master = dict(sync.optimizer_state())[f"{MASTER}.weight"]
    wanted = -RATE * 41 * forces.sum(0)
    step = RATE * float(forces.abs().amax()) / 7
    return float((master - wanted).abs().amax()) / step


def _forgetting(original: Callable) -> Callable:
    def step(self, *args) -> None:
        self._leaves = None
        original(self, *args)

    return step


@pytest.mark.parametrize("size", [2, 3])
def test_what_a_gradient_loses_is_sent_later(size: int) -> None:
    """The error of a sum of steps stays that of one step, and grows without feedback."""
    assert run_ranks(pulled, size, False)[0] < 2.0 * (size - 1)
    assert run_ranks(pulled, size, True)[0] > 5.0, "the control"


def given_up(world, code: str) -> tuple[str, str]:
    """Every way to drop a step, and a twin that never tried."""
    tables_on()
    shard_file.CHUNK_BYTES = 256
    sync, twin = quantized(Text("tied"), code), quantized(Text("tied"), code)
    for step in range(4):
        take(sync, [lambda s=step: text_loss(sync.model, words(s, world.rank))])
        take(twin, [lambda s=step: text_loss(twin.model, words(s, world.rank))])
        before = feedback_of(sync)
        assert any(v.any() for v in before.values()) == (step > 0)
        for way in ("after", "backward", "nan"):
            try:
                with sync.micro_batch():
                    loss = text_loss(sync.model, words(50 + step, world.rank))
                    if way == "nan":
                        loss = loss * float("nan" if world.rank == 1 else 1.0)
                    if way == "backward" and world.rank == 1:
                        raise Boom
                    loss.backward()
            except Boom:
                pass
            sync.finish()
            if way == "nan":
                done = sync.update(divide_by=4.0, max_norm=1.0, learning_rate=RATE)
                assert not done.committed
            else:
                sync.discard()
        after = feedback_of(sync)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    return digest_of(sync), digest_of(twin)


@pytest.mark.parametrize("code", BOTH)
@pytest.mark.parametrize("size", [2, 3])
def test_a_step_that_is_given_up_leaves_feedback_as_it_was(size: int, code: str) -> None:
    found = run_ranks(given_up, size, code)
    assert len({d for pair in found for d in pair}) == 1


# --- saved, loaded, laid out anew


def continued(
    world, code: str, saved: Any, steps: range, bucket_mb: float = 0.003
) -> tuple[dict, dict, dict, str]:
    """What a checkpoint holds after `steps`, and what was told on loading."""
    tables_on()
    model, note = Text("tied"), ""
    if saved:
        model.load_state_dict(saved[0])
    sync = quantized(model, code, layout=saved[2] if saved else None, bucket_mb=bucket_mb)
    if saved:
        own = {k: v for k, v in saved[1].items() if OWN in k}
        sync.load_optimizer_state({k: v for k, v in saved[1].items() if k not in own})
        note = sync.load_own_state(own)
        if steps == range(0):
            state = {k: v.clone() for k, v in sync.optimizer_state()}
            return {}, state, {}, note
    for step in steps:
        take(sync, [lambda s=step: text_loss(model, words(s, world.rank))])
    state = {n: t.clone() for n, t in sync.state_dict().items()}
    return state, {k: v.clone() for k, v in sync.optimizer_state()}, sync.layout(), note


@pytest.mark.parametrize("code", BOTH)
@pytest.mark.parametrize("size", [2, 3])
def test_a_resumed_run_has_the_same_bits(size: int, code: str) -> None:
    # The first step lays buckets out as the whole run has them, so that the second half does too.
    whole = run_ranks(continued, size, code, None, range(6))[0]
    half = run_ranks(continued, size, code, None, range(3))[0]
    again = run_ranks(continued, size, code, half, range(3, 6))[0]
    assert [sha256(x) for x in whole[:2]] == [sha256(x) for x in again[:2]]
    assert again[3] == "" and again[2] == whole[2]
    forgot = (half[0], {k: v for k, v in half[1].items() if OWN not in k}, half[2])
    without = run_ranks(continued, size, code, forgot, range(3, 6))[0]
    assert sha256(without[0]) != sha256(whole[0]), "the control"


def total(state: dict) -> dict[str, torch.Tensor]:
    """What all replicas together have yet to send."""
    result: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if OWN in key:
            name = key.partition(".")[2]
            result[name] = result.get(name, torch.zeros_like(value)) + value
    return result


@pytest.mark.parametrize("size", [2, 3, 4])
def test_at_another_number_of_replicas_the_sum_stays(size: int) -> None:
    saved = run_ranks(continued, 3, "int4", None, range(4))[0]
    found = run_ranks(continued, size, "int4", saved, range(0))[0]
    wanted, now = total(saved[1]), total(found[1])
    assert wanted.keys() == now.keys()
    for name in wanted:
        torch.testing.assert_close(now[name], wanted[name], rtol=1e-5, atol=1e-6)
    told = f"error feedback of 3 replicas is divided evenly among {size}"
    assert found[3] == ("" if size == 3 else told)
    run_ranks(continued, size, "int4", saved, range(4, 6))


def laid_out_anew(world, code: str) -> None:
    tables_on()
    sync = quantized(Text("tied"), code)
    for step in range(5):
        take(sync, [lambda s=step: text_loss(sync.model, words(s, world.rank))])
        before = total(feedback_of(sync))
        sync.rebucket([0.0005, 100.0, 0.002, 0.003, 0.001][step])
        after = total(feedback_of(sync))
        assert before.keys() == after.keys() and before
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("code", BOTH)
@pytest.mark.parametrize("size", [2, 3])
def test_other_buckets_keep_the_sum_of_what_is_yet_to_be_sent(size: int, code: str) -> None:
    run_ranks(laid_out_anew, size, code)


def told_on_loading(world, saved: Any) -> list[str]:
    own = {k: v for k, v in saved[1].items() if OWN in k}
    notes = []
    for name, code in (("quantized", "int8"), ("exact", "float32")):
        options = {"shard": True, "wire": code, "layout": saved[2], "bucket_mb": 0.003}
        sync = make_strategy(name, Text("tied"), Ledger(), optimizer=adamw, **options)
        notes.append(sync.load_own_state(own))
    return notes


def test_feedback_that_has_no_place_is_told() -> None:
    saved = run_ranks(continued, 2, "int4", None, range(4))[0]
    int8, exact = run_ranks(told_on_loading, 2, saved)[0]
    assert "left out error feedback of" in int8 and "int8 has none" in int8
    assert "left out what single replicas had of their own (feedback)" in exact


# --- bytes


def bytes_of_a_step(world, code: str, tied: bool, bucket_mb: float) -> None:
    """To the byte: each bucket's rows as the codec says, both ways; a table's rows as int8."""
    tables_on()
    kind = "tied" if tied else "untied"
    sync = quantized(Text(kind), code, bucket_mb=bucket_mb)
    for _ in range(3):
        before = len(sync.ledger.entries)
        take(sync, [lambda: text_loss(sync.model, torch.tensor([[1, 2, 3, 4, 9]]))])
    sync.settle()
    new = list(sync.ledger.entries)[before:]
    sent = {g: sum(e.sent_bytes for e in new if e.group == g) for g in ("scatter", "gather", "sum", "rows")}  # fmt: skip
    others, size_of = world.size - 1, make_codec(code).encoded_bytes
    buckets = [s.layout for s in sync._shards if not s.whole]
    dense = [s.layout for s in sync._shards if s.whole and s.sends_gradients]
    assert len(dense) == tied
    one_way = others * sum(size_of(b.row_length) for b in buckets)
    of_tables = others * sum(size_of(b.row_length) for b in dense)
    assert sent["scatter"] == one_way + of_tables
    assert sent["gather"] == one_way and sent["sum"] == of_tables
    looked_up = {"embed.weight": 5, "positions.weight": 5, "segments.weight": 4}
    assert {sync.names[i] for i in sync._tables} == looked_up.keys()
    wanted = sum(make_codec("int8").encoded_bytes(k * 9) + 4 * k for k in looked_up.values())
    assert sent["rows"] == others * (8 * len(sync._tables) + wanted)


def all_bytes(world) -> None:
    for code in BOTH:
        for tied in (True, False):
            for bucket_mb in (0.0003, 0.003, 1.0):
                bytes_of_a_step(world, code, tied, bucket_mb)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_of_the_formula(size: int) -> None:
    run_ranks(all_bytes, size)
