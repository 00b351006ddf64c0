"""The receipt: its sums, counterfactuals, advice, and how it looks."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from unisono import config as config_module
from unisono.clock import PHASES
from unisono.config import Config
from unisono.observe.advice import advise, gain_without
from unisono.observe.blame import Blame
from unisono.observe.flops import Peak
from unisono.observe.receipt import (
    Receipt,
    make_receipt,
    render,
    utilization,
    with_recomputation,
)
from unisono.plan import Facts, Plan, make_plan
from unisono.train.trial import Baseline
from unisono.world import World

SECONDS = {
    "compute": 70.0, "recomputation": 0.0, "communication": 10.0, "waiting": 4.0, "imbalance": 0.0,
    "data": 1.0, "optimizer": 3.0, "checkpoint": 2.0, "evaluation": 8.0, "other": 2.0,
}  # fmt: skip


def config(**fields: Any) -> Config:
    return config_module.parse({"model": "x", "data": "x", "output_dir": "x", **fields})


def plan_of(config: Config, replicas: int = 2) -> Plan:
    facts = Facts(10**7, 10**7, 4 * 10**7, 10_000, 100)
    return make_plan(config, World(size=replicas, local_size=replicas), facts, 4)


def receipt(replicas: int = 2, **seconds: float) -> Receipt:
    return make_receipt(
        [{**SECONDS, **seconds}] * replicas, device="a CPU", steps=100, tokens=10_000, accumulation=2,
        baseline=Baseline(0.4, 0.41), sent_bytes=10**8, final_loss=2.0, eval_loss=2.1, skipped_steps=0,
    )  # fmt: skip


def shown(receipt: Receipt, width: int = 88) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render(receipt))
    return console.export_text()


def test_shares_sum_to_one_and_gains_are_against_the_steps() -> None:
    r = receipt()
    assert sum(r.shares.values()) == pytest.approx(1, abs=1e-12)
    assert set(r.shares) == set(PHASES)
    assert r.tokens_per_second == pytest.approx(10_000 / 90)
    assert gain_without("communication", r.shares) == pytest.approx(10 / 80)
    assert gain_without("evaluation", r.shares) == pytest.approx(8 / 92)
    assert gain_without("compute", r.shares) is None


def test_every_line_has_advice_with_a_field_and_a_value() -> None:
    asked = config(learning_rate=1e-3)
    advice = advise(
        receipt(recomputation=1.0, imbalance=1.0, generation=1.0).shares, [], asked, plan_of(asked)
    )
    assert {a["what"] for a in advice} == set(PHASES) - {"compute"}
    gains = [a["gain"] for a in advice]
    assert gains == sorted(gains, reverse=True)
    for a in advice:
        assert "=" in a["do"] or a["what"] == "waiting", a
        for word in a["do"].split():
            field, equals, value = word.partition("=")
            if equals and field.startswith("grpo."):
                config(grpo={"reward_funcs": "a:b", field.removeprefix("grpo."): int(value)})
            elif equals and field.islower():
                config(**{field.split(".")[0]: {"path": "x", "packing": value} if "." in field else yaml_value(value)})  # fmt: skip


def yaml_value(text: str) -> Any:
    import yaml

    return yaml.safe_load(text.rstrip(",;:"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "wire=bfloat16 halves"),
        ({"wire": "bfloat16"}, "global_batch_size=64"),
        ({"shard_optimizer": False}, "shard_optimizer=auto wire=bfloat16"),
        ({"determinism": "strict"}, "global_batch_size=64"),
        ({"sync": "sharded"}, "global_batch_size=64"),
    ],
)
def test_advice_on_communication_is_possible_there(fields: dict[str, Any], expected: str) -> None:
    asked = config(**fields)
    advice = {a["what"]: a["do"] for a in advise(receipt().shares, [], asked, plan_of(asked))}
    assert expected in advice["communication"]


def test_blame_comes_with_advice_that_covers_its_line() -> None:
    asked = config()
    blames = [
        Blame("slow rank", 3, 0.2, "computes 25% longer"),
        Blame("slow loader", 1, 0.1, "reads"),
    ]
    advice = advise(receipt().shares, blames, asked, plan_of(asked, 8))
    rows = {a["what"]: a for a in advice}
    assert rows["slow rank, rank 3"]["gain"] == pytest.approx(0.25)
    assert "replicas=7 without it is faster" in rows["slow rank, rank 3"]["do"]
    assert rows["waiting"]["do"] == "see slow rank, rank 3"
    assert rows["data"]["do"] == "see slow loader, rank 1"
    text = shown(replace(receipt(8), blame=blames, advice=advice))
    assert "slow rank: rank 3 computes 25% longer; costs 20% of the step" in text
    assert "see slow" not in text


def test_utilization_needs_a_peak() -> None:
    r = receipt()
    used = utilization(r, 8e9, 10e9, Peak(1e10, "published"))
    # 4 GFLOP a replica in a step of 0.9 s.
    assert used.value == pytest.approx(4 / 9)
    assert used.hfu == pytest.approx(5 / 9)
    nothing = utilization(r, 8e9, 10e9, Peak(None, "no known peak of X"))
    assert nothing.value is None and nothing.hfu is None
    assert "MFU: no known peak of X" in shown(replace(r, mfu=nothing))
    assert "MFU 44.4%, HFU 55.6%" in shown(replace(r, mfu=used))


def test_recomputation_on_a_gpu_is_a_share_of_what_was_computed() -> None:
    found = with_recomputation(SECONDS, 0.25)
    assert (found["compute"], found["recomputation"]) == (52.5, 17.5)
    assert sum(found.values()) == sum(SECONDS.values())


def test_it_fits_a_terminal_and_hides_what_cannot_be() -> None:
    alone = shown(receipt(1))
    assert "communication" not in alone and "waiting" not in alone and "recomputation" not in alone
    assert "recomputation" in shown(receipt(recomputation=5.0))
    text = shown(receipt(), width=80)
    assert "\nsum " in text and "100.0%" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
