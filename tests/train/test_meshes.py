"""Meshes train what one process trains, and a checkpoint of one goes on upon any other."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import job_fields, make_job, run, write_corpus
from ranks import run_ranks

STEPS = 3
SAME = {
    "max_steps": STEPS,
    "save_steps": STEPS,
    "adam_epsilon": 1e-6,
    "eval_batches": 2,
    "threads": 1,
}
"""Without a larger epsilon AdamW makes a whole step of a gradient that is zero but for rounding."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(corpus: Path, output: Path, ranks: int, **changes: object) -> tuple[dict, dict]:
    """(final parameters, receipt with the losses of the steps and the plan)."""
    config = make_job(corpus, output, **{**SAME, **changes})
    ends = run_ranks(run, ranks, config, join=False)
    assert [end for end, _, _ in ends] == ["done"] * ranks, ends[0]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    receipt = json.loads((output / "receipt.json").read_text())
    receipt["losses"] = [r["train/loss"] for r in rows if "train/loss" in r]
    receipt["plan"] = json.loads((output / "plan.json").read_text())
    return load_file(output / "model.safetensors"), receipt


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return trained(corpus, tmp_path_factory.mktemp("one") / "run", 1)


def worst(found: dict, expected: dict) -> float:
    """The largest difference of any weight."""
    assert set(found) == set(expected)
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


def assert_alike(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    """Same weights, losses and held-out loss; every sample, token and operation counted once."""
    assert worst(found[0], expected[0]) < 1e-5
    mine, first = found[1], expected[1]
    assert torch.allclose(torch.tensor(mine["losses"]), torch.tensor(first["losses"]), rtol=1e-5)
    assert mine["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert mine["tokens"] == first["tokens"]
    assert mine["samples"] == first["samples"]
    assert "each exactly where the order has it" in mine["samples"]
    assert mine["mfu"]["model_flops_per_step"] == first["mfu"]["model_flops_per_step"]


NARROW = {
    "int8": {"sync": "quantized"},
    "int4": {"sync": "quantized", "wire": "int4"},
    "powersgd": {"sync": "powersgd", "powersgd": {"rank": 4, "start": 0.3}},
}


@pytest.mark.parametrize("kind", NARROW)
def test_codes_between_ranks_that_share_sequences(
    kind: str, corpus: Path, tmp_path: Path, one: tuple[dict, dict]
) -> None:
    mesh = {"replica": 2, "context": 2}
    found = trained(corpus, tmp_path / "run", 4, mesh=mesh, check_replicas_every=1, **NARROW[kind])
    assert found[1]["losses"] == pytest.approx(one[1]["losses"], rel=1e-2)
    assert found[1]["losses"] != one[1]["losses"]


PAIRS = {
    "replica x shard": ("sharded", {"replica": 2, "shard": 2}),
    "replica x context": ("exact", {"replica": 2, "context": 2}),
    "replica x tensor": ("exact", {"replica": 2, "tensor": 2}),
    "shard x context": ("sharded", {"shard": 2, "context": 2}),
    "shard x tensor": ("sharded", {"shard": 2, "tensor": 2}),
    "context x tensor": ("exact", {"context": 2, "tensor": 2}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_axes_train_what_one_process_trains(
    pair: str, corpus: Path, tmp_path: Path, one: tuple[dict, dict]
) -> None:
    sync, mesh = PAIRS[pair]
    found = trained(corpus, tmp_path / "run", 4, sync=sync, mesh=mesh, check_replicas_every=1)
    assert_alike(found, one)
    # The plan's bytes, with what else a step sends: votes, norms, who used what. Of a halo the plan has
    # those of the rank that sends most.
    planned, sent = found[1]["plan"]["sent_bytes_per_step"], found[1]["sent_bytes_per_step"]
    assert 0.9 * planned <= sent < 1.02 * planned


OPTIONS: dict[str, dict] = {
    "optimizer on shards": {"mesh": {"context": 2}, "shard_optimizer": True},
    "recomputed": {"mesh": {"context": 2, "tensor": 2}, "gradient_checkpointing": True},
    "padded sequences": {"mesh": {"context": 4}, "sequence_length": 30},
    "windows": {"mesh": {"context": 2}, "attention": {"window": 5, "sinks": 1}},
    "all-gather": {"mesh": {"context": 2}, "context": {"scheme": "allgather"}},
    "ulysses": {"mesh": {"context": 2}, "context": {"scheme": "ulysses"}},
    "usp": {"mesh": {"context": 4}, "context": {"scheme": "usp", "ulysses": 2}},
    "usp, recomputed": {
        "mesh": {"context": 4},
        "context": {"scheme": "usp", "ulysses": 2},
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_mesh_with_other_options(option: str, corpus: Path, tmp_path: Path) -> None:
    changes = dict(OPTIONS[option])
    mesh = changes.pop("mesh")
    own = {k: v for k, v in changes.items() if k in ("sequence_length", "attention")}
    expected = trained(corpus, tmp_path / "one", 1, **own)
    found = trained(corpus, tmp_path / "run", 4, mesh=mesh, **changes)
    assert_alike(found, expected)
    plan = found[1]["plan"]
    if scheme := changes.get("context", {}).get("scheme"):
        assert f"2 layers {scheme}: as asked" in plan["reasons"]["context"]
        assert found[1]["sent_bytes_per_step"] == pytest.approx(plan["sent_bytes_per_step"], rel=0.02)  # fmt: skip


def test_packed_documents_over_context_ranks(tmp_path: Path) -> None:
    """Short documents, several in a sequence, which must not see each other across ranks either."""
    chooser = random.Random(3)
    lexicon = write_corpus(tmp_path).read_text().split()
    corpus = tmp_path / "documents.jsonl"
    texts = [" ".join(chooser.choices(lexicon, k=chooser.randint(3, 30))) for _ in range(600)]
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    expected = trained(corpus, tmp_path / "one", 1, data={"path": str(corpus), "packing": "best_fit"})  # fmt: skip
    found = trained(
        corpus, tmp_path / "run", 2, mesh={"context": 2},
        data={"path": str(corpus), "packing": "best_fit"},
    )  # fmt: skip
    assert_alike(found, expected)


STEADY = {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 1e-3}
RESUMES = [
    (({"sync": "exact", "mesh": {"context": 2, "tensor": 2}}, 4), ({"sync": "sharded", "mesh": {"shard": 2, "context": 2}}, 4)),
    (({"sync": "sharded", "mesh": {"shard": 2, "tensor": 2}}, 4), ({"sync": "exact"}, 1)),
    (({"sync": "exact"}, 1), ({"sync": "exact", "mesh": {"replica": 2, "tensor": 2}, "shard_optimizer": True}, 4)),
    (({"sync": "exact", "mesh": {"context": 2}, "shard_optimizer": True}, 4), ({"sync": "sharded", "mesh": {"replica": 2, "shard": 2}}, 4)),
]  # fmt: skip


@pytest.fixture(scope="module")
def four_steps(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return trained(corpus, tmp_path_factory.mktemp("four") / "run", 1, **{**STEADY, "max_steps": 4})[0]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), RESUMES, ids=["exact to fsdp", "to one", "from one", "context to hsdp"])  # fmt: skip
def test_a_checkpoint_goes_on_upon_another_mesh(
    before: tuple, after: tuple, corpus: Path, tmp_path: Path, four_steps: dict
) -> None:
    output = tmp_path / "run"
    (changes, ranks), (others, other_ranks) = before, after
    trained(corpus, output, ranks, **{**STEADY, **changes, "max_steps": 2, "save_steps": 2})
    assert (output / "checkpoint-2").is_dir()
    found, receipt = trained(corpus, output, other_ranks, **{**STEADY, **others, "max_steps": 4})
    assert receipt["steps"] == 2  # it did go on
    assert worst(found, four_steps) < 1e-5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mesh": {"tensor": 4}}, "mesh.tensor: found 4, but the model has num_key_value_heads 2"),
        ({"mesh": {"context": 4}, "attention": "native"}, "attention: found native with mesh.context: 4"),
        ({"mesh": {"context": 4}, "context": {"scheme": "usp"}}, "context.scheme: found usp without"),
        ({"mesh": {"context": 4}, "context": {"scheme": "usp", "ulysses": 3}}, "context.ulysses: found 3"),
        ({"mesh": {"tensor": 4}, "determinism": "strict"}, "mesh.tensor: found 4 with determinism: strict"),
        ({"mesh": {"shard": 4}}, "mesh.shard: found 4 with sync: exact"),
        ({"mesh": {"replica": 2}}, "replica 2 x shard 1 = 2, but there are 4 ranks"),
    ],
)  # fmt: skip
def test_what_does_not_combine_is_refused_on_every_rank(
    changes: dict, told: str, corpus: Path, tmp_path: Path
) -> None:
    config = make_job(corpus, tmp_path / "run", **{**SAME, **changes})
    for end, _, _ in run_ranks(run, 4, config, join=False):
        assert end.startswith("ConfigError: ")
        assert told in end


def test_dropout_is_refused_where_its_masks_would_depend_on_the_mesh(
    corpus: Path, tmp_path: Path
) -> None:
    model = {**job_fields(corpus, tmp_path)["model"], "attention_dropout": 0.1}
    for mesh in ({"tensor": 2}, {"context": 2}):
        config = make_job(corpus, tmp_path / "run", **{**SAME, "mesh": mesh, "model": model})
        (end, _, _), *_ = run_ranks(run, 2, config, join=False)
        assert "ConfigError" in end
        assert "dropout" in end


def test_layers_that_carry_state_past_attention_do_not_cross_context_ranks(
    corpus: Path, tmp_path: Path
) -> None:
    model = {
        **job_fields(corpus, tmp_path)["model"], "model_type": "jamba", "attn_layer_period": 2,
        "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }  # fmt: skip
    config = make_job(corpus, tmp_path / "run", **{**SAME, "mesh": {"context": 2}, "model": model})
    for end, _, _ in run_ranks(run, 2, config, join=False):
        assert "mesh.context: found 2, but other layers of a JambaForCausalLM than attention" in end


def test_a_forecast_of_a_mesh_is_written_before_its_steps(corpus: Path, tmp_path: Path) -> None:
    _, receipt = trained(
        corpus, tmp_path / "run", 4, mesh={"context": 2, "tensor": 2}, baseline_steps=2
    )
    forecast = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert forecast["sent_bytes_per_step"] == pytest.approx(receipt["sent_bytes_per_step"], rel=0.1)
    assert forecast["parts"]["communication"] > 0
    assert "over the ranks that share them" in forecast["sources"]["pass"]
