"""Every finished run has its forecast, made before its first step, beside what was measured."""

import json
import math
from pathlib import Path

import pytest

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.clock import PHASES


def first_then_run(world, config):
    """The forecast as it lies there when the first step begins."""
    from unisono.train import loop

    path = Path(config.output_dir) / "forecast.json"
    seen = []
    taken = loop.advance

    def advance(job, previous=None):
        if not seen:
            seen.append(json.loads(path.read_text()) if path.is_file() else None)
        return taken(job, previous)

    loop.advance = advance
    try:
        return run(world, config), seen[0]
    finally:
        loop.advance = taken


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"shard_optimizer": True}),
        (2, {"wire": "bfloat16", "micro_batch_size": 8}),
        (2, {"sync": "quantized", "wire": "int4", "micro_batch_size": 8}),
        (3, {"sync": "quantized", "wire": "int8", "micro_batch_size": 8}),
        (2, {"sync": "ddp"}),
        (2, {"determinism": "strict"}),
    ],
)
def test_a_run_writes_its_forecast_before_and_the_measurement_after(
    tmp_path: Path, size: int, fields: dict
) -> None:
    corpus = write_corpus(tmp_path)
    config = make_job(
        corpus, tmp_path / "run", max_steps=12, baseline_steps=2, global_batch_size=12,
        probe="none", save_steps=100, **({"micro_batch_size": 2} | fields),
    )  # fmt: skip
    (end, told, receipt), before = run_ranks(first_then_run, size, config, join=False)[0]
    assert end == "done" and receipt is not None
    found = json.loads((tmp_path / "run/forecast.json").read_text())
    assert before is not None, "written before the first step"
    assert "measured" not in before
    assert {k: found[k] for k in before} == before, "never touched again"
    assert found["step_s"] == pytest.approx(sum(found["parts"].values()))
    assert set(found["parts"]) <= set(PHASES)
    measured = found["measured"]
    assert measured["step_s"] == pytest.approx(receipt["step_ms"] / 1e3)
    assert found["error"] == pytest.approx(found["step_s"] / measured["step_s"] - 1)
    assert found["memory_bytes"] == pytest.approx(measured["memory_bytes"], rel=0.1)
    if fields.get("sync") != "ddp" and size > 1:
        padding = 0.04 if "sync" in fields else 0.003  # rows of 13,000 values in blocks of 256
        assert found["sent_bytes_per_step"] == pytest.approx(measured["sent_bytes_per_step"], rel=padding)  # fmt: skip
    assert any(line.startswith("forecast:") and "measured" in line for line in told)


@pytest.mark.parametrize(
    "mesh",
    [
        {"shard": 2},
        {"replica": 2, "shard": 2},
        {"shard": 2, "context": 2},
        {"shard": 2, "tensor": 2},
        {"replica": 2, "tensor": 2},
    ],
    ids=lambda mesh: "x".join(mesh),
)
def test_sharded_meshes_are_foretold(tmp_path: Path, mesh: dict) -> None:
    config = make_job(
        write_corpus(tmp_path), tmp_path / "run", max_steps=6, baseline_steps=1, global_batch_size=8,
        micro_batch_size=2, probe="none", save_steps=100, sync="sharded", mesh=mesh,
    )  # fmt: skip
    size = math.prod(mesh.values())
    (end, _, receipt), _ = run_ranks(first_then_run, size, config, join=False)[0]
    assert end == "done" and receipt is not None
    found = json.loads((tmp_path / "run/forecast.json").read_text())
    measured = found["measured"]
    assert found["sent_bytes_per_step"] == pytest.approx(measured["sent_bytes_per_step"], rel=0.002)
    assert found["memory_bytes"] == pytest.approx(measured["memory_bytes"], rel=0.1)


def test_without_a_pass_alone_there_is_none_and_it_is_said(tmp_path: Path) -> None:
    config = make_job(write_corpus(tmp_path), tmp_path / "run", max_steps=2, probe="none")
    (end, told, _) = run_ranks(run, 2, config, join=False)[0]
    assert end == "done"
    assert not (tmp_path / "run/forecast.json").exists()
    assert any("no forecast: nothing timed a pass alone" in line for line in told)


LOCAL = {"sync": "streaming", "streaming": {"sync_every": 6, "num_fragments": 3, "fragment_sync_delay": 1}}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (2, LOCAL),
        (3, LOCAL),
        (2, {**LOCAL, "wire": "int8", "max_steps": 13}),
        (2, {"sync": "streaming", "streaming": {"sync_every": 4, "num_fragments": 1, "fragment_sync_delay": 0}}),
        (2, {"sync": "sparse", "sparse": {"sync_every": 5}}),
        (3, {"sync": "sparse", "sparse": {"sync_every": 5}}),
        (2, {**LOCAL, "optim": "muon"}),
        (1, {**LOCAL, "optim": "muon"}),
        (1, {"optim": "muon"}),
        (2, {"sync": "powersgd", "powersgd": {"rank": 4, "start": 0}}),
        (3, {"sync": "powersgd", "powersgd": {"rank": 4, "start": 0}}),
    ],
)  # fmt: skip
def test_bytes_of_rounds_and_thin_matrices_are_those_of_the_ledger(
    tmp_path: Path, size: int, fields: dict
) -> None:
    """To the byte, over all steps of the run, the last one included."""
    job = make_job(
        write_corpus(tmp_path), tmp_path / "run", baseline_steps=1, global_batch_size=12,
        probe="none", save_steps=100, **({"max_steps": 10} | fields),
    )  # fmt: skip
    end, told, receipt = run_ranks(run, size, job, join=False)[0]
    assert end == "done" and receipt is not None, told
    found = json.loads((tmp_path / "run/forecast.json").read_text())
    measured = found["measured"]
    assert found["sent_bytes_per_step"] == pytest.approx(measured["sent_bytes_per_step"], rel=1e-12)
    assert (found["sent_bytes_per_step"] > 0) == (size > 1)
    assert found["memory_bytes"] == pytest.approx(measured["memory_bytes"], rel=0.1)
    assert found["step_s"] > 0 and found["parts"]["communication"] >= 0
    assert ("optimizer" in found["sources"]) == (fields.get("optim") == "muon")


def test_steps_of_powersgd_that_are_exact_are_counted_as_such(tmp_path: Path) -> None:
    sent = {}
    for start in (0, 0.5, 1):
        job = make_job(
            write_corpus(tmp_path), tmp_path / f"run-{start}", baseline_steps=1, max_steps=10,
            probe="none", save_steps=100, sync="powersgd", powersgd={"rank": 4, "start": start},
        )  # fmt: skip
        assert run_ranks(run, 2, job, join=False)[0][0] == "done"
        found = json.loads((tmp_path / f"run-{start}/forecast.json").read_text())
        sent[start] = found["sent_bytes_per_step"]
        assert sent[start] == pytest.approx(found["measured"]["sent_bytes_per_step"], rel=0.01)
    assert sent[0] < sent[0.5] < sent[1]
    assert sent[0.5] == pytest.approx((sent[0] + sent[1]) / 2)


def what_is_held(world, fields: dict) -> tuple[int, int]:
    """(values foretold, values held) that a strategy keeps beside weights, gradients and optimizer."""
    import torch

    from unisono.sync import make_strategy
    from unisono.sync.ledger import Ledger
    from unisono.sync.outer import Outer, delta_codec

    torch.manual_seed(3)
    model = torch.nn.Sequential(*[torch.nn.Linear(48, 48) for _ in range(4)])
    outer = Outer(
        delta_codec("int4"), sync_every=6, num_fragments=3, fragment_sync_delay=1,
        learning_rate=0.6, last_step=12, **fields,
    )  # fmt: skip
    sgd = lambda m, v: torch.optim.SGD([*m, *v], lr=0.1)  # noqa: E731
    sync = make_strategy("streaming", model, Ledger(), optimizer=sgd, outer=outer, timeout_s=60)
    try:
        kept = sum(
            t.numel() for f in sync._fragments for t in (f.outer, f.velocity, f.feedback) if t is not None
        )  # fmt: skip
        sizes = [p.numel() for p in model.parameters()]
        return outer.state_values(sizes) - 2 * max(sync.fragment_values), kept
    finally:
        sync.close()


@pytest.mark.parametrize("fields", [{}, {"momentum": 0.9}, {"momentum": 0.9, "feedback_decay": 0.95}])  # fmt: skip
def test_what_streaming_keeps_is_what_the_formula_says(fields: dict) -> None:
    for foretold, held in run_ranks(what_is_held, 2, fields):
        assert foretold == held
