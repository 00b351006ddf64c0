"""PowerSGD: exact until it starts, then near, the same bits everywhere, nothing lost on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_rows import text_loss, words
from test_zero import RATE, Alone, adamw, difference, plain_sgd, take, weights
from torch import nn

from ranks import run_ranks
from unisono.sync import make_strategy
from unisono.sync.digest import sha256
from unisono.sync.ledger import Ledger
from unisono.sync.powersgd import PowerSGD, _Stack, is_low_rank, travelling_values
from unisono.sync.update import OWN


class Net(nn.Module):
    """Two matrices of one shape, one of another, one too small, an embedding, vectors, some unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(41, 24)
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.wide = nn.Linear(24, 30, bias=False)
        self.head = nn.Linear(30, 41)
        self.rare, self.never = nn.Linear(24, 24), nn.Linear(24, 24)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.use_rare = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = torch.tanh(self.b(torch.tanh(self.a(x)))) + self.frozen(x)
        if self.use_rare:
            x = x + self.rare(x)
        return self.head(torch.tanh(self.wide(x)))


def thin(model: nn.Module, optimizer: Callable = adamw, **changes: Any) -> PowerSGD:
    options: dict = {"low_rank": (2, 0), "timeout_s": 60, **changes}
    sync = make_strategy("powersgd", model, Ledger(), optimizer=optimizer, **options)
    assert isinstance(sync, PowerSGD)
    return sync


def steps_of(world, sync: PowerSGD, alone: Alone | None, steps: range, mine: int = 1) -> list[str]:
    digests = []
    for step in steps:
        for model in [sync.model, *([alone.model] if alone else [])]:
            model.use_rare = step % 3 == 1
        take(sync, [lambda k=k, s=step: text_loss(sync.model, words(s, world.rank, k)) for k in range(mine)])  # fmt: skip
        if alone:
            alone.step([lambda r=r, k=k, s=step: text_loss(alone.model, words(s, r, k)) for r in range(world.size) for k in range(mine)])  # fmt: skip
        digests.append(sha256(dict(sync.replicated())))
    return digests


def near(world, start: int, rank: int, mine: int) -> tuple[list[str], list[float]]:
    sync, alone = thin(Net(), low_rank=(rank, start)), Alone(Net())
    digests = steps_of(world, sync, alone, range(4), mine)
    early = difference(weights(sync.model), weights(alone.model))
    digests += steps_of(world, sync, alone, range(4, 20), mine)
    return digests, [early, difference(weights(sync.model), weights(alone.model))]


@pytest.mark.parametrize(("size", "mine"), [(2, 1), (3, 2), (4, 1), (8, 1)])
def test_exact_until_it_starts_then_near_and_equal_everywhere(size: int, mine: int) -> None:
    found = run_ranks(near, size, 4, 5, mine, timeout=120)
    assert all(f[0] == found[0][0] for f in found), "replicas differ"
    early, late = found[0][1]
    assert early <= 1e-5
    assert 1e-4 < late <= 0.35


def test_more_columns_are_nearer() -> None:
    found = [run_ranks(near, 2, 0, rank, 1)[0][1][1] for rank in (1, 6)]
    assert found[1] < 0.5 * found[0]


def test_which_matrices_are_made_thin() -> None:
    assert is_low_rank((24, 24), 6) and not is_low_rank((24, 24), 7)
    assert not is_low_rank((1000,), 1) and is_low_rank((8, 8, 9), 1)
    shapes = [(41, 24), (24, 24), (24,), (30, 24)]
    wanted = 41 * 24 + 2 * (24 + 24) + 24 + 2 * (30 + 24)
    assert travelling_values(shapes, [True, False, False, False], 2) == wanted


def bytes_sent(world, rank: int) -> None:
    """To the byte."""
    model = Net()
    sync = thin(model, low_rank=(rank, 0))
    before = len(sync.ledger.entries)
    steps_of(world, sync, None, range(1))
    new = [e for e in list(sync.ledger.entries)[before:] if e.group == "low-rank"]
    params = [p for _, p in sync.named]
    values = travelling_values([p.shape for p in params], [p is model.embed.weight for p in params], rank)  # fmt: skip
    n = world.size
    assert abs(sum(e.sent_bytes for e in new) - 2 * 4 * values * (n - 1) / n) < len(new)
    assert len(new) == 3


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_of_the_formula(size: int) -> None:
    for rank in (1, 2, 6):
        run_ranks(bytes_sent, size, rank)


class Pull(nn.Module):
    """Each rank pulls with a force of its own, of full rank, the same in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 20))


def pulled(world, forgetful: bool) -> float:
    """How far from the right place, as a share of the way."""
    if forgetful:
        commit = _Stack.commit

        def forget(self: _Stack) -> None:
            self._matrices = torch.zeros_like(self.left)
            commit(self)

        _Stack.commit = forget
    g = torch.Generator().manual_seed(0)
    forces = torch.randn(world.size, 16, 20, generator=g)
    sync = thin(Pull(), plain_sgd)
    for _ in range(60):
        take(sync, [lambda: (sync.model.weight * forces[world.rank]).sum()], 1.0, max_norm=0.0)
    wanted = -RATE * 60 * forces.sum(0)
    return float((sync.model.weight.detach() - wanted).norm() / wanted.norm())


def test_what_a_gradient_loses_is_sent_later() -> None:
    assert run_ranks(pulled, 2, False)[0] < 0.2
    assert run_ranks(pulled, 2, True)[0] > 0.5, "the control"


def unused(world) -> bool:
    """What no replica has a gradient of, in a step that others use: its state stays, and its weight."""
    sync = thin(Net())
    steps_of(world, sync, None, range(1, 2))  # `rare` is used
    steps_of(world, sync, None, range(2, 3))
    before, weight = own_state(sync), sync.model.rare.weight.detach().clone()
    steps_of(world, sync, None, range(5, 7))  # ids of other steps; 5 and 6 do not use it
    after = own_state(sync)
    keys = [k for k in before if "rare.weight" in k]
    assert len(keys) == world.size + 1 and before[keys[0]].any()
    assert torch.equal(weight, sync.model.rare.weight)
    assert not any(torch.equal(before[k], after[k]) for k in before if "a.weight" in k)
    return all(torch.equal(before[k], after[k]) for k in keys)


def test_what_nobody_uses_stays_as_it_was() -> None:
    assert all(run_ranks(unused, 2))


def own_state(sync: PowerSGD) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in sync.optimizer_state() if OWN in k}


def given_up(world) -> list[str]:
    sync, twin = thin(Net()), thin(Net())
    for step in range(4):
        steps_of(world, sync, None, range(step, step + 1))
        steps_of(world, twin, None, range(step, step + 1))
        before = own_state(sync)
        for bad in (False, True):
            with sync.micro_batch():
                factor = float("nan") if bad and world.rank == 1 else 1.0
                (text_loss(sync.model, words(50, world.rank)) * factor).backward()
            sync.finish()
            if not bad:
                sync.discard()
                continue
            done = sync.update(divide_by=4.0, max_norm=1.0, learning_rate=RATE)
            assert not done.committed
            assert (sync.blame() or (-1, ""))[0] == (1 if world.rank == 1 else -1)
        after = own_state(sync)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    return [sha256(dict(s.replicated())) for s in (sync, twin)]


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_that_is_given_up_leaves_everything_as_it_was(size: int) -> None:
    assert len({d for pair in run_ranks(given_up, size) for d in pair}) == 1


def continued(world, saved: Any, steps: range) -> tuple[dict, dict, dict, str]:
    model, note = Net(), ""
    if saved:
        model.load_state_dict(saved[0])
    sync = thin(model, low_rank=(2, 2), layout=saved[2] if saved else None)
    if saved:
        own = {k: v for k, v in saved[1].items() if OWN in k}
        sync.load_optimizer_state({k: v for k, v in saved[1].items() if k not in own})
        note = sync.load_own_state(own)
    steps_of(world, sync, None, steps)
    state = {n: t.clone() for n, t in sync.state_dict().items()}
    return state, {k: v.clone() for k, v in sync.optimizer_state()}, sync.layout(), note


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_resumed_run_has_the_same_bits(size: int, at: int) -> None:
    whole = run_ranks(continued, size, None, range(7))[0]
    half = run_ranks(continued, size, None, range(at))[0]
    again = run_ranks(continued, size, half, range(at, 7))[0]
    assert [sha256(x) for x in whole[:2]] == [sha256(x) for x in again[:2]]
    assert again[3] == "" and whole[2] == {"updates": 7}


def test_at_another_number_of_replicas_the_sum_stays() -> None:
    saved = run_ranks(continued, 3, None, range(4))[0]
    found = run_ranks(continued, 2, saved, range(0))[0]
    assert found[3] == "error feedback of 3 replicas is divided evenly among 2"
    for name in ("a.weight", "wide.weight"):
        sums = [
            sum(
                v
                for k, v in state[1].items()
                if k.startswith("feedback@") and k.endswith(f".{name}")
            )
            for state in (saved, found)
        ]
        assert sums[0].any()
        torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-6)
        q = f"warm_start@0.{name}"
        assert torch.equal(saved[1][q], found[1][q])
