"""Every finished run has its forecast, made before its first step, beside what was measured."""

import json
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
    if "sync" not in fields and size > 1:
        # The first of twelve steps is laid out otherwise (whole float32 gradients also where the wire is
        # bfloat16), and more is told in it.
        assert found["sent_bytes_per_step"] == pytest.approx(measured["sent_bytes_per_step"], rel=0.15)  # fmt: skip
    assert any(line.startswith("forecast:") and "measured" in line for line in told)


def test_without_a_pass_alone_there_is_none_and_it_is_said(tmp_path: Path) -> None:
    config = make_job(write_corpus(tmp_path), tmp_path / "run", max_steps=2, probe="none")
    (end, told, _) = run_ranks(run, 2, config, join=False)[0]
    assert end == "done"
    assert not (tmp_path / "run/forecast.json").exists()
    assert any("no forecast: nothing timed a pass alone" in line for line in told)
