"""N replicas train the model that one replica would have trained, for every strategy.

The task has what breaks naive averaging: ragged target counts, micro-batches of different sizes,
tied weights, a frozen parameter and one that only some samples use.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import run_ranks
from unisono.sync import make_strategy, zero
from unisono.sync.digest import sha256
from unisono.sync.ledger import Ledger

STEPS, ROWS, LENGTH, VOCAB = 20, 12, 10, 23


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.weight.requires_grad_(False)
        self.up = nn.Linear(16, 33)
        self.down = nn.Linear(33, 16)
        self.rare = nn.Linear(16, 16)
        self.never = nn.Linear(3, 3)
        self.head = nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.frozen(self.embed(ids))
        x = x + self.down(torch.tanh(self.up(x)))
        if rare:
            x = x + self.rare(x)
        return self.head(x)


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a step; between 1 and LENGTH targets a row, so that ranks hold different counts."""
    g = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    keep = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=g)
    labels[torch.arange(LENGTH) >= keep] = -100
    return ids, labels


def leaf_rows(leaf: int, leaves: int) -> slice:
    return slice(leaf * ROWS // leaves, (leaf + 1) * ROWS // leaves)


def sgd(matrices, vectors) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=0.5, momentum=0.9, weight_decay=0.01)


def make(strategy: str, model: nn.Module, ledger: Ledger, leaves: int | None = None):
    """`NAME[-shard|-rows|-bfloat16]`; rows: the embedding's rows travel by themselves."""
    name, _, variant = strategy.partition("-")
    if name == "ddp":
        from unisono.sync.ddp import DDP

        return DDP(model, ledger, optimizer=sgd, find_unused_parameters=True)
    if variant == "rows":
        zero.TABLE_BYTES, zero.TABLE_SHARE = 0, 1.0
    return make_strategy(
        name,
        model,
        ledger,
        optimizer=sgd,
        bucket_mb=0.002,
        leaves=leaves,
        shard=bool(variant),
        wire="bfloat16" if variant == "bfloat16" else "float32",
        timeout_s=60,
    )


def train(world, strategy: str, leaves: int, strict: bool, steps: int = STEPS):
    """`leaves` micro-batches a step over all replicas; returns parameters and losses."""
    torch.manual_seed(7)
    model = Model()
    mine = leaves // world.size
    ledger = Ledger()
    sync = make(strategy, model, ledger, mine if strict else None)
    losses = []
    for step in range(steps):
        ids, labels = global_batch(step)
        loss_sum, count = 0.0, 0
        for k in range(mine):
            rows = leaf_rows(world.rank * mine + k, leaves)
            with sync.micro_batch(last=k == mine - 1):
                rare = bool((ids[rows, 0] % 2 == 0).any())
                logits = sync.model(ids[rows], rare)
                loss = F.cross_entropy(
                    logits.flatten(0, 1), labels[rows].flatten(), reduction="sum"
                )
                loss.backward()
            loss_sum += loss.item()
            count += int((labels[rows] != -100).sum())
        total_loss, tokens = sync.finish(loss_sum, count)
        sync.update(divide_by=tokens, max_norm=1.0, learning_rate=0.5)
        losses.append(total_loss / tokens)
    sync.settle()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    return state, losses, sha256(state)


def difference(a: dict, b: dict) -> float:
    """Largest relative difference of a tensor, in the L2 norm."""
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in a)


@pytest.fixture(scope="module")
def one() -> dict:
    """The whole global batch in one backward pass, on one process, in a plain PyTorch loop."""
    torch.manual_seed(7)
    model = Model()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        ids, labels = global_batch(step)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for leaf in range(LEAVES):
            rows = leaf_rows(leaf, LEAVES)
            use = bool((ids[rows, 0] % 2 == 0).any())
            loss = loss + F.cross_entropy(
                model(ids[rows], use).flatten(0, 1), labels[rows].flatten(), reduction="sum"
            )
        (loss / (labels != -100).sum()).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


LEAVES = 12
EXACT = ["exact", "exact-shard", "exact-rows", "reference", "ddp"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bfloat16_on_the_wire_stays_close_and_replicas_equal(size: int, one: dict) -> None:
    """A gradient is rounded once, to 2^-9 of itself; weights follow the float32 masters."""
    results = run_ranks(train, size, "exact-bfloat16", LEAVES, False)
    for state, losses, digest in results:
        assert 1e-6 < difference(state, one) <= 1e-2
        assert digest == results[0][2], "replicas differ"
        assert losses == results[0][1]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("strategy", EXACT)
def test_parameters_equal_one_process(strategy: str, size: int, one: dict) -> None:
    """20 SGD steps, 12 micro-batches of ragged targets in all, accumulation 12, 6 and 3."""
    results = run_ranks(train, size, strategy, LEAVES, False)
    for state, losses, digest in results:
        assert difference(state, one) <= 1e-5
        assert digest == results[0][2], "replicas differ"
        assert losses == results[0][1]


@pytest.mark.parametrize("strategy", EXACT)
def test_one_micro_batch_a_rank(strategy: str) -> None:
    """Accumulation 1: four ranks with one micro-batch each equal one rank with four."""
    one, _, _ = run_ranks(train, 1, strategy, 4, False)[0]
    for state, _, _ in run_ranks(train, 4, strategy, 4, False):
        assert difference(state, one) <= 1e-5


@pytest.mark.parametrize("leaves", [8, 24])
def test_strict_digests_are_equal_at_any_power_of_two(leaves: int) -> None:
    digests = {
        size: {r[2] for r in run_ranks(train, size, "exact", leaves, True, 6)}
        for size in (1, 2, 4, 8)
    }
    assert len(set.union(*digests.values())) == 1, digests


def test_strict_equals_the_reference_bit_for_bit() -> None:
    exact = run_ranks(train, 2, "exact", LEAVES, True, 6)[0][2]
    assert run_ranks(train, 2, "reference", LEAVES, True, 6)[0][2] == exact
    assert run_ranks(train, 1, "reference", LEAVES, True, 6)[0][2] == exact


def test_default_mode_is_not_strict() -> None:
    """The control of the strict tests: a running sum does give other bits."""
    digests = {size: run_ranks(train, size, "exact", 8, False, 6)[0][2] for size in (1, 4)}
    assert digests[1] != digests[4]
