"""LoRA: peft's own loop, a fraction of the bytes, peft's files, exact resumes, merged weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.errors import ConfigError

STEPS = 20
LORA = {"r": 4, "alpha": 8}
VOTE_BYTES = 4096
"""At most so much of a step's traffic is no gradient and no weight."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a base model, trained by nobody."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unisono.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("lora")
    config = make_job(write_corpus(folder), folder / "unused")
    cache = folder / "cache" / "unisono"
    tokenizer = load_tokenizer(config.model, config.tokenizer, config.data, cache)
    torch.manual_seed(0)
    fields = {k: v for k, v in config.model.items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **fields)).save_pretrained(folder / "base")  # fmt: skip
    tokenizer.save_pretrained(folder / "base")
    return folder


def job(place: Path, output: Path, **changes: object):
    fields = {"model": str(place / "base"), "tokenizer": None, "lora": LORA, "max_steps": STEPS, **changes}  # fmt: skip
    return make_job(place / "corpus.txt", output, **fields)


def finish(place: Path, output: Path, size: int, **changes: object) -> list:
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    ends = run_ranks(run, size, job(place, output, **changes), join=False, env=env)
    assert [end for end, _, _ in ends] == ["done"] * size
    return ends


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def adapters(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "adapter_model.safetensors")


def plain_loop(place: Path, lora: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """peft, torch's AdamW and transformers' schedule, one process."""
    import peft
    from transformers import AutoModelForCausalLM, get_scheduler

    from unisono.data.order import Order
    from unisono.data.prepare import prepare
    from unisono.data.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    config = job(place, place / "plain")
    cache = place / "cache" / "unisono"
    tokenizer = load_tokenizer(config.model, None, config.data, cache)
    blocks = prepare(config, tokenizer, cache, place / "quarantine").blocks("train")
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    torch.manual_seed(config.seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora)).train()
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
    return found, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("ours", "pefts"),
    [
        (LORA, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        pytest.param(
            {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "use_dora": True, "modules_to_save": ["lm_head"]},
            {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "use_dora": True, "modules_to_save": ["lm_head"]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["all-linear", "named, rsLoRA, DoRA, lm_head"],
)  # fmt: skip
def test_it_is_peft_in_a_plain_loop(place: Path, tmp_path: Path, ours: dict, pefts: dict) -> None:
    expected, weights = plain_loop(place, pefts)
    for size in (1, 2):
        output = tmp_path / str(size)
        finish(place, output, size, lora=ours, logging_steps=1)
        assert losses(output) == pytest.approx(expected, rel=1e-5)
        found = adapters(output)
        assert set(found) == set(weights)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_only_what_is_trained_travels_is_kept_and_is_saved(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "base")
    size = 0
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            size += 4 * LORA["r"] * (module.in_features + module.out_features)
    for ranks in (2, 4):
        output = tmp_path / str(ranks)
        finish(place, output, ranks, max_steps=4, save_steps=2)
        plan = json.loads((output / "plan.json").read_text())
        formula = 2 * size * (ranks - 1) // ranks
        assert plan["sent_bytes_per_step"] == formula
        measured = json.loads((output / "receipt.json").read_text())["sent_bytes_per_step"]
        assert formula <= measured <= formula + VOTE_BYTES
    adapted = PeftModel.from_pretrained(base, tmp_path / "2")
    assert 4 * sum(t.numel() for t in adapters(tmp_path / "2").values()) == size
    newest = sorted((tmp_path / "2").glob("checkpoint-*"))[-1]
    assert (newest / "adapter_config.json").is_file() and not (newest / "config.json").exists()
    state = {}
    for path in newest.glob("optimizer-*.safetensors"):
        state |= load_file(path)
    kept = {key.partition(".")[2] for key in state}
    assert kept and all("lora_" in name for name in kept)
    assert 4 * sum(t.numel() for k, t in state.items() if k.startswith("exp_avg.")) == size
    assert any("lora_" in n for n, _ in adapted.named_parameters())


def test_a_resume_is_exact_at_any_number_of_replicas(place: Path, tmp_path: Path) -> None:
    def digest(output: Path) -> str:
        return json.loads((output / "receipt.json").read_text())["digest"]

    strict = {"determinism": "strict", "lr_scheduler_type": "constant", "lora": {**LORA, "dropout": 0.1}}  # fmt: skip
    finish(place, tmp_path / "whole", 2, max_steps=8, **strict)
    finish(place, tmp_path / "parts", 1, max_steps=4, **strict)
    ends = finish(place, tmp_path / "parts", 4, max_steps=8, **strict)
    assert any("resumed from" in line for line in ends[0][1])
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")


def test_merged_weights_compute_the_same(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unisono.generate import generate
    from unisono.model.adapter import merge

    finish(place, tmp_path / "run", 1, max_steps=4)
    merge(tmp_path / "run", tmp_path / "merged")
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        plain = base.eval()(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "run").eval()(ids).logits
        found = merged(ids).logits
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-5)
    assert float((found - plain).abs().max()) > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id is not None
    wanted = {"max_new_tokens": 5, "temperature": 0.0}
    text = generate(str(tmp_path / "merged"), "The", **wanted)
    assert generate(str(tmp_path / "run"), "The", **wanted) == text
    with pytest.raises(ConfigError, match="not empty"):
        merge(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        merge(place / "base", tmp_path / "other")
    with pytest.raises(ConfigError, match="write --base DIR"):
        merge(tmp_path / "run", tmp_path / "other", base=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sync": "sharded"}, "sync: found sharded with lora"),
        ({"lora": {"target_modules": ["no_such_layer"]}}, "lora.target_modules: "),
        ({"model": {"model_type": "llama"}, "tokenizer": {"vocab_size": 320}}, "lora: found with an architecture"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    place: Path, tmp_path: Path, changes: dict, reason: str
) -> None:
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    config = job(place, tmp_path / "run", **changes)
    end, _, _ = run_ranks(run, 1, config, join=False, env=env)[0]
    assert end.startswith("ConfigError: ") and reason in end, end


def test_adapters_of_another_base_are_refused(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from unisono.model.adapter import merge

    finish(place, tmp_path / "run", 1, max_steps=4)
    config = AutoModelForCausalLM.from_pretrained(place / "base").config
    config.hidden_size, config.head_dim = 64, 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(ConfigError, match="its adapters are not of this model"):
        merge(tmp_path / "run", tmp_path / "out", base=str(tmp_path / "wider"))
    config = job(place, tmp_path / "run", model=str(tmp_path / "wider"), tokenizer=str(place / "base"))  # fmt: skip
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    end, _, _ = run_ranks(run, 1, config, join=False, env=env)[0]
    assert "holds adapters of" in end, end
