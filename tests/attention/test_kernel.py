"""One tile: both kernels against float64, gradients from global sums, and what sees nothing."""

import pytest
import torch
from dense import SCALE, gradients, qkv, some, worst

from unisono.attention import kernel, tiled

KERNELS = {"flash": kernel, "tiled": tiled}
FORWARD, GRADIENT = 2e-6, 5e-6


def run(which, q, k, v, dout, **how):
    out, lse = which.forward(q, k, v, scale=SCALE, **how)
    return [out, lse, *which.backward(dout, q, k, v, out, lse, scale=SCALE, **how)]


def masks(q_length: int, k_length: int) -> dict:
    seen = some(2, 4, q_length, k_length, seed=9) > 0
    seen[:, :, 1] = False  # a query that sees nothing
    return {
        "none": {},
        "causal": {"causal": True},
        "bool": {"mask": seen},
        "shared": {"mask": seen[:1, :1]},
        "by row": {"mask": seen[:, :1]},
        "added": {"mask": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)},
    }


def seen_of(how: dict, q_length: int, k_length: int) -> torch.Tensor:
    if "mask" in how:
        return how["mask"] if how["mask"].dtype == torch.bool else how["mask"] == 0
    full = torch.ones(q_length, k_length, dtype=torch.bool)
    return full.tril() if how.get("causal") else full


def test_the_operator_of_this_torch_works() -> None:
    assert kernel.flash_works()


@pytest.mark.parametrize("name", ["none", "causal", "bool", "shared", "by row", "added"])
@pytest.mark.parametrize(("q_length", "k_length"), [(1, 1), (5, 7), (64, 64), (600, 700), (130, 40)])  # fmt: skip
@pytest.mark.parametrize("which", KERNELS)
def test_against_float64(which: str, q_length: int, k_length: int, name: str) -> None:
    q, k, v, dout = qkv(length=q_length, keys=k_length)
    how = masks(q_length, k_length)[name] if q_length > 1 else {}
    found = run(KERNELS[which], q, k, v, dout, **how)
    wanted = gradients(dout, (q, k, v), seen_of(how, q_length, k_length))
    assert worst(found[0], wanted[0]) <= FORWARD
    assert worst(found[1], wanted[1]) <= FORWARD
    for one, other in zip(found[2:], wanted[2:]):
        assert (
            worst(one, other) <= 2 * GRADIENT
        )  # scores of this scale are 4 times unit normal ones


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (6, 2), (3, 3), (8, 4)])
@pytest.mark.parametrize(("width", "v_width"), [(16, 16), (24, 16), (16, 24), (5, 3)])
def test_groups_and_widths_of_heads(which, heads, kv_heads, width, v_width) -> None:
    q, k, v, dout = qkv(1, heads, kv_heads, 33, 40, width, v_width)
    found = run(KERNELS[which], q, k, v, dout)
    wanted = gradients(dout, (q, k, v), seen_of({}, 33, 40))
    assert [x.shape for x in found[2:]] == [q.shape, k.shape, v.shape]
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= GRADIENT


@pytest.mark.parametrize("which", KERNELS)
def test_a_query_that_sees_nothing_has_nothing(which: str) -> None:
    q, k, v, dout = qkv(length=6)
    seen = torch.ones(6, 6, dtype=torch.bool)
    seen[2] = False
    out, lse, dq, dk, dv = run(KERNELS[which], q, k, v, dout, mask=seen)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -torch.inf).all()
    assert (dq[:, :, 2] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    zero = torch.zeros_like(
        q
    )  # all scores 0 and one key: the log-sum-exp is 0, and that is no hole
    _, lse = KERNELS[which].forward(zero, zero[:, :2, :1], zero[:, :2, :1], scale=1.0, mask=torch.ones(6, 1, dtype=torch.bool))  # fmt: skip
    assert (lse == 0).all()


@pytest.mark.parametrize("which", KERNELS)
def test_keys_in_two_halves_merge_to_the_whole(which: str) -> None:
    q, k, v, dout = qkv(length=50, keys=80)
    seen = some(2, 1, 50, 80, seed=4) > 0
    seen[:, :, 3, 30:] = False  # sees keys of the first half only,
    seen[:, :, 4, :30] = False  # of the second only,
    seen[:, :, 5] = False  # and none
    halves = [(slice(0, 30), seen[..., :30]), (slice(30, 80), seen[..., 30:])]
    parts = [KERNELS[which].forward(q, k[:, :, s], v[:, :, s], scale=SCALE, mask=m) for s, m in halves]  # fmt: skip
    out, lse = kernel.merge(*parts[0], *parts[1])
    grads = [
        KERNELS[which].backward(dout, q, k[:, :, s], v[:, :, s], out, lse, scale=SCALE, mask=m)
        for s, m in halves
    ]
    dq = grads[0][0] + grads[1][0]
    dk, dv = (torch.cat([g[n] for g in grads], 2) for n in (1, 2))
    wanted = gradients(dout, (q, k, v), seen)
    for one, other in zip((out, lse, dq, dk, dv), wanted):
        assert worst(one, other) <= GRADIENT


@pytest.mark.parametrize("which", KERNELS)
def test_softcap(which: str) -> None:
    q, k, v, dout = qkv(length=70)
    q = 3 * q
    causal = torch.ones(70, 70).tril().bool()
    found = run(KERNELS[which], q, k, v, dout, causal=True, softcap=2.0)
    wanted = gradients(dout, (q, k, v), causal, softcap=2.0)
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= GRADIENT
    without = gradients(dout, (q, k, v), causal)
    assert worst(found[0], without[0]) > 0.1  # the control: without it another result


def test_sinks_take_part_and_get_their_gradient() -> None:
    q, k, v, dout = qkv(length=40)
    sinks = some(4, seed=8)
    causal = torch.ones(40, 40).tril().bool()
    out, lse = kernel.with_sinks(*kernel.forward(q, k, v, scale=SCALE, causal=True), sinks)
    found = [out, lse, *kernel.backward(dout, q, k, v, out, lse, scale=SCALE, causal=True)]
    found.append(kernel.sinks_gradient(dout, out, lse, sinks))
    wanted = gradients(dout, (q, k, v, sinks), causal)
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= GRADIENT
    assert worst(out, gradients(dout, (q, k, v), causal)[0]) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", KERNELS)
def test_half_precision_is_as_exact_as_torch(which: str, dtype: torch.dtype) -> None:
    q, k, v, dout = (x.to(dtype) for x in qkv(length=300, width=64))
    found = run(KERNELS[which], q, k, v, dout, causal=True)
    causal = torch.ones(300, 300).tril().bool()
    wanted = gradients(dout, (q, k, v), causal)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE, enable_gqa=True)  # fmt: skip
    theirs = [theirs, *torch.autograd.grad(theirs, leaves, dout)]
    for one, other, right in zip((found[0], *found[2:]), theirs, (wanted[0], *wanted[2:])):
        assert one.dtype == dtype
        assert (one.double() - right).norm() <= 1.05 * (other.double() - right).norm()
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("which", KERNELS)
def test_float64_stands_up_to_gradcheck(which: str) -> None:
    leaves = [x.double().requires_grad_() for x in qkv(1, 2, 1, 5, 6, 4)[:3]]
    seen = torch.ones(5, 6, dtype=torch.bool).tril(1)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = KERNELS[which].forward(q, k, v, scale=SCALE, mask=seen)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            return KERNELS[which].backward(dout, *ctx.saved_tensors, scale=SCALE, mask=seen)

    assert torch.autograd.gradcheck(Once.apply, leaves)


def test_without_the_operator_plain_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = qkv(length=30)
    wanted = run(kernel, q, k, v, dout, causal=True)

    def gone(*_, **__):
        raise AttributeError("no such operator")

    kernel.flash_works.cache_clear()
    monkeypatch.setattr(kernel, "_flash", gone)
    assert not kernel.flash_works()
    found = run(kernel, q, k, v, dout, causal=True)
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= GRADIENT
    monkeypatch.undo()
    kernel.flash_works.cache_clear()


def test_an_operator_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel._flash

    def wrong(*args):
        out, lse = right(*args)
        return out, lse + 1e-3

    kernel.flash_works.cache_clear()
    monkeypatch.setattr(kernel, "_flash", wrong)
    assert not kernel.flash_works()
    monkeypatch.undo()
    kernel.flash_works.cache_clear()


@pytest.mark.parametrize("which", KERNELS)
def test_layouts_of_hugging_face_need_no_copy_by_the_caller(which: str) -> None:
    q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(length=20))
    found = run(KERNELS[which], q, k, v, dout, causal=True)
    wanted = gradients(dout, (q, k, v), torch.ones(20, 20).tril().bool())
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= GRADIENT
    expanded = torch.ones(()).expand(q.shape)  # what out.sum() sends back
    found = run(KERNELS[which], q, k, v, expanded, causal=True)
    wanted = gradients(expanded, (q, k, v), torch.ones(20, 20).tril().bool())
    assert max(worst(a, b) for a, b in zip(found, wanted)) <= 4 * GRADIENT
