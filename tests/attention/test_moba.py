"""MoBA is attention under the mask that its own choice makes, and causal attention if all is chosen."""

import pytest
import torch
from dense import SCALE, gradients, qkv, worst

from unisono.attention.mask import Documents, Mask
from unisono.attention.moba import attend, choose

LENGTH, BLOCK = 300, 32


def run(leaves, dout, **how):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = attend(*leaves, block=BLOCK, scale=SCALE, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def spelled(q, k, top):
    """The definition, by a loop over queries: own block up to oneself, and the nearest mean keys."""
    seen = torch.zeros(*q.shape[:2], LENGTH, LENGTH, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = k[b, h // (q.shape[1] // k.shape[1])]
            for i in range(LENGTH):
                own = i // BLOCK
                seen[b, h, i, own * BLOCK : i + 1] = True
                gates = [float(q[b, h, i] @ keys[n * BLOCK : (n + 1) * BLOCK].mean(0)) for n in range(own)]  # fmt: skip
                for n in sorted(range(own), key=lambda n, g=gates: -g[n])[: top - 1]:
                    seen[b, h, i, n * BLOCK : (n + 1) * BLOCK] = True
    return seen


@pytest.mark.parametrize("top", [1, 3])
def test_against_float64_under_the_mask_of_its_choice(top: int) -> None:
    q, k, v, dout = qkv(1, 4, 2, LENGTH)
    wanted = gradients(dout, (q, k, v), spelled(q, k, top))
    for found, right in zip(run((q, k, v), dout, top=top), (wanted[0], *wanted[2:])):
        assert worst(found, right) <= 1e-5
    other = gradients(dout, (q, k, v), spelled(q, k, top + 1))
    assert worst(other[0], wanted[0]) > 0.1  # the control: one block more is another result


def test_with_all_blocks_it_is_causal_attention() -> None:
    q, k, v, dout = qkv(length=LENGTH)
    causal = Mask().spell(0, LENGTH, 0, LENGTH)
    wanted = gradients(dout, (q, k, v), causal, softcap=2.0)
    found = run((q, k, v), dout, top=LENGTH // BLOCK + 1, softcap=2.0)
    for one, right in zip(found, (wanted[0], *wanted[2:])):
        assert worst(one, right) <= 1e-5


def test_documents_are_sequences_of_their_own() -> None:
    q, k, v, dout = qkv(1, length=LENGTH)
    documents = Documents.of_ids(torch.arange(LENGTH)[None] // 170)
    found = run((q, k, v), dout, top=2, documents=documents)[0]
    alone = [x[:, :, 170:] for x in (q, k, v)]
    assert torch.equal(found[:, :, 170:], attend(*alone, block=BLOCK, top=2, scale=SCALE))


def test_nothing_later_is_ever_chosen() -> None:
    q, k, _, _ = qkv(length=LENGTH)
    chosen = choose(q, k, BLOCK, 4)
    own = torch.arange(LENGTH)[:, None] // BLOCK
    assert (chosen < own).all()
    assert ((chosen >= 0).sum(-1) == own[:, 0].clamp(max=3)).all()
