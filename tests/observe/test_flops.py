"""Operations counted from models, against counting by hand and torch's own counter."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from unisono import config as config_module
from unisono.forecast import hardware
from unisono.forecast.probe import Probe
from unisono.observe.flops import Flops, count, find_peak, pairs

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
MATRICES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)


def build(**fields: object) -> torch.nn.Module:
    config = AutoConfig.for_model(**{**LLAMA, **fields})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("tied", [True, False])
def test_llama_by_hand(tied: bool) -> None:
    flops = count(build(tie_word_embeddings=tied))
    assert (flops.layers, flops.head, flops.pair) == (MATRICES, 64 * 128, 4 * 64)
    # Forward and backward, PaLM's 6 N + 12 L H Q T for a token, attention over half of T.
    attention = 12 * 2 * 64 * (16 + 1) / 2
    assert flops.model(3, 16) == 3 * 16 * (6 * (MATRICES + 64 * 128) + attention)
    assert flops.hardware(3, 16) == flops.model(3, 16)


def test_torch_counts_the_same_matrices() -> None:
    model = build(tie_word_embeddings=True)
    flops = count(model)
    with FlopCounterMode(display=False) as counter:
        loss = model(torch.randint(128, (2, 16)), labels=torch.randint(128, (2, 16))).loss
        loss.backward()
    # Eager attention computes all pairs; the first layer's input needs no gradient only in part.
    all_pairs = Flops(flops.layers, 0, flops.head, flops.pair, flops.windows, causal=False)
    assert counter.get_total_flops() == pytest.approx(all_pairs.model(2, 16), rel=0.02)


def test_recomputation_is_every_layer_forward_again() -> None:
    model = build()
    flops = count(model, recomputes=True)
    attention = 2 * 4 * 64 * pairs(16, 0)
    assert flops.hardware(1, 16) - flops.model(1, 16) == 2 * 16 * MATRICES + attention


def test_frozen_matrices_need_no_gradient_of_their_own() -> None:
    model = build(tie_word_embeddings=False)
    for p in model.model.layers[0].parameters():
        p.requires_grad = False
    flops = count(model)
    assert flops.layers == flops.frozen_layers == MATRICES / 2
    whole = count(build(tie_word_embeddings=False))
    assert whole.model(1, 8) - flops.model(1, 8) == 8 * 2 * MATRICES / 2


@pytest.mark.parametrize(
    ("length", "window", "expected"), [(4, 0, 10), (4, 2, 7), (4, 1, 4), (4, 9, 10), (1, 0, 1)]
)
def test_pairs_of_query_and_key(length: int, window: int, expected: int) -> None:
    assert pairs(length, window) == expected
    assert expected == sum(min(i + 1, window or length) for i in range(length))


def test_windows_and_experts() -> None:
    mistral = build(model_type="mistral", sliding_window=8)
    assert count(mistral).windows == (8, 8)
    gemma = build(model_type="gemma3_text", num_hidden_layers=6, head_dim=32, sliding_window=8)
    assert count(gemma).windows == (8, 8, 8, 8, 8, 0)
    assert count(gemma).pair == 4 * 4 * 32
    assert count(build(model_type="qwen2")).windows == (0, 0)
    experts = 4 * 3 * 64 * 96
    mixtral = build(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    chosen = count(mixtral).layers
    dense = MATRICES - 2 * 3 * 64 * 96
    assert chosen == pytest.approx(dense + 2 * experts / 2)


def test_a_peak_is_published_measured_or_unknown(tmp_path: Path) -> None:
    config = config_module.parse(
        {"model": LLAMA, "data": "x", "output_dir": str(tmp_path), "bf16": True}
    )
    published = find_peak(config, "cuda:0", "NVIDIA H100 80GB HBM3", None)
    assert published.flops == hardware.device("H100").peak("bf16")
    assert "bf16" in published.source
    unknown = find_peak(config, "cpu", "AMD EPYC", None)
    assert unknown.flops is None
    assert unknown.source == "no known peak of AMD EPYC; unisono probe measures one"
    probe = Probe(
        device="AMD EPYC", ranks=1, nodes=1, memory_bytes=1e9, memory_bytes_per_s=1e9,
        matmul_flops={"bf16": 2e10},
    )  # fmt: skip
    assert find_peak(config, "cpu", "AMD EPYC", probe).flops == 2e10
    only_fp32 = probe.model_copy(update={"matmul_flops": {"fp32": 5e10}})
    assert find_peak(config, "cpu", "AMD EPYC", only_fp32).flops is None
