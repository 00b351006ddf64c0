"""Weights that return during the forward pass, of a model of which torch.compile has taken parts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ranks import run_ranks
from unisono.sync import make_strategy
from unisono.sync.ledger import Ledger

STEPS, RATE = 5, 0.05


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Blocks between an embedding and an output layer that is only a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.out = nn.Parameter(torch.randn(40, 16))
        self.mix: Callable = mix

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.mix(x, self.out)


def mix(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ out.T)


BACKEND = "aot_eager"  # the same kernels as eager, so that results are equal to the bit


def nothing(model: Model) -> nn.Module:
    return model


def layers(model: Model) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=BACKEND)
    return model


def wrapped_layers(model: Model) -> nn.Module:
    for i in range(3):
        model.blocks[i] = torch.compile(model.blocks[i], backend=BACKEND)
    return model


def function(model: Model) -> nn.Module:
    """Its weights cannot be known from outside."""
    model.mix = torch.compile(mix, backend=BACKEND)
    return model


def whole(model: Model) -> nn.Module:
    return torch.compile(model, backend=BACKEND)


def whole_and_layers(model: Model) -> nn.Module:
    return whole(layers(model))


def sgd(matrices: list, vectors: list) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=1.0, momentum=0.9)


def train(world: Any, how: str, backend: str = BACKEND) -> tuple[dict, dict, bool, bool, list[str]]:
    """Weights; graph breaks; whether there were graphs, and newer ones after the second step; and
    whose weights are used unseen."""
    from torch._dynamo.utils import counters

    global BACKEND
    BACKEND = backend
    counters.clear()
    model = globals()[how](Model())
    sync = make_strategy(
        "exact", model, Ledger(), optimizer=sgd, shard=True, bucket_mb=0.001, timeout_s=60
    )
    for step in range(STEPS):
        for k in range(2):
            g = torch.Generator().manual_seed(100 * step + 10 * world.rank + k)
            ids = torch.randint(40, (3, 5), generator=g)
            with sync.micro_batch(last=k == 1):
                sync.model(ids).square().sum().backward()
        sync.finish()
        sync.update(divide_by=12.0, max_norm=1.0, learning_rate=RATE)
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
    newer = counters["stats"]["unique_graphs"] > graphs
    names = [n.replace("_orig_mod.", "") for n, _ in sync.named_parameters()]
    unseen = [names[i] for i in sync.layout()["unseen"]]
    sync.settle()
    weights = {
        n.replace("_orig_mod.", ""): p.detach().tolist() for n, p in model.named_parameters()
    }
    sync.close()
    model(torch.zeros(1, 1, dtype=torch.int64))  # an ordinary one again
    return weights, dict(counters["graph_break"]), graphs > 0, newer, unseen


def layers_and_function(model: Model) -> nn.Module:
    return function(layers(model))


@pytest.fixture(scope="module")
def eager() -> dict:
    [(weights, *rest)] = same(run_ranks(train, 2, "nothing"))
    assert rest == [{}, False, False, []]
    return weights


def same(results: list) -> list:
    return [r for k, r in enumerate(results) if r not in results[:k]]


@pytest.mark.parametrize(
    "how", ["layers", "wrapped_layers", "function", "whole", "whole_and_layers"]
)
def test_a_compiled_part_trains_the_same_in_whole_graphs(eager: dict, how: str) -> None:
    """No graph breaks, and none is made again and again; what a compiled module uses is known."""
    [(weights, *rest)] = same(run_ranks(train, 2, how))
    assert weights == eager
    assert rest == [{}, True, False, []]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_runs_in_c_trains_the_same(eager: dict, tmp_path: Path) -> None:
    """Nothing of it is seen, as with TorchScript: the first step finds the function's weight."""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    results = run_ranks(train, 2, "layers_and_function", "inductor", timeout=380, env=env)
    [(weights, *rest)] = same(results)
    for name in eager:
        # Its kernels round otherwise; a weight of the step before is off by a thousand times as much.
        ours, theirs = torch.tensor(weights[name]), torch.tensor(eager[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert rest[:3] == [{}, True, False]
    assert set(rest[3]) <= {"out"}, "only what a function uses is unseen"
