"""The output layer's weight gradient comes before its input's, and changes no bit (sync/early.py)."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from unisono.sync.digest import sha256
from unisono.sync.early import linear
from unisono.sync.ledger import Ledger
from unisono.sync.zero import Zero


def operands(dtype: torch.dtype = torch.float32, rows: int = 25, k: int = 64, m: int = 300):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, rows, k, generator=g, dtype=dtype).requires_grad_()
    return x, Parameter(torch.randn(m, k, generator=g, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_is_autograds(dtype: torch.dtype) -> None:
    x, weight = operands(dtype)
    found = []
    for product in (F.linear, linear):
        y = product(x, weight)
        # Used again, by another function too: autograd adds.
        total = y.float().square().sum() + product(2 * x, weight).float().sum() + weight.norm()
        total.backward()
        found.append((y.detach(), x.grad, weight.grad))
        x.grad = weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def products_before_the_weights_gradient(product) -> int:
    """Of the two in the backward pass."""
    x, weight = operands()
    y, counts = product(x, weight).sum(), []
    with Products() as products:
        weight.register_post_accumulate_grad_hook(lambda _: counts.append(products.count))
        y.backward()
    assert products.count == 2
    return counts[0]


def test_the_weights_gradient_is_first() -> None:
    assert products_before_the_weights_gradient(linear) == 1
    assert products_before_the_weights_gradient(F.linear) == 2  # else this file is of no use


def test_gradients_asked_for_one_by_one() -> None:
    x, weight = operands()
    wanted = torch.autograd.grad(F.linear(x, weight).sum(), [x, weight])
    found = torch.autograd.grad(linear(x, weight).sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    linear(x, weight).sum().backward(inputs=[x])
    assert torch.equal(x.grad, wanted[0])
    assert weight.grad is None
    linear(x.detach(), weight).sum().backward()
    assert torch.equal(weight.grad, wanted[1])


def test_second_derivatives() -> None:
    x, weight = operands(torch.float64, rows=2, k=3, m=5)
    assert torch.autograd.gradcheck(linear, (x, weight))
    assert torch.autograd.gradgradcheck(linear, (x, weight))


def test_a_weight_changed_before_the_backward_pass_is_an_error() -> None:
    x, weight = operands()
    y = linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between its use and the backward pass"):
        y.sum().backward()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(4096, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4096, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.hidden = torch.tanh(self.layer(self.embedding(ids)))
        return self.head(self.hidden)


def train_checkpointed(world, reentrant: bool) -> str:
    """The output layer recomputed in the backward pass, where torch functions are not seen."""
    model, digests = Tied(), []
    model.head.weight = Parameter(model.embedding.weight.detach().clone())
    for checkpointed in (False, True):
        copy = deepcopy(model)
        if checkpointed:
            plain = copy.head.forward
            copy.head.forward = partial(checkpoint, plain, use_reentrant=reentrant)
        sgd = partial(torch.optim.SGD, lr=0.1)
        sync = Zero(copy, Ledger(), optimizer=lambda a, b: sgd([*a, *b]), timeout_s=60)  # noqa: B023
        for step in range(3):
            g = torch.Generator().manual_seed(10 * step + world.rank)
            with sync.micro_batch():
                copy(torch.randint(0, 4096, (2, 8), generator=g)).square().sum().backward()
            sync.finish()
            sync.update(divide_by=1.0, max_norm=1.0, learning_rate=0.1)
        digests.append(sha256(sync.state_dict()))
        sync.close()
    assert digests[0] == digests[1]
    return digests[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_output_layer_that_is_recomputed_is_autograds(reentrant: bool) -> None:
    assert len(set(run_ranks(train_checkpointed, 2, reentrant))) == 1


def sent_before_the_second_product(world, tied: bool) -> list[int]:
    """By step: how many messages with gradients leave after one product of the backward pass."""
    model = Tied()
    if not tied:
        model.head.weight = Parameter(model.embedding.weight.detach().clone())
    ledger = Ledger()
    sgd = partial(torch.optim.SGD, lr=0.1)
    sync = Zero(model, ledger, optimizer=lambda a, b: sgd([*a, *b]), timeout_s=60)
    found = []
    for step in range(2):
        g = torch.Generator().manual_seed(10 * step + world.rank)
        with sync.micro_batch():
            loss = model(torch.randint(0, 4096, (2, 8), generator=g)).square().sum()
            with Sent(ledger) as sent:
                loss.backward()
        found.append(sent.at[1] - sent.at[0])
        sync.finish()
        sync.update(divide_by=1.0, max_norm=1.0, learning_rate=0.1)
    sync.close()
    return found


class Sent(TorchDispatchMode):
    """How many messages with gradients had left before each matrix product."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.at: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.at.append(sum(e.group == "scatter" for e in self.ledger.entries))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [True, False])
def test_it_travels_during_the_second_product(tied: bool) -> None:
    for first, second in run_ranks(sent_before_the_second_product, 2, tied):
        assert first == 0  # nothing is known yet
        assert second > 0
