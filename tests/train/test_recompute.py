"""What a checkpointed layer computes again is told apart, on a real model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unisono.clock import Clock
from unisono.train.recompute import time_recomputation


def model_with(checkpointing: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def seconds_of_a_pass(checkpointing: bool) -> tuple[dict[str, float], Clock]:
    model, clock = model_with(checkpointing), Clock()
    ids = torch.randint(128, (4, 64))
    with time_recomputation(model, clock), clock("compute"):
        model(ids, labels=ids).loss.backward()
    assert clock.phase == "other"
    return clock.read(), clock


def test_recomputation_is_a_part_of_the_backward_pass() -> None:
    seconds, _ = seconds_of_a_pass(True)
    assert 0 < seconds["recomputation"] < seconds["compute"]


def test_without_checkpointing_there_is_none() -> None:
    assert "recomputation" not in seconds_of_a_pass(False)[0]


def test_every_layer_is_entered_and_left_once(monkeypatch) -> None:
    entered = []
    original = Clock._switch

    def noting(self: Clock, phase: str) -> str:
        entered.append(phase)
        return original(self, phase)

    monkeypatch.setattr(Clock, "_switch", noting)
    seconds_of_a_pass(True)
    assert entered.count("recomputation") == 3, "once for each layer"
