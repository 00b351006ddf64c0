"""The exact strategy at its edges: odd models, odd users, odd timing, and what it sends when."""

import random
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import unisono
from ranks import run_ranks
from unisono.errors import ConfigError, ReplicaError, UnisonoError
from unisono.sync import make_strategy
from unisono.sync.digest import sha256
from unisono.sync.exact import Exact
from unisono.sync.ledger import Ledger


def tower(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)
    )


def rows(step: int, rank: int, k: int = 0) -> torch.Tensor:
    """Ragged: every rank and micro-batch has another number of rows."""
    g = torch.Generator().manual_seed(1000 * step + 10 * rank + k)
    return torch.randn(1 + (step + 2 * rank + k) % 5, 6, generator=g)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def expected(make: Callable, batches: list, loss: Callable = loss_of) -> dict:
    """What one process gets from the backward passes of all ranks, in plain PyTorch."""
    model = make()
    for batch in batches:
        loss(model, batch).backward()
    return gradients(model)


def assert_equal(found: dict, wanted: dict, tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, b in wanted.items():
        a = found[name]
        assert (a is None) == (b is None), name
        if a is not None:
            assert float((a - b).norm()) <= tolerance * float(b.norm().clamp_min(1e-30)), name


def exact(model: nn.Module, **changes) -> Exact:
    options = {"bucket_mb": 0.001, "timeout_s": 60, **changes}
    return Exact(model, Ledger(), **options)


# --- how users treat gradients


def zeroing(world, set_to_none: bool, momentum: float) -> str:
    """Steps with an optimizer whose gradients are zeroed one way or the other."""
    model, alone = tower(), tower()
    sync = exact(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum) for m in (model, alone)]
    for step in range(5):
        for o in optimizers:
            o.zero_grad(set_to_none=set_to_none)
        loss_of(model, rows(step, world.rank)).backward()
        sync.finish()
        for r in range(world.size):
            loss_of(alone, rows(step, r)).backward()
        assert_equal(gradients(model), gradients(alone))
        for o in optimizers:
            o.step()
    return sha256(dict(model.named_parameters()))


@pytest.mark.parametrize(("size", "set_to_none"), [(2, False), (3, True), (3, False)])
def test_zero_grad_either_way(size: int, set_to_none: bool) -> None:
    assert len(set(run_ranks(zeroing, size, set_to_none, 0.9))) == 1


# --- which parameters take part


class Odd(nn.Module):
    """Tied, frozen, sometimes used and never used parameters, a scalar and an empty one."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.rare = nn.Linear(6, 6)
        self.never = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.conv = nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.tied(torch.tanh(self.frozen(self.inner(x)))) * self.scale + self.empty.sum()
        x = x + self.conv(x.view(-1, 1, 2, 3).repeat(1, 1, 2, 1)).flatten(1).sum(1, keepdim=True)
        return self.rare(x) if rare else x


def odd_loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return model(*batch).square().sum()


def odd_model(world, leaves: int | None) -> None:
    """In step s only rank s (if there is one) uses `rare`; nobody ever uses `never`."""
    model = Odd()
    sync = exact(model, leaves=leaves)
    mine = leaves or 2
    for step in range(world.size + 2):
        model.zero_grad()
        batches = [
            (rows(step, r, k), r == step and k == 0) for r in range(world.size) for k in range(mine)
        ]
        for k, batch in enumerate(batches[world.rank * mine : (world.rank + 1) * mine]):
            with sync.micro_batch(last=k == mine - 1):
                odd_loss(model, batch).backward()
        sync.finish()
        wanted = expected(Odd, batches, odd_loss)
        assert wanted["never.weight"] is None
        assert (wanted["rare.weight"] is None) == (step >= world.size)
        assert_equal(gradients(model), wanted, 1e-5)
        assert model.frozen.weight.grad is None
        assert model.tied.weight is model.inner.weight


@pytest.mark.parametrize(("size", "leaves"), [(1, None), (2, None), (3, None), (2, 2), (4, 3)])
def test_unused_tied_frozen_scalar_and_empty_parameters(size: int, leaves: int | None) -> None:
    run_ranks(odd_model, size, leaves)


def nothing_to_train(world) -> list[float]:
    model = tower().requires_grad_(False)
    sync = exact(model)
    sync.finish()
    return sync.finish(2.0, world.rank)


def test_a_model_without_trained_parameters() -> None:
    assert run_ranks(nothing_to_train, 2) == [[4.0, 1.0]] * 2


def a_rank_without_work(world) -> None:
    model = tower()
    sync = exact(model)
    for step in range(3):
        model.zero_grad()
        busy = [r for r in range(world.size) if r != step]
        if world.rank in busy:
            loss_of(model, rows(step, world.rank)).backward()
        sync.finish()
        wanted = expected(tower, [rows(step, r) for r in busy])
        assert_equal(gradients(model), wanted)


def test_a_rank_without_work_adds_nothing() -> None:
    run_ranks(a_rank_without_work, 3)


# --- numbers of replicas and types


def whole_numbers(world) -> None:
    """Gradients that are small whole numbers, whose sums are exact in any order."""
    for dtype in (torch.float32, torch.float64):
        for leaves in (None, 1):
            whole_numbers_of(world, dtype, leaves)


def whole_numbers_of(world, dtype: torch.dtype, leaves: int | None) -> None:

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 2)).to(dtype)
        for p in model.parameters():
            p.data = torch.arange(p.numel()).remainder(3).sub(1).view(p.shape).to(dtype)
        return model

    def batch(step: int, r: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(100 * step + r)
        return torch.randint(-2, 3, (2, 5), generator=g).to(dtype)

    model = make()
    sync = exact(model, bucket_mb=1e-5, leaves=leaves)
    for step in range(3):
        model.zero_grad()
        model(batch(step, world.rank)).sum().backward()
        sync.finish()
        wanted = expected(
            make, [batch(step, r) for r in range(world.size)], lambda m, x: m(x).sum()
        )
        assert_equal(gradients(model), wanted, 0.0)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_sums_are_exact_for_any_number_of_replicas(size: int) -> None:
    run_ranks(whole_numbers, size)


def beside_the_reference(world, dtypes: tuple[torch.dtype, ...], strict: bool) -> None:
    """Exact and reference on the same gradients: the same bits when strict, else rounding."""

    def make() -> nn.Module:
        torch.manual_seed(5)
        model = tower()
        for k, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
            layer.to(dtypes[k % len(dtypes)])
        return model

    def backward(model: nn.Module, step: int, k: int) -> None:
        x = rows(step, world.rank, k)
        for layer in model:
            x = layer(x.to(layer.weight.dtype) if isinstance(layer, nn.Linear) else x)
        x.float().square().sum().backward()

    models = [make(), make()]
    options = {"bucket_mb": 0.0005, "leaves": 2 if strict else None, "timeout_s": 60.0}
    syncs = [make_strategy(n, m, Ledger(), **options) for n, m in zip(("exact", "reference"), models, strict=True)]  # fmt: skip
    for step in range(3):
        for model, sync in zip(models, syncs, strict=True):
            model.zero_grad()
            for k in range(2):
                with sync.micro_batch(last=k == 1):
                    backward(model, step, k)
            sync.finish()
        found, wanted = map(gradients, models)
        if strict:
            for name in found:
                assert sha256({"": found[name]}) == sha256({"": wanted[name]}), name
        assert_equal(found, wanted, 1e-2 if torch.bfloat16 in dtypes else 1e-6)


def every_type_beside_the_reference(world) -> None:
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    for dtypes in ((f32,), (bf16,), (f64,), (bf16, f32, f64)):
        beside_the_reference(world, dtypes, False)
    if world.size in (1, 2, 4):
        beside_the_reference(world, (f64, f32), True)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_every_type_equals_the_reference(size: int) -> None:
    run_ranks(every_type_beside_the_reference, size)


def half_on_the_wire(world, dtype: torch.dtype) -> None:
    """Summed in float32 and rounded once: adding in bfloat16 would lose most of the ranks."""
    model = nn.ParameterList([nn.Parameter(torch.ones(40, dtype=dtype))])
    sync = exact(model)
    value = 256.0 if world.rank == 0 else 1.0
    for _ in range(2):
        model.zero_grad()
        (model[0] * value).sum().backward()
        sync.finish()
        assert model[0].grad.dtype == dtype
        assert model[0].grad.tolist() == [256.0 + world.size - 1] * 40


def test_half_precision_on_the_wire_is_added_in_float32() -> None:
    run_ranks(half_on_the_wire, 5, torch.bfloat16)


def strict_half(world) -> str:
    try:
        exact(tower().to(torch.bfloat16), leaves=1)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_strict_refuses_weights_in_half_precision() -> None:
    [told] = run_ranks(strict_half, 1)
    assert "strict needs weights in float32, but 0.weight is in half precision" in told


def huge_and_tiny(world) -> None:
    class Lopsided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.huge = nn.Parameter(torch.randn(500_000))
            self.tiny = nn.ParameterList(nn.Parameter(torch.randn(1 + k % 3)) for k in range(150))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.huge * x.sum()).square().sum() / 1e6 + sum(
                (t * x.mean() * k).sum().square() for k, t in enumerate(self.tiny)
            )

    model = Lopsided()
    sync = exact(model)
    for step in range(2):
        model.zero_grad()
        model(rows(step, world.rank)).backward()
        sync.finish()
        wanted = expected(Lopsided, [rows(step, r) for r in range(world.size)], lambda m, x: m(x))
        assert_equal(gradients(model), wanted, 1e-5)


def test_one_huge_and_many_tiny_parameters() -> None:
    run_ranks(huge_and_tiny, 3)


# --- gradient checkpointing, and several backward passes


class Blocks(nn.Module):
    def __init__(self, mode: str, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mode = mode
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        if shared:
            self.layers[3] = self.layers[0]
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            if self.mode == "plain":
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
        return self.head(x)


def checkpointed(
    world, mode: str, shared: bool, leaves: int | None, bucket_mb: float = 0.001
) -> list[str] | str:
    model = Blocks(mode, shared)
    sync = exact(model, leaves=leaves, bucket_mb=bucket_mb)
    digests = []
    for step in range(3):
        model.zero_grad()
        try:
            for k in range(leaves or 1):
                with sync.micro_batch(last=k == (leaves or 1) - 1):
                    loss_of(model, rows(step, world.rank, k)).backward()
        except UnisonoError as error:
            return str(error)
        sync.finish()
        digests.append(sha256(gradients(model)))
    return digests


def checkpointed_or_not(world) -> None:
    for shared in (False, True):
        for leaves in (None, 2):
            plain = checkpointed(world, "plain", shared, leaves)
            assert len(set(plain)) == 3
            assert checkpointed(world, "not reentrant", shared, leaves) == plain


def test_gradient_checkpointing_changes_no_bit() -> None:
    run_ranks(checkpointed_or_not, 2)


def reentrant(world) -> str:
    for shared in (False, True):
        plain = checkpointed(world, "plain", shared, None)
        assert checkpointed(world, "reentrant", shared, None, 100.0) == plain
    return str(checkpointed(world, "reentrant", True, None, 0.0001))


def test_reentrant_checkpointing_is_right_or_refused() -> None:
    """It runs a backward pass for each block: a block that is used twice gets its gradient twice.

    Right where both come before the bucket leaves, and refused where the second comes after.
    """
    for told in run_ranks(reentrant, 2):
        assert "received a gradient after its bucket was sent" in told
        assert "gradient checkpointing needs use_reentrant=False" in told


def two_backwards(world, size_mb: float) -> str:
    model = tower()
    sync = exact(model, bucket_mb=size_mb)
    try:
        for k in range(2):
            loss_of(model, rows(0, world.rank, k)).backward()
    except UnisonoError as error:
        sync.finish()  # still in step with the others
        model.zero_grad()
        for k in range(2):
            with sync.micro_batch(last=k == 1):
                loss_of(model, rows(1, world.rank, k)).backward()
        sync.finish()
        wanted = expected(tower, [rows(1, r, k) for r in range(world.size) for k in (0, 1)])
        assert_equal(gradients(model), wanted)
        return str(error)
    return "no error"


@pytest.mark.parametrize(("size", "bucket_mb"), [(1, 0.001), (2, 0.001), (2, 100.0)])
def test_two_backward_passes_in_one_step_are_refused(size: int, bucket_mb: float) -> None:
    for told in run_ranks(two_backwards, size, bucket_mb):
        assert (
            "several backward passes in one step need `with sync.micro_batch(last=False)`" in told
        )


# --- what travels, and when


def spied(world, leaves: int) -> tuple[float, float, list, int]:
    """One step after the learning one: when the backward pass returned, and the ledger's entries."""
    model = tower()
    sync = exact(model)
    entries: list = []
    first_hook: list[float] = []
    handle = model[4].weight.register_hook(lambda g: first_hook.append(time.perf_counter()))
    for step in range(2):
        model.zero_grad()
        before = len(sync.ledger.entries)
        for k in range(leaves):
            with sync.micro_batch(last=k == leaves - 1):
                loss = loss_of(model, rows(step, world.rank, k))
                loss.backward()
                returned = time.perf_counter()
        sync.finish()
        entries = list(sync.ledger.entries)[before:]
    handle.remove()
    return first_hook[-1], returned, entries, len(sync._buckets)


@pytest.mark.parametrize(("size", "leaves"), [(2, 1), (2, 3), (3, 1), (3, 3)])
def test_buckets_leave_during_the_last_backward_pass(size: int, leaves: int) -> None:
    for began, returned, entries, buckets in run_ranks(spied, size, leaves):
        sent = [e.started for e in entries if e.group == "scatter"]
        assert len(sent) == buckets >= 3, "once a step, whatever the accumulation"
        assert all(began < t < returned for t in sent), "each left while the pass was running"
        gathered = [e for e in entries if e.operation == "all-gather"]
        assert len(gathered) == (buckets if size > 2 else 0), "two need one collective a bucket"
        assert [e.sequence for e in gathered] == sorted(e.sequence for e in gathered)


def sent_bytes(world, leaves: int, bucket_mb: float) -> list[int]:
    model = tower()
    sync = exact(model, bucket_mb=bucket_mb)
    found = []
    for step in range(3):
        model.zero_grad()
        before = len(sync.ledger.entries)
        for k in range(leaves):
            with sync.micro_batch(last=k == leaves - 1):
                loss_of(model, rows(step, world.rank, k)).backward()
        sync.finish()
        new = list(sync.ledger.entries)[before:]
        found.append(sum(e.sent_bytes for e in new if e.group in ("scatter", "gather")))
        others = {e.group for e in new} - {"scatter", "gather"}
        assert others == ({"control"} if world.size > 1 else set()), "and one small sum"
    return found


def sent_bytes_each_way(world) -> list[list[int]]:
    return [sent_bytes(world, 1, 100.0), sent_bytes(world, 3, 100.0), sent_bytes(world, 1, 1e-5)]


def padded_bytes(buckets: list[list[int]], n: int) -> int:
    """Every tensor begins at a multiple of 64 bytes, every bucket is n equal such pieces."""
    total = 0
    for numels in buckets:
        size = sum(-(-4 * numel // 64) * 64 for numel in numels)
        total += -(-size // (64 * n)) * 64 * n
    return total


NUMELS = [p.numel() for p in tower().parameters()]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bytes_are_2_s_n_minus_1_over_n_once_a_step(n: int) -> None:
    one_bucket = 2 * padded_bytes([NUMELS], n) * (n - 1) // n
    each_alone = 2 * padded_bytes([[x] for x in NUMELS], n) * (n - 1) // n
    for found in run_ranks(sent_bytes_each_way, n):
        assert found == [[one_bucket] * 3, [one_bucket] * 3, [each_alone] * 3]


# --- order and timing


class Star(nn.Module):
    """Independent layers, so that a rank may visit them in any order."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.rays = nn.ModuleList(nn.Linear(6, 4) for _ in range(width))

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        total = x.sum() * 0
        for k in order:
            total = total + torch.tanh(self.rays[k](x)).square().sum() * (k + 1)
        return total


def shuffled(world, bucket_mb: float, steps: int, delay_s: float, leaves: int | None) -> list:
    """Every rank goes through the layers in an order of its own, another one in every step.

    Delays are faults made by the test: a rank is slow at random moments of its backward pass.
    """
    model = Star()
    sync = exact(model, bucket_mb=bucket_mb, leaves=leaves)
    chooser = random.Random(world.rank)
    if delay_s:
        for p in model.parameters():
            p.register_hook(lambda g: time.sleep(chooser.uniform(0, delay_s)))
    layouts = []
    mine = leaves or 1
    for step in range(steps):
        model.zero_grad()
        for k in range(mine):
            order = chooser.sample(range(12), 12)
            with sync.micro_batch(last=k == mine - 1):
                model(rows(step, world.rank, k), order).backward()
        sync.finish()
        layouts.append([b.indices for b in sync._buckets])
        batches = [rows(step, r, k) for r in range(world.size) for k in range(mine)]
        wanted = expected(Star, batches, lambda m, x: m(x, list(range(12))))
        assert_equal(gradients(model), wanted, 1e-5)
    return layouts


def test_the_order_is_learned_once_and_is_rank_0s() -> None:
    layouts = run_ranks(shuffled, 3, 0.0003, 3, 0.0, None)
    assert layouts[0] == layouts[1] == layouts[2]
    assert len({str(x) for x in layouts[0]}) == 1, "learned in the first step, kept after it"
    # Rank 0's own order: a layer's weight and bias come last visited first.
    order = random.Random(0).sample(range(12), 12)
    flat = [i for bucket in layouts[0][0] for i in bucket]
    assert [i // 2 for i in flat[::2]] == order[::-1]


@pytest.mark.parametrize(("size", "leaves"), [(4, None), (2, 3)])
def test_many_buckets_and_ranks_that_are_slow_at_random(size: int, leaves: int | None) -> None:
    run_ranks(shuffled, size, 1e-5, 5, 0.003, leaves)


# --- steps that are given up


class Boom(Exception):
    pass


def given_up(world, leaves: int | None, which: str, half: str) -> None:
    """Rank 1 fails in steps 1 and 3; all complete the step, forget it either way, and go on."""
    model = tower()
    sync = exact(model, leaves=leaves)
    mine = leaves or 2

    def fail(_: torch.Tensor) -> None:
        raise Boom

    for step in range(5):
        failing = step in (1, 3) and world.rank == 1
        try:
            for k in range(mine):
                with sync.micro_batch(last=k == mine - 1):
                    now = failing and k == {"first": 0, "second": 1, "last": mine - 1}[which]
                    loss = loss_of(model, rows(step, world.rank, k))
                    if now and half == "forward":
                        raise Boom
                    hook = model[2].weight.register_hook(fail) if now else None
                    try:
                        loss.backward()
                    finally:
                        if hook:
                            hook.remove()
        except Boom:
            assert failing
        [failures] = sync.finish(float(failing))
        assert failures == (step in (1, 3))
        if failures:
            if step == 1:
                sync.discard()
            else:
                model.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            continue
        batches = [rows(step, r, k) for r in range(world.size) for k in range(mine)]
        wanted = expected(tower, batches)
        assert_equal(gradients(model), wanted)
        model.zero_grad()


def given_up_anywhere(world, leaves: int | None) -> None:
    for which in ("first", "second", "last"):
        for half in ("forward", "backward"):
            given_up(world, leaves, which, half)


@pytest.mark.parametrize(("size", "leaves"), [(2, None), (2, 4), (3, None), (3, 4)])
def test_a_step_given_up_half_way_leaves_the_next_ones_right(size: int, leaves: int | None) -> None:
    run_ranks(given_up_anywhere, size, leaves)


def discarded(world) -> None:
    """Micro-batches that are tried and thrown away, before the first step and between steps."""
    model = tower()
    sync = exact(model, leaves=2)
    for step in range(3):
        before = sync.ledger.collectives
        with sync.micro_batch(last=False):
            loss_of(model, rows(77, world.rank)).backward()
            assert [n for n, _ in sync.local_gradients()] == sync.names
        sync.discard()
        assert sync.ledger.collectives == before
        for k in range(2):
            with sync.micro_batch(last=k == 1):
                loss_of(model, rows(step, world.rank, k)).backward()
        sync.finish()
        wanted = expected(tower, [rows(step, r, k) for r in range(world.size) for k in (0, 1)])
        assert_equal(gradients(model), wanted)
        model.zero_grad()


def test_discarded_micro_batches_leave_no_trace() -> None:
    run_ranks(discarded, 2)


def blamed(world, rank: int, name: str) -> tuple[int, str] | None:
    model = tower()
    sync = exact(model)
    parameter = dict(model.named_parameters())[name]
    if world.rank == rank:
        parameter.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("nan")))
    for step in range(2):
        model.zero_grad()
        loss_of(model, rows(step, world.rank)).backward()
        sync.finish()
        assert not torch.isfinite(parameter.grad).all()
        if step == 0:
            mine = (rank, name) if world.rank == rank else None
            assert sync.blame() == mine, "a rank knows what it sent, and guesses nothing else"
    return sync.blame()


@pytest.mark.parametrize(
    ("size", "rank", "name"),
    [(3, 2, "2.weight"), (3, 1, "4.bias"), (4, 0, "0.weight"),
     (4, 2, "4.weight")],
)  # fmt: skip
def test_a_contribution_that_is_not_finite_is_traced_to_its_rank(
    size: int, rank: int, name: str
) -> None:
    seen = {b for b in run_ranks(blamed, size, rank, name) if b is not None}
    assert seen == {(rank, name)}


def closed(world) -> None:
    model = tower()
    sync = exact(model)
    loss_of(model, rows(0, 0)).backward()
    sync.finish()
    sync.close()
    model.zero_grad()
    for k in range(2):
        loss_of(model, rows(1, world.rank, k)).backward()
    wanted = expected(tower, [rows(1, world.rank, k) for k in (0, 1)])
    assert_equal(gradients(model), wanted, 0.0)


def test_after_close_the_model_is_an_ordinary_one() -> None:
    run_ranks(closed, 2)


# --- the library: unisono.replicate


def own_loop(world, counts: list[int]) -> str:
    """Ragged shares (one of them may be empty): gradients of the mean over the global batch."""
    model = tower(seed=world.rank)  # replicate makes them rank 0's
    sync = unisono.replicate(model)
    alone = tower(seed=0)
    g = torch.Generator().manual_seed(8)
    for _ in range(3):
        batches = [torch.randn(c, 6, generator=g) for c in counts]
        mine = batches[world.rank]
        half = len(mine) // 2
        with sync.accumulate():
            loss_of(model, mine[:half]).backward()
        loss_of(model, mine[half:]).backward()
        assert sync.finish(len(mine)) == sum(counts)
        loss_of(alone, torch.cat(batches)).div(sum(counts)).backward()
        assert_equal(gradients(model), gradients(alone), 1e-5)
        for m in (model, alone):
            for p in m.parameters():
                p.data -= 0.01 * p.grad
            m.zero_grad()
    sync.check()
    return sha256(dict(model.named_parameters()))


@pytest.mark.parametrize("counts", [[5], [3, 8], [1, 0, 9], [2, 2, 2, 7]])
def test_replicate_with_ragged_counts(counts: list[int]) -> None:
    assert len(set(run_ranks(own_loop, len(counts), counts))) == 1


def means_of_equal_shares(world) -> None:
    model = tower()
    sync = unisono.replicate(model)
    g = torch.Generator().manual_seed(8)
    x = torch.randn(4 * world.size, 6, generator=g)
    model(world.share(x)).square().mean().backward()
    assert sync.finish() == world.size
    assert_equal(gradients(model), expected(tower, [x], lambda m, x: m(x).square().mean()), 1e-5)


def test_replicate_with_means_needs_no_count() -> None:
    run_ranks(means_of_equal_shares, 3)


def buffers_and_desync(world) -> str:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    model[1].running_mean.fill_(world.rank + 5.0)
    sync = unisono.replicate(model)
    assert model[1].running_mean[0] == 5, "buffers too are rank 0's"
    sync.check(step=1)
    if world.rank == 2:
        model[0].bias.data.view(torch.int32)[3] ^= 1
    try:
        sync.check(step=2)
    except ReplicaError as error:
        return str(error)
    return "equal"


def test_check_finds_one_bit() -> None:
    for told in run_ranks(buffers_and_desync, 3):
        assert told.startswith("replicas differ after step 2: rank 2 in 0.bias, and 1 of 4")


def no_targets(world) -> str:
    model = tower()
    sync = unisono.replicate(model)
    (loss_of(model, rows(0, 0)) * 0).backward()
    try:
        sync.finish(0)
    except UnisonoError as error:
        return str(error)
    return "no error"


def test_counts_that_sum_to_nothing_are_an_error() -> None:
    assert (
        run_ranks(no_targets, 2) == ["finish(count=0): the counts of all replicas sum to 0.0"] * 2
    )


def test_replicate_before_join_says_what_is_missing() -> None:
    with pytest.raises(UnisonoError, match=r"call unisono\.join\(\) first"):
        unisono.replicate(tower())


def sparse(world) -> str:
    """Sparse gradients are made dense; what comes out must be right all the same."""
    make = partial(sparse_model, 9)
    model = make()
    sync = exact(model)
    for step in range(2):
        model.zero_grad()
        batches = [torch.tensor([r, r, step]) for r in range(world.size)]
        loss_of(model, batches[world.rank]).backward()
        sync.finish()
        wanted = expected(make, batches)
        assert_equal(gradients(model), {n: g.to_dense() for n, g in wanted.items()}, 1e-6)
    return "right"


def sparse_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Embedding(7, 5, sparse=True)


def test_sparse_gradients() -> None:
    assert run_ranks(sparse, 2) == ["right"] * 2
