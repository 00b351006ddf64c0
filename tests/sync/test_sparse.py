"""Sparse deltas: the codec to the byte, and SparseLoCo as the paper has it, in a plain loop."""

from dataclasses import replace

import pytest
import test_streaming as streaming
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import difference
from test_streaming import LEAVES, RATE, STEPS, adamw, build, loss_of, weights
from torch import nn

from ranks import run_ranks
from unisono.sync.digest import sha256
from unisono.sync.sparse import sparse_outer
from unisono.sync.topk import TopK
from unisono.sync.update import by_dimension

SPARSE = sparse_outer(sync_every=3, top_k=32, chunk=256, feedback_decay=0.95, learning_rate=1.0)


def plain_top_k(values: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """What a code stands for, chunk by chunk and value by value."""
    found = torch.zeros_like(values)
    for start in range(0, len(values), chunk):
        part = values[start : start + chunk]
        padded = torch.cat([part, part.new_zeros(chunk - len(part))])
        places = sorted(range(chunk), key=lambda i: -abs(float(padded[i])))[:k]
        sizes = [abs(float(padded[i])) for i in places]
        high = [x for x in sizes if 2 * x > max(sizes) + min(sizes)]
        low = [x for x in sizes if not 2 * x > max(sizes) + min(sizes)]
        levels = [
            float(torch.tensor(sum(x) / len(x)).bfloat16()) if x else 0.0 for x in (low, high)
        ]
        for i, x in zip(places, sizes, strict=True):
            if i < len(part):
                level = levels[1] if 2 * x > max(sizes) + min(sizes) else levels[0]
                found[start + i] = level if padded[i] >= 0 else -level
    return found


@pytest.mark.parametrize("values", [1, 300, 4096, 10_000])
@pytest.mark.parametrize("codec", [TopK(), TopK(4, 16), TopK(64, 512), TopK(16, 100)])
def test_a_code_holds_the_largest_and_its_bytes_are_exact(codec: TopK, values: int) -> None:
    x = torch.randn(values, generator=torch.Generator().manual_seed(1)) ** 3
    left = torch.empty_like(x)
    code = codec.encode(x, 0, left)
    chunks = -(-values // codec.chunk)
    assert code.dtype == torch.uint8
    assert len(code) == codec.encoded_bytes(values) == chunks * (codec.k * 14 // 8 + 4)
    out = torch.full_like(x, 7.0)
    codec.decode(code, out)
    # The mean of a level is added up in another order, and rounded to 8 bits.
    assert torch.allclose(out, plain_top_k(x, codec.k, codec.chunk), rtol=2**-7)
    assert torch.equal((out != 0).int(), (plain_top_k(x, codec.k, codec.chunk) != 0).int())
    assert torch.equal(left, x - out)
    again = torch.ones_like(x)
    codec.decode(code, again, add=True)
    assert torch.equal(again, 1 + out)
    codec.encode(x, 3, x)
    assert torch.equal(x, left), "in place"


def test_the_published_size() -> None:
    """0.219 bit a value for places and values, 146 times less than float32; levels add 0.008."""
    n = 4096 * 1000
    assert 8 * (TopK().encoded_bytes(n) - 4 * 1000) / n == pytest.approx(0.21875)
    assert 8 * TopK().encoded_bytes(n) / n == pytest.approx(0.2265625)


@settings(max_examples=100)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(0.0), min_size=1, max_size=200)
)
def test_any_values_come_back_with_their_signs(values: list[float]) -> None:
    x = torch.tensor(values)
    codec, out = TopK(8, 64), torch.empty(len(values))
    codec.decode(codec.encode(x), out)
    assert torch.isfinite(out).all()
    assert (out * x.sign() >= 0).all()


def simulate(replicas: int, steps: int = STEPS) -> list[dict]:
    """SparseLoCo: e <- b e + delta, c = codec(e), e <- e - c, W <- W - mean(c)."""
    models = [build() for _ in range(replicas)]
    params = [[p for p in m.parameters() if p.requires_grad] for m in models]
    names = [n for n, p in models[0].named_parameters() if p.requires_grad]
    inner = [adamw(*by_dimension(p)) for p in params]

    def flat(tensors: list) -> torch.Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    whole = flat(params[0])
    left = [torch.zeros_like(whole) for _ in range(replicas)]
    found = []
    for step in range(steps):
        count = sum(loss_of(models[0], step, leaf)[1] for leaf in range(LEAVES))
        for m, model in enumerate(models):
            model.zero_grad()
            mine = LEAVES // replicas
            loss = sum(loss_of(model, step, m * mine + j)[0] for j in range(mine))
            (loss * replicas / count).backward()
            nn.utils.clip_grad_norm_(params[m], 1.0)
            inner[m].step()
        if (step + 1) % SPARSE.sync_every == 0:
            total = torch.zeros_like(whole)
            for m in range(replicas):
                left[m] = SPARSE.feedback_decay * left[m] + (whole - flat(params[m]))
                sent = torch.zeros_like(whole)
                SPARSE.codec.decode(SPARSE.codec.encode(left[m]), sent)
                left[m] -= sent
                total += sent
            whole = whole - total / replicas
            for p in params:
                for own, new in zip(p, whole.split([x.numel() for x in p]), strict=True):
                    own.data = new.view(own.shape).clone()
        pieces = whole.split([p.numel() for p in params[0]])
        found.append({n: x.view(p.shape).clone() for n, x, p in zip(names, pieces, params[0], strict=True)})  # fmt: skip
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_the_definition(size: int) -> None:
    expected = simulate(size)
    for states, *_ in run_ranks(streaming.train, size, SPARSE):
        assert len({sha256(s) for s in states}) == 1 + STEPS // 3
        for state, wanted in zip(states, expected, strict=True):
            assert difference(weights(state), wanted) <= 1e-5


def without_feedback(world) -> None:
    from unisono.sync.streaming import Streaming

    original = Streaming._leave

    def leave(self, f, seed):
        f.feedback.zero_()
        return original(self, f, seed)

    Streaming._leave = leave


def test_without_feedback_it_is_another_method() -> None:
    expected = simulate(2)
    result = run_ranks(streaming.train, 2, SPARSE, adamw, STEPS, 1.0, RATE, without_feedback)
    assert difference(weights(result[0][0][-1]), expected[-1]) > 1e-3


def test_it_resumes_to_the_bit() -> None:
    rule = replace(SPARSE, last_step=STEPS)
    model, states = run_ranks(streaming.saved, 2, rule, 7)[0]
    whole = run_ranks(streaming.train, 2, rule)
    again = run_ranks(streaming.resumed, 2, rule, model, states, 7, STEPS, "sparse")
    for (expected, *_), (outer, _, note, *_) in zip(whole, again, strict=True):
        assert sha256(outer) == sha256(expected[-1]) and note == ""


def test_it_trains() -> None:
    results = run_ranks(streaming.train, 2, SPARSE, adamw, 30)
    losses = results[0][2]
    assert sum(losses[-5:]) < sum(losses[:5]) * 0.97
