"""A digest shows the smallest difference; replicas that differ are named by tensor and rank."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranks import run_ranks
from unisono.errors import ReplicaError
from unisono.sync.digest import check_replicas, fingerprint, sha256
from unisono.sync.ledger import Group, Ledger

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64,
    torch.complex128,
]  # fmt: skip
SIZES = [1, 3, 255, 256, 257, 512, 1000, 20_001]


def tensor_of(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype; bool has only two."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, (size,), generator=g).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(256, (size * width,), dtype=torch.uint8, generator=g).view(dtype)


def seen(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both digests tell two tensors apart; they must agree."""
    prints = not torch.equal(fingerprint(a), fingerprint(b))
    assert (sha256({"x": a}) != sha256({"x": b})) == prints
    return prints


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_single_flipped_bit_shows(dtype: torch.dtype) -> None:
    for size in SIZES:
        original = tensor_of(size, dtype)
        assert not seen(original, original.clone())
        width = original.element_size()
        bits = range(1) if dtype == torch.bool else range(8 * width)
        places = {0, size - 1, size // 2, min(255, size - 1), min(511, size - 1)}
        mine = fingerprint(original)
        if size > 1000:
            bits, places = bits[-2:], {0, size - 1}
        for place, bit in itertools.product(places, bits):
            byte = original.view(torch.uint8)[place * width + bit // 8]
            byte ^= 1 << (bit % 8)
            assert not torch.equal(fingerprint(original), mine), (size, place, bit)
            byte ^= 1 << (bit % 8)


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 3000),
    where=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
)
def test_the_sign_of_zero_shows(size: int, where: int, dtype: torch.dtype) -> None:
    """-0.0 equals 0.0 and is another weight: only the highest bit differs."""
    a = torch.zeros(size, dtype=dtype)
    b = a.clone()
    b.view(torch.uint8)[(where % size + 1) * a.element_size() - 1] ^= 0x80
    assert seen(a, b)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(2, 80),
    columns=st.sampled_from([1, 3, 16, 256, 300]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
)
def test_swapped_rows_and_elements_show(rows: int, columns: int, seed: int, dtype) -> None:
    a = tensor_of(rows * columns, dtype, seed).view(rows, columns)
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(rows, generator=g)[:2].tolist()
    swapped = a.clone()
    swapped[[i, j]] = a[[j, i]]
    if not torch.equal(swapped.view(torch.uint8), a.view(torch.uint8)):
        assert seen(a, swapped)
    one = a.clone().view(-1)
    one[[i, j]] = a.view(-1)[[j, i]]
    if not torch.equal(one.view(torch.uint8), a.view(-1).view(torch.uint8)):
        assert seen(a.view(-1), one)


def test_swapped_negatives_show() -> None:
    """1.0 and -1.0 differ in the highest bit only, whose weighted sums may wrap away."""
    a = torch.ones(2048, dtype=torch.float64)
    for i, j in ((1, 3), (255, 511), (256, 768), (0, 512), (0, 2047)):
        one, other = a.clone(), a.clone()
        one[i], other[j] = -1.0, -1.0
        assert seen(one, other), (i, j)


def test_empty_scalar_and_strided_tensors() -> None:
    assert fingerprint(torch.empty(0)).tolist() == [0, 0]
    assert fingerprint(torch.empty(0, 5)).shape == (2,)
    assert sha256({"x": torch.empty(0)}) != sha256({"x": torch.empty(0, 1)})
    assert seen(torch.tensor(1.0), torch.tensor(-1.0))
    matrix = torch.arange(12.0).view(3, 4)
    assert torch.equal(fingerprint(matrix.t()), fingerprint(matrix.t().contiguous()))
    assert seen(matrix.reshape(4, 3).contiguous(), matrix.t().contiguous())


def test_sha256_knows_names_shapes_and_dtypes() -> None:
    x = torch.zeros(4)
    digests = [
        sha256({"a": x}),
        sha256({"b": x}),
        sha256({"a": x.view(2, 2)}),
        sha256({"a": x.view(torch.int32)}),
        sha256({"a": x, "b": x}),
        sha256({}),
    ]
    assert len(set(digests)) == len(digests)
    assert sha256({"a": x, "b": x + 1}) == sha256({"b": x + 1, "a": x})


def compare(world, odd: list[int], name: str, dtype: torch.dtype) -> str:
    named = {
        "embed": tensor_of(700, dtype, 1),
        "norm": tensor_of(3, dtype, 2),
        "none": torch.empty(0, dtype=dtype),
        "head": tensor_of(700, dtype, 1),
    }
    if world.rank in odd:
        named[name].view(torch.uint8)[-1] ^= 0x80
        if name == "norm":
            named["head"].view(torch.uint8)[5] ^= 1
    ledger = Ledger()
    try:
        check_replicas(named.items(), Group("check", ledger, 60), step=7)
    except ReplicaError as error:
        return str(error)
    assert ledger.sent_bytes == 16 * 4 * (world.size - 1)
    return "equal"


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_rank_that_differs_is_named(size: int, dtype: torch.dtype) -> None:
    for told in run_ranks(compare, size, [2], "norm", dtype):
        assert told.startswith("replicas differ after step 7: rank 2 in norm, and 2 of 4 tensors")
        assert "checkpoint from before" in told


def test_rank_0_can_be_the_odd_one() -> None:
    for told in run_ranks(compare, 3, [0], "head", torch.float32):
        assert told.startswith("replicas differ after step 7: rank 0 in head, and 1 of 4")


def test_two_ranks_have_no_majority() -> None:
    for told in run_ranks(compare, 2, [1], "embed", torch.float32):
        assert told.startswith("replicas differ after step 7: ranks 0, 1 (no majority) in embed")


def test_two_of_four_have_no_majority() -> None:
    for told in run_ranks(compare, 4, [1, 3], "embed", torch.float32):
        assert "ranks 0, 1, 2, 3 (no majority) in embed" in told


@pytest.mark.parametrize("size", [2, 3])
def test_equal_replicas_pass(size: int) -> None:
    assert run_ranks(compare, size, [], "", torch.float64) == ["equal"] * size
