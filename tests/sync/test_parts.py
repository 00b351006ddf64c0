"""Every strategy measures the norms that a plain loop finds in the same ranks' gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_parity import Model, global_batch, leaf_rows, make
from test_sharded import Blocks
from torch import nn

from ranks import run_ranks
from unisono.observe import noise
from unisono.observe.noise import Averages, Meter, estimate
from unisono.sync.ledger import Ledger
from unisono.sync.parts import Parts

STEPS, LEAVES = 14, 12


def loss_and_count(model, step: int, leaf: int, always: bool) -> tuple[torch.Tensor, int]:
    ids, labels = global_batch(step)
    rows = leaf_rows(leaf, LEAVES)
    rare = always or bool((ids[rows, 0] % 2 == 0).any())  # DDP wants the same of each micro-batch
    logits = model(ids[rows], rare).flatten(0, 1)
    loss = F.cross_entropy(logits, labels[rows].flatten(), reduction="sum")
    return loss, int((labels[rows] != -100).sum())


def new_model(strategy: str) -> nn.Module:
    torch.manual_seed(7)
    return Blocks() if strategy.startswith("sharded") else Model()


def measure(world, strategy: str, strict: bool) -> tuple[list[tuple], float, float]:
    """What all ranks told of each step, and what came of it."""
    torch.manual_seed(7)
    noise.WARM_STEPS = 0
    mine = LEAVES // world.size
    ledger, model = Ledger(), new_model(strategy)
    if strategy.startswith("sharded"):
        from test_parity import sgd

        from unisono.mesh import Mesh
        from unisono.sync import make_strategy

        axes = Mesh(*(int(x) for x in strategy.partition("-")[2].split("x")))
        sync = make_strategy("sharded", model, ledger, optimizer=sgd, mesh=axes, timeout_s=60)
    else:
        sync = make(strategy, model, ledger, mine if strict else None)
    meter, heard = Meter(budget=math.inf), []
    for step in range(STEPS):
        sync.parts.begin(measure=meter.due())
        counts, last = [], mine - 1
        for k in range(mine):
            with sync.micro_batch(last=k == last):
                loss, count = loss_and_count(
                    sync.model, step, world.rank * mine + k, strategy == "ddp"
                )
                loss.backward()
            counts.append(count)
            sync.parts.after(k + 1, mine, sync.local_gradients())
        tokens, *sums = sync.finish(sum(counts), *meter.told())
        heard.append(tuple(sums[:3]))
        meter.hear(sums)
        done = sync.update(divide_by=tokens, max_norm=1.0, learning_rate=0.5)
        squares, spent_s = sync.parts.end()
        assert spent_s > 0
        meter.keep(squares, sync.parts.sizes(counts), spent_s, done.gradient_norm, tokens)
    sync.settle()
    assert meter.every == 1
    scale = meter.scale()
    assert scale is not None
    return heard[1:], scale.tokens, scale.batch


def plain(strategy: str, size: int, kind: str) -> tuple[list[tuple], float, float]:
    """The same from one process that keeps every micro-batch's gradient."""
    model = new_model(strategy)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.01)
    told, averages, mine = [], Averages(), LEAVES // size
    for step in range(STEPS):
        gradients, counts = [], []
        for leaf in range(LEAVES):
            optimizer.zero_grad()
            loss, count = loss_and_count(model, step, leaf, strategy == "ddp")
            loss.backward()
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
            counts.append(count)
        flat = torch.stack([torch.cat([g.flatten() for g in leaf]) for leaf in gradients]).double()
        cuts = {
            "micro-batch": [range(k, k + 1) for k in range(LEAVES)],
            "rank": [range(r * mine, (r + 1) * mine) for r in range(size)],
            "half": [range(LEAVES // 2)],
        }[kind]
        parts = [(float(flat[c].sum(0).square().sum()), sum(counts[i] for i in c)) for c in cuts]
        q, m = sum(square / n for square, n in parts), sum(n for _, n in parts)
        tokens = sum(counts)
        total = flat.sum(0)
        if step < STEPS - 1:  # what the last step has is never told
            told.append((q, m, len(parts)))
            s = float(total.square().sum()) / tokens
            averages.add(*estimate(q, m, len(parts), s, tokens), tokens)
        used = [any(leaf[i].any() for leaf in gradients) for i in range(len(params))]
        pieces = torch.split((total / tokens).float(), [p.numel() for p in params])
        for p, piece, is_used in zip(params, pieces, used):
            p.grad = piece.view_as(p).clone() if is_used else None
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    scale = averages.scale()
    assert scale is not None
    return told, scale.tokens, scale.batch


CASES = [
    *((name, n, False, "rank") for name in ("exact", "ddp", "exact-shard", "exact-rows") for n in (2, 3)),
    ("exact-shard", 4, False, "rank"),
    ("exact-rows", 4, False, "rank"),
    ("exact-bfloat16", 2, False, "rank"),
    *((name, 1, False, "half") for name in ("exact", "ddp", "sharded-1x1")),
    *(("exact", n, True, "micro-batch") for n in (1, 2, 4)),
    *(("reference", n, False, "micro-batch") for n in (1, 2)),
    *((f"sharded-{mesh}", 4, False, "rank") for mesh in ("1x4", "2x2", "4x1")),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "size", "strict", "kind"), CASES)
def test_norms_are_those_of_a_plain_loop(strategy, size, strict, kind) -> None:
    results = run_ranks(measure, size, strategy, strict)
    assert all(r == results[0] for r in results), "ranks must agree on what they heard"
    heard, tokens, batch = results[0]
    told, plain_tokens, plain_batch = plain(strategy, size, kind)
    near = 0.05 if "bfloat16" in strategy else 1e-4
    for (q, m, c), (q2, m2, c2) in zip(heard, told, strict=True):
        assert (m, c) == (m2, c2)
        assert q == pytest.approx(q2, rel=near)
    assert tokens == pytest.approx(plain_tokens, rel=5 * near)
    assert batch == pytest.approx(plain_batch)


def test_the_first_half_alone_is_a_part() -> None:
    parts = Parts("half")
    parts.begin(measure=True)
    for k in range(5):
        parts.after(k + 1, 5, iter([("a", torch.full((4,), 3.0)), ("b", torch.tensor(8.0))]))
    assert parts.sizes([1, 2, 4, 8, 16]) == [3]
    squares, spent_s = parts.end()
    assert squares == [100.0] and spent_s > 0
    assert parts.end() == ([], 0.0)


def test_one_micro_batch_has_no_half() -> None:
    parts = Parts("half")
    parts.begin(measure=True)
    parts.after(1, 1, iter([("a", torch.ones(4))]))
    assert parts.sizes([7]) == [0]
    assert parts.end()[0] == []


def test_nothing_is_kept_unless_measured() -> None:
    parts = Parts("rank")
    parts.add(torch.ones(3))
    parts.cut()
    assert parts.end() == ([], 0.0)


def own_loop(world) -> tuple[float, float]:
    """A loop of one's own with uneven shares; the noise scale it is told, and the plain one."""
    import copy

    import unisono

    Meter.__init__.__defaults__ = (math.inf,)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1))
    sync = unisono.replicate(model, bucket_mb=0.0001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averages, data = Averages(), torch.Generator().manual_seed(5)
    for step in range(20):
        shares = []
        for rank in range(world.size):
            x = torch.randn(4 + 3 * rank + step % 3, 6, generator=data)
            shares.append((x, x[:, :1] ** 2))
        gradients = []
        for x, y in shares:
            plain = copy.deepcopy(model)
            plain.zero_grad()
            F.mse_loss(plain(x), y, reduction="sum").backward()
            gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters()]).double())
        counts = [len(x) for x, _ in shares]
        if noise.WARM_STEPS <= step < 19:
            q = sum(float(g @ g) / n for g, n in zip(gradients, counts, strict=True))
            whole, total = sum(gradients), sum(counts)
            s = float(whole @ whole) / total
            averages.add(*estimate(q, total, world.size, s, total), total)
        x, y = shares[world.rank]
        first = len(x) // 2
        with sync.accumulate():
            F.mse_loss(model(x[:first]), y[:first], reduction="sum").backward()
        F.mse_loss(model(x[first:]), y[first:], reduction="sum").backward()
        sync.finish(len(x))
        optimizer.step()
        optimizer.zero_grad()
    found, plain_scale = sync.noise_scale(), averages.scale()
    sync.close()
    assert found is not None and plain_scale is not None
    assert found.batch == pytest.approx(plain_scale.batch)
    return found.tokens, plain_scale.tokens


def test_a_loop_of_one_s_own_is_told_its_noise_scale() -> None:
    results = run_ranks(own_loop, 3)
    assert len({found for found, _ in results}) == 1
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-4)
