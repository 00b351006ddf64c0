"""Chunks of queries against chunks of keys: every mask against float64, whole and in pieces."""

import itertools

import pytest
import torch
from dense import SCALE, gradients, qkv, worst

from unisono.attention import kernel, pair
from unisono.attention.mask import Documents, Mask
from unisono.attention.pattern import bigbird, dilated, function, strided

FORWARD, GRADIENT = 2e-6, 5e-6


def documents(length: int, mean: int, rows: int = 2) -> Documents | None:
    generator = torch.Generator().manual_seed(mean)
    return Documents.of_ids((torch.rand(rows, length, generator=generator) < 1 / mean).cumsum(1))


def masks(length: int) -> dict[str, Mask]:
    def packed(mean: int, **fields: object) -> Mask:
        return Mask(documents=documents(length, mean), **fields)

    return {
        "causal": Mask(),
        "all": Mask(causal=False),
        "window 1": Mask(window=1),
        "window 100": Mask(window=100),
        "window 128": Mask(window=128),
        "window beyond": Mask(window=5000),
        "window 1100": Mask(window=1100),
        "sinks": Mask(window=100, sinks=4),
        "many sinks": Mask(window=100, sinks=200),
        "chunk": Mask(chunk=200),
        "prefix": Mask(prefix=77),
        "packed": packed(300),
        "packed short": packed(20),
        "packed window": packed(300, window=60),
        "packed sinks": packed(150, window=60, sinks=3),
        "packed short sinks": packed(40, window=30, sinks=3),
        "packed prefix": packed(100, prefix=10),
        "packed chunk": packed(300, chunk=150),
        "packed one row": Mask(documents=documents(length, 200, rows=1)),
        "bigbird": Mask(pattern=bigbird(64)),
        "bigbird small": Mask(pattern=bigbird(32)),
        "packed bigbird": Mask(pattern=bigbird(64), documents=documents(length, 300)),
        "strided": Mask(pattern=strided(64, 3)),
        "strided window": Mask(pattern=strided(64, 3, 2)),
        "dilated": Mask(pattern=dilated(30, 4)),
        "function": Mask(pattern=function(lambda i, j, h: (i * j) % 3 != 0)),
        "by head": Mask(pattern=function(lambda i, j, h: i - j < 50 * (h + 1), by_head=True)),
    }


NAMES = list(masks(10))


@pytest.mark.parametrize("length", [5, 300, 900])
@pytest.mark.parametrize("name", NAMES)
def test_against_float64_whole_and_in_chunks(name: str, length: int) -> None:
    mask = masks(length)[name]
    q, k, v, dout = qkv(heads=2, kv_heads=1, length=length)
    wanted = gradients(dout, (q, k, v), mask.spell(0, length, 0, length, heads=2))
    out, lse = pair.forward(q, k, v, mask, scale=SCALE)
    grads = pair.backward(dout, q, k, v, out, lse, mask, scale=SCALE)
    bounds = [FORWARD, FORWARD, *[GRADIENT] * 3]
    for found, right, bound in zip((out, lse, *grads), wanted, bounds):
        assert worst(found, right) <= bound
    if length > 5:
        in_chunks(mask, (q, k, v, dout), wanted, bounds)


def in_chunks(mask: Mask, tensors: tuple, wanted: list, bounds: list) -> None:
    """Three uneven chunks, as a ring would ask: forward of each pair merged, then backward of each."""
    q, k, v, dout = tensors
    length = q.shape[2]
    spans = list(itertools.pairwise((0, length // 3 + 7, 2 * length // 3, length)))
    rows = []
    for a, b in spans:
        out = lse = None
        for x, y in spans:
            part = pair.forward(
                q[:, :, a:b], k[:, :, x:y], v[:, :, x:y], mask, q_start=a, k_start=x, scale=SCALE
            )
            out, lse = part if out is None else kernel.merge(out, lse, *part)
        rows.append((out, lse))
    found = [torch.cat([r[n] for r in rows], 2) for n in (0, 1)]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for (a, b), (out, lse) in zip(spans, rows):
        for x, y in spans:
            dq, dk, dv = pair.backward(
                dout[:, :, a:b], q[:, :, a:b], k[:, :, x:y], v[:, :, x:y], out, lse, mask,
                q_start=a, k_start=x, scale=SCALE,
            )  # fmt: skip
            grads[0][:, :, a:b] += dq
            grads[1][:, :, x:y] += dk
            grads[2][:, :, x:y] += dv
    for one, right, bound in zip((*found, *grads), wanted, bounds):
        assert worst(one, right) <= bound


@pytest.mark.parametrize("softcap", [1.5, None])
def test_softcap_goes_through_every_kind_of_step(softcap: float | None) -> None:
    length = 700
    for mask in (Mask(), Mask(window=100, sinks=4), Mask(pattern=bigbird(64))):
        q, k, v, dout = qkv(length=length)
        wanted = gradients(dout, (q, k, v), mask.spell(0, length, 0, length), softcap=1.5)
        how = {"scale": SCALE, "softcap": softcap}
        out, lse = pair.forward(q, k, v, mask, **how)
        found = [out, lse, *pair.backward(dout, q, k, v, out, lse, mask, **how)]
        off = max(worst(a, b) for a, b in zip(found, wanted))
        assert off <= GRADIENT if softcap else off > 0.1  # ignored, it would show


def test_a_window_that_is_off_by_one_shows() -> None:
    q, k, v, _ = qkv(length=600)
    wanted = gradients(q, (q, k, v), Mask(window=100).spell(0, 600, 0, 600))[0]
    assert worst(pair.forward(q, k, v, Mask(window=100), scale=SCALE)[0], wanted) <= FORWARD
    assert worst(pair.forward(q, k, v, Mask(window=101), scale=SCALE)[0], wanted) > 0.05
    assert worst(pair.forward(q, k, v, Mask(), scale=SCALE)[0], wanted) > 0.1


@pytest.mark.parametrize("name", ["window 100", "sinks", "packed", "packed short", "bigbird", "dilated"])  # fmt: skip
def test_steps_do_not_compute_much_more_than_is_visible(name: str) -> None:
    """Counted in scores, of 4,096 tokens: less than a third of causal attention's."""
    length = 4096
    mask = masks(length)[name]
    q = torch.empty(2, 4, length, 16)
    computed = sum(
        s.num * s.tile * s.length * (2 if s.row is None else 1) for s in pair.plan(mask, q, q, 0, 0)
    )
    assert computed < 2 * length * length / 2 / 3


def test_the_plan_of_a_mask_is_made_once() -> None:
    mask, q = Mask(window=300), torch.empty(1, 2, 1000, 16)
    assert pair.plan(mask, q, q, 0, 0) is pair.plan(mask, q, q, 0, 0)
    assert pair.plan(mask, q, q, 0, 0) is not pair.plan(mask, q, q, 1000, 0)


def test_documents_of_another_batch_are_refused() -> None:
    q, k, v, _ = qkv(rows=3, length=300)
    with pytest.raises(ValueError, match="found 2 rows, but the batch has 3"):
        pair.forward(q, k, v, Mask(documents=documents(300, 50)), scale=SCALE)


def test_what_is_not_there_costs_nothing_and_is_empty() -> None:
    q, k, v, dout = qkv(length=300)
    out, lse = pair.forward(q, k, v, Mask(), q_start=0, k_start=300, scale=SCALE)
    assert not pair.plan(Mask(), q, k, 0, 300)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert not any(
        g.any() for g in pair.backward(dout, q, k, v, out, lse, Mask(), k_start=300, scale=SCALE)
    )
