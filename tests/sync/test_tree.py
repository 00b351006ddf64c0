"""Sums in a fixed tree: the same brackets whether leaves come at once, one by one, or by rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.sync.tree import TreeSum, tree_sum


def leaves_of(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Numbers of many magnitudes, so that other brackets give other bits."""
    g = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 7, (count, 64), generator=g)
    return list((torch.randn(count, 64, generator=g) * scale).to(dtype))


def by_definition(leaves: list[torch.Tensor]) -> torch.Tensor:
    """An even number: the sum of its halves; an odd number: from left to right."""
    if len(leaves) == 1:
        return leaves[0]
    if len(leaves) % 2:
        return by_definition([leaves[0] + leaves[1], *leaves[2:]]) if len(leaves) == 3 else (
            sum(leaves[1:], leaves[0])
        )  # fmt: skip
    half = len(leaves) // 2
    return by_definition(leaves[:half]) + by_definition(leaves[half:])


def one_by_one(leaves: list[torch.Tensor]) -> torch.Tensor:
    tree = TreeSum(len(leaves))
    for leaf in leaves[:-1]:
        own = leaf.clone()
        tree.add(own)
        own.fill_(float("nan"))  # the leaf is the caller's again
    last = leaves[-1].clone()
    tree.finish(last)
    return last


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 96), seed=st.integers(0, 2**31))
def test_tree_sum_is_its_definition(count: int, seed: int) -> None:
    leaves = leaves_of(count, seed)
    expected = by_definition(leaves)
    assert equal_bits(one_by_one(leaves), expected)
    assert equal_bits(tree_sum([leaf.clone() for leaf in leaves]), expected)


@settings(max_examples=100, deadline=None)
@given(mine=st.integers(1, 24), power=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_ranks_hold_whole_subtrees(mine: int, power: int, seed: int) -> None:
    """Any power of two of ranks, each with its own leaves one by one, gives the same bits."""
    ranks = 2**power
    leaves = leaves_of(mine * ranks, seed)
    own = [one_by_one(leaves[r * mine : (r + 1) * mine]) for r in range(ranks)]
    assert equal_bits(tree_sum(own), by_definition(leaves))


def test_another_order_gives_other_bits() -> None:
    """The control: a running sum is not the tree, and three ranks do not cut at subtrees."""
    leaves = leaves_of(12)
    assert not equal_bits(sum(leaves[1:], leaves[0]), by_definition(leaves))
    thirds = [by_definition(leaves[r * 4 : (r + 1) * 4]) for r in range(3)]
    assert not equal_bits(tree_sum(thirds), by_definition(leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_in_float32(dtype: torch.dtype) -> None:
    """4096 ones and small numbers: added in bfloat16 they would stop at 256."""
    total = tree_sum([torch.ones(3, dtype=dtype) for _ in range(4096)])
    assert total.dtype == torch.float32
    assert total.tolist() == [4096.0] * 3


def test_float64_stays_float64() -> None:
    tiny = torch.tensor([2.0**-40], dtype=torch.float64)
    total = tree_sum([torch.ones(1, dtype=torch.float64), tiny])
    assert total.dtype == torch.float64
    assert total.item() == 1 + 2.0**-40


def test_a_sum_can_be_given_up_and_begun_again() -> None:
    leaves = leaves_of(8)
    tree = TreeSum(8)
    for leaf in leaves_of(5, seed=9):
        tree.add(leaf)
    assert not tree.complete_but_one
    tree.reset()
    for leaf in leaves[:-1]:
        tree.add(leaf)
    assert tree.complete_but_one
    last = leaves[-1].clone()
    tree.finish(last)
    assert equal_bits(last, by_definition(leaves))


def test_a_missing_leaf_is_an_error() -> None:
    tree = TreeSum(4)
    with pytest.raises(AssertionError, match="a leaf is missing"):
        tree.finish(torch.zeros(1))


@pytest.mark.parametrize("count", [1, 2, 8, 12, 64, 96])
def test_buffers_are_few_and_used_again(count: int) -> None:
    """At most log2(leaves) extra buffers, in the first step and in every later one."""
    tree = TreeSum(count)
    for _ in range(3):
        for leaf in leaves_of(count)[:-1]:
            tree.add(leaf)
        tree.finish(leaves_of(1)[0])
        assert len(tree._free) + len(tree._partial) <= count.bit_length() + 1
