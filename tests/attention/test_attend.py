"""Whole sequences: autograd, what a changed token may change, memory, and per-layer mixtures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense import SCALE, gradients, qkv, some, worst
from torch.utils._python_dispatch import TorchDispatchMode

import unisono
from unisono.attention.local import attend
from unisono.attention.mask import Documents, Mask
from unisono.attention.pattern import bigbird, dilated, function, strided

LENGTH = 900


def packed(**fields: object) -> Mask:
    ids = torch.stack([torch.arange(LENGTH) // 137, torch.arange(LENGTH) // 400])
    return Mask(documents=Documents.of_ids(ids), **fields)


MASKS = {
    "causal": Mask(),
    "window": Mask(window=70),
    "sinks": Mask(window=70, sinks=3),
    "chunk": Mask(chunk=130),
    "packed": packed(),
    "packed window": packed(window=50),
    "bigbird": Mask(pattern=bigbird(64)),
    "strided": Mask(pattern=strided(64, 4)),
    "dilated": Mask(pattern=dilated(40, 3)),
    "function": Mask(pattern=function(lambda i, j, h: (i - j) % 7 != 3)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sinks", [False, True])
def test_autograd_gives_what_float64_gives(name: str, sinks: bool) -> None:
    leaves = list(qkv(length=LENGTH)[:3]) + ([some(4, seed=7)] if sinks else [])
    dout = qkv(length=LENGTH)[3]
    wanted = gradients(dout, leaves, MASKS[name].spell(0, LENGTH, 0, LENGTH))
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves[:3], MASKS[name], scale=SCALE, sinks=leaves[3] if sinks else None)
    found = torch.autograd.grad(out, leaves, dout)
    assert worst(out.detach(), wanted[0]) <= 2e-6
    for one, right in zip(found[:3], wanted[2:5]):
        assert worst(one, right) <= 5e-6
    if sinks:  # a sum over all queries
        assert worst(found[3] / wanted[5].norm(), wanted[5] / wanted[5].norm()) <= 5e-6


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("token", [0, 136, 411, 899])
def test_a_changed_token_changes_what_may_see_it_and_nothing_else(name: str, token: int) -> None:
    """Exactly nothing: a leak of one part in a million would show."""
    mask = MASKS[name]
    q, k, v, dout = qkv(length=LENGTH)
    may = mask.spell(0, LENGTH, 0, LENGTH)[:, 0, :, token].expand(2, -1)
    out = attend(q, k, v, mask, scale=SCALE)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, token] += 1
    v2[:, :, token] += 1
    changed = (attend(q, k2, v2, mask, scale=SCALE) != out).any(-1).any(1)
    assert not changed[~may].any()
    assert changed[may].any()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    only = torch.zeros_like(dout)
    only[:, :, token] = 1
    _, dk, dv = torch.autograd.grad(attend(*leaves, mask, scale=SCALE), leaves, only)
    sees = mask.spell(0, LENGTH, 0, LENGTH)[:, 0, token].expand(2, -1)
    for gradient in (dk, dv):
        assert not (gradient != 0).any(-1).any(1)[~sees].any()


def test_the_probe_of_leaks_finds_a_leak() -> None:
    """Its control: the same change under a window one wider reaches one query more."""
    q, k, v, _ = qkv(length=LENGTH)
    k2 = k.clone()
    k2[:, :, 300] += 1
    for window, reached in ((70, False), (71, True)):
        mask = Mask(window=window)
        a, b = attend(q, k, v, mask, scale=SCALE), attend(q, k2, v, mask, scale=SCALE)
        assert (a[:, :, 370] != b[:, :, 370]).any().item() is reached


def test_packed_documents_are_as_if_alone() -> None:
    q, k, v, _ = qkv(length=LENGTH)
    for fields in ({}, {"window": 50, "sinks": 2}, {"chunk": 60}, {"prefix": 9}):
        out = attend(q, k, v, packed(**fields), scale=SCALE)
        for a, b in ((137, 274), (822, 900)):
            part = [x[:1, :, a:b] for x in (q, k, v)]
            assert worst(attend(*part, Mask(**fields), scale=SCALE), out[:1, :, a:b]) <= 2e-6


def test_a_decoding_step_sees_what_the_whole_would() -> None:
    q, k, v, _ = qkv(length=LENGTH)
    for mask in (Mask(), Mask(window=70, sinks=3), Mask(chunk=130)):
        whole = attend(q, k, v, mask, scale=SCALE)
        step = attend(
            q[:, :, 700:701], k[:, :, :701], v[:, :, :701], mask, scale=SCALE, q_start=700
        )
        assert worst(step, whole[:, :, 700:701]) <= 2e-6


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return found


@pytest.mark.parametrize("name", [*MASKS, "softcap"])
def test_no_tensor_grows_with_the_square(name: str) -> None:
    """At 4,096 tokens of 1 head nothing is a quarter of S x S; the definition itself is caught."""
    length = 4096
    mask = MASKS.get(name, Mask())
    if mask.documents is not None:
        mask = Mask(
            window=mask.window, documents=Documents.of_ids(torch.arange(length)[None] // 300)
        )
    leaves = [some(1, 1, length, 16, seed=n).requires_grad_() for n in range(3)]
    with Largest() as largest:
        attend(*leaves, mask, scale=SCALE, softcap=3.0 if name == "softcap" else None).sum().backward()  # fmt: skip
    assert largest.elements < length * length / 4
    with Largest() as largest, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    assert largest.elements >= length * length


PEAK = """
import resource, sys, torch
from unisono.attention.local import attend
from unisono.attention.mask import Mask
torch.set_num_threads(1)
length = int(sys.argv[1])
def step(length):
    leaves = [torch.randn(1, h, length, 64).requires_grad_() for h in (2, 1, 1)]
    attend(*leaves, Mask(window=512) if sys.argv[2] == "window" else Mask(), scale=0.125).sum().backward()
step(512)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(length)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024)
"""


@pytest.mark.parametrize("kind", ["window", "causal"])
def test_peak_memory_is_linear(kind: str) -> None:
    """Of fresh processes, above what one small pass needs: twice the tokens, at most 2.15 times."""
    path = str(Path(unisono.__file__).parents[1])
    peaks = []
    for length in (8192, 16384):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(length), kind],
            capture_output=True, text=True, timeout=120, check=True, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks.append(int(done.stdout))
    assert peaks[1] <= 2.15 * peaks[0]
    assert peaks[1] <= 80e6 * 1.1


def test_layers_of_different_kinds_share_nothing() -> None:
    """A Gemma-like mixture: each mask has its own plan, and the same answer in any order."""
    q, k, v, _ = qkv(length=LENGTH)
    masks = [Mask(), Mask(window=70), Mask(window=70, sinks=3)]
    first = [attend(q, k, v, m, scale=SCALE) for m in masks]
    again = [attend(q, k, v, m, scale=SCALE) for m in reversed(masks)]
    for one, other in zip(first, reversed(again)):
        assert torch.equal(one, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", ["causal", "window", "bigbird", "packed"])
def test_bfloat16_is_as_exact_as_torch(name: str) -> None:
    """Error to float64 of out and gradients, in norm: at most 1.05 of sdpa with the spelled-out mask."""
    mask = MASKS[name]
    q, k, v, dout = (x.bfloat16() for x in qkv(length=LENGTH, width=64))
    seen = mask.spell(0, LENGTH, 0, LENGTH)
    wanted = gradients(dout, (q, k, v), seen)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, mask, scale=SCALE)
    ours = [out, *torch.autograd.grad(out, leaves, dout)]
    how = {"is_causal": True} if name == "causal" else {"attn_mask": seen}
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=SCALE, enable_gqa=True, **how)  # fmt: skip
    theirs = [out, *torch.autograd.grad(out, leaves, dout)]
    for one, other, right in zip(ours, theirs, (wanted[0], *wanted[2:])):
        assert one.dtype == torch.bfloat16
        assert (one.double() - right).norm() <= 1.05 * (other.double() - right).norm()


def test_the_same_input_gives_the_same_bits() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for mask in MASKS.values():
            runs = []
            for _ in range(2):
                leaves = [x.requires_grad_() for x in qkv(length=LENGTH)[:3]]
                out = attend(*leaves, mask, scale=SCALE)
                runs.append([out, *torch.autograd.grad(out.sum(), leaves)])
            assert all(torch.equal(a, b) for a, b in zip(*runs))
    finally:
        torch.use_deterministic_algorithms(False)
