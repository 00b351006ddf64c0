"""QLoRA: peft's own loop beside bitsandbytes' 4-bit weights, replicas, resumes, merged weights, memory."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes", reason="needs the extra qlora")

from jobs import make_job, run, write_corpus
from pairs import make_pair_job, pairs, write_model, write_pairs
from ranks import run_ranks
from unisono.errors import ConfigError
from unisono.model import quantize

STEPS = 8
QLORA = {"r": 4, "alpha": 8, "load_in_4bit": True}
BLOCK = 64
"""Weights that share a scale."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a base model, trained by nobody."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unisono.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("qlora")
    config = make_job(write_corpus(folder), folder / "unused")
    tokenizer = load_tokenizer(
        config.model, config.tokenizer, config.data, folder / "cache" / "unisono"
    )
    torch.manual_seed(0)
    fields = {k: v for k, v in config.model.items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **fields)).save_pretrained(folder / "base")  # fmt: skip
    tokenizer.save_pretrained(folder / "base")
    return folder


def job(place: Path, output: Path, **changes: object):
    fields = {"model": str(place / "base"), "tokenizer": None, "lora": QLORA, "max_steps": STEPS, **changes}  # fmt: skip
    return make_job(place / "corpus.txt", output, **fields)


def ends_of(place: Path, size: int, config, patch=None) -> list:
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    return run_ranks(run, size, config, patch, join=False, env=env)


def finish(place: Path, output: Path, size: int, **changes: object) -> None:
    ends = ends_of(place, size, job(place, output, **changes))
    assert [end for end, _, _ in ends] == ["done"] * size


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [row["train/loss"] for row in rows(output) if "train/loss" in row]


def digest(output: Path) -> str:
    return json.loads((output / "receipt.json").read_text())["digest"]


def quantized(place: Path, **fields: object):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **fields
    )
    model = AutoModelForCausalLM.from_pretrained(
        place / "base", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    quantize.keep_layout(model)
    return model


def plain_loop(place: Path, double: bool) -> list[float]:
    """peft with what it does to a model of 4 bits, torch's AdamW, one process."""
    import peft
    from transformers import get_scheduler

    from unisono.data.order import Order
    from unisono.data.prepare import prepare
    from unisono.data.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    config = job(place, place / "plain")
    cache = place / "cache" / "unisono"
    tokenizer = load_tokenizer(config.model, None, config.data, cache)
    blocks = prepare(config, tokenizer, cache, place / "quarantine").blocks("train")
    model = peft.prepare_model_for_kbit_training(
        quantized(place, bnb_4bit_use_double_quant=double), use_gradient_checkpointing=False
    )
    torch.manual_seed(config.seed)
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **wanted)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, 4, STEPS)
    order, found = Order(len(blocks), config.seed), []
    for step in range(STEPS):
        batch = blocks.read(order.at(np.arange(step * 16, step * 16 + 16)))
        loss = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            labels=torch.from_numpy(batch.labels),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("double", [False, True])
def test_it_is_peft_in_a_plain_loop_also_with_evaluations_between(
    place: Path, tmp_path: Path, double: bool
) -> None:
    """bitsandbytes packs weights anew where it evaluates, on some CPUs, and these have no gradients."""
    expected = plain_loop(place, double)
    lora = {**QLORA, "bnb_4bit_use_double_quant": double}
    for size, sync in ((1, "exact"), (2, "exact"), (2, "ddp")):
        output = tmp_path / f"{sync}{size}"
        finish(place, output, size, lora=lora, sync=sync, eval_steps=2)
        assert losses(output) == pytest.approx(expected, rel=1e-5), (size, sync)


def test_matrices_of_layers_alone_take_half_a_byte(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for double in (False, True):
        output = tmp_path / str(double)
        finish(place, output, 2, lora={**QLORA, "bnb_4bit_use_double_quant": double}, max_steps=2)
        base = quantized(place, bnb_4bit_use_double_quant=double)
        layers = sum(quantize.values(m.weight) for m in base.modules() if hasattr(m, "quant_state"))
        whole = sum(quantize.values(p) for p in base.parameters())
        assert layers == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
        adapters = load_file(output / "adapter_model.safetensors")
        trained = sum(t.numel() for t in adapters.values())
        assert all("lora_" in name for name in adapters)
        plan = json.loads((output / "plan.json").read_text())
        assert plan["sent_bytes_per_step"] == 2 * 4 * trained // 2
        scales = sum(t.numel() * t.element_size() for _, t in quantize.scales(base))
        assert scales == (layers / BLOCK + 14 * (4 + 4) if double else layers / BLOCK * 4)
        state = (1 + 2) * 4 * trained if not plan["shard_optimizer"] else (1 + 2 / 2) * 4 * trained
        weights = 4 * (whole - layers + trained) + layers / 2 + scales
        assert plan["model_bytes"] == weights + state


def test_a_resume_is_exact_at_any_number_of_replicas(place: Path, tmp_path: Path) -> None:
    strict = {"determinism": "strict", "lr_scheduler_type": "constant"}
    finish(place, tmp_path / "whole", 2, **strict)
    finish(place, tmp_path / "parts", 1, max_steps=4, **strict)
    finish(place, tmp_path / "parts", 4, **strict)
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    config = job(place, tmp_path / "parts", lora={**QLORA, "load_in_4bit": False}, **strict)
    assert "lora: found" in ends_of(place, 1, config)[0][0]


def test_merged_weights_are_those_that_were_trained_beside(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from unisono.evaluate import model as evaluated
    from unisono.generate import load
    from unisono.model.adapter import merge

    finish(place, tmp_path / "run", 1)
    merge(tmp_path / "run", tmp_path / "merged")
    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    source = evaluated.find(str(tmp_path / "run"))
    with torch.no_grad():
        trained = PeftModel.from_pretrained(quantized(place), tmp_path / "run").eval()(ids).logits
        beside = AutoModelForCausalLM.from_pretrained(place / "base")
        other = PeftModel.from_pretrained(beside, tmp_path / "run").eval()(ids).logits
        answers = [
            merged(ids).logits,
            load(str(tmp_path / "run"), "cpu")[0](ids).logits,
            evaluated.load(source, "cpu", "float32").model(ids).logits,
        ]
    for found in answers:
        torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
    assert float((other - trained).abs().max()) > 1e-3, "the base as it is is another model"


def other_scales(world) -> None:
    """On rank 1 a base whose packed weights are the same, and one scale is not."""
    from unisono.train import job as job_module

    load = job_module.load_model

    def changed(*args, **kwargs):
        model = load(*args, **kwargs)
        if world.rank == 1:
            next(m for m in model.modules() if hasattr(m, "quant_state")).weight.quant_state.absmax[3] *= 2  # fmt: skip
        return model

    job_module.load_model = changed


def test_scales_that_differ_between_hosts_are_found(place: Path, tmp_path: Path) -> None:
    for end, _, _ in ends_of(place, 2, job(place, tmp_path / "run"), other_scales):
        assert "the hosts have other base models" in end and ".absmax" in end, end


def test_preferences_are_compared_with_the_quantized_model(tmp_path: Path) -> None:
    """At the first step the adapters are zero, so every reward is, if the reference is that same model."""
    model = write_model(tmp_path)
    data = write_pairs(tmp_path / "pairs.jsonl", pairs(40))
    config = make_pair_job(model, data, tmp_path / "run", lora=QLORA, max_steps=2, learning_rate=1e-9)  # fmt: skip
    assert [end for end, _, _ in ends_of(tmp_path, 2, config)] == ["done"] * 2
    first = next(row for row in rows(tmp_path / "run") if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_reward_model_keeps_its_head_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from unisono.model.adapter import merge

    model = write_model(tmp_path)
    data = write_pairs(tmp_path / "pairs.jsonl", pairs(40))
    config = make_pair_job(model, data, tmp_path / "run", lora=QLORA, max_steps=2, dpo=None, reward={})  # fmt: skip
    assert [end for end, _, _ in ends_of(tmp_path, 2, config)] == ["done"] * 2
    merge(tmp_path / "run", tmp_path / "merged")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert whole.score.weight.shape == (1, 32) and whole.score.weight.any()


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = SimpleNamespace(load_in_4bit=True, bnb_4bit_use_double_quant=False, modules_to_save=())
    with pytest.raises(ConfigError, match=r"lora\.load_in_4bit: .* pip install 'unisono\[qlora\]'"):
        quantize.asked(asked, "cpu", False)


@pytest.mark.gpu
def test_on_a_gpu_it_learns_what_a_cpu_learns(place: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    finish(place, tmp_path / "cpu", 1)
    finish(place, tmp_path / "gpu", 1, device="cuda")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    assert len({tuple(losses(tmp_path / name)) for name in ("cpu", "gpu")}) == 2
