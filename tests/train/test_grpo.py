"""Online tuning: TRL's losses, one replica's weights at any number, exact resumes, failures that stop all."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.config import GrpoConfig, parse
from unisono.data.blocks import NO_LABEL
from unisono.data.prompts import rollout
from unisono.errors import ConfigError
from unisono.train.online import balanced
from unisono.train.policy import advantages, log_probabilities, measure_rollout

REWARD = """
def letters(prompts, completions, letter, **_):
    assert len(prompts) == len(completions) == len(letter) and len(set(prompts)) == 1
    return [text.lower().count(one) / 10 for text, one in zip(completions, letter)]

def short(completions):
    return [-len(text) / 100 for text in completions]

def few(prompts, completions, **_):
    return [0.0] * (len(completions) - ("BAD" in prompts[0]))

def nothing(prompts, completions, **_):
    return [float("nan") if "BAD" in prompt else 0.0 for prompt in prompts]

def broken(prompts, completions, **_):
    return [1 / (0 if "BAD" in prompt else 1) for prompt in prompts]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, rewards, and a model that has opinions but was trained by nobody."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unisono.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("grpo")
    corpus = write_corpus(folder)
    rng, words = random.Random(0), corpus.read_text().split()
    records = [
        {"prompt": " ".join(rng.choices(words, k=rng.randint(1, 6))), "letter": rng.choice("aes")}
        for _ in range(60)
    ]
    write(folder / "prompts.jsonl", records)
    write(folder / "bad.jsonl", [*records[:20], {"prompt": "BAD one", "letter": "a"}])
    (folder / "reward.py").write_text(REWARD)
    config = make_job(corpus, folder / "unused")
    tokenizer = load_tokenizer(config.model, config.tokenizer, config.data, folder / "cache")
    torch.manual_seed(0)
    fields = {k: v for k, v in config.model.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **fields))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def job(place: Path, output: Path, grpo: dict | None = None, prompts: str = "prompts", **changes: object):  # fmt: skip
    fields = {
        "model": str(place / "base"), "tokenizer": None, "sequence_length": 64, "max_steps": 6,
        "data": {"path": str(place / f"{prompts}.jsonl"), "eval_fraction": 0.1}, "save_steps": 3,
        "global_batch_size": 8, "micro_batch_size": 2, "optim": "sgd", "learning_rate": 0.1, **changes,
    }  # fmt: skip
    given = {"reward_funcs": f"{place / 'reward.py'}:letters", "num_generations": 4, "max_completion_length": 12}  # fmt: skip
    return make_job(place / "corpus.txt", output, **fields, grpo={**given, **(grpo or {})})


def start(place: Path, output: Path, size: int, grpo: dict | None = None, **changes: object):
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    return run_ranks(run, size, job(place, output, grpo, **changes), join=False, env=env)


def finish(place: Path, output: Path, size: int, grpo: dict | None = None, **changes: object) -> dict:  # fmt: skip
    ends = start(place, output, size, grpo, **changes)
    assert [end for end, _, _ in ends] == ["done"] * size
    return json.loads((output / "receipt.json").read_text())


def metrics(output: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


# --- the mathematics


def test_advantages() -> None:
    rewards = np.array([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    spread = np.sqrt((4 + 1 + 0 + 9) / 3)  # torch.std's: over n - 1
    scaled = np.array([-2.0, -1.0, 0.0, 3.0]) / (spread + 1e-4)
    np.testing.assert_allclose(advantages(rewards, "grpo", True), [scaled, [0] * 4], rtol=1e-6)
    plain = [[-2.0, -1.0, 0.0, 3.0], [0.0] * 4]
    np.testing.assert_allclose(advantages(rewards, "dapo", False), plain, rtol=1e-6)
    left_out = [[1 - 11 / 3, 2 - 10 / 3, 0.0, 6 - 2.0], [0.0] * 4]
    np.testing.assert_allclose(advantages(rewards, "rloo", False), left_out, rtol=1e-6)


def made_up(place: Path, seed: int, count: int = 6):
    """A model, another one as its reference, and ragged prompts with ragged completions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "base")
    reference = AutoModelForCausalLM.from_pretrained(place / "base")
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.from_numpy(rng.normal(0, 0.02, p.shape)).float())
    prompts = [rng.integers(5, 300, rng.integers(2, 9)).tolist() for _ in range(count)]
    completions = [rng.integers(5, 300, rng.integers(1, 12)).tolist() for _ in range(count)]
    return model, reference, prompts, completions, rng.normal(0, 1, count).astype(np.float32)


def measured(model, reference, rows, prompts, completions, gains, asked: GrpoConfig):
    """Ours, of these rows."""
    from dataclasses import replace

    batch = rollout([prompts[r] for r in rows], [completions[r] for r in rows], padding=0)
    inside = batch.labels[:, 1:] != NO_LABEL
    apart = np.zeros_like(batch.drawn)
    with torch.no_grad():
        logp, _ = log_probabilities(reference, batch, asked.temperature, "cpu", False, True)
    apart[inside] = logp.numpy()
    held = apart if asked.beta and asked.loss_type != "rloo" else None
    batch = replace(batch, advantages=gains[rows], reference=held)
    return measure_rollout(model, batch, asked, "cpu", False, keeps=True)


KINDS = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "beta": 0.3, "temperature": 0.7},
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "dr_grpo", "beta": 0.1},
    {"loss_type": "rloo", "temperature": 0.7},
]


@pytest.mark.parametrize("asked", KINDS, ids=lambda asked: " ".join(map(str, asked.values())))
def test_loss_and_gradients_are_trls(place: Path, tmp_path: Path, asked: dict) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    model, reference, prompts, completions, gains = made_up(place, seed=1)
    config = GrpoConfig(reward_funcs="a:b", max_completion_length=20, **asked)

    # Ours: two micro-batches of unlike sizes, sums divided once.
    parts = [
        measured(model, reference, rows, prompts, completions, gains, config)
        for rows in ([0, 1, 2, 3], [4, 5])
    ]
    loss = (parts[0].loss + parts[1].loss) / (parts[0].count + parts[1].count)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    # TRL's, which changes the model's forward method: all rows at once, prompts padded on the left and completions on the right.
    plain = type(model).forward
    rloo = asked["loss_type"] == "rloo"
    fields = {k: v for k, v in asked.items() if not (rloo and k == "loss_type")}
    arguments = (trl.RLOOConfig if rloo else trl.GRPOConfig)(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2,
        per_device_train_batch_size=6, max_completion_length=20, disable_dropout=False,
        gradient_checkpointing=False, steps_per_generation=1, **fields,
    )  # fmt: skip
    trainer = (trl.RLOOTrainer if rloo else trl.GRPOTrainer)(
        model=model, args=arguments, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * 6),
        processing_class=AutoTokenizer.from_pretrained(place / "base"),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    wide, long = max(map(len, prompts)), max(map(len, completions))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (wide - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([c + [0] * (long - len(c)) for c in completions]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (long - len(c)) for c in completions]),
        "advantages": torch.from_numpy(gains),
        "num_items_in_batch": torch.tensor(float(sum(map(len, completions)))),
    }  # fmt: skip

    def logps(model) -> torch.Tensor:
        found = torch.zeros(len(prompts), long)
        for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            with torch.no_grad():
                logits = plain(model, input_ids=torch.tensor([prompt + completion])).logits[0]
            logp = (logits / config.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            found[k, : len(completion)] = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
        return found

    inputs["ref_per_token_logps"] = logps(reference)
    inputs["old_logps"] = (logps(model) * inputs["completion_mask"]).sum(1)
    theirs = trainer._compute_loss(model.train(), inputs)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-3
    for name, p in model.named_parameters():
        scale = float(p.grad.abs().max())
        assert float((ours[name] - p.grad).abs().max()) <= 1e-5 * scale + 1e-9, name
    sums = _added(parts)
    if asked.get("beta"):
        assert sums["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-4)
    assert sums["entropy"] == pytest.approx(trainer._metrics["train"]["entropy"][-1], rel=1e-5)


def _added(parts: list) -> dict[str, float]:
    return {
        name: sum(p.sums[name][0] for p in parts) / sum(p.sums[name][1] for p in parts)
        for name in parts[0].sums
    }


@pytest.mark.parametrize("asked", KINDS, ids=lambda asked: " ".join(map(str, asked.values())))
def test_a_loss_does_not_depend_on_micro_batches(place: Path, asked: dict) -> None:
    model, reference, prompts, completions, gains = made_up(place, seed=2)
    config = GrpoConfig(reward_funcs="a:b", max_completion_length=20, **asked)
    found = []
    for cut in ([[0, 1, 2, 3, 4, 5]], [[5, 0], [], [2, 1, 3], [4]]):
        parts = [measured(model, reference, r, prompts, completions, gains, config) for r in cut]
        (sum(p.loss for p in parts) / sum(p.count for p in parts)).backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_every_part_of_a_batch_has_long_and_short_prompts() -> None:
    rng = np.random.default_rng(3)
    for count in (1, 2, 3, 7, 16, 48, 64):
        lengths = rng.integers(1, 500, count)
        order = balanced(lengths)
        assert sorted(order.tolist()) == list(range(count))
        np.testing.assert_array_equal(order, balanced(lengths))
        for parts in (2, 4, 8):
            if count % parts == 0 and count // parts >= 4:
                sums = lengths[order].reshape(parts, -1).sum(1)
                at_once = np.sort(lengths)[::-1].reshape(parts, -1).sum(1)
                assert np.ptp(sums) < 0.45 * np.ptp(at_once)


# --- at any number of replicas


def weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    ("grpo", "changes"),
    [
        ({"beta": 0.1, "loss_type": "grpo"}, {}),
        ({"beta": 0.1, "loss_type": "rloo", "top_p": 0.9}, {"shard_optimizer": True}),
        ({"mask_truncated_completions": True}, {"sync": "ddp"}),
    ],
    ids=["grpo", "rloo on shards", "dapo in ddp"],
)
def test_replicas_train_what_one_would(
    place: Path, tmp_path: Path, grpo: dict, changes: dict
) -> None:
    sizes = (1, 2) if changes else (1, 2, 4)
    for size in sizes:
        finish(place, tmp_path / str(size), size, grpo, **(changes if size > 1 else {}))
    one = weights(tmp_path / "1")
    names = ("train/loss", "train/reward", "train/completions/mean_length", "eval/reward")
    for size in sizes[1:]:
        for name in names:
            expected = pytest.approx(metrics(tmp_path / "1", name), rel=1e-5, abs=1e-8)
            assert metrics(tmp_path / str(size), name) == expected, name
        for name, value in weights(tmp_path / str(size)).items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-6)
    if "loss_type" in grpo:
        assert "train/kl" in (tmp_path / "1/metrics.jsonl").read_text()


def test_strict_gives_the_same_bits_and_a_resume_too(place: Path, tmp_path: Path) -> None:
    fields = {"determinism": "strict", "lr_scheduler_type": "constant", "optim": "adamw", "learning_rate": 1e-2}  # fmt: skip
    grpo = {"beta": 0.1}
    whole = finish(place, tmp_path / "whole", 2, grpo, **fields)
    one = finish(place, tmp_path / "one", 1, grpo, **fields)
    assert whole["digest"] == one["digest"]
    finish(place, tmp_path / "parts", 4, grpo, max_steps=3, **fields)
    resumed = finish(place, tmp_path / "parts", 1, grpo, **fields)
    assert resumed["digest"] == whole["digest"]
    rows = (tmp_path / "parts/completions.jsonl").read_text()
    assert rows == (tmp_path / "one/completions.jsonl").read_text()


def test_a_resume_with_another_reward_is_another_run(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 1, max_steps=3)
    for grpo, reason in (
        ({"reward_funcs": f"{place / 'reward.py'}:short"}, "grpo: found"),
        ({"temperature": 0.9}, "grpo: found"),
    ):
        end, _, _ = start(place, tmp_path, 1, grpo)[0]
        assert end.startswith("ConfigError") and reason in end
    (place / "other.py").write_text(REWARD)
    given = {"reward_funcs": f"{place / 'other.py'}:letters"}
    finish(place, tmp_path / "b", 1, given, max_steps=3)
    (place / "other.py").write_text(REWARD + "\n# changed\n")
    end, _, _ = start(place, tmp_path / "b", 1, given)[0]
    assert "or reward functions changed" in end


def test_adapters_are_compared_with_the_model_without_them(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    fields = {"lora": {"r": 4, "alpha": 8}, "optim": "adamw", "learning_rate": 3e-2, "determinism": "strict", "lr_scheduler_type": "constant"}  # fmt: skip
    whole = finish(place, tmp_path / "whole", 2, {"beta": 0.1}, **fields)
    kl = metrics(tmp_path / "whole", "train/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-9) and kl[-1] > 1e-4
    assert max(metrics(tmp_path / "whole", "train/sampling/sampling_logp_difference/mean")) < 1e-5
    finish(place, tmp_path / "parts", 1, {"beta": 0.1}, max_steps=3, **fields)
    resumed = finish(place, tmp_path / "parts", 1, {"beta": 0.1}, **fields)
    assert resumed["digest"] == whole["digest"]


def test_it_learns_what_is_rewarded_and_says_where_the_time_went(
    place: Path, tmp_path: Path
) -> None:
    rewards = [f"{place / 'reward.py'}:{name}" for name in ("letters", "short")]
    receipt = finish(
        place, tmp_path, 2, {"reward_funcs": rewards, "reward_weights": [1.0, 0.2]}, optim="adamw",
        learning_rate=2e-2, max_steps=40, data={"path": str(place / "prompts.jsonl"), "eval_fraction": 0.3},
    )  # fmt: skip
    before, after = (metrics(tmp_path, "eval/reward")[k] for k in (0, -1))
    assert after > before + 0.1
    both = zip(*(metrics(tmp_path, f"train/{n}") for n in ("reward", "rewards/letters/mean", "rewards/short/mean")), strict=True)  # fmt: skip
    assert all(r == pytest.approx(a + 0.2 * b) for r, a, b in both)
    assert sum(receipt["shares"].values()) == pytest.approx(1.0)
    assert receipt["shares"]["generation"] > 0.05
    assert receipt["tokens"] == sum(metrics(tmp_path, "train/completions/mean_length")) * 32
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(1, 41))
    assert set(rows[0]) >= {"prompt", "completion", "reward", "rewards", "advantage", "ended"}


def slow_on_rank_1(world) -> None:
    """Its rewards take 50 ms a prompt, and ranks vote between micro-batches as in slow steps."""
    import time

    from unisono.train import online, step

    step.SLOW_STEP_S = 0.0
    plain = online.Online._rewarded

    def slowly(self, *given):
        if world.rank == 1:
            time.sleep(0.05)
        return plain(self, *given)

    online.Online._rewarded = slowly


def test_who_waits_for_another_ones_generation_is_waiting(place: Path, tmp_path: Path) -> None:
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    ends = run_ranks(run, 2, job(place, tmp_path), slow_on_rank_1, join=False, env=env)
    assert [end for end, _, _ in ends] == ["done", "done"]
    first, second = json.loads((tmp_path / "receipt.json").read_text())["seconds_by_rank"]
    slept = 6 * 4 * 0.05
    assert second["generation"] >= slept
    assert first["waiting"] + first["imbalance"] + first["communication"] > 0.5 * slept
    assert first["waiting"] + first["imbalance"] > first["other"] + first["communication"]


def test_a_reward_model_of_ours_judges(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"say {k}", "chosen": "ab", "rejected": "the king"} for k in range(20)]
    write(tmp_path / "pairs.jsonl", pairs)
    changes = {"grpo": None, "reward": {}, "data": {"path": str(tmp_path / "pairs.jsonl")}}
    trained = job(place, tmp_path / "judge").model_dump(mode="json") | changes
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    end, _, _ = run_ranks(run, 1, parse(trained), join=False, env=env)[0]
    assert end == "done"
    finish(place, tmp_path / "run", 2, {"reward_funcs": str(tmp_path / "judge")}, max_steps=2)
    assert len(set(metrics(tmp_path / "run", "train/rewards/judge/mean"))) == 2


# --- what goes wrong


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("few", "returned 3 numbers for 4 completions"),
        ("nothing", "returned nan for "),
        ("broken", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_fails_stops_all(
    place: Path, tmp_path: Path, function: str, reason: str
) -> None:
    given = {"reward_funcs": f"{place / 'reward.py'}:{function}"}
    changes = {"prompts": "bad", "data": {"path": str(place / "bad.jsonl"), "eval_fraction": 0}}
    ends = [end for end, _, _ in start(place, tmp_path, 2, given, **changes)]
    said = [end for end in ends if end.startswith("UnisonoError")]
    assert len(said) == 1 and sum("Elsewhere" in end for end in ends) == 1
    assert f"reward {function}, step " in said[0] and "bad.jsonl:21, prompt 'BAD one'" in said[0]
    assert reason in said[0] and "\n" not in said[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sync": "sharded"}, "sync: found sharded with grpo"),
        ({"attention": {"window": 8}}, "attention: found a mapping with grpo"),
        ({"data": {"path": "x.jsonl", "packing": "concat"}}, "data.packing: found concat with grpo"),
        ({"grpo": {"reward_funcs": "nowhere.py:f"}}, "no file nowhere.py"),
        ({"grpo": {"max_completion_length": 64}}, "sequence_length: found 64, which holds prompt and"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    place: Path, tmp_path: Path, changes: dict, reason: str
) -> None:
    end, _, _ = start(place, tmp_path, 1, **changes)[0]
    assert end.startswith("ConfigError: ") and reason in end, end


def test_fields_that_contradict() -> None:
    least = {"model": "m", "data": "p.jsonl", "output_dir": "o"}
    for grpo, reason in (
        ({"reward_funcs": "a:b", "reward_weights": [1, 2]}, "2 reward_weights for 1 reward_funcs"),
        ({"reward_funcs": "a:b", "loss_type": "rloo", "scale_rewards": "group"}, "leave scale_rewards out"),
        ({"reward_funcs": "a:b", "num_generation": 4}, "did you mean grpo.num_generations?"),
        ({"reward_funcs": "a:b", "num_generations": 1}, "grpo.num_generations: found 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            parse({**least, "grpo": grpo})
        assert reason in str(caught.value)


def test_a_plan_does_not_foretell_completions() -> None:
    from unisono.forecast.ask import configuration

    with pytest.raises(ConfigError, match="how long completions will be is not known"):
        configuration("shakespeare-grpo", [])
    assert configuration("shakespeare-grpo", ["grpo=null"]).grpo is None


def test_memory_that_runs_out_makes_smaller_batches(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unisono.clock import Clock
    from unisono.data.prompts import prepare_prompts
    from unisono.train import online as module

    config = job(place, place / "unused")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    prompts = prepare_prompts(config, tokenizer, None).train
    policy = module.policy_of(AutoModelForCausalLM.from_pretrained(place / "base"))
    found, sizes = [], []
    plain = module.complete

    def scarce(model, ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise MemoryError
        return plain(model, ids, *rest)

    for complete in (plain, scarce):
        monkeypatch.setattr(module, "complete", complete)
        world = SimpleNamespace(device="cpu", local_size=1)
        online = module.make_online(config, world, policy, [], tokenizer, Clock())
        monkeypatch.setattr(online, "_rewarded", lambda prompt, rows, where: rows)
        rows = list(enumerate(prompts.items[:8]))
        found.append(online.draw(rows, module.TRAINING, 4, "step 1")[0])
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert [[r.tokens for r in rows] for rows in found[0]] == [[r.tokens for r in rows] for rows in found[1]]  # fmt: skip
