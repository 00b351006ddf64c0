"""Embeddings whose rows travel by themselves (sync/rows.py): as right as any other, and in step.

Every embedding is a table here, however small. Each rank also trains a plain loop over all ranks'
batches and compares; what a gather brings is NaN until it is waited for.
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
    hold_gathers_back,
    shard,
    take,
    weights,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from unisono.errors import UnisonoError
from unisono.sync import zero
from unisono.sync.digest import sha256
from unisono.sync.rows import Table
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
            x = x * self.embed((ids + 1) % VOCAB).tanh() + self.embed(ids).square()
        return x + self.positions(torch.arange(ids.shape[-1]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kind in ("checkpointed", "reentrant"):
            x = checkpoint(self.looked_up, ids, use_reentrant=self.kind == "reentrant")
        else:
            x = self.looked_up(ids)
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
    zero.TABLE_BYTES, zero.TABLE_SHARE = 0, 1.0


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
    hold_gathers_back()
    found = []
    for mine in (1, 3):
        sync, alone = shard(Text(kind), wire=wire), Alone(Text(kind))
        train(world, sync, alone, range(5), mine)
        digest = assert_equal(sync, alone, 1e-5 if wire == "float32" else 2e-2)
        found.append((digest, tables_of(sync)))
    return found


KINDS = ["tied", "untied", "padded", "twice", "beside"]


def each_kind_trained(world, wire: str) -> list[list]:
    return [trained(world, kind, wire) for kind in KINDS]


@pytest.mark.parametrize(("size", "wire"), [(2, "float32"), (3, "float32"), (4, "float32"), (3, "bfloat16")])  # fmt: skip
def test_rows_equal_a_plain_loop(size: int, wire: str) -> None:
    results = run_ranks(each_kind_trained, size, wire)
    assert all(r == results[0] for r in results), "replicas differ"
    for kind, found in zip(KINDS, results[0], strict=True):
        for _, tables in found:
            assert tables.keys() == {"embed.weight", "positions.weight", "segments.weight"}
            assert kind == "beside" or tables["embed.weight"] == (kind == "tied")


@pytest.mark.parametrize("kind", ["checkpointed", "reentrant"])
def test_lookups_in_checkpointed_segments(kind: str) -> None:
    """What is recomputed must look up what the forward pass did; such embeddings are no tables."""
    for found in run_ranks(trained, 2, kind, "float32"):
        assert all(tables == {} for _, tables in found)


def a_missing_fetch(world) -> bool:
    """The control of the above: rows that come from this replica's old copy are noticed."""
    tables_on()
    hold_gathers_back()
    Table.fetch = lambda self, ids: (setattr(self, "stale", False), self.shard.weights.view(-1, self.dim)[ids].detach())[1]  # fmt: skip
    sync, alone = shard(Text("untied")), Alone(Text("untied"))
    train(world, sync, alone, range(1), 1)
    with sync.micro_batch():
        return bool(text_loss(sync.model, words(1, world.rank)).isnan())


def test_a_missing_fetch_is_noticed() -> None:
    assert run_ranks(a_missing_fetch, 2) == [True, True]


# --- ranks that do not ask, or ask in another order


def empty(step: int, rank: int, k: int) -> torch.Tensor:
    return words(step, rank, k)[:, :0] if rank == step % 2 and step else words(step, rank, k)


def empty_batches(world) -> str:
    tables_on()
    hold_gathers_back()
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
    hold_gathers_back()
    sync, alone = shard(Several()), Alone(Several())
    for step in range(6):

        def loss(model: nn.Module, r: int, k: int, step: int = step) -> torch.Tensor:
            return model(words(step, r, k), ORDERS[(step + 2 * r + k) % len(ORDERS) if step else 0])

        take(sync, [lambda k=k: loss(sync.model, world.rank, k) for k in range(2)])
        alone.step([lambda r=r, k=k: loss(alone.model, r, k) for r in range(world.size) for k in range(2)])  # fmt: skip
    assert list(tables_of(sync)) == [f"tables.{k}.weight" for k in (2, 0, 1)], "as first looked up"
    return assert_equal(sync, alone)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_tables_in_an_order_of_each_rank(size: int) -> None:
    assert len(set(run_ranks(several, size, timeout=60))) == 1


def given_up(world, kind: str, first: int) -> str:
    """Rank 1 fails somewhere in every other step; the others are not left waiting."""
    tables_on()
    hold_gathers_back()
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
    assert not told or f"embedding of {VOCAB} rows: found row " in told
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


def dense_later(world) -> str:
    tables_on()
    sync = shard(Text("untied"))
    for step in range(2):
        take(sync, [lambda s=step: text_loss(sync.model, words(s, world.rank))])
    try:
        with sync.micro_batch():
            x = F.linear(sync.model.looked_up(words(2, world.rank)), sync.model.embed.weight)
            x.square().sum().backward()
    except UnisonoError as error:
        sync.finish()
        sync.discard()
        return str(error)
    return "no error"


def test_a_table_that_is_used_otherwise_later_is_an_error() -> None:
    for told in run_ranks(dense_later, 2):
        assert told.startswith("embed.weight was only looked up in the first step")
        assert "shard_optimizer: false" in told


def not_finite(world, rank: int) -> tuple[int, str] | None:
    tables_on()
    sync, alone = shard(Text("untied")), Alone(Text("untied"))
    train(world, sync, alone, range(2), 1)
    sync.settle()
    before = sha256(weights(sync.model))

    def loss() -> torch.Tensor:
        ids = words(9, world.rank)
        total = text_loss(sync.model, ids)
        if world.rank == rank:
            total = total + sync.model.segments(ids % 7).sum() * float("nan")
        return total

    with sync.micro_batch():
        loss().backward()
        names = [n for n, g in sync.local_gradients() if not torch.isfinite(g).all()]
        assert names == (["segments.weight"] if world.rank == rank else [])
    sync.finish()
    assert not sync.update(divide_by=4.0, max_norm=1.0, learning_rate=RATE).committed
    found = sync.blame()
    sync.discard()
    assert before == sha256(weights(sync.model))
    train(world, sync, alone, range(3, 5), 1)
    assert_equal(sync, alone)
    return found


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 1)])
def test_rows_that_are_not_finite_are_traced(size: int, rank: int) -> None:
    seen = {b for b in run_ranks(not_finite, size, rank) if b is not None}
    assert seen == {(rank, "segments.weight")}


# --- what travels, and what is kept


def sent(world, wire: str) -> None:
    """The formula of the file: k rows each way, less those that this rank owns itself."""
    tables_on()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 1))
    sync = shard(model, adamw, wire=wire)
    for _ in range(3):
        ids = torch.tensor([[0, 1, 2, 33, 34, 0], [1, 40, 41, 63, 41, 5]])[world.rank % 2]
        before = len(sync.ledger.entries)
        take(sync, [lambda ids=ids: model(ids).square().sum()])
        new = [e for e in list(sync.ledger.entries)[before:] if e.group == "rows"]
    unique = torch.unique(ids)
    others = int((unique // (64 // world.size) != world.rank).sum())
    asked = [torch.unique(torch.tensor(x)) for x in ([0, 1, 2, 33, 34, 0], [1, 40, 41, 63, 41, 5])]
    served = sum(int((a // (64 // world.size) == world.rank).sum()) for r, a in enumerate(asked * 2) if r < world.size and r != world.rank)  # fmt: skip
    value = 4 if wire == "float32" else 2
    counts = 8 * (world.size - 1)
    fetched = [counts, 4 * others, 4 * 16 * served]
    assert [e.sent_bytes for e in new] == [*fetched, counts, 4 * others, value * 16 * others]
    assert not any(
        e.group == "scatter" for e in list(sync.ledger.entries)[before:] if e.sent_bytes > 500
    )


@pytest.mark.parametrize(("size", "wire"), [(2, "float32"), (2, "bfloat16"), (4, "float32")])
def test_bytes_of_rows_are_those_of_the_formula(size: int, wire: str) -> None:
    run_ranks(sent, size, wire)


def kept(world) -> int:
    tables_on()
    sync = shard(Text("untied"))
    take(sync, [lambda: text_loss(sync.model, words(0, world.rank))])
    most = 0
    for k in range(12):
        with sync.micro_batch(last=k == 11):
            text_loss(sync.model, words(1, world.rank, k)).backward()
        held = [x for t in sync._tables.values() for x in t.lookups]
        most = max(most, sum(len(x.ids) for x in held))
    sync.finish()
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
