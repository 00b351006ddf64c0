"""A run's folder with every file that the page knows, made up but in the real formats."""

import json
import math
from pathlib import Path
from typing import Any

from unisono.clock import PHASES

SHARES = (0.8, 0.0, 0.0, 0.03, 0.05, 0.0, 0.01, 0.02, 0.01, 0.07, 0.01)


def write_run(folder: Path, *, steps: int = 200, replicas: int = 2, **changes: Any) -> Path:
    """`changes` replace fields of run.json."""
    folder.mkdir(parents=True)
    config = {
        "model": {"model_type": "llama", "hidden_size": 64},
        "sync": "exact",
        "max_grad_norm": 1.0,
        "output_dir": str(folder),
        "replicas": replicas,
        **changes,
    }
    plan = {
        "replicas": replicas,
        "global_batch_size": 32,
        "sequence_length": 128,
        "max_steps": steps,
        "model_bytes": 22_960_640,
        "bucket_mb": 1.3,
        "hyper": {"learning_rate": 0.004},
        "reasons": {"bucket_mb": "link of 18 Gbit/s"},
    }
    receipt = {
        "step": steps,
        "steps": steps,
        "replicas": replicas,
        "device": "AMD EPYC",
        "tokens_per_second": 7000.0 * replicas * 0.9,
        "efficiency": 0.9,
        "step_ms": 280.0,
        "wall_s": 60.0,
        "mfu": 0.41,
        "goodput": 0.97,
        "memory_by_rank": [400_000_000 + r for r in range(replicas)],
        "blame": [{"kind": "slow rank", "rank": 1, "cost": 0.05, "detail": "computes 6% longer"}],
        "advice": [{"what": "waiting for rank 1", "share": 0.05, "gain": 0.06, "do": "look at it"}],
        "seconds_by_rank": [
            {p: 60 * s for p, s in zip(PHASES, SHARES, strict=True)} for _ in range(replicas)
        ],
    }
    forecast = {
        "step_s": 0.27,
        "parts": {"compute": 0.22, "communication": 0.01},
        "tokens_per_second": 13000.0,
        "efficiency": 0.93,
        "sent_bytes_per_step": 1_000_000,
        "memory_bytes": 380_000_000,
        "sources": {"pass": "a probe", "link": "a probe"},
        "error": -0.036,
        "measured": {
            "step_s": 0.28,
            "parts": {"compute": 0.24, "communication": 0.009, "waiting": 0.015},
            "tokens_per_second": 12600.0,
            "efficiency": 0.9,
            "sent_bytes_per_step": 1_000_000,
            "memory_bytes": 400_000_000,
        },
    }
    probe = {
        "collectives": [
            {"axis": "replica", "operation": "all-reduce", "bytes": 2**k, "busbw_GBps": 0.1 * k}
            for k in range(12, 27)
        ]
    }
    files = {
        "run.json": config, "plan.json": plan, "receipt.json": receipt, "forecast.json": forecast,
        "probe.json": probe, "environment.json": {"torch": "2.13.0", "host": "somewhere"},
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    write_lines(folder / "metrics.jsonl", [metrics_row(s) for s in range(1, steps + 1)])
    write_lines(folder / "ranks.jsonl", [ranks_row(s, replicas) for s in range(1, steps + 1)])
    held = [{"step": s, "eval/loss": 5 - s / steps} for s in range(steps // 4, steps + 1, steps // 4)]  # fmt: skip
    write_lines(folder / "metrics.jsonl", held)
    write_lines(
        folder / "timeline.jsonl",
        [timeline_row(step, rank) for step in (5, 6, 100) for rank in range(replicas)],
    )
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def metrics_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 7 * math.exp(-step / 500) + 2,
        "train/learning_rate": 0.004 / step,
        "train/grad_norm": 1 + math.sin(step) / 2,
        "perf/tokens_per_second": 12_000 + 500 * math.sin(step),
        "perf/mfu": 0.4,
        "perf/memory_bytes": 4e8 + step,
        "comm/exposed_fraction": 0.03,
        "comm/waiting_fraction": 0.05,
        "batch/noise_scale_tokens": 3000.0 + step,
        "batch/noise_scale_low_tokens": 2500.0,
        "batch/noise_scale_high_tokens": 4000.0,
        "batch/critical_tokens": 4000.0,
        **{f"time/{p}_s": 0.3 * s for p, s in zip(PHASES, SHARES, strict=True)},
    }


def ranks_row(step: int, replicas: int = 2) -> dict[str, Any]:
    """Rank 0 waits for 0.02 s of a step of 0.3 s, the others never; no time of the first is known."""
    waits = [0.02 * (r == 0) for r in range(replicas)]
    seconds = [{"compute": 0.29 - w, "waiting": w, "data": 0.01} for w in waits]
    return {"step": step, "steps": step > 1, "seconds": seconds if step > 1 else []}


def timeline_row(step: int, rank: int, late_ms: float = 20.0) -> dict[str, Any]:
    """100 ms of computing, `late_ms` more on rank 1, then an all-reduce of 5 ms."""
    come = 100 + late_ms * (rank == 1)
    end = 105 + late_ms
    return {
        "step": step,
        "rank": rank,
        "host": "somewhere",
        "offset_error_ms": 0.05 * (rank > 0),
        "began_ms": 0.0,
        "ended_ms": end + 1,
        "spans": [["compute", 0.0, come], ["waiting", come, end], ["optimizer", end, end + 1]],
        "spans_left_out": 0,
        "collectives": [
            {
                "operation": "all-reduce",
                "group": "control",
                "sequence": step,
                "sent_bytes": 1_000_000,
                "started_ms": come,
                "waited_ms": end - come,
                "finished_ms": end,
            }
        ],
        "collectives_left_out": 0,
    }
