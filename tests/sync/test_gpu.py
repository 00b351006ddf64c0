"""On one GPU, one replica: exact is the reference, bit for bit, through the same group as NCCL's."""

import pytest
import torch
from torch import nn

from unisono.sync import make_strategy
from unisono.sync.codec import SLICE, make_codec
from unisono.sync.digest import check_replicas, fingerprint, sha256
from unisono.sync.ledger import Group, Ledger
from unisono.world import World, from_env, joined

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(strategy: str, leaves: int | None, dtype: torch.dtype) -> str:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to("cuda", dtype)
    options = {"bucket_mb": 0.02, "leaves": leaves, "timeout_s": 60.0}
    sync = make_strategy(strategy, model, Ledger(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    g = torch.Generator().manual_seed(2)
    for _ in range(5):
        for k in range(leaves or 1):
            x = torch.randn(16, 64, generator=g).to("cuda", dtype)
            with sync.micro_batch(last=k == (leaves or 1) - 1):
                model(x).float().square().sum().backward()
        [count] = sync.finish(32.0)
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= count
        optimizer.step()
        optimizer.zero_grad()
    sync.close()
    return sha256(dict(model.named_parameters()))


@pytest.fixture(scope="module")
def world():
    with joined(from_env("cuda")) as world:
        yield world


@pytest.mark.parametrize(
    ("leaves", "dtype"), [(2, torch.float32), (2, torch.float64), (None, torch.bfloat16)]
)
def test_exact_equals_the_reference(world: World, leaves: int | None, dtype: torch.dtype) -> None:
    digests = {name: train(name, leaves, dtype) for name in ("exact", "reference")}
    assert digests["exact"] == digests["reference"]
    assert digests["exact"] != train("exact", (leaves or 1) + 1, torch.float32), "the control"


def test_fingerprints_are_those_of_the_cpu(world: World) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(10_007, dtype=dtype)
        assert torch.equal(fingerprint(x), fingerprint(x.cuda()).cpu())
    check_replicas([("x", x.cuda())], Group("check", Ledger(), 60), 1)


@pytest.mark.parametrize("n", [7, 256, 70_000])
@pytest.mark.parametrize(("name", "stochastic"), [("int8", False), ("int8", True), ("int4", False)])
def test_codes_are_those_of_the_cpu(n: int, name: str, stochastic: bool) -> None:
    codec, values = make_codec(name, stochastic=stochastic), torch.randn(n)
    left, out = torch.empty(n, device="cuda"), torch.empty(n, device="cuda")
    code = codec.encode(values.cuda(), 3, left)
    codec.decode(code, out)
    torch.testing.assert_close(out + left, values.cuda(), rtol=0, atol=2e-6)
    if name == "int8" and n <= SLICE:  # beyond it, other slices have other noise
        assert torch.equal(code.cpu(), codec.encode(values, 3))
    assert torch.equal(code, codec.encode(values.cuda(), 3))
