"""Embeddings whose rows travel by themselves (sync/rows.py): as right as any other, and in step.

Every embedding is a table here, however small. Each rank also trains a plain loop over all ranks'
batches and compares; what tables bring is not usable until it is waited for.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_zero import (
    RATE,
    Alone,
    Boom,
    adamw,
    assert_equal,
    difference,
    hold_gathers_back,
    shard,
    take,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from unisono.errors import UnisonoError
from unisono.sync import make_strategy, zero
from unisono.sync import shard as shard_file
from unisono.sync.digest import sha256
from unisono.sync.ledger import Group, Handle, Ledger
from unisono.sync.update import MASTER
from unisono.sync.zero import Zero

VOCAB, DIM = 41, 9


class Text(nn.Module):
    """A little of a language model; `kind` says what its embedding is used for besides."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.embed = nn.Embedding(VOCAB, DIM, padding_idx=3 if kind == "padded" else None)
        self.positions = nn.Embedding(50, DIM)
        self.segments = nn.Embedding(7, DIM)  # fewer rows than fill each rank's part
        self.inner = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        if kind == "tied":
            self.head.weight = self.embed.weight

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.segments(ids % 7) + self.embed(ids)
        if self.kind == "twice":
            x = x * self.embed(((ids + 1) % VOCAB).int()).tanh() + self.embed(ids).square()
        return x + self.positions(torch.arange(ids.shape[-1]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kind == "asked":  # for what is no use of it
            assert self.embed.weight.requires_grad and self.embed.weight.dtype == torch.float32
            assert (
                self.embed.weight.shape == (VOCAB, DIM) and self.embed.weight.device.type == "cpu"
            )
        if self.kind == "hooked" and not self.embed.weight._backward_hooks:
            self.embed.weight.register_hook(lambda g: g * (torch.arange(VOCAB) % 2)[:, None])
        if self.kind in ("checkpointed", "reentrant"):
            x = checkpoint(self.looked_up, ids, use_reentrant=self.kind == "reentrant")
        else:
            x = self.looked_up(ids)
        if self.kind == "partly":
            x = x + checkpoint(self.embed, (ids + 2) % VOCAB, use_reentrant=False)
        if self.kind == "beside":
            with torch.no_grad():
                x = x + self.embed((ids + 5) % VOCAB).mean()
        return self.head(torch.tanh(self.inner(x)))


def words(step: int, rank: int, k: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * step + 10 * rank + k)
    return torch.randint(VOCAB, (2, 3 + (step + rank + k) % 3), generator=g)


def text_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum")


def tables_on() -> None:
    zero.TABLE_BYTES, zero.TABLE_SHARE = 0, 1e9


def small_chunks() -> None:
    """Whatever travels does so in many pieces."""
    shard_file.CHUNK_BYTES = 64


def hold_back() -> None:
    """What is gathered is NaN, and row numbers are none, until it is waited for."""
    hold_gathers_back()
    all_gather = Group.all_gather

    class Late(Handle):
        def __init__(self, real: Handle, target: torch.Tensor, arrived: torch.Tensor) -> None:
            self._real, self._target, self._arrived = real, target, arrived
            target.fill_(float("nan") if target.is_floating_point() else -1)

        def done(self) -> bool:
            return self._real.done()

        def wait(self) -> None:
            self._real.wait()
            self._target.copy_(self._arrived)

    def late_gather(self: Group, whole: torch.Tensor, chunk: torch.Tensor) -> Handle:
        if self.name not in ("sum", "rows"):
            return all_gather(self, whole, chunk)
        arrived = torch.empty_like(whole)
        return Late(all_gather(self, arrived, chunk), whole, arrived)

    Group.all_gather = late_gather


def train(
    world, sync: Zero, alone: Alone, steps: range, mine: int, batch: Callable = words
) -> None:
    for step in steps:
        take(sync, [lambda k=k, s=step: text_loss(sync.model, batch(s, world.rank, k)) for k in range(mine)])  # fmt: skip
        alone.step([lambda r=r, k=k, s=step: text_loss(alone.model, batch(s, r, k)) for r in range(world.size) for k in range(mine)])  # fmt: skip


def tables_of(sync: Zero) -> dict[str, bool]:
    """Which parameters travel by rows; whether densely too."""
    return {sync.names[i]: t.shard.sends_gradients for i, t in sync._tables.items()}


def trained(world, kind: str, wire: str) -> list:
    tables_on()
    hold_back()
    found = []
    for mine in (1, 3):
        sync, alone = shard(Text(kind), wire=wire), Alone(Text(kind))
        train(world, sync, alone, range(5), mine)
        assert_equal(sync, alone, 1e-5 if wire == "float32" else 2e-2)
        found.append((sha256(dict(sync.replicated())), tables_of(sync)))
        small_chunks()
    return found


KINDS = ["tied", "untied", "padded", "twice", "beside", "partly", "hooked", "asked"]


def each_kind_trained(world, wire: str) -> list[list]:
    return [trained(world, kind, wire) for kind in KINDS]


@pytest.mark.parametrize(("size", "wire"), [(2, "float32"), (3, "float32"), (3, "bfloat16"), (3, "int8")])  # fmt: skip
def test_rows_equal_a_plain_loop(size: int, wire: str) -> None:
    results = run_ranks(each_kind_trained, size, wire)
    assert all(r == results[0] for r in results), "replicas differ"
    for kind, found in zip(KINDS, results[0], strict=True):
        for _, tables in found:
            assert tables.keys() ^ {"positions.weight", "segments.weight"} == (
                set() if kind == "hooked" else {"embed.weight"}
            )
            assert tables.get("embed.weight", False) == (kind in ("tied", "beside", "partly"))
            assert not tables["positions.weight"] and not tables["segments.weight"]


@pytest.mark.parametrize("kind", ["checkpointed", "reentrant"])
def test_lookups_in_checkpointed_segments(kind: str) -> None:
    """What is recomputed must look up what the forward pass did; such embeddings are no tables."""
    for found in run_ranks(trained, 2, kind, "float32"):
        assert all(tables == {} for _, tables in found)


def a_missing_wait(world, where: str) -> bool:
    """Returns whether a step whose sums are not waited for is noticed."""
    tables_on()
    hold_back()
    sync = shard(Text("tied"))
    take(sync, [lambda: text_loss(sync.model, words(0, world.rank))])
    all_gather = Group.all_gather

    def no_wait(self: Group, whole: torch.Tensor, chunk: torch.Tensor) -> Handle:
        handle = all_gather(self, whole, chunk)
        if self.name == where and whole.dtype == torch.float32:
            handle.wait = lambda: None
        return handle

    Group.all_gather = no_wait
    return not take(sync, [lambda: text_loss(sync.model, words(1, world.rank))]).committed


@pytest.mark.parametrize("where", ["sum", "rows"])
def test_a_missing_wait_is_noticed(where: str) -> None:
    """The control of the above."""
    assert run_ranks(a_missing_wait, 2, where) == [True, True]


def dense_only(world) -> str:
    sync, alone = shard(Text("tied"), tables=False), Alone(Text("tied"))
    train(world, sync, alone, range(4), 2)
    assert not tables_of(sync) and not sync.layout()["tables"]
    assert not [e for e in sync.ledger.entries if e.group in ("rows", "sum")]
    assert dict(sync.replicated()).keys() == dict(sync.named).keys()
    return assert_equal(sync, alone)


def tables_switched_off(world) -> str:
    """Also for a run that goes on from a layout with tables."""
    tables_on()
    hold_back()
    first = dense_only(world)
    sync = shard(Text("tied"))
    take(sync, [lambda: text_loss(sync.model, words(0, world.rank))])
    assert tables_of(sync)
    other, alone = shard(Text("tied"), tables=False, layout=sync.layout()), Alone(Text("tied"))
    train(world, other, alone, range(3), 1)
    assert not tables_of(other)
    return first + assert_equal(other, alone)


def test_without_tables_all_is_right_too() -> None:
    assert len(set(run_ranks(tables_switched_off, 3))) == 1


# --- ranks that do not ask, or ask in another order


def empty(step: int, rank: int, k: int) -> torch.Tensor:
    return words(step, rank, k)[:, :0] if rank == step % 2 and step else words(step, rank, k)


def empty_batches(world) -> str:
    tables_on()
    hold_back()
    sync, alone = shard(Text("tied")), Alone(Text("tied"))
    train(world, sync, alone, range(5), 2, empty)
    return assert_equal(sync, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_an_empty_batch_on_one_rank(size: int) -> None:
    assert len(set(run_ranks(empty_batches, size))) == 1


class Several(nn.Module):
    """Tables of different widths, looked up in an order that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.tables = nn.ModuleList(nn.Embedding(10 + 15 * k, 3 + 2 * k) for k in range(3))
        self.outs = nn.ModuleList(nn.Linear(3 + 2 * k, 2) for k in range(3))

    def forward(self, ids: torch.Tensor, order: list[int]) -> torch.Tensor:
        total = self.outs[0].bias.sum() * 0.0
        for k in order:
            x = self.tables[k](ids % (10 + 15 * k))
            total = total + torch.tanh(self.outs[k](x)).square().sum() * (k + 1)
        return total


ORDERS = [[2, 0, 1], [0, 1, 2], [1, 2], [], [2, 1, 0], [0], [1, 1, 0, 2]]


def several(world) -> str:
    tables_on()
    hold_back()
    small_chunks()
    sync, alone = shard(Several()), Alone(Several())
    for step in range(6):

        def loss(model: nn.Module, r: int, k: int, step: int = step) -> torch.Tensor:
            return model(words(step, r, k), ORDERS[(step + 2 * r + k) % len(ORDERS) if step else 0])

        take(sync, [lambda k=k: loss(sync.model, world.rank, k) for k in range(2)])
        alone.step([lambda r=r, k=k: loss(alone.model, r, k) for r in range(world.size) for k in range(2)])  # fmt: skip
    assert list(tables_of(sync)) == [f"tables.{k}.weight" for k in range(3)], "on every rank alike"
    return assert_equal(sync, alone)


@pytest.mark.parametrize("size", [2, 4])
def test_several_tables_in_an_order_of_each_rank(size: int) -> None:
    assert len(set(run_ranks(several, size, timeout=60))) == 1


def given_up(world, kind: str, first: int) -> str:
    """Rank 1 fails somewhere in every other step; the others are not left waiting."""
    tables_on()
    hold_back()
    small_chunks()
    sync, alone = shard(Text(kind)), Alone(Text(kind))

    def fail(_: torch.Tensor) -> None:
        raise Boom

    places = [(k, p) for k in (0, 1) for p in ("data", "row", "middle", "backward")]
    step, told = 0, ""
    while places:
        failing = places.pop() if step >= first and (step - first) % 2 == 0 else None
        mine = failing if world.rank == 1 else None
        try:
            for k in range(2):
                with sync.micro_batch(last=k == 1):
                    ids = words(step, world.rank, k)
                    if mine == (k, "data"):
                        raise Boom
                    if mine == (k, "row"):
                        ids[1, 2] = VOCAB + step
                    hooks = []
                    if mine == (k, "middle"):
                        hooks.append(sync.model.inner.register_forward_hook(lambda *_: fail(_)))
                    if mine == (k, "backward"):
                        hooks.append(sync.model.inner.weight.register_hook(fail))
                    try:
                        text_loss(sync.model, ids).backward()
                    finally:
                        for hook in hooks:
                            hook.remove()
        except (Boom, IndexError) as error:
            assert mine
            told = told or (str(error) if mine[1] == "row" and sync._tables else "")
        [failures] = sync.finish(float(bool(mine)))
        assert failures == float(bool(failing))
        if failing:
            sync.discard()
        else:
            sync.update(divide_by=4.0, max_norm=1.0, learning_rate=RATE)
            alone.step([lambda r=r, k=k, s=step: text_loss(alone.model, words(s, r, k)) for r in range(world.size) for k in range(2)])  # fmt: skip
        step += 1
    assert bool(told) == (world.rank == 1)
    assert not told or "out of range" in told
    return assert_equal(sync, alone)


@pytest.mark.parametrize(("size", "kind", "first"), [(2, "tied", 1), (3, "untied", 1), (2, "tied", 0), (3, "tied", 0)])  # fmt: skip
def test_steps_given_up_anywhere_leave_nobody_waiting(size: int, kind: str, first: int) -> None:
    assert len(set(run_ranks(given_up, size, kind, first, timeout=60))) == 1


def first_fails_everywhere(world) -> str:
    """All ranks run out of memory before the output layer: that teaches nothing about it."""
    tables_on()
    sync, alone = shard(Text("tied")), Alone(Text("tied"))
    try:
        with sync.micro_batch():
            sync.model.inner(sync.model.looked_up(words(0, world.rank)))
            raise Boom
    except Boom:
        sync.finish()
        sync.discard()
    train(world, sync, alone, range(3), 2)
    assert tables_of(sync)["embed.weight"]
    return assert_equal(sync, alone)


def test_a_first_step_that_failed_teaches_nothing() -> None:
    assert len(set(run_ranks(first_fails_everywhere, 2))) == 1


def dense_later(world, at: int) -> str:
    """In micro-batch `at` of two."""
    tables_on()
    sync = shard(Text("untied"))
    for step in range(2):
        take(sync, [lambda s=step: text_loss(sync.model, words(s, world.rank))])
    told = "no error"
    try:
        for k in range(2):
            with sync.micro_batch(last=k == 1):
                x = sync.model.looked_up(words(2, world.rank, k))
                if k == at:
                    x = F.linear(x, sync.model.embed.weight)
                x.square().sum().backward()
    except UnisonoError as error:
        told = str(error)
    sync.finish()
    sync.discard()
    take(sync, [lambda: text_loss(sync.model, words(3, world.rank))])
    return told


@pytest.mark.parametrize("at", [0, 1])
def test_a_table_that_is_used_otherwise_later_is_an_error(at: int) -> None:
    for told in run_ranks(dense_later, 2, at):
        assert told.startswith("embed.weight was only looked up in the first step")
        assert "shard_optimizer: true" in told


def looked_up_late(world) -> tuple[str, str]:
    """Two backward passes in the last micro-batch; the rows were told to all in the first."""
    tables_on()
    sync = shard(Text("untied"))
    take(sync, [lambda: text_loss(sync.model, words(0, world.rank))])
    told = []
    for _ in range(2):
        before = sha256(dict(sync.replicated()))
        try:
            with sync.micro_batch(last=True):
                text_loss(sync.model, words(1, world.rank)).backward()
                sync.model.looked_up(words(2, world.rank)).square().sum().backward()
            told.append("no error")
        except UnisonoError as error:
            told.append(str(error))
        sync.finish()
        sync.discard()
        assert before == sha256(dict(sync.replicated()))
    take(sync, [lambda: text_loss(sync.model, words(3, world.rank))])
    return told[0], told[1]


def test_a_lookup_after_the_rows_were_told_is_refused() -> None:
    for told in run_ranks(looked_up_late, 2):
        for text in told:
            assert "several backward passes in one" in text, text


def half_precision_weights(world) -> set[float]:
    """Sums of rows to which rank 0 adds 1 and the others what bfloat16 loses beside it."""
    tables_on()
    model = nn.Sequential(nn.Embedding(VOCAB, DIM), nn.Linear(DIM, 1)).bfloat16()
    sync = shard(model)
    ids = torch.arange(0, VOCAB, 3)
    take(sync, [lambda: model(ids).sum()])
    with sync.micro_batch(last=True):
        scale = 1.0 if world.rank == 0 else 2.0**-9
        (model[0](ids).sum() * scale + 0 * model[1].weight.sum()).backward()
    sync.finish()
    [table] = sync._tables.values()
    return set(table.shard.whole_sum()[ids].flatten().tolist())


def test_rows_of_half_precision_weights_are_rounded_once() -> None:
    # 1 + 3 / 512 is next to 1 + 4 / 512; one after the other, each 1 / 512 would be lost.
    assert run_ranks(half_precision_weights, 4) == [{1 + 2.0**-7}] * 4


def not_finite(world, rank: int, name: str) -> tuple[int, str] | None:
    tables_on()
    hold_back()
    sync, alone = shard(Text("tied")), Alone(Text("tied"))
    train(world, sync, alone, range(2), 1)
    sync.settle()
    before = sha256(dict(sync.replicated()))

    def loss() -> torch.Tensor:
        ids = words(9, world.rank)
        total = text_loss(sync.model, ids)
        if world.rank == rank and name == "segments.weight":
            total = total + sync.model.segments(ids % 7).sum() * float("nan")
        elif world.rank == rank:
            total = total + sync.model.head.weight.sum() * float("nan")
        return total

    with sync.micro_batch():
        loss().backward()
        names = {n for n, g in sync.local_gradients() if not torch.isfinite(g).all()}
        if name == "segments.weight":  # the dense half may have left
            assert names == ({name} if world.rank == rank else set())
    sync.finish()
    assert not sync.update(divide_by=4.0, max_norm=1.0, learning_rate=RATE).committed
    found = sync.blame()
    assert before == sha256(dict(sync.replicated()))
    train(world, sync, alone, range(3, 5), 1)
    assert_equal(sync, alone)
    return found


@pytest.mark.parametrize(
    ("size", "rank", "name"),
    [(2, 0, "segments.weight"), (3, 1, "segments.weight"), (2, 1, "embed.weight"), (3, 2, "embed.weight")],
)  # fmt: skip
def test_sums_that_are_not_finite_are_traced(size: int, rank: int, name: str) -> None:
    seen = {b for b in run_ranks(not_finite, size, rank, name) if b is not None}
    assert seen == {(rank, name)}


# --- what travels, and what is kept


class Lookup(nn.Module):
    """A table of 64 rows of 16 values, and perhaps an output layer that is tied to it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.tied = nn.Embedding(64, 16), nn.Linear(16, 16), tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.embed(ids))
        return F.linear(x, self.embed.weight) if self.tied else x


def sent(world, wire: str, tied: bool) -> None:
    """The formula of the file, for 5 rows on even ranks and 4 on odd ones."""
    tables_on()
    hold_back()
    sync = shard(Lookup(tied), wire=wire)
    ids = torch.tensor([[0, 1, 2, 33, 34, 0], [1, 40, 41, 63, 41, 1]])[world.rank % 2]
    for _ in range(3):
        before = len(sync.ledger.entries)
        take(sync, [lambda: sync.model(ids).square().sum()])
    new = list(sync.ledger.entries)[before:]

    def bytes_of(group: str) -> list[int]:
        return [e.sent_bytes for e in new if e.group == group]

    value, others = 4 if wire == "float32" else 2, world.size - 1
    assert bytes_of("rows") == [8 * others, 4 * 5 * others, value * 5 * 16 * others]
    dense = [value * 64 * 16 * others // world.size] if tied else []
    assert bytes_of("sum") == dense
    inner = [b for b in bytes_of("scatter") if b not in dense]
    assert len(inner) == len(bytes_of("scatter")) - len(dense)
    assert sorted(inner) == sorted(bytes_of("gather")), (
        "of the table nothing is sent in the forward pass"
    )
    assert len(bytes_of("control")) == 1 and len(new) == 4 + 2 * len(dense) + 2 * len(inner)


def every_count_of_bytes(world) -> None:
    for wire in ("float32", "bfloat16"):
        for tied in (False, True):
            sent(world, wire, tied)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_the_formula(size: int) -> None:
    run_ranks(every_count_of_bytes, size)


def is_table(world, rows: int, nbytes: int) -> bool:
    """Whether rank 0's `rows` of 64 make a table; the others touch fewer."""
    zero.TABLE_BYTES = nbytes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 4), nn.Linear(4, 2))
    sync = shard(model)
    ids = torch.arange(2 if world.rank else rows).repeat(2)
    take(sync, [lambda: model(ids).square().sum()])
    found = tables_of(sync).keys() == {"0.weight"}
    sync.close()
    return found


def limits(world) -> list[bool]:
    most = 16 // (world.size - 1)  # a quarter of the table
    cases = [(most, 1024), (most + 1, 1024), (most, 1025), (0, 1024)]
    return [is_table(world, *case) for case in cases]


@pytest.mark.parametrize("size", [2, 3])
def test_few_rows_of_a_large_embedding_make_a_table(size: int) -> None:
    """Which is what every rank receives: the rows of all others."""
    assert run_ranks(limits, size) == [[True, False, False, True]] * size


def kept(world) -> int:
    tables_on()
    sync = shard(Text("untied"))
    take(sync, [lambda: text_loss(sync.model, words(0, world.rank))])
    most = 0
    for k in range(12):
        with sync.micro_batch(last=k == 11):
            text_loss(sync.model, words(1, world.rank, k)).backward()
        assert all(len(t.lookups) == 1 for t in sync._tables.values())
        held = [x for t in sync._tables.values() for x in t.lookups]
        most = max(most, sum(len(x.ids) for x in held))
    sync.finish()
    assert not any(t.lookups for t in sync._tables.values())
    return most


def test_accumulation_keeps_each_row_once() -> None:
    assert max(run_ranks(kept, 2)) <= VOCAB + 50 + 7


def resumed(world, layout: Any, steps: range, state: Any) -> Any:
    tables_on()
    model = Text("tied")
    if state:
        model.load_state_dict(state[0])
    sync = shard(model, layout=layout, bucket_mb=0.0005)
    if state:
        sync.load_optimizer_state(state[1])
    for step in steps:
        take(sync, [lambda s=step: text_loss(model, words(s, world.rank))])
        if step == 1:
            sync.rebucket(0.0005)
    saved = {n: t.clone() for n, t in sync.state_dict().items()}
    return saved, {k: v.clone() for k, v in sync.optimizer_state()}, sync.layout()


def test_the_layout_of_tables_is_resumed_bit_for_bit() -> None:
    whole = run_ranks(resumed, 2, None, range(6), None)[0]
    half = run_ranks(resumed, 2, None, range(3), None)[0]
    again = run_ranks(resumed, 2, half[2], range(3, 6), half)[0]
    assert half[2]["tables"] and half[2]["dense"]
    assert [sha256(x) for x in whole[:2]] == [sha256(x) for x in again[:2]]


# --- the optimizer's state


def states(world, wire: str) -> str:
    """Whole on every rank, once, and it stays when buckets change."""
    tables_on()
    hold_back()
    sync, alone = shard(Text("tied"), wire=wire), Alone(Text("tied"))
    for step in range(4):
        train(world, sync, alone, range(step, step + 1), 2)
        keys = [k for k, _ in sync.optimizer_state()]
        assert len(keys) == len(set(keys))
        before = sha256(dict(sync.replicated()))
        everything = sha256({k: v.clone() for k, v in sync.optimizer_state()})
        sync.rebucket([0.0001, 100.0, 1e-5, 0.002][step])
        assert sha256(dict(sync.replicated())) == before
        assert sha256({k: v.clone() for k, v in sync.optimizer_state()}) == everything
    assert len(tables_of(sync)) == 3
    found = {k: v.clone() for k, v in sync.optimizer_state()}
    wanted = {
        f"{key}.{name}": value
        for name, p in alone.named
        for key, value in alone.optimizer.state[p].items()
    }
    masters = {k for k in found if k.startswith(f"{MASTER}.")}
    rounded = {f"{MASTER}.{n}" for n, _ in sync.named if n not in tables_of(sync)}
    assert masters == (set() if wire == "float32" else rounded)
    ours = {k: v for k, v in found.items() if k not in masters}
    assert difference(ours, wanted) <= (1e-4 if wire == "float32" else 3e-2)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in wanted.items()}
    whole = {k for k in wanted if k.partition(".")[2] in tables_of(sync)}
    replicated = [k for k, _ in sync.replicated()]
    assert sorted(replicated) == sorted([*(n for n, _ in sync.named), *whole])
    assert_equal(sync, alone, 1e-5 if wire == "float32" else 2e-2)
    return sha256(dict(sync.replicated())) + sha256(found)


@pytest.mark.parametrize(("size", "wire"), [(2, "float32"), (3, "bfloat16")])
def test_the_state_of_tables_is_replicated_and_saved_once(size: int, wire: str) -> None:
    assert len(set(run_ranks(states, size, wire))) == 1


VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"shard": False},
    "tables": {},
    "bfloat16": {"wire": "bfloat16"},
    "no tables": {"tables": False},
    "bfloat16, no tables": {"wire": "bfloat16", "tables": False},
}


def continued(world, variant: str, saved: Any, steps: range, resume: bool = False) -> Any:
    """`steps` of global batches of 12, the same at any size; what a checkpoint would hold."""
    model = Text("tied")
    options = {"shard": True, "layout": saved[2] if saved and resume else None, **VARIANTS[variant]}
    if saved:
        model.load_state_dict(saved[0])
    sync = make_strategy(
        "exact", model, Ledger(), optimizer=adamw, bucket_mb=0.001, timeout_s=60, **options
    )
    if saved:
        sync.load_optimizer_state(saved[1])
        now = {k: v.clone() for k, v in sync.optimizer_state()}
        for key in now.keys() & saved[1].keys():
            assert torch.equal(now[key], saved[1][key]), key
        for key in now.keys() ^ saved[1].keys():
            assert key.startswith(MASTER), key
    for step in steps:
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCAB, (12, 4), generator=g).tensor_split(world.size)[world.rank]
        take(sync, [lambda ids=ids: text_loss(model, ids)], 12.0)
    state = {n: t.clone() for n, t in sync.state_dict().items()}
    return state, {k: v.clone() for k, v in sync.optimizer_state()}, sync.layout()


def all_first_halves(world) -> dict[str, Any]:
    tables_on()
    saved = {v: continued(world, v, None, range(4)) for v in VARIANTS}
    assert saved["tables"][2]["tables"] and not saved["no tables"][2]["tables"]
    return {**saved, "uninterrupted": continued(world, "exact", None, range(8))}


def all_second_halves(world, saved: dict[str, Any]) -> None:
    tables_on()
    wanted = saved["uninterrupted"][0]
    cases = [("tables", v, False) for v in VARIANTS] + [(v, "tables", False) for v in VARIANTS]
    cases += [("tables", "no tables", True), ("no tables", "tables", True), ("bfloat16", "bfloat16", True)]  # fmt: skip
    cases += [("bfloat16", "tables", True), ("tables", "bfloat16", True)]
    for first, second, resume in cases:
        found = continued(world, second, saved[first], range(4, 8), resume)[0]
        limit = 2e-2 if "bfloat16" in first + second else 1e-5
        assert difference(found, wanted) <= limit, (first, second, resume)


def test_saved_with_tables_and_continued_without_and_back() -> None:
    run_ranks(all_second_halves, 3, run_ranks(all_first_halves, 2)[0])
