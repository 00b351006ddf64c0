"""Tuning on preference pairs: the formulas, TRL's loss and gradients, replicas, resumes, the reference."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import run
from pairs import apart, load, make_pair_job, pairs, read_pairs, rows, write_model, write_pairs
from ranks import run_ranks
from unisono.config import DpoConfig
from unisono.train import reference
from unisono.train.preference import log_probabilities, pair_losses, preference

NAMES = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write_model(folder)
    write_pairs(folder / "pairs.jsonl", pairs(90))
    return folder


# --- the formulas


@pytest.mark.parametrize("kind", ["sigmoid", "smooth", "hinge", "ipo", "normalized"])
def test_losses_are_those_of_the_papers(kind: str) -> None:
    """Written out once more, one pair at a time, in Python's own numbers."""
    settings = {"smooth": {"label_smoothing": 0.2}, "normalized": {"length_normalized": True}}
    fields = settings.get(kind, {"loss_type": kind})
    beta = 0.3
    config = DpoConfig(beta=beta, **fields)
    chosen, rejected = [1.0, -2.0, 8.0], [0.5, 3.0, -4.0]
    tokens = [[2, 5, 1], [4, 1, 3]]
    ratios = torch.tensor([*chosen, *rejected])
    found = pair_losses(ratios, torch.tensor([*tokens[0], *tokens[1]]), config)

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for k, (c, r) in enumerate(zip(chosen, rejected, strict=True)):
        d = c - r
        mean = c / tokens[0][k] - r / tokens[1][k]
        expected = {
            "sigmoid": -math.log(sigma(beta * d)),
            "smooth": -0.8 * math.log(sigma(beta * d)) - 0.2 * math.log(sigma(-beta * d)),
            "hinge": max(0.0, 1 - beta * d),
            "ipo": (mean - 1 / (2 * beta)) ** 2,
            "normalized": -math.log(sigma(beta * mean)),
        }[kind]
        assert float(found[k]) == pytest.approx(expected, rel=1e-6)


def test_log_probabilities_are_those_of_each_row_alone(place: Path, tmp_path: Path) -> None:
    """Whatever else is in the batch: padding and the logits that are left out change nothing."""
    model, _ = load(place / "model")
    read = read_pairs(place / "model", place / "pairs.jsonl", tmp_path)
    batch = read.read(np.arange(16))
    lengths = {int((row != -100).sum()) for row in batch.labels}
    assert len(lengths) > 4, "answers differ in length"
    with torch.no_grad():
        together = log_probabilities(model.eval(), batch, "cpu", False)
        for pair in range(16):
            alone = read.read([pair])
            for half in (0, 1):
                ids, labels = alone.input_ids[half], alone.labels[half]
                wanted = np.flatnonzero(labels != -100)
                end = wanted[-1] + 1
                logp = model(input_ids=torch.tensor(ids[None, :end])).logits[0].log_softmax(-1)
                expected = sum(float(logp[k - 1, ids[k]]) for k in wanted)
                assert float(together[pair + 16 * half]) == pytest.approx(expected, rel=1e-5)


def test_a_blank_batch_counts_nothing_and_gives_every_parameter_a_zero(
    place: Path, tmp_path: Path
) -> None:
    model, _ = load(place / "model")
    batch = read_pairs(place / "model", place / "pairs.jsonl", tmp_path).read([0]).blank()
    found = preference(DpoConfig()).measure(model, batch, "cpu", False)
    found.loss.backward()
    assert (float(found.loss.detach()), found.count) == (0.0, 0)
    assert all(count == 0 for _, count in found.sums.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# --- against TRL


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
@pytest.mark.parametrize("form", ["chats", "texts", "conversations"])
def test_loss_gradients_and_metrics_are_trls(
    kind: str, form: str, place: Path, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    records = pairs(7, seed=5)
    if form == "conversations":
        records = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in records]
    if form == "texts":  # each begins with a space, so that no token spans the border
        records = [
            {"prompt": r["prompt"][0]["content"], **{k: " " + r[k][0]["content"] for k in ("chosen", "rejected")}}
            for r in records
        ]  # fmt: skip
    path = write_pairs(tmp_path / "pairs.jsonl", records)
    model, tokenizer = load(place / "model")
    base, _ = load(place / "model")
    torch.manual_seed(1)
    with torch.no_grad():  # no reward is zero
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))

    read = read_pairs(place / "model", path, tmp_path)
    values = reference.reference_of(
        read.rows.folder, {}, tmp_path / "reference", lambda: base, Alone(), "cpu", False, print
    )
    read = reference.with_reference(read, values)
    fields = {"length_normalized": True} if kind == "sigmoid_norm" else {"loss_type": kind}
    found = preference(DpoConfig(beta=0.2, **fields)).measure(
        model, read.read(np.arange(len(read))), "cpu", False
    )
    loss = found.loss / found.count
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=None,
        per_device_train_batch_size=len(records), beta=0.2, loss_type=kind, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=model, ref_model=base, args=arguments, train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model.train(), inputs)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, p in model.named_parameters():
        scale = float(p.grad.abs().max())
        assert float((ours[name] - p.grad).abs().max()) <= 1e-5 * scale, name
    logged = trainer._metrics["train"]
    for name in NAMES:
        total, count = found.sums[name]
        assert float(total) / count == pytest.approx(logged[name][-1], rel=1e-4, abs=1e-6), name


class Alone:
    """A group of one, outside of a job."""

    rank, size = 0, 1

    def each(self, *values: float) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float64)

    def all_reduce(self, tensor: torch.Tensor):
        return self

    broadcast = all_reduce

    def wait(self) -> None:
        pass


# --- whole runs


def finish(place: Path, output: Path, size: int, **changes: object) -> dict:
    fields = {"determinism": "strict", "max_steps": 6, "micro_batch_size": 1, **changes}
    config = make_pair_job(place / "model", place / "pairs.jsonl", output, **fields)
    ends = run_ranks(run, size, config, **apart(place))
    assert all(end == "done" for end, _, _ in ends), ends
    return json.loads((output / "receipt.json").read_text())


@pytest.mark.parametrize("lora", [None, pytest.param({"r": 4}, marks=pytest.mark.slow)])
def test_replicas_equal_one(lora: dict | None, place: Path, tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft")
    one = finish(place, tmp_path / "1", 1, lora=lora)
    for size in (2, 4):
        assert finish(place, tmp_path / str(size), size, lora=lora)["digest"] == one["digest"]
        for ours, theirs in zip(rows(tmp_path / "1"), rows(tmp_path / str(size)), strict=True):
            for name in ours:
                if name.startswith(("train/", "eval/")):
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-12, abs=1e-12), name
    other = finish(place, tmp_path / "beta", 1, lora=lora, dpo={"beta": 0.6})
    assert other["digest"] != one["digest"], "the loss decides the weights"


@pytest.mark.parametrize("sync", ["exact", "ddp", "sharded", "reference"])
def test_every_strategy_gives_the_same_model(sync: str, place: Path, tmp_path: Path) -> None:
    """Fifteen pairs in two uneven micro-batches a rank, one epoch and a bit; within rounding."""
    changes = {"determinism": "default", "micro_batch_size": 4, "global_batch_size": 15, "learning_rate": 1e-4}  # fmt: skip
    finish(place, tmp_path / "one", 1, **changes)
    finish(place, tmp_path / sync, 2, sync=sync, **changes)
    ours, theirs = rows(tmp_path / sync), rows(tmp_path / "one")
    for name in ("eval/loss", *(f"eval/{n}" for n in NAMES)):
        a = next(r[name] for r in reversed(ours) if name in r)
        b = next(r[name] for r in reversed(theirs) if name in r)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4), name


def test_it_learns_what_is_preferred_and_tells_so(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path / "a", 2, max_steps=20, determinism="default", learning_rate=2e-3)
    written = rows(tmp_path / "a")
    train = [r for r in written if "train/loss" in r]
    assert train[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-4), "the reference is itself"
    assert train[0]["train/rewards/margins"] == pytest.approx(0, abs=1e-3)
    last = next(r for r in reversed(written) if "eval/loss" in r)
    assert last["eval/rewards/accuracies"] > 0.9
    assert last["eval/rewards/margins"] == pytest.approx(
        last["eval/rewards/chosen"] - last["eval/rewards/rejected"], rel=1e-5
    )
    assert "eval/perplexity" not in last


def test_a_resume_is_exact_and_another_dpo_is_refused(place: Path, tmp_path: Path) -> None:
    fields = {"determinism": "strict", "micro_batch_size": 1, "save_steps": 4, "lr_scheduler_type": "constant"}  # fmt: skip
    whole = finish(place, tmp_path / "whole", 2, max_steps=8, **fields)
    finish(place, tmp_path / "part", 2, max_steps=4, **fields)
    other = make_pair_job(
        place / "model", place / "pairs.jsonl", tmp_path / "part", max_steps=8,
        **{**fields, "dpo": {"beta": 0.5, "loss_type": "ipo"}},
    )  # fmt: skip
    end, _, _ = run_ranks(run, 1, other, **apart(place))[0]
    assert "dpo: found" in end and "'loss_type': 'ipo'" in end
    shutil.copytree(place / "model", tmp_path / "elsewhere")
    other = make_pair_job(tmp_path / "elsewhere", place / "pairs.jsonl", tmp_path / "part", max_steps=8, **fields)  # fmt: skip
    end, _, _ = run_ranks(run, 1, other, **apart(place))[0]
    assert "model: found" in end and "was compared with" in end
    assert finish(place, tmp_path / "part", 1, max_steps=8, **fields)["digest"] == whole["digest"]


# --- the reference


def test_the_adapter_switched_off_is_the_reference(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from unisono.model import adapter

    read = read_pairs(place / "model", place / "pairs.jsonl", tmp_path)
    base, _ = load(place / "model")
    values = reference.reference_of(
        read.rows.folder, {}, tmp_path / "r", lambda: base, Alone(), "cpu", False, print
    )
    model, _ = load(place / "model")
    wanted = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "use_rslora": False, "use_dora": False, "modules_to_save": ()}  # fmt: skip
    adapted = adapter.attach(model, wanted, 1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1)
        batch = read.read(np.arange(8))
        on = log_probabilities(adapted.eval(), batch, "cpu", False)
        with adapted.disable_adapter():
            off = log_probabilities(adapted, batch, "cpu", False)
    expected = reference.with_reference(read, values).read(np.arange(8)).reference
    assert torch.allclose(off, torch.from_numpy(expected), rtol=1e-5)
    assert not torch.allclose(on, off, rtol=1e-2)


def test_the_reference_is_computed_once_and_a_damaged_piece_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PAIRS", 32)
    read = read_pairs(place / "model", place / "pairs.jsonl", tmp_path)
    loads = []

    def base():
        loads.append(1)
        return load(place / "model")[0]

    def values(**made_from: str) -> np.ndarray:
        return reference.reference_of(
            read.rows.folder, made_from, tmp_path / "r", base, Alone(), "cpu", False, print
        )

    first = values(model="a")
    assert np.array_equal(values(model="a"), first) and len(loads) == 1
    (kept,) = (tmp_path / "r").iterdir()
    assert len(list(kept.iterdir())) == 3
    for damage in (b"torn", b"\xff" * 32 * 16):
        (kept / "000001.f64").write_bytes(damage)
        assert np.array_equal(values(model="a"), first)
    assert len(loads) == 3
    values(model="b")
    assert len(loads) == 4, "another model has its own"


@pytest.mark.parametrize("size", [1, 4])
def test_the_reference_does_not_depend_on_replicas(size: int, place: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(computed, size, place, tmp_path)
    one = run_ranks(computed, 1, place, tmp_path / "one")[0]
    assert all(np.array_equal(o, one) for o in outcomes)


def computed(world, place: Path, folder: Path) -> np.ndarray:
    from unisono.sync.ledger import Group, Ledger

    torch.set_num_threads(1)
    (folder / str(world.rank)).mkdir(parents=True, exist_ok=True)
    read = read_pairs(place / "model", place / "pairs.jsonl", folder / str(world.rank))
    return reference.reference_of(
        read.rows.folder, {}, folder / "r", lambda: load(place / "model")[0],
        Group("votes", Ledger(), 60), "cpu", False, print,
    )  # fmt: skip


def test_a_run_with_adapters_can_be_evaluated(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from unisono.evaluate import model

    finish(place, tmp_path / "run", 1, lora={"r": 4}, max_steps=8, determinism="default")
    source = model.find(str(tmp_path / "run"))
    assert model.config_context(source) == 256
    loaded = model.load(source, "cpu", "float32")
    base, tokenizer = load(place / "model")
    ids = tokenizer("who is dead", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert not torch.equal(loaded.model(ids).logits, base(ids).logits), "adapters are in it"


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": {"context": 2}}, "mesh.context: found 2 with dpo"),
        ({"mesh": {"tensor": 2}}, "mesh.tensor: found 2 with dpo"),
    ],
)
def test_axes_that_do_not_combine_are_named(changes, words, place: Path, tmp_path: Path) -> None:
    config = make_pair_job(place / "model", place / "pairs.jsonl", tmp_path / "run", **changes)
    for end, _, _ in run_ranks(run, 2, config, **apart(place)):
        assert words in end or "Elsewhere" in end
