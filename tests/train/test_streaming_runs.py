"""Whole jobs whose replicas step alone: killed, resumed as they were or elsewhere, evaluated, verified."""

import json
import signal
from pathlib import Path

import pytest
import torch
from test_strategies import (
    all_done,
    finish,
    losses,
    poison_rank_1,
    receipt,
    rows,
    start,
    wait_for,
)

from jobs import job_fields, make_job, write_corpus
from unisono import config as config_module
from unisono.errors import ConfigError
from unisono.sync.outer import Outer, delta_codec

COMMON = {"max_steps": 12, "save_steps": 4, "lr_scheduler_type": "constant"}
STREAM = {
    **COMMON,
    "sync": "streaming",
    "streaming": {"sync_every": 6, "num_fragments": 3, "fragment_sync_delay": 1},
}
SPARSE = {**COMMON, "sync": "sparse", "sparse": {"sync_every": 3}}
KINDS = {"streaming": STREAM, "sparse": SPARSE, "muon": {**STREAM, "optim": "muon"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs at 2 ranks."""
    found = {}
    for name, changes in {**KINDS, "exact": COMMON}.items():
        found[name] = tmp_path_factory.mktemp(name)
        all_done(finish(place, found[name], 2, **changes))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_gives_the_same_bits(
    place: Path, tmp_path: Path, whole: dict[str, Path], kind: str
) -> None:
    """The digest is of outer weights and all state, each replica's own among it."""
    with start(place, tmp_path, 2, **KINDS[kind]) as ranks:
        wait_for(lambda: list(tmp_path.glob("checkpoint-[48]/manifest.json")) or not ranks.alive())
        ranks.signal(signal.SIGKILL)
        ranks.join()
    assert not (tmp_path / "receipt.json").exists(), "killed before the end"
    ends = finish(place, tmp_path, 2, **KINDS[kind])
    all_done(ends)
    assert any("resumed from" in line for line in ends[0][1])
    assert not any("resume:" in line for line in ends[0][1])
    assert receipt(tmp_path)["digest"] == receipt(whole[kind])["digest"]
    assert losses(tmp_path) == losses(whole[kind])
    assert "each exactly where the order has it" in receipt(tmp_path)["samples"]


def test_resumed_elsewhere(place: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
    """With one more replica, then alone, then as exact, and back."""
    told = []
    narrow = {**COMMON, "sync": "quantized", "wire": "int4"}
    parts = [(2, STREAM), (3, STREAM), (1, STREAM), (2, COMMON), (2, SPARSE), (2, narrow), (2, STREAM)]  # fmt: skip
    for k, (size, changes) in enumerate(parts):
        ends = finish(place, tmp_path, size, **{**changes, "max_steps": 4 * (k + 1)})
        all_done(ends)
        told.append([line for line in ends[0][1] if "resume:" in line])
    assert not told[0]
    assert "has 2 replicas, now 3" in told[1][0] and "outer momentum is kept" in told[1][0]
    assert "has 3 replicas, now 1" in told[2][0]
    assert "left out what single replicas had of their own" in told[3][0]
    assert "no replica's own weights" in told[4][0]
    # What is left of deltas is no error of gradients, nor the other way round.
    assert "(delta_feedback, exp_avg, exp_avg_sq, step, weight)" in told[5][0]
    assert "left out what single replicas had of their own (feedback)" in told[6][0]
    assert losses(tmp_path)[:12] == pytest.approx(losses(whole["exact"]), rel=0.06)
    assert len(losses(tmp_path)) == 28


def test_the_plan_says_how_and_its_bytes_are_exact(whole: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole["streaming"], local_files_only=True)
    sizes = [p.numel() for p in model.parameters()]
    rule = Outer(delta_codec("int4"), sync_every=6, num_fragments=3)
    plan = json.loads((whole["streaming"] / "plan.json").read_text())
    assert plan["sent_bytes_per_step"] == rule.sent_bytes(sizes, 2) // 6
    assert plan["reasons"]["outer"].startswith(
        "every 6 steps, 3 fragments in turn, 1 step on the way: outer rate 0.36: Nesterov 0.9, 0.6"
    )
    n, own = sum(sizes), 4 * sum(sizes) * 4  # weights, gradients, two moments
    assert own + 12 * n < plan["model_bytes"] <= own + 12 * n + 8 * n
    muon = json.loads((whole["muon"] / "plan.json").read_text())
    assert muon["model_bytes"] < plan["model_bytes"]
    sparse = json.loads((whole["sparse"] / "plan.json").read_text())
    assert sparse["sent_bytes_per_step"] == -(-n // 4096) * 116 // 3
    for name in KINDS:  # checkpoints and comparisons pass the ledger too, evaluations not
        sent = receipt(whole[name])["sent_bytes_per_step"]
        assert sent >= json.loads((whole[name] / "plan.json").read_text())["sent_bytes_per_step"]


def test_what_is_left_is_an_ordinary_model(whole: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    models = {
        name: dict(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).named_parameters())
        for name, folder in whole.items()
    }  # fmt: skip
    for name in ("streaming", "sparse"):
        for key, exact in models["exact"].items():
            difference = (models[name][key] - exact).norm() / exact.norm()
            # Of an embedding sparse has sent little after 4 rounds: what is left waits in its feedback.
            assert 0 < difference < (0.6 if name == "streaming" else 1.0), (name, key)
    ends = {name: losses(folder)[-1] for name, folder in whole.items()}
    assert ends["streaming"] == pytest.approx(ends["exact"], rel=0.05)
    assert ends["sparse"] < losses(whole["sparse"])[0] - 0.1


class Watching:
    """A patch for a rank: digests of what is evaluated, and of what each step begins with, by rank in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world) -> None:
        from unisono.sync.digest import sha256
        from unisono.train import advance, loop

        evaluate, take = loop.evaluate, advance.take_step

        def note(kind: str, model) -> None:
            with (self.folder / f"{kind}-{world.rank}").open("a") as file:
                file.write(sha256(dict(model.named_parameters())) + "\n")

        def evaluated(model, *args, **kwargs):
            note("evaluated", model)
            return evaluate(model, *args, **kwargs)

        def taken(number, feed, measure, metrics, sync, *args, **kwargs):
            with sync.micro_batch():
                note("own", sync.model)
            return take(number, feed, measure, metrics, sync, *args, **kwargs)

        loop.evaluate, advance.take_step = evaluated, taken


def test_evaluation_sees_the_outer_weights(
    place: Path, tmp_path: Path, whole: dict[str, Path]
) -> None:
    changes = {**STREAM, "eval_steps": 1}
    all_done(finish(place, tmp_path / "run", 2, Watching(tmp_path), **changes))
    evaluated, own = (
        [(tmp_path / f"{kind}-{rank}").read_text().split() for rank in range(2)]
        for kind in ("evaluated", "own")
    )
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 12
    assert own[0][0] == own[1][0]
    assert all(a != b for a, b in zip(own[0][1:], own[1][1:], strict=True))
    assert not set(evaluated[0]) & set(own[0][1:])
    # Outer weights move when a fragment arrives, and at the end.
    moved = [k + 2 for k, (a, b) in enumerate(zip(evaluated[0], evaluated[0][1:])) if a != b]
    assert moved == [3, 5, 7, 9, 11, 12]
    assert receipt(tmp_path / "run")["digest"] == receipt(whole["streaming"])["digest"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all(
    place: Path, tmp_path: Path, size: int
) -> None:
    ends = finish(place, tmp_path, size, poison_rank_1, **{**STREAM, "max_steps": 6})
    all_done(ends)
    told = [t for t in ends[0][1] if "gradient not finite on rank 1, first in model." in t]
    assert [t.partition(":")[0] for t in told] == ["step 1", "step 3"]
    assert ends[0][2]["skipped_steps"] == 2


def test_one_replica_and_a_signal(place: Path, tmp_path: Path) -> None:
    """A signal commits between synchronizations, and the run goes on from there."""
    changes = {**STREAM, "max_steps": 4000, "save_steps": 4000}
    with start(place, tmp_path, 1, **changes) as ranks:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > 3)
        ranks.signal(signal.SIGTERM)
        ends = ranks.result()
    assert ends[0][0].startswith("stopped")
    last = max(r["step"] for r in rows(tmp_path))
    all_done(finish(place, tmp_path, 1, **{**changes, "max_steps": last + 2}))
    assert len(losses(tmp_path)) == last + 2


def test_muon_steps_whole_matrices_wherever_they_are(place: Path, tmp_path: Path) -> None:
    """With exact, two replicas train what one trains; and a resume brings its momentum back."""
    changes = {**COMMON, "optim": "muon"}
    for name, size in (("one", 1), ("two", 2)):
        all_done(finish(place, tmp_path / name, size, **changes))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for steps in (4, 12):
        all_done(finish(place, tmp_path / "again", 2, **{**changes, "max_steps": steps}))
    assert receipt(tmp_path / "again")["digest"] == receipt(tmp_path / "two")["digest"]
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert not plan["shard_optimizer"]


def test_momentum_twice_is_told(place: Path, tmp_path: Path) -> None:
    every = {"sync_every": 1, "num_fragments": 1, "fragment_sync_delay": 0}
    ends = finish(place, tmp_path, 2, **{**STREAM, "streaming": every, "max_steps": 2})
    all_done(ends)
    assert any("momentum twice" in line for line in ends[0][1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"streaming": {"sync_every": 7}}, "no multiple of num_fragments 5; write num_fragments: 1"),
        ({"streaming": {"sync_every": 12}}, "write num_fragments: 4"),
        ({"streaming": {"fragment_sync_delay": 6}}, "the next fragment leaves after 6 steps"),
        ({"sparse": {"top_k": 66}}, "sparse.top_k: found 66"),
        ({"sparse": {"top_k": 64, "chunk": 32}}, "more than chunk 32"),
        ({"sync": "sharded", "optim": "muon"}, "found muon with sync: sharded"),
        ({"sync": "exact", "optim": "muon", "shard_optimizer": True}, "with shard_optimizer: true"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        asked(**changes)


def asked(**changes: object):
    fields = {"model": "m", "data": "d", "output_dir": "o", "sync": "streaming"}
    return config_module.parse({**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"determinism": "strict"}, "whose replicas step alone, with determinism: strict"),
        ({"mesh": {"shard": 2}}, "mesh.shard: found 2 with sync: streaming"),
        ({"mesh": {"context": 2}}, "mesh.context: found 2 with sync: streaming"),
        ({"mesh": {"tensor": 2}}, "mesh.tensor: found 2 with sync: streaming"),
        ({"sync": "exact", "wire": "int4"}, "wire: found int4 with sync: exact"),
        ({"sync": "sparse", "wire": "int4"}, "wire: found int4 with sync: sparse"),
        ({"sync": "exact", "wire": "bfloat16", "optim": "muon"}, "with optim: muon"),
        ({"shard_optimizer": True}, "needs sync: exact"),
        (
            {"sync": "exact", "optim": "muon", "mesh": {"tensor": 2}},
            "mesh.tensor: found 2 with optim: muon",
        ),
    ],
)
def test_what_does_not_combine_is_refused(
    place: Path, tmp_path: Path, changes: dict, told: str
) -> None:
    ends = finish(place, tmp_path, 2, **{**STREAM, "streaming": {}, **changes})
    assert told in ends[0][0] and "\n" not in ends[0][0]


def test_the_wire_of_deltas_is_int4_unless_told() -> None:
    assert asked().wire == "int4" and asked(wire="float32").wire == "float32"
    assert asked(sync="exact").wire == "float32" and asked(sync="sparse").wire == "float32"
    assert asked(streaming={"fragment_sync_delay": 0}).streaming.alpha == 0.0
    assert asked().streaming.alpha == 0.5


def test_muon_steps_what_it_should(place: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from unisono.sync.update import by_dimension
    from unisono.train.scaling import scale
    from unisono.train.state import for_muon, optimizer_factory

    fields = dict(job_fields(place / "corpus.txt", tmp_path)["model"])
    kind = fields.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=320, **{**fields, "tie_word_embeddings": False}))  # fmt: skip
    stepped = {id(p) for p in for_muon(model)}
    names = {n for n, p in model.named_parameters() if id(p) in stepped}
    assert all("proj" in n for n in names) and len(names) == 14
    config = make_job(place / "corpus.txt", tmp_path, optim="muon")
    optimizer = optimizer_factory(config, scale(config), model)(*by_dimension(list(model.parameters())))  # fmt: skip
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        keys = {"momentum_buffer"} if name in names else {"exp_avg", "exp_avg_sq", "step"}
        assert set(optimizer.state[p]) == keys
        # AdamW's first step is the learning rate; Muon's root mean square is made to be 0.2 of it.
        size = float((p - before[name]).square().mean().sqrt()) / config.learning_rate
        assert size == pytest.approx(0.2 if name in names else 1.0, rel=0.35), name
