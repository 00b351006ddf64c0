"""`auto` takes what the cost model says, and says why in numbers that are true."""

import math
from dataclasses import replace

import pytest
import torch

from ranks import run_ranks
from unisono.attention.hf import Wish
from unisono.attention.mask import Documents, Mask
from unisono.attention.pattern import Pattern
from unisono.attention.schemes import (
    Layer,
    Speeds,
    choose,
    explain,
    layers_of,
    measure_speeds,
    sent_bytes,
    visible_pairs,
)
from unisono.attention.shard import Placement
from unisono.sync.ledger import Group, Ledger

LAPTOP = Speeds(latency_s=1e-4, bytes_per_s=1e9, flops_per_s=5e10)
NODE = Speeds(latency_s=2e-5, bytes_per_s=2e11, flops_per_s=3e14)
WIRE = Speeds(latency_s=5e-4, bytes_per_s=1e8, flops_per_s=5e10)
LLAMA = Layer(1, 32, 8, 128, 128, 2, Mask())


def pick(layer: Layer, length: int, size: int, speeds: Speeds, **more) -> str:
    return choose(layer, Placement(length, size), speeds, **more).scheme


def test_a_window_layer_takes_the_halo_and_a_full_one_the_ring() -> None:
    window = replace(LLAMA, mask=Mask(window=1024))
    for size in (2, 4, 8):
        assert pick(window, 65536, size, LAPTOP) == "halo"
        assert pick(LLAMA, 65536, size, LAPTOP) == "ring"


def test_a_window_wider_than_a_chunk_is_no_halo_when_it_needs_more_than_a_rank_holds() -> None:
    wide = replace(LLAMA, mask=Mask(window=8000))
    assert "halo" not in choose(wide, Placement(8192, 8), LAPTOP).seconds
    assert "halo" in choose(wide, Placement(2**18, 8), LAPTOP).seconds


def test_short_sequences_on_a_link_of_latencies_take_fewer_messages() -> None:
    slow = Speeds(latency_s=5e-3, bytes_per_s=1e9, flops_per_s=3e14)
    assert pick(LLAMA, 2048, 8, slow) == "ulysses"
    few = replace(LLAMA, heads=6, kv_heads=2)  # which 8 ranks cannot divide
    assert pick(few, 2048, 8, slow) == "allgather"
    assert pick(LLAMA, 2**18, 8, LAPTOP) == "ring"


def test_short_documents_take_the_halo() -> None:
    ids = (torch.arange(4096) // 100)[None]
    packed = replace(LLAMA, mask=Mask(documents=Documents.of_ids(ids)))
    assert pick(packed, 4096, 4, WIRE) == "halo"


def test_usp_is_possible_where_it_is_set_up() -> None:
    placement = Placement(8192, 8)
    assert "usp" not in choose(LLAMA, placement, NODE).seconds
    assert "usp" in choose(LLAMA, placement, NODE, inner=2).seconds


def test_a_pattern_that_differs_by_head_is_not_cut_by_heads() -> None:
    odd = Pattern("by-head", 16, visible=lambda i, j, h: j % 2 == h % 2, by_head=True)
    found = choose(replace(LLAMA, mask=Mask(pattern=odd)), Placement(8192, 4), NODE, inner=2)
    assert not {"ulysses", "usp"} & set(found.seconds)


def test_the_reason_is_a_sentence_with_the_bytes_of_each_way() -> None:
    window = replace(LLAMA, mask=Mask(window=1024))
    placement = Placement(65536, 4)
    reason = choose(window, placement, LAPTOP).reason
    assert "2,046 keys of other ranks" in reason
    for scheme in ("halo", "ring", "allgather"):
        assert f"{sum(sent_bytes(scheme, window, placement)) / 1e6:,.2f} MB" in reason


def test_a_model_of_two_kinds_of_layers_is_explained_in_two_lines() -> None:
    from transformers import Gemma3TextConfig, GPT2Config, MistralConfig

    gemma = Gemma3TextConfig(sliding_window=1024, num_hidden_layers=12)
    (window, halo), (full, other) = explain(layers_of(gemma, 1, 2), Placement(65536, 4), LAPTOP)
    assert (window, halo.scheme) == ("10 of 12 layers", "halo")
    assert (full, other.scheme) == ("2 of 12 layers", "ring")
    assert {x.mask.window for x in layers_of(MistralConfig(sliding_window=64), 1, 2)} == {64}
    assert {x.mask.window for x in layers_of(GPT2Config(), 1, 4)} == {None}
    narrow = layers_of(GPT2Config(), 1, 4, Wish(window=32, layers=(0, 1)))
    assert [x.mask.window for x in narrow[:3]] == [32, 32, None]
    assert len({id(x.mask) for x in narrow}) == 2


def test_halo_sends_the_formula() -> None:
    window = replace(LLAMA, mask=Mask(window=1024))
    forward, backward = sent_bytes("halo", window, Placement(65536, 4))
    assert forward == 2 * 1023 * 8 * (128 + 128) * 2
    assert backward == 2 * forward


@pytest.mark.parametrize("fields", [{}, {"window": 5}, {"chunk": 12}, {"window": 5, "sinks": 2}])
def test_pairs_are_counted(fields: dict) -> None:
    mask = Mask(**fields)
    assert visible_pairs(mask, 50) == int(mask.spell(0, 50, 0, 50).sum())
    ids = (torch.rand(3, 50) < 0.1).cumsum(1)
    packed = Mask(**fields, documents=Documents.of_ids(ids))
    assert visible_pairs(packed, 50) == pytest.approx(float(packed.spell(0, 50, 0, 50).sum()) / 3)


def measured(world) -> Speeds:
    return measure_speeds(Group("context", Ledger(), 60), "cpu")


def test_all_ranks_measure_the_same() -> None:
    first, *others = run_ranks(measured, 3)
    assert first.latency_s > 0 < first.bytes_per_s < math.inf
    assert first.flops_per_s > 1e8
    assert all(other == first for other in others)
