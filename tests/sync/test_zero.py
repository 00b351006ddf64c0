"""Sharded optimizer (sync/zero.py): equal to a plain loop, never stale, and whole wherever it is asked.

Each rank also trains `Alone`, a plain PyTorch loop over all ranks' batches, and compares.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from unisono.errors import UnisonoError
from unisono.sync import make_strategy
from unisono.sync import shard as shard_file
from unisono.sync.digest import sha256
from unisono.sync.ledger import Group, Handle, Ledger
from unisono.sync.shard import Shard
from unisono.sync.update import MASTER, Update, by_dimension
from unisono.sync.zero import Zero

RATE = 0.02


def adamw(matrices: list, vectors: list) -> torch.optim.Optimizer:
    """`eps` is large, so that a gradient of nearly zero does not decide a step by its sign."""
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, eps=1e-3, fused=True)


def sgd(matrices: list, vectors: list) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=1.0, momentum=0.9)


def plain_sgd(matrices: list, vectors: list) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=1.0)


class Alone:
    """One process and torch's own means: the definition of right."""

    def __init__(self, model: nn.Module, optimizer: Callable = adamw) -> None:
        self.model = model
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.optimizer = optimizer(*by_dimension([p for _, p in self.named]))

    def step(self, losses: list, max_norm: float = 1.0, divide_by: float = 4.0) -> None:
        for loss in losses:
            loss().backward()
        for _, p in self.named:
            if p.grad is not None:
                p.grad /= divide_by
        grads = [p.grad for _, p in self.named if p.grad is not None]
        norm = torch.stack([g.double().norm() for g in grads]).norm()
        if torch.isfinite(norm):
            for g in grads:
                g *= min(1.0, max_norm / (float(norm) + 1e-6))
            for group in self.optimizer.param_groups:
                group["lr"] = RATE
            self.optimizer.step()
        self.model.zero_grad()


def shard(model: nn.Module, optimizer: Callable = adamw, **changes: Any) -> Zero:
    options: dict = {"bucket_mb": 0.001, "timeout_s": 60, "shard": True, **changes}
    sync = make_strategy("exact", model, Ledger(), optimizer=optimizer, **options)
    assert isinstance(sync, Zero)
    return sync


def take(sync: Any, losses: list, divide_by: float = 4.0, max_norm: float = 1.0) -> Update:
    for k, loss in enumerate(losses):
        with sync.micro_batch(last=k == len(losses) - 1):
            loss().backward()
    sync.finish()
    return sync.update(divide_by=divide_by, max_norm=max_norm, learning_rate=RATE)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def difference(a: dict, b: dict) -> float:
    """Largest relative difference of a tensor, in the L2 norm."""
    assert a.keys() == b.keys()
    worst = [
        float((a[n] - b[n]).double().norm() / b[n].double().norm().clamp_min(1e-12)) for n in b
    ]
    return max(worst) if all(w == w for w in worst) else float("nan")


def assert_equal(sync: Zero, alone: Alone, tolerance: float = 1e-5, half: float = 2e-2) -> str:
    sync.settle()
    found, wanted = weights(sync.model), weights(alone.model)
    for name in wanted:
        limit = half if wanted[name].dtype == torch.bfloat16 else tolerance
        assert difference({name: found[name]}, {name: wanted[name]}) <= limit, name
    return sha256(found)


def tower(seed: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)]
    return nn.Sequential(*layers).to(dtype)


def rows(step: int, rank: int, k: int = 0) -> torch.Tensor:
    """Ragged: every rank and micro-batch has another number of rows."""
    g = torch.Generator().manual_seed(1000 * step + 10 * rank + k)
    return torch.randn(1 + (step + 2 * rank + k) % 5, 6, generator=g)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def both(
    world: Any, sync: Zero, alone: Alone, steps: range, mine: int = 1, loss: Callable = loss_of
) -> None:
    """The same steps by both."""
    for step in steps:
        take(
            sync,
            [lambda k=k, s=step: loss(sync.model, rows(s, world.rank, k)) for k in range(mine)],
        )
        alone.step(
            [
                lambda r=r, k=k, s=step: loss(alone.model, rows(s, r, k))
                for r in range(world.size)
                for k in range(mine)
            ]
        )


# --- which parameters take part


class Odd(nn.Module):
    """Tied, frozen, rarely and never used, scalar, empty, of every type, huge and tiny."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.rare = nn.Linear(6, 6)
        self.never = nn.Linear(2, 2)
        self.scale = Parameter(torch.tensor(0.7))
        self.empty = Parameter(torch.empty(0, 4))
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.bf16 = nn.Linear(6, 6).to(torch.bfloat16)
        self.none = Parameter(torch.empty(0, dtype=torch.float16))
        self.wide = nn.Linear(6, 6).double()
        self.huge = Parameter(torch.randn(20_001) / 100)
        self.tiny = nn.ParameterList(Parameter(torch.randn(1 + k % 3)) for k in range(40))

    def forward(self, x: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.tied(torch.tanh(self.frozen(self.inner(x)))) * self.scale + self.empty.sum()
        x = x + self.conv(x.view(-1, 2, 1, 3).repeat(1, 1, 2, 1)).flatten(1).mean(1, keepdim=True)
        x = x + self.wide(x.double()).float()
        x = x + (self.huge * x.mean()).square().sum() / 10 + self.none.sum()
        x = x + sum((t * x.mean() * k).sum().square() for k, t in enumerate(self.tiny)) / 1e3
        # Apart from the others, which its rounding would reach.
        y = self.bf16(x.detach().bfloat16()).float()
        return torch.cat([self.rare(x) if rare else x, y], 1)


def odd_model(world, optimizer: Callable, mine: int) -> str:
    """In step s only rank s (if there is one) uses `rare`; nobody ever uses `never`."""
    sync, alone = shard(Odd(), optimizer), Alone(Odd(), optimizer)
    before = weights(alone.model)
    for step in range(world.size + 2):

        def loss(model: nn.Module, r: int, k: int, step: int = step) -> torch.Tensor:
            return model(rows(step, r, k), r == step and k == 0).square().mean()

        take(sync, [lambda k=k: loss(sync.model, world.rank, k) for k in range(mine)], max_norm=0.0)
        alone.step([lambda r=r, k=k: loss(alone.model, r, k) for r in range(world.size) for k in range(mine)], 1e9)  # fmt: skip
    digest = assert_equal(sync, alone)
    after = weights(sync.model)
    for name in ("inner.weight", "conv.weight", "bf16.weight", "wide.weight", "huge", "scale"):
        assert not torch.equal(after[name], before[name]), name
    for name in ("never.weight", "frozen.weight"):
        assert torch.equal(after[name], before[name]), name
    assert sync.model.tied.weight is sync.model.inner.weight
    return digest


def odd_models(world) -> list[str]:
    return [odd_model(world, o, m) for o in (adamw, sgd) for m in (1, 2)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_odd_models_equal_a_plain_loop(size: int) -> None:
    digests = run_ranks(odd_models, size)
    assert all(d == digests[0] for d in digests), "replicas differ"


# --- weights are waited for, whoever uses them


def none_of(target: torch.Tensor) -> float:
    """In codes the bytes of a scale that is NaN."""
    return float("nan") if target.is_floating_point() else 255


def hold_gathers_back() -> None:
    """What a gather brings is NaN until it is waited for."""

    class Late(Handle):
        def __init__(self, real: Handle, target: torch.Tensor, arrived: torch.Tensor) -> None:
            self._real, self._target, self._arrived = real, target, arrived
            target.fill_(none_of(target))

        def done(self) -> bool:
            return False

        def wait(self) -> None:
            self._real.wait()
            self._target.copy_(self._arrived)

    exchange, all_gather = Group.exchange, Group.all_gather

    def late_exchange(self: Group, received: torch.Tensor, sent: torch.Tensor) -> Handle:
        if self.name != "gather":
            return exchange(self, received, sent)
        arrived = torch.empty_like(received)
        return Late(exchange(self, arrived, sent), received, arrived)

    def late_gather(self: Group, whole: torch.Tensor, chunk: torch.Tensor) -> Handle:
        if self.name != "gather":
            return all_gather(self, whole, chunk)
        arrived = torch.empty_like(whole).view(self.size, -1)
        handle = all_gather(self, arrived, chunk)
        others = [r for r in range(self.size) if r != self.rank]
        table = whole.view(self.size, -1)

        class LateRows(Late):
            def __init__(self) -> None:
                table[others] = none_of(table)

            def wait(self) -> None:
                handle.wait()
                table.copy_(arrived)

        return LateRows()

    Group.exchange, Group.all_gather = late_exchange, late_gather


class Special(Parameter):
    """A class of one's own."""


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


class Elsewhere(nn.Module):
    """Weights that are used by another module than their owner, in every way that torch has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.other = nn.Linear(6, 6, bias=False)
        self.keyword = nn.Linear(6, 6)
        self.a, self.b = Parameter(torch.randn(3, 6) / 3), Parameter(torch.randn(3, 6) / 3)
        self.pieces = nn.ParameterList(Parameter(torch.randn(2, 6) / 3) for _ in range(3))
        self.by_name = nn.ParameterDict({"x": Parameter(torch.randn(6))})
        self.matrix, self.transposed = Parameter(torch.eye(6)), Parameter(torch.eye(6))
        self.function = Parameter(torch.randn(6, 6) / 3)
        self.special = Special(torch.randn(6, 6) / 3)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x[None], x[None], x[None], need_weights=True)[0][0]
        x = x + F.linear(x, self.other.weight) + F.linear(input=x, weight=self.keyword.weight)
        x = x + F.linear(x, torch.cat([self.a, self.b])) + F.linear(x, torch.cat(tensors=tuple(self.pieces)))  # fmt: skip
        x = x * self.by_name["x"].sigmoid() + x @ self.matrix + (self.transposed.T @ x.T).T
        x = x + Product.apply(x, self.function) + F.linear(x, self.special) * self.special[0, 0]
        x = x + self.lstm(x[None])[0][0] + self.norm(x)
        x = x + torch.einsum("bi,oi->bo", [x, self.other.weight]) + self.keyword.bias.detach()
        return self.out(torch.tanh(x))


def used_elsewhere(world, blind: bool, wire: str) -> bool:
    """Returns whether NaN was seen; `blind`: nothing waits."""
    hold_gathers_back()
    # Each parameter has a bucket of its own, or others would be waited for in its place.
    sync, alone = shard(Elsewhere(), wire=wire, bucket_mb=1e-5), Alone(Elsewhere())
    both(world, sync, alone, range(1))
    if blind:
        Zero.on_use = lambda self, tensor: None
        with sync.micro_batch():
            loss = loss_of(sync.model, rows(1, world.rank))
        return bool(loss.isnan())
    both(world, sync, alone, range(1, 4), 2)
    assert_equal(sync, alone, {"float32": 1e-5, "int4": 0.3}.get(wire, 2e-2))
    return False


@pytest.mark.parametrize(
    ("size", "wire"), [(2, "float32"), (3, "float32"), (2, "bfloat16"), (2, "int8"), (3, "int4")]
)
def test_weights_are_waited_for_whoever_uses_them(size: int, wire: str) -> None:
    run_ranks(used_elsewhere, size, False, wire)


@pytest.mark.parametrize("size", [2, 3])
def test_a_missing_wait_is_noticed(size: int) -> None:
    """The control."""
    assert run_ranks(used_elsewhere, size, True, "float32") == [True] * size


def each_way_alone(world) -> list[str]:
    """Each parameter in turn is the only one that is not waited for: it must show."""
    hold_gathers_back()
    original = Zero.on_use
    sync = shard(Elsewhere(), bucket_mb=1e-5)
    unseen = []
    take(sync, [lambda: loss_of(sync.model, rows(0, world.rank))])
    for step, (name, p) in enumerate(sync.named_parameters()):
        Zero.on_use = lambda self, t, p=p: None if t is p else original(self, t)
        with sync.micro_batch():
            loss = loss_of(sync.model, rows(step, world.rank))
        whole = sync._places[sync._index[name]][0].gather is None
        Zero.on_use = original
        if not loss.isnan() and not whole:
            unseen.append(name)
        sync.settle()
        sync.discard()
        take(sync, [lambda s=step: loss_of(sync.model, rows(s, world.rank))])
    return unseen


def test_every_way_of_use_is_seen_by_the_test_above() -> None:
    """Parameters that lie on one rank alone show on the other; none is used by nobody."""
    unseen = run_ranks(each_way_alone, 2)
    assert not set(unseen[0]) & set(unseen[1])


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


class Scripted(nn.Module):
    """`hidden` is used by TorchScript, from step `since` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)
        self.hidden = Parameter(torch.randn(20, 20) / 5)
        self.step, self.since = 0, since

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.last(scripted(x, self.hidden) if self.step >= self.since else x @ self.hidden)


def used_unseen(world, since: int) -> str:
    hold_gathers_back()
    sync, alone = shard(Scripted(since), bucket_mb=1e-5), Alone(Scripted(since))
    try:
        for step in range(4):
            sync.model.step = alone.model.step = step
            both(world, sync, alone, range(step, step + 1), mine=2)
    except UnisonoError as error:
        sync.finish()
        return str(error)
    assert_equal(sync, alone)
    return ""


@pytest.mark.parametrize("size", [2, 3])
def test_uses_that_torch_does_not_show_are_waited_for_or_refused(size: int) -> None:
    assert run_ranks(used_unseen, size, 0) == [""] * size
    for told in run_ranks(used_unseen, size, 2):
        assert "hidden was used before its new value was there" in told


# --- checkpointing, accumulation, and what happens between steps


class Blocks(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mode = mode
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            if self.mode == "plain":
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
        return self.head(x)


def checkpointed(world) -> None:
    hold_gathers_back()
    digests = set()
    for mode in ("plain", "not reentrant", "reentrant"):
        sync, alone = shard(Blocks(mode)), Alone(Blocks("plain"))
        both(world, sync, alone, range(4), 2)
        digests.add(assert_equal(sync, alone))
    assert len(digests) == 1


def test_gradient_checkpointing_changes_no_bit() -> None:
    run_ranks(checkpointed, 2)


def between_steps(world) -> list[int]:
    """Evaluation, weights and the state dict between steps; returns collectives a step."""
    hold_gathers_back()
    sync, alone = shard(Blocks("plain")), Alone(Blocks("plain"))
    counts = []
    for step in range(6):
        before = len(sync.ledger.entries)
        both(world, sync, alone, range(step, step + 1), 3)
        new = list(sync.ledger.entries)[before:]
        if step:
            buckets = len(sync._shards)
            assert len([e for e in new if e.group == "scatter"]) == buckets >= 3
            assert len([e for e in new if e.group == "gather"]) == buckets
            counts.append(len(new) - 2 * buckets)
        if step == 1:
            sync.settle()
            sync.model.eval()
            with torch.no_grad():
                x = rows(9, 9)
                assert torch.allclose(sync.model(x), alone.model(x), atol=1e-5)
            sync.model.train()
        if step == 2:
            state = sync.state_dict()
            assert difference(state, dict(alone.model.state_dict())) <= 1e-5
        if step == 3:
            named = dict(sync.replicated())
            assert difference(named, dict(alone.named)) <= 1e-5
        if step == 4:
            sync.settle()
            sync.settle()
    assert_equal(sync, alone)
    return counts


@pytest.mark.parametrize("size", [2, 3])
def test_between_steps_everything_can_be_read(size: int) -> None:
    """And a step communicates once, whatever the accumulation: one small sum besides."""
    assert run_ranks(between_steps, size) == [[1] * 5] * size


def sparse(world) -> str:
    """A sparse gradient of the first micro-batch alone, and then of the last one."""

    def model() -> nn.ModuleDict:
        torch.manual_seed(2)
        return nn.ModuleDict({"embed": nn.Embedding(9, 6, sparse=True), "out": nn.Linear(6, 3)})

    def loss(m: nn.ModuleDict, step: int, r: int, k: int) -> torch.Tensor:
        x = rows(step, r, k)
        if k == step % 2:
            x = x + m["embed"](torch.arange(len(x)) + r)
        return m["out"](torch.tanh(x)).square().sum()

    sync, alone = shard(model(), sgd), Alone(model(), sgd)
    for step in range(5):
        take(sync, [lambda k=k, s=step: loss(sync.model, s, world.rank, k) for k in range(2)])
        for r, k in ((r, k) for r in range(world.size) for k in range(2)):
            loss(alone.model, step, r, k).backward()
        alone.model["embed"].weight.grad = alone.model["embed"].weight.grad.to_dense()
        alone.step([])
    return assert_equal(sync, alone)


def test_sparse_gradients_of_any_micro_batch() -> None:
    assert len(set(run_ranks(sparse, 3))) == 1


def closed(world) -> None:
    sync, alone = shard(tower()), Alone(tower())
    both(world, sync, alone, range(3))
    sync.close()
    for model in (sync.model, alone.model):
        for k in range(2):
            loss_of(model, rows(1, world.rank, k)).backward()
    found = {n: p.grad for n, p in sync.model.named_parameters()}
    assert difference(found, {n: p.grad for n, p in alone.model.named_parameters()}) <= 1e-4


def test_after_close_the_model_is_an_ordinary_one() -> None:
    run_ranks(closed, 2)


# --- steps that are given up, and gradients that are not finite


class Boom(Exception):
    pass


def given_up(world, first: int) -> str:
    """From step `first` on every other step fails on rank 1, each time elsewhere."""
    sync, alone = shard(tower()), Alone(tower())

    def fail(_: torch.Tensor) -> None:
        raise Boom

    places = [(k, half) for k in (0, 1, 2) for half in ("data", "forward", "backward")]
    step = 0
    while places:
        failing = places.pop() if step >= first and (step - first) % 2 == 0 else None
        mine = failing if world.rank == 1 else None
        try:
            for k in range(3):
                with sync.micro_batch(last=k == 2):
                    if mine == (k, "data"):
                        raise Boom
                    loss = loss_of(sync.model, rows(step, world.rank, k))
                    if mine == (k, "forward"):
                        raise Boom
                    hook = sync.model[2].weight.register_hook(fail) if mine == (k, "backward") else None  # fmt: skip
                    try:
                        loss.backward()
                    finally:
                        if hook:
                            hook.remove()
        except Boom:
            assert mine
        [failures] = sync.finish(float(bool(mine)))
        assert failures == float(bool(failing))
        if failing:
            sync.discard()
        else:
            sync.update(divide_by=4.0, max_norm=1.0, learning_rate=RATE)
            alone.step([lambda r=r, k=k, s=step: loss_of(alone.model, rows(s, r, k)) for r in range(world.size) for k in range(3)])  # fmt: skip
        step += 1
    return assert_equal(sync, alone)


@pytest.mark.parametrize(("size", "first"), [(2, 0), (3, 0), (3, 1)])
def test_steps_given_up_leave_the_others_right(size: int, first: int) -> None:
    assert len(set(run_ranks(given_up, size, first))) == 1


def blamed(world, rank: int, name: str, at: int, wire: str) -> tuple[int, str] | None:
    """`rank` has one NaN in step `at`; that step changes nothing, and all go on as the plain loop."""
    sync, alone = shard(tower(), wire=wire), Alone(tower())
    now = [False]

    def poison(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient.index_fill(0, torch.tensor([1]), float("nan")) if now[0] else None

    if world.rank == rank:
        dict(sync.model.named_parameters())[name].register_hook(poison)
    dict(alone.model.named_parameters())[name].register_hook(poison)
    both(world, sync, alone, range(at))
    sync.settle()
    before = sha256(weights(sync.model)), sha256(dict(sync.optimizer_state()))
    now[0] = True
    done = take(sync, [lambda: loss_of(sync.model, rows(at, world.rank))])
    now[0] = False
    assert not done.committed
    found = sync.blame()
    sync.discard()
    assert before == (sha256(weights(sync.model)), sha256(dict(sync.optimizer_state())))
    assert all(p.grad is None for p in sync.model.parameters())
    both(world, sync, alone, range(at + 1, at + 4))
    assert_equal(sync, alone, 1e-5 if wire == "float32" else 2e-2)
    assert sync.blame() is None
    return found


@pytest.mark.parametrize(
    ("size", "rank", "name"),
    [(2, 0, "0.weight"), (2, 1, "0.weight"), (2, 0, "4.bias"), (2, 1, "4.bias"), (3, 0, "0.weight"),
     (3, 1, "2.weight"), (3, 2, "4.bias"), (4, 1, "0.weight"), (4, 3, "2.weight")],
)  # fmt: skip
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_what_is_not_finite_changes_nothing_and_is_traced(
    size: int, rank: int, name: str, wire: str
) -> None:
    seen = {b for b in run_ranks(blamed, size, rank, name, 2, wire) if b is not None}
    assert seen == {(rank, name)}


@pytest.mark.parametrize("size", [2, 3])
def test_in_the_first_step_a_rank_knows_what_it_sent_itself(size: int) -> None:
    found = run_ranks(blamed, size, 1, "2.weight", 0, "float32")
    assert found == [(1, "2.weight") if rank == 1 else None for rank in range(size)]


def out_of_memory(world, allocation: int) -> tuple[int, str]:
    """Rank 1 has no memory for the pieces that arrive, in the midst of a bucket of several chunks."""
    shard_file.CHUNK_BYTES = 64
    sync, alone = shard(tower(), bucket_mb=1e-4), Alone(tower())
    both(world, sync, alone, range(1))

    class Scarce:
        left = allocation

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if not self.left:
                raise torch.OutOfMemoryError
            return torch.empty_like(tensor)

    if world.rank == 1:
        shard_file.torch = Scarce()
    failed = False
    try:
        with sync.micro_batch():
            loss_of(sync.model, rows(1, world.rank)).backward()
    except torch.OutOfMemoryError:
        failed = True
    assert sync.finish(float(failed)) == [1.0]
    sync.discard()
    both(world, sync, alone, range(2, 5))
    return sync._scatters._sequence, assert_equal(sync, alone)


def test_memory_that_runs_out_while_a_bucket_leaves() -> None:
    for allocation in (1, 2, 3):
        assert len(set(run_ranks(out_of_memory, 3, allocation))) == 1


def too_large(world) -> None:
    """Each gradient is finite, but their float32 norm is not: as with a whole gradient, a skip."""
    sync, alone = shard(tower()), Alone(tower())
    for step in range(4):
        factor = 1e28 if step in (0, 2) else 1.0
        done = take(sync, [lambda s=step, f=factor: loss_of(sync.model, rows(s, world.rank)) * f])
        assert done.committed == (factor == 1.0)
        if done.committed:
            alone.step([lambda r=r, s=step: loss_of(alone.model, rows(s, r)) for r in range(world.size)])  # fmt: skip
    assert_equal(sync, alone)


def test_a_norm_that_overflows_skips_the_step() -> None:
    run_ranks(too_large, 2)


# --- bfloat16 on the wire


def half_wire(world) -> list[str]:
    sync = shard(tower(), wire="bfloat16", bucket_mb=0.002)
    digests = []
    left: dict[Shard, torch.Tensor] = {}
    for step in range(12):
        old = {s: s.master.clone() for s in sync._shards}
        take(sync, [lambda s=step: loss_of(sync.model, rows(s, world.rank))])
        sync.settle()
        digests.append(sha256(weights(sync.model)))
        for s in sync._shards if old else ():
            change = (s.master - old[s]).norm() + (left[s].norm() if s in left else 0.0)
            left[s] = s.master - s.row
            assert left[s].norm() <= 2**-8 * change + 2**-23 * s.row.norm()
            assert step < 2 or left[s].norm() > 0, "nothing was rounded"
    return digests


@pytest.mark.parametrize("size", [2, 3])
def test_replicas_are_equal_after_every_step_and_near_the_masters(size: int) -> None:
    found = run_ranks(half_wire, size)
    assert all(d == found[0] for d in found)
    assert len(set(found[0])) == 12


def sent_bytes(world, wire: str, bucket_mb: float, width: int = 0) -> tuple[int, int]:
    """(bytes of gradients, of weights) in the second step."""
    model = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 300)) if width else tower()
    sync = shard(model, wire=wire, bucket_mb=bucket_mb)
    for step in range(2):
        before = len(sync.ledger.entries)
        take(sync, [lambda s=step: loss_of(model, rows(s, world.rank))])
        new = list(sync.ledger.entries)[before:]
    return tuple(sum(e.sent_bytes for e in new if e.group == g) for g in ("scatter", "gather"))


def every_count_of_bytes(world) -> list:
    found = [sent_bytes(world, "float32", 0.001), sent_bytes(world, "bfloat16", 0.001)]
    return [
        *found,
        sent_bytes(world, "float32", 0.5, 1000),
        sent_bytes(world, "bfloat16", 0.5, 1000),
    ]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes_are_s_n_minus_1_over_n_each_way_and_half_in_bfloat16(n: int) -> None:
    for small, small_half, large, large_half in run_ranks(every_count_of_bytes, n):
        assert small[0] == small[1] == 2 * small_half[0] == 2 * small_half[1]
        assert large[0] == large[1] == 2 * large_half[0] == 2 * large_half[1]
        whole = 4 * (6 * 1000 + 1000 + 1000 * 300 + 300)
        assert whole > 1 << 20
        assert whole * (n - 1) / n <= large[0] <= 1.03 * whole * (n - 1) / n


def regression(world) -> list[float]:
    """The loss of 200 steps, float32 and bfloat16 on the wire."""
    g = torch.Generator().manual_seed(9)
    x = torch.randn(512, 6, generator=g)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.square().mean(1)], 1)
    y += torch.randn(512, 3, generator=g) / 2
    finals = []
    for wire in ("float32", "bfloat16"):
        sync = shard(tower(), wire=wire)
        own, wanted = x[world.rank :: world.size], y[world.rank :: world.size]
        for _ in range(200):
            take(sync, [lambda s=sync, a=own, b=wanted: (s.model(a) - b).square().sum()], 512)
        sync.settle()
        with torch.no_grad():
            finals.append(float((sync.model(x) - y).square().mean()))
    return finals


def test_no_drift_in_200_steps() -> None:
    for exact, half in run_ranks(regression, 2):
        assert exact < 0.4
        assert half == pytest.approx(exact, rel=0.002)


def dropped(self: Shard, group: Group) -> None:
    send(self, group)
    self.master.copy_(self.row)


def rounded_weights(self: Shard, group: Group) -> None:
    """What a naive wire does: weights themselves in bfloat16."""
    self.master.copy_(self.master.bfloat16())
    send(self, group)


send = Shard.send_weights


def small_steps(world, broken: Callable | None) -> float:
    """A constant gradient whose steps are far below a weight's bfloat16: how far off it ends."""
    if broken:
        Shard.send_weights = broken
    model = nn.ParameterList([Parameter(torch.ones(64, 2))])
    sync = shard(model, plain_sgd, wire="bfloat16")
    slope = 1.0 + 2**-9 + 2**-8  # in the middle between two numbers of bfloat16
    for _ in range(128):
        with sync.micro_batch():
            (model[0] * slope / world.size).sum().backward()
        sync.finish()
        sync.update(divide_by=1.0, max_norm=0.0, learning_rate=2**-12)
    sync.settle()
    gradient = float(sum(torch.tensor(slope / world.size).bfloat16() if r else torch.tensor(slope / world.size) for r in range(world.size)))  # fmt: skip
    return float(((1 - model[0].detach()) / (128 * 2**-12 * gradient) - 1).abs().max())


def test_what_rounding_leaves_is_not_lost() -> None:
    assert max(run_ranks(small_steps, 2, None)) < 2**-12
    assert min(run_ranks(small_steps, 2, dropped)) > 2**-11, "the control: it is what is tested"
    assert min(run_ranks(small_steps, 2, rounded_weights)) > 0.5, "the control: it stalls"


# --- the optimizer's state: whole where it is asked for, a part where it lies


def whole_state(world, optimizer: Callable) -> None:
    sync, alone = shard(tower(), optimizer), Alone(tower(), optimizer)
    both(world, sync, alone, range(3))
    found = dict((k, v.clone()) for k, v in sync.optimizer_state())  # noqa: C402
    wanted = {
        f"{key}.{name}": value
        for name, p in alone.named
        for key, value in alone.optimizer.state[p].items()
        if isinstance(value, torch.Tensor)
    }
    assert difference(found, wanted) <= 1e-4
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def whole_states(world) -> None:
    for optimizer in (adamw, sgd):
        whole_state(world, optimizer)


@pytest.mark.parametrize("size", [2, 3])
def test_the_state_is_whole_and_the_plain_optimizers(size: int) -> None:
    run_ranks(whole_states, size)


def own_state(world) -> tuple[int, int]:
    """(elements of state that this rank holds, of one replica's)."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(90, 110) if k % 2 == 0 else nn.Linear(110, 90) for k in range(6)))  # fmt: skip
    sync = shard(model, bucket_mb=0.05)
    take(sync, [lambda: model(torch.ones(1, 90)).square().sum()])
    held = [v for s in sync._shards for st in s.optimizer.state.values() for v in st.values()]
    return sum(v.numel() for v in held if v.dim()), 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n", [2, 4])
def test_each_rank_holds_one_nth_of_the_state(n: int) -> None:
    found = run_ranks(own_state, n)
    assert sum(mine for mine, _ in found) == found[0][1], "every element lies on one rank"
    for mine, whole in found:
        assert mine <= whole / n * 1.03


Saved = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]


def trained(world, kind: str, saved: Saved | None, steps: range) -> Saved:
    """`steps` of global batches of 12 rows, the same at any size; what a checkpoint would hold."""
    name, _, variant = kind.partition("-")
    model = tower()
    if saved:
        model.load_state_dict(saved[0])
    sync = make_strategy(
        name,
        model,
        Ledger(),
        optimizer=adamw,
        bucket_mb=0.001,
        shard=bool(variant),
        wire="bfloat16" if variant == "bfloat16" else "float32",
        layout=saved[2] if saved else None,
        timeout_s=60,
    )
    if saved:
        sync.load_optimizer_state(saved[1])
        now = {k: v.clone() for k, v in sync.optimizer_state()}
        for key in now:
            if key in saved[1]:
                assert torch.equal(now[key], saved[1][key]), key
        for key in saved[1]:
            assert key in now or key.startswith(MASTER), key
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(12, 6, generator=g).tensor_split(world.size)[world.rank]
        take(sync, [lambda x=x: loss_of(sync.model, x)], 12.0)
    state = {n: t.clone() for n, t in sync.state_dict().items()}
    return state, {k: v.clone() for k, v in sync.optimizer_state()}, sync.layout()


KINDS = ["exact-shard", "exact-bfloat16", "exact", "reference", "ddp"]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    return run_ranks(trained, 1, "exact", None, range(8))[0][0]


@pytest.mark.parametrize(
    ("first", "second"),
    [*(("exact-shard", k) for k in KINDS), *((k, "exact-shard") for k in KINDS[1:]),
     ("exact-bfloat16", "exact"), ("exact", "exact-bfloat16"), ("exact-bfloat16", "exact-bfloat16")],
)  # fmt: skip
def test_saved_by_one_and_continued_by_another(
    first: str, second: str, uninterrupted: dict
) -> None:
    saved = run_ranks(trained, 2, first, None, range(4))[0]
    size = 4 if "bfloat16" in second else 3
    state, _, _ = run_ranks(trained, size, second, saved, range(4, 8))[0]
    rounded = "bfloat16" in first + second
    assert difference(state, uninterrupted) <= (1e-2 if rounded else 1e-5)


def masters(saved: Saved) -> dict[str, torch.Tensor]:
    return {k: v for k, v in saved[1].items() if k.startswith(f"{MASTER}.")}


def test_masters_survive_and_the_same_number_of_ranks_continues_bit_for_bit() -> None:
    for kind in ("exact-shard", "exact-bfloat16"):
        whole = run_ranks(trained, 2, kind, None, range(8))[0]
        half = run_ranks(trained, 2, kind, None, range(4))[0]
        again = run_ranks(trained, 2, kind, half, range(4, 8))[0]
        for a, b in zip(whole[:2], again[:2], strict=True):
            assert sha256(a) == sha256(b)
    assert len(masters(half)) == 6
    assert all(not torch.equal(v, half[0][k.partition(".")[2]]) for k, v in masters(half).items())
    [kept, _] = run_ranks(trained, 2, "exact", half, range(0))
    assert all(torch.equal(kept[0][k.partition(".")[2]], v) for k, v in masters(half).items()), (
        "a strategy without masters goes on from them"
    )


def rebucketed(world, wire: str, optimizer: Callable) -> None:
    sync, other = shard(tower(), optimizer, wire=wire), shard(tower(), optimizer, wire=wire)
    for step, size in enumerate([0.0005, 100.0, 1e-5, 0.002, 0.002]):
        for s in (sync, other):
            take(s, [lambda s=s, k=step: loss_of(s.model, rows(k, world.rank))])
        sync.settle()
        before = sha256(weights(sync.model)), sha256(dict((k, v.clone()) for k, v in sync.optimizer_state()))  # noqa: C402  # fmt: skip
        sync.rebucket(size)
        after = sha256(weights(sync.model)), sha256(dict((k, v.clone()) for k, v in sync.optimizer_state()))  # noqa: C402  # fmt: skip
        assert before == after
    assert len(sync._shards) != len(other._shards)
    take(sync, [lambda: loss_of(sync.model, rows(9, world.rank))])
    take(other, [lambda: loss_of(other.model, rows(9, world.rank))])
    other.settle()
    sync.settle()
    assert difference(weights(sync.model), weights(other.model)) <= (1e-6 if wire == "float32" else 1e-3)  # fmt: skip


def rebucketed_each_way(world) -> None:
    for wire in ("float32", "bfloat16"):
        for optimizer in (adamw, sgd):
            rebucketed(world, wire, optimizer)


@pytest.mark.parametrize("size", [2, 3])
def test_other_buckets_in_the_middle_change_nothing(size: int) -> None:
    run_ranks(rebucketed_each_way, size)


class Scalar(nn.Module):
    """Between two matrices, a weight without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.scale, self.out = nn.Linear(6, 20), Parameter(torch.tensor(0.7)), nn.Linear(20, 3)  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x)) * self.scale)


def scalar_moved(world) -> None:
    for optimizer in (adamw, sgd):
        sync, alone = shard(Scalar(), optimizer), Alone(Scalar(), optimizer)
        both(world, sync, alone, range(2))
        for size in (0.0005, 100.0, 1e-5):
            sync.rebucket(size)
            both(world, sync, alone, range(2, 4))
        assert_equal(sync, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_the_state_of_a_scalar_moves_too(size: int) -> None:
    run_ranks(scalar_moved, size)


def loaded_late(world) -> list[float]:
    """Masters that are loaded while weights are on their way."""
    hold_gathers_back()
    sync = shard(tower())
    for step in range(2):
        take(sync, [lambda s=step: loss_of(sync.model, rows(s, world.rank))])
    sync.load_optimizer_state({f"{MASTER}.0.weight": torch.full((20, 6), 0.5)})
    sync.settle()
    return sorted(set(sync.model[0].weight.flatten().tolist()))


def test_what_is_loaded_is_not_overtaken() -> None:
    assert run_ranks(loaded_late, 2) == [[0.5]] * 2


def before_the_first_step(world) -> str:
    """A state that was loaded and not used yet is given back, and other buckets lose nothing."""
    model = tower()
    sync = shard(model)
    state = {}
    for n, p in model.named_parameters():
        state[f"step.{n}"] = torch.tensor(3.0)
        state |= {f"{k}.{n}": torch.full_like(p, 0.5) for k in ("exp_avg", "exp_avg_sq")}
    sync.load_optimizer_state(state)
    assert dict(sync.optimizer_state()).keys() == state.keys()
    sync.rebucket(0.01)
    take(sync, [lambda: loss_of(model, rows(0, world.rank)) * 0])
    found = {k: v.clone() for k, v in sync.optimizer_state()}
    assert found.keys() == state.keys()
    assert float((found["exp_avg.0.weight"] - 0.45).abs().max()) < 1e-6
    return str(float(found["step.0.weight"]))


def test_a_loaded_state_is_there_before_the_first_step() -> None:
    assert run_ranks(before_the_first_step, 2) == ["4.0"] * 2


def two_backwards(world) -> str:
    sync = shard(tower())
    for step in range(2):
        take(sync, [lambda s=step: loss_of(sync.model, rows(s, world.rank))])
    try:
        with sync.micro_batch():
            for k in range(2):
                loss_of(sync.model, rows(0, world.rank, k)).backward()
    except UnisonoError as error:
        sync.finish()
        sync.discard()
        return str(error)
    return "no error"


def test_two_backward_passes_in_one_step_are_refused() -> None:
    for told in run_ranks(two_backwards, 2):
        assert "several backward passes in one step" in told
