"""Which published rows qualify, what is read from them, and how forecasts are scored."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import forecast  # noqa: E402
from published import (  # noqa: E402
    alike_in_curves,
    dtype_of,
    node_gbit,
    number,
    read,
    recomputation,
    source_of,
)

SHARED = Path(os.environ.get("UNISONO_SHARED", Path(__file__).parents[3] / "shared"))
RUNS = SHARED / "data" / "published-runs.csv"

ROW = {
    "id": "X-1", "source": "some/repo@abc README.md", "year": "2024", "model": "Llama-2-7B",
    "n_layers": "32", "hidden": "4096", "n_heads": "32", "ffn": "11008", "vocab": "32000",
    "seq_len": "4096", "gpu": "A100-80GB", "gpu_count": "64", "gpus_per_node": "8",
    "inter_node_link": "4 x 100 Gbit/s RoCE per node", "precision": "bf16", "strategy": "fsdp",
    "dp": "64", "tp": "1", "pp": "1", "cp": "1", "zero_stage": "3", "micro_batch": "2",
    "global_batch_sequences": "256", "activation_checkpointing": "none", "domain": "llm",
    "tokens_per_s_per_gpu": "3,500", "metric_scope": "steady_state", "dp_dominated": "yes",
    "curve_id": "c", "notes": "CPU offload False",
}  # fmt: skip


def test_a_row_is_read_as_it_says() -> None:
    p = read(ROW)
    assert not isinstance(p, str)
    assert (p.source, p.device.name, p.tokens_per_s) == ("some/repo", "A100 80GB", 3500.0)
    assert p.device.node_bytes_per_s == 50e9
    run = p.run
    assert (run.strategy, run.mesh.shard, run.micro_batch, run.accumulation) == ("fsdp", 64, 2, 2)
    assert run.model.gated and run.model.parameters == pytest.approx(6.74e9, rel=0.01)
    assert (run.dtype, run.recompute, run.flash, run.stack) == ("bf16", "none", True, "eager")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tp": "8"}, "not data parallel alone"),
        ({"dp_dominated": "no"}, "not data parallel alone"),
        ({"strategy": "diloco"}, "strategy not stated"),
        ({"strategy": "diloco over fsdp"}, "compressed or local"),
        ({"notes": "DeepSpeed offload of activations"}, "offload to the host"),
        ({"notes": "LoRA rank 8"}, "parts of the weights trained"),
        ({"notes": "INCONSISTENT: misprint"}, "flagged by the collection"),
        ({"gpu": "Pascal"}, "device unknown"),
        ({"n_layers": "", "model": "ours"}, "shape not stated"),
        ({"seq_len": ""}, "sequence or number of devices not stated"),
        ({"precision": ""}, "precision not stated"),
        ({"micro_batch": "", "global_batch_sequences": ""}, "batch not stated"),
        ({"tokens_per_s_per_gpu": ""}, "throughput not stated"),
        ({"domain": "cnn"}, "domain cnn"),
        ({"metric_scope": "end_to_end"}, "not steady state"),
        (
            {"source": "NVIDIA/DeepLearningExamples@7 PyTorch/LanguageModeling/BERT/README.md"},
            "sequences binned by length",
        ),
    ],
)
def test_what_does_not_state_enough_says_why(changes: dict[str, str], why: str) -> None:
    assert read({**ROW, **changes}) == why


@pytest.mark.parametrize("column", sorted(ROW))
@pytest.mark.parametrize("mess", ["", "?", "n/a", "~", "1e", "-", "∞", "8 x", "{}", "0", "1e12"])
def test_no_cell_can_break_the_reader(column: str, mess: str) -> None:
    found = read({**ROW, column: mess})
    assert isinstance(found, str) or forecast.throughput(found, forecast.DEFAULT) > 0


def test_less_stated_rows_take_what_is_usual() -> None:
    named = read({**ROW, "model": "Llama-3.1-8B", "n_layers": "", "hidden": ""})
    assert not isinstance(named, str) and named.run.model.name == "llama3-8b"
    timed = read({**ROW, "tokens_per_s_per_gpu": "", "step_time_s": "4.8"})
    assert not isinstance(timed, str)
    assert timed.tokens_per_s == pytest.approx(256 * 4096 / 4.8 / 64)
    free = read({**ROW, "micro_batch": "", "activation_checkpointing": ""})
    assert not isinstance(free, str)
    assert free.run.micro_batch * free.run.accumulation == 4
    group = read({**ROW, "strategy": "hsdp", "notes": "FSDP shard group 16"})
    assert not isinstance(group, str) and (group.run.mesh.replica, group.run.mesh.shard) == (4, 16)
    slow = read({**ROW, "gpu": "H100", "notes": "Grand Teton, HBM2e, 500 W"})
    assert not isinstance(slow, str) and slow.device.name == "H100 96GB HBM2e"


@pytest.mark.parametrize(
    ("strategy", "kind", "shard"),
    [("ZeRO-3", "fsdp", 64), ("DeepSpeed ZeRO stage 3", "fsdp", 64), ("zero_2", "zero2", 1),
     ("FSDP SHARD_GRAD_OP", "zero2", 1), ("fsdp HYBRID_SHARD", "fsdp", 8), ("FSDP2", "fsdp", 64),
     ("ZeRO 1", "zero1", 1), ("Horovod", "ddp", 1), ("data-parallel", "ddp", 1)],
)  # fmt: skip
def test_strategies_in_any_spelling(strategy: str, kind: str, shard: int) -> None:
    found = read({**ROW, "strategy": strategy, "zero_stage": ""})
    assert not isinstance(found, str)
    assert (found.run.strategy, found.run.mesh.shard) == (kind, shard)


def test_stacks_by_what_is_stated() -> None:
    def stack(**changes: str) -> str:
        found = read({**ROW, **changes})
        assert not isinstance(found, str)
        return found.run.stack

    assert stack(year="2020", strategy="ddp (NGC TensorFlow 1.x)") == "unfused"
    assert stack(year="2020", strategy="ddp (NGC TensorFlow 1.x w/XLA)") == "early"
    assert stack(strategy="fsdp (MaxText)") == stack(compile="yes") == "fused"
    assert [recomputation(t) for t in ("none", "no (all kept)", "False", "full", "1", "selective op", "every block", "per block", "")] == ["none", "none", "none", "full", "full", "selective", "selective", "full", "none"]  # fmt: skip


def test_cells_in_any_spelling() -> None:
    assert [number(t) for t in ("1,024", "~250k", "7B", "4.1e3", "", "none")] == [1024, 250e3, 7e9, 4100, None, None]  # fmt: skip
    assert [dtype_of(t) for t in ("fp16 (amp)", "BF16", "MXFP8", "bf16 + float8", "NVFP4", "TF32", "")] == ["fp16", "bf16", "fp8", "fp8", "fp4", "tf32", None]  # fmt: skip
    assert source_of({"source": "Oneflow-Inc/DLPerf@c8 reports/x.md"}) == "oneflow-inc/dlperf"
    assert source_of({"source": "Narayanan et al. SC21 (arXiv 2104.04473) Table 1"}) == "narayanan et al. sc21"  # fmt: skip
    assert node_gbit("1600 Gbps node-node RoCE (200 Gbit/s per GPU)", 8) == 1600
    assert node_gbit("200 Gbit/s HDR IB per GPU (Azure)", 8) == 1600
    assert node_gbit("40 Gbit/s Ethernet (TCP; 4.1 Gbit/s effective measured)", 4) == 4.1
    assert node_gbit("InfiniBand", 8) is None


def scored(count: str, published: str, **more: str) -> forecast.Scored:
    row = read({**ROW, "gpu_count": count, "tokens_per_s_per_gpu": published, "global_batch_sequences": "", **more})  # fmt: skip
    assert not isinstance(row, str)
    return forecast.Scored(row, 1000.0)


def test_errors_and_curves_by_hand() -> None:
    rows = [scored("8", "1000"), scored("16", "900"), scored("32", "1250"), scored("8", "500", curve_id="d")]  # fmt: skip
    rows[1] = forecast.Scored(rows[1].row, 950.0)
    assert [round(s.error, 4) for s in rows] == [0.0, 0.0556, 0.2, 1.0]
    assert forecast.curve_points(rows) == pytest.approx(
        [5.0, 25.0]
    )  # 95 against 90%, 100 against 125
    assert forecast.quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert forecast.quantile([1.0, 2.0], 0.9) == pytest.approx(1.9)


def test_unstated_recomputation_is_one_along_a_curve() -> None:
    big = {**ROW, "n_layers": "80", "hidden": "8192", "n_heads": "64", "ffn": "22016", "micro_batch": "1",
           "global_batch_sequences": "", "activation_checkpointing": ""}  # fmt: skip
    small, large = read({**big, "gpu_count": "16"}), read({**big, "gpu_count": "512"})
    assert not isinstance(small, str) and not isinstance(large, str)
    assert small.run.recompute != "none"
    assert small.run.recompute_share > large.run.recompute_share or large.run.recompute == "none"
    first, second = alike_in_curves([small, large])
    assert (first.run.recompute, first.run.recompute_share) == (second.run.recompute, second.run.recompute_share)  # fmt: skip


def test_a_source_held_out_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = scored("8", "1000").row, scored("8", "1000", source="other/repo@1 x").row
    seen = []
    monkeypatch.setattr(forecast, "fit", lambda rows, start: (seen.append({r.source for r in rows}), start)[1])  # fmt: skip
    forecast.leave_one_source_out([a, b])
    assert seen == [{"some/repo"}, {"other/repo"}]


def test_the_fit_sees_curves() -> None:
    """Two rows that are both 10% off cost more if their curve bends the wrong way."""
    rows = [scored("8", "1").row, scored("64", "1").row]
    here = [forecast.throughput(row, forecast.PRIOR) for row in rows]
    alike = [replace(r, tokens_per_s=t * 1.1) for r, t in zip(rows, here)]
    bent = [replace(r, tokens_per_s=t * f) for r, t, f in zip(rows, here, (1.1, 1 / 1.1))]
    extra = forecast.loss(bent, forecast.PRIOR) - forecast.loss(alike, forecast.PRIOR)
    assert extra == pytest.approx(forecast.bounded(2 * math.log(1.1)))


def test_fitting_recovers_what_made_the_data() -> None:
    """A constant that is off by 15% is found again from throughputs that another value made."""
    truth = replace(forecast.PRIOR, matmul=0.75)
    settings = [scored(n, "1", micro_batch=m).row for n in ("8", "64") for m in ("1", "4", "16")]
    rows = [replace(row, tokens_per_s=forecast.throughput(row, truth)) for row in settings]
    found = forecast.fit(rows, forecast.PRIOR)
    errors = [abs(forecast.throughput(r, found) / r.tokens_per_s - 1) for r in rows]
    before = [abs(forecast.throughput(r, forecast.PRIOR) / r.tokens_per_s - 1) for r in rows]
    assert max(errors) < 0.4 * max(before)


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "forecast.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_any_file_of_the_same_columns(tmp_path: Path) -> None:
    file, out = tmp_path / "runs.csv", tmp_path / "out.json"
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(ROW))
        writer.writeheader()
        writer.writerows([ROW, {**ROW, "id": "X-2", "gpu_count": "128", "global_batch_sequences": "512"}, {**ROW, "tp": "2"}])  # fmt: skip
    done = bench("--runs", file, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["rows"] == 2
    assert result["not_qualified"] == {"not data parallel alone": 1}
    assert {"median_absolute_percentage_error", "p90_absolute_percentage_error", "curve_median_error_points"} <= set(result)  # fmt: skip
    assert result["left_out"] == [{"id": "X-1", "why": "not data parallel alone"}]
    assert [r["id"] for r in result["list"]] == ["X-1", "X-2"]
    assert result["list"][0]["published_tokens_per_s_per_device"] == 3500

    few = ["Strategy", "GPU", "gpu_count", "model", "Seq_len", "precision", "micro batch", "tokens_per_s_per_gpu"]  # fmt: skip
    cells = ["ddp", "8 x A100", "8", "gpt2", "1024", "bf16", "8", "100,000"]
    other = [*cells[:1], "Abacus", *cells[2:]]
    file.write_bytes(b"\n".join([",".join(r).replace("100,000", '"100,000"').encode() for r in (few, cells, other)]) + b"\n\xff")  # fmt: skip
    assert bench("--runs", file, "--json", out).returncode == 0
    result = json.loads(out.read_text())
    assert (result["rows"], result["list"][0]["device"]) == (1, "A100 80GB")
    assert result["left_out"][0] == {"id": "line 3", "why": "device unknown"}

    file.write_text(",".join(ROW) + "\n")
    assert bench("--runs", file, "--json", out).returncode == 0
    assert json.loads(out.read_text())["median_absolute_percentage_error"] is None
    assert "is no file" in bench("--runs", tmp_path / "absent.csv").stderr


@pytest.mark.skipif(not RUNS.is_file(), reason="the collection of published runs is not here")
def test_the_collection_is_foretold() -> None:
    """The goals that hold with a margin; --folds gives the figures that are reported."""
    rows, _ = forecast.load(RUNS)
    found = forecast.forecast_all(rows, forecast.DEFAULT)
    assert len(found) >= 500
    assert forecast.percent(found, 0.5) < 10
    assert forecast.percent(found, 0.9) < 30
    decoders = [s for s in found if s.row.run.model.causal]
    assert forecast.quantile(forecast.curve_points(decoders), 0.5) < 3
