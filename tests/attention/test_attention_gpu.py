"""The same bounds on a GPU: operators of torch for tiles, and every kind of step around them."""

import pytest
import torch
from dense import SCALE, gradients, qkv, worst

from unisono.attention import kernel
from unisono.attention.local import attend
from unisono.attention.mask import Documents, Mask
from unisono.attention.pattern import bigbird

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTH = 900
MASKS = {
    "causal": Mask(),
    "window": Mask(window=70, sinks=3),
    "packed": Mask(documents=Documents.of_ids(torch.arange(LENGTH)[None] // 137)),
    "bigbird": Mask(pattern=bigbird(64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_tile_against_float64(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, dout = (x.to("cuda", dtype) for x in qkv(length=200, width=64))
    seen = torch.ones(200, 200, dtype=torch.bool, device="cuda").tril()
    how = {"mask": seen} if masked else {"causal": True}
    out, lse = kernel.forward(q, k, v, scale=SCALE, **how)
    found = [out, lse, *kernel.backward(dout, q, k, v, out, lse, scale=SCALE, **how)]
    wanted = gradients(dout, (q, k, v), seen)
    bound = 1e-3 if dtype == torch.float32 else 0.15  # TF32 may be on
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= bound


@pytest.mark.parametrize("name", MASKS)
def test_whole_sequences_against_the_cpu(name: str) -> None:
    q, k, v, dout = qkv(length=LENGTH, width=64)
    wanted = gradients(dout, (q, k, v), MASKS[name].spell(0, LENGTH, 0, LENGTH))
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, MASKS[name], scale=SCALE)
    grads = torch.autograd.grad(out, leaves, dout.cuda())
    assert worst(out.detach().cpu(), wanted[0]) <= 1e-3
    for one, right in zip(grads, wanted[2:]):
        assert worst(one.cpu(), right) <= 5e-3
