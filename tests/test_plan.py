"""How the global batch splits, how long a run is, learning rate and schedule; what ranks tell."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.config import Config, parse
from unisono.errors import ConfigError
from unisono.mesh import Divided, Mesh
from unisono.observe.arrival import NAMES, Period
from unisono.plan import Facts, Plan, describe, largest_micro_batch, make_plan, with_micro_batch
from unisono.train.scaling import Hyper, scale, warmup_steps
from unisono.train.schedule import factor
from unisono.train.vote import FAILED, FINE, Ballot, pack, unpack
from unisono.world import World

FACTS = Facts(1000, 900, 3600, 500, 50)


def asked(**changes: object) -> Config:
    return parse({"model": "m", "data": "d", "output_dir": "o", **changes})


def planned(replicas: int = 1, micro_batch: int = 4, facts: Facts = FACTS, **changes) -> Plan:
    return make_plan(asked(**changes), World(size=replicas), facts, micro_batch)


# --- the split


@settings(max_examples=300)
@given(
    batch=st.integers(1, 200),
    replicas=st.integers(1, 20),
    micro=st.integers(1, 50),
    strict=st.booleans(),
)
def test_every_row_is_in_one_micro_batch(
    batch: int, replicas: int, micro: int, strict: bool
) -> None:
    if strict:
        replicas = 2 ** (replicas % 5)
    mode = "strict" if strict else "default"
    plan = planned(replicas, micro, global_batch_size=batch, determinism=mode)
    assert plan.micro_batches == plan.accumulation * replicas
    rows = [list(plan.rows(leaf)) for leaf in range(plan.micro_batches)]
    assert [r for leaf in rows for r in leaf] == list(range(batch)), "in order, each once"
    sizes = {len(leaf) for leaf in rows}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == plan.micro_batch_size <= micro


@given(batch=st.integers(1, 200), micro=st.integers(1, 50))
def test_strict_micro_batches_do_not_depend_on_replicas(batch: int, micro: int) -> None:
    changes = {"global_batch_size": batch, "determinism": "strict"}
    plans = []
    for replicas in (1, 2, 4, 8):
        most = largest_micro_batch(asked(**changes), World(size=replicas))
        plans.append(planned(replicas, min(micro, most), **changes))
    assert len({p.micro_batches for p in plans}) == 1
    assert [p.accumulation * p.replicas for p in plans] == [plans[0].micro_batches] * 4


def test_the_default_split_by_hand() -> None:
    plan = planned(2, 4, global_batch_size=10)
    assert (plan.micro_batches, plan.accumulation, plan.micro_batch_size) == (4, 2, 3)
    assert [list(plan.rows(k)) for k in range(4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


def test_more_replicas_than_rows_says_so() -> None:
    plan = planned(4, 1, global_batch_size=3)
    assert sum(len(plan.rows(k)) for k in range(plan.micro_batches)) == 3
    assert "1 of 4 replicas have no row" in plan.reasons["micro_batch_size"]


@pytest.mark.parametrize("replicas", [3, 5, 6, 7, 12])
def test_strict_needs_a_power_of_two(replicas: int) -> None:
    with pytest.raises(ConfigError, match=rf"replicas: found {replicas}.*power of two"):
        planned(replicas, determinism="strict")


def test_strict_refuses_ddp() -> None:
    with pytest.raises(ConfigError, match=r"sync: found ddp.*needs sync: exact"):
        planned(2, determinism="strict", sync="ddp")


def test_smaller_micro_batches_keep_the_global_batch() -> None:
    config, world = asked(global_batch_size=24), World(size=2)
    plan = make_plan(config, world, FACTS, 6)
    smaller = with_micro_batch(plan, config, 3)
    assert (plan.micro_batches, smaller.micro_batches) == (4, 8)
    assert (smaller.micro_batch_size, smaller.accumulation) == (3, 4)
    assert smaller.global_batch_size == 24
    assert (smaller.max_steps, smaller.hyper) == (plan.max_steps, plan.hyper)


# --- the length


def test_steps_of_an_epoch_with_a_partial_last_one() -> None:
    plan = planned(global_batch_size=32)
    assert (plan.max_steps, plan.samples, plan.epochs) == (16, 500, 1.0)
    assert plan.positions(0) == range(32)
    assert plan.positions(15) == range(480, 500)
    used = [p for step in range(plan.max_steps) for p in plan.positions(step)]
    assert used == list(range(500))


def test_steps_of_other_lengths() -> None:
    assert planned(global_batch_size=32, num_train_epochs=2.5).samples == 1250
    assert planned(global_batch_size=32, num_train_epochs=2.5).max_steps == 40
    short = planned(global_batch_size=32, num_train_epochs=1e-9)
    assert (short.max_steps, short.samples) == (1, 1)
    given_steps = planned(global_batch_size=32, max_steps=20, num_train_epochs=99)
    assert (given_steps.max_steps, given_steps.samples) == (20, 640)
    assert given_steps.epochs == pytest.approx(640 / 500)


def test_intervals_are_a_tenth_unless_given() -> None:
    assert planned(max_steps=450).eval_steps == 45
    assert planned(max_steps=3).save_steps == 1
    plan = planned(max_steps=450, eval_steps=7, save_steps=9)
    assert (plan.eval_steps, plan.save_steps) == (7, 9)


def test_bytes_and_memory_by_hand() -> None:
    assert planned(1).sent_bytes_per_step == 0
    assert planned(2).sent_bytes_per_step == 3600
    assert planned(4).sent_bytes_per_step == 2 * 3600 * 3 // 4
    assert planned(4, wire="bfloat16").sent_bytes_per_step == 3600 * 3 // 4
    # Both ways a row of 225 values goes to three others, with one scale; int4 in whole rotations of 32.
    assert planned(4, sync="quantized").sent_bytes_per_step == 2 * 3 * (225 + 4)
    assert planned(4, sync="quantized", wire="int4").sent_bytes_per_step == 2 * 3 * (128 + 4)
    thin = replace(FACTS, thin_values=300)
    assert planned(4, facts=thin, sync="powersgd").sent_bytes_per_step == 2 * 1200 * 3 // 4
    # Gradients go over two copies, weights and gradients over the two shards of each.
    sharded = planned(4, sync="sharded", mesh={"replica": 2})
    assert sharded.sent_bytes_per_step == 1800 * (2 * 2 + 1) + 3600 // 2
    # Weights 4000, gradients 3600, two moments; shared out where the optimizer is.
    assert planned(1).model_bytes == 4000 + 3600 * 3
    shard = {"shard_optimizer": True}
    assert planned(2, **shard).model_bytes == 4000 + 3600 + 3600
    assert planned(4, **shard).model_bytes == 4000 + 3600 + 3600 * 2 // 4
    assert planned(4, wire="bfloat16").model_bytes == 4000 + 3600 + 3600 * 3 // 4
    assert planned(4, sync="quantized").model_bytes == 4000 + 3600 + 3600 * 3 // 4
    # Feedback: of other ranks' rows, or of everything.
    assert planned(4, sync="quantized", wire="int4").model_bytes == 4000 + 3600 + 2 * 3600 * 3 // 4
    assert planned(2, sync="powersgd").model_bytes == 4000 + 3600 * 3 + 3600
    assert sharded.model_bytes == (4000 + 3600 * 3) // 2
    # Whole gradients: from three replicas on the received pieces too.
    assert planned(2).model_bytes == 4000 + 3600 * 3
    assert planned(4).model_bytes == 4000 + 3600 * 4


def test_meshes_divide_samples_bytes_and_memory() -> None:
    plan = planned(4, mesh={"context": 2})
    assert plan.mesh == Mesh(replica=2, context=2)
    assert [list(plan.leaves(rank)) for rank in range(4)] == [
        list(range(plan.accumulation * k, plan.accumulation * (k + 1))) for k in (0, 0, 1, 1)
    ]
    assert plan.sent_bytes_per_step == 2 * 3600 * 3 // 4  # context ranks are more ranks of the sum
    assert planned(4, sync="sharded", mesh={"context": 2}).mesh == Mesh(shard=2, context=2)
    both = planned(4, sync="sharded", mesh={"replica": 2, "context": 2})
    assert both.mesh == Mesh(replica=2, context=2)
    assert both.model_bytes == (4000 + 3600 * 3) // 2
    # Half of 800 of the 900 trained values is elsewhere; activations cross for every token.
    facts = replace(FACTS, divided=Divided(values=800, sent=12))
    cut = planned(4, mesh={"tensor": 2}, facts=facts)
    tokens = -(-cut.global_batch_size // 2) * cut.sequence_length
    assert cut.across_bytes_per_step == tokens * 12 * 4 // 2
    assert cut.sent_bytes_per_step == 2 * (3600 - 1600) // 2 + cut.across_bytes_per_step
    assert cut.model_bytes == 4000 - 1600 + (3600 - 1600) * 3
    assert "in 2 slices" in cut.reasons["mesh"]


def test_the_optimizer_is_on_shards_where_that_pays() -> None:
    large = replace(FACTS, gradient_bytes=32 << 20)
    assert planned(2, facts=large).shard_optimizer
    assert not planned(2).shard_optimizer
    assert not planned(1, facts=large).shard_optimizer
    assert not planned(2, facts=large, shard_optimizer=False).shard_optimizer
    assert not planned(2, facts=large, determinism="strict").shard_optimizer
    assert not planned(2, facts=large, sync="ddp").shard_optimizer
    assert planned(2, wire="bfloat16").shard_optimizer
    fast = replace(large, hides_whole=True)
    assert not planned(2, facts=fast).shard_optimizer
    assert "fast link" in planned(2, facts=fast).reasons["shard_optimizer"]
    assert planned(2, facts=fast, shard_optimizer=True).shard_optimizer
    assert planned(2, facts=fast, wire="bfloat16").shard_optimizer
    few = planned(2, facts=replace(FACTS, hides_whole=True), sync="quantized")
    assert few.shard_optimizer, "it was asked for"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"wire": "bfloat16", "sync": "ddp"}, "wire: found bfloat16 with sync: ddp"),
        ({"wire": "int8"}, "wire: found int8 with sync: exact.*write sync: quantized"),
        ({"sync": "quantized", "wire": "bfloat16"}, "wire: found bfloat16 with sync: quantized"),
        (
            {"sync": "quantized", "determinism": "strict"},
            "sync: found quantized.*needs sync: exact",
        ),
        (
            {"sync": "quantized", "shard_optimizer": False},
            "shard_optimizer: found false with sync: q",
        ),
        ({"sync": "quantized", "mesh": {"tensor": 2}}, "mesh.tensor: found 2 with sync: quantized"),
        ({"sync": "powersgd", "wire": "bfloat16"}, "wire: found bfloat16 with sync: powersgd"),
        ({"sync": "powersgd", "determinism": "strict"}, "sync: found powersgd.*needs sync: exact"),
        ({"wire": "bfloat16", "determinism": "strict"}, "with determinism: strict"),
        ({"wire": "bfloat16", "shard_optimizer": False}, "with shard_optimizer: false"),
        ({"shard_optimizer": True, "determinism": "strict"}, "shard_optimizer: found true"),
        ({"shard_optimizer": True, "sync": "sharded"}, "shard_optimizer: found true"),
        (
            {"mesh": {"shard": 2}},
            "mesh.shard: found 2 with sync: exact, which keeps the weights whole",
        ),
        ({"mesh": {"context": 2}, "sync": "ddp"}, "mesh.context: found 2 with sync: ddp"),
        ({"mesh": {"tensor": 2}, "sync": "reference"}, "mesh.tensor: found 2 with sync: reference"),
        ({"mesh": {"tensor": 2}, "determinism": "strict"}, "mesh.tensor: found 2 with determinism"),
        ({"mesh": {"context": 3}}, "replica 1 x shard 1 x context 3 = 3, but there are 4 ranks"),
        ({"mesh": {"tensor": 8}}, "x tensor 8 = 8, but there are 4 ranks; make the product 4"),
        ({"mesh": {"replica": 3}}, "or leave replica out"),
        ({"sync": "sharded", "mesh": {"replica": 3}}, "replica 3 x shard 1 = 3, but there are 4"),
        ({"sync": "sharded", "determinism": "strict"}, "sync: found sharded"),
    ],
)
def test_what_does_not_combine_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        planned(4, **changes)
    assert planned(1, optim="sgd").model_bytes == 4000 + 3600
    assert planned(1, optim="sgd", momentum=0.9).model_bytes == 4000 + 3600 * 2


def test_the_shown_plan_gives_each_number_its_reason() -> None:
    config, world = asked(base_batch_size=8), World(size=2, threads=3)
    plan = make_plan(config, world, replace(FACTS, gradient_bytes=32 << 20), 4)
    rows = {what: (value, reason) for what, value, reason in describe(plan, config, world, FACTS)}
    assert rows["replicas"] == ("2 on CPU", "sync exact, optimizer on shards, 3 threads each")
    assert rows["global batch"][0] == "32 x 1024 = 32,768 tokens"
    assert "batch 32 / base_batch_size 8 = 4" in rows["optimizer"][1]
    assert all(reason for _, reason in rows.values())
    assert plan.as_json()["hyper"]["learning_rate"] == plan.hyper.learning_rate


# --- scaling, against numbers worked out by hand from the rules


def test_square_root_rule_for_adamw() -> None:
    """kappa 4: rate and weight decay x 2, betas to the 4th power, epsilon / 2."""
    hyper = scale(
        asked(
            base_batch_size=8, global_batch_size=32, learning_rate=1e-3, weight_decay=0.1,
            adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        )
    )  # fmt: skip
    assert hyper.learning_rate == pytest.approx(2e-3, rel=1e-12)
    assert hyper.weight_decay == pytest.approx(0.2, rel=1e-12)
    assert hyper.beta1 == pytest.approx(0.6561, rel=1e-12)
    assert hyper.beta2 == pytest.approx(0.996005996001, rel=1e-12)
    assert hyper.epsilon == pytest.approx(5e-9, rel=1e-12)
    assert "0.001 x sqrt(4)" in hyper.reason


def test_a_smaller_batch_scales_the_other_way() -> None:
    hyper = scale(
        asked(base_batch_size=64, global_batch_size=16, learning_rate=1e-3, adam_beta2=0.81)
    )
    assert hyper.learning_rate == pytest.approx(5e-4)
    assert hyper.beta1 == pytest.approx(0.9**0.25)
    assert hyper.beta2 == pytest.approx(0.9486832980505138)
    assert hyper.epsilon == pytest.approx(2e-8)


@pytest.mark.parametrize(("given_beta2", "scaled"), [(0.95, 0.9), (0.99, 0.9606), (0.85, 0.85)])
def test_beta2_does_not_fall_below_its_floor(given_beta2: float, scaled: float) -> None:
    hyper = scale(asked(base_batch_size=8, global_batch_size=32, adam_beta2=given_beta2))
    assert hyper.beta2 == pytest.approx(scaled, rel=1e-4)


def test_linear_rule_for_sgd() -> None:
    """kappa 8: rate x 8, nothing else (Goyal et al.)."""
    hyper = scale(
        asked(
            optim="sgd", base_batch_size=4, global_batch_size=32, learning_rate=0.1,
            weight_decay=0.01, momentum=0.9,
        )
    )  # fmt: skip
    assert hyper.learning_rate == pytest.approx(0.8)
    assert hyper.weight_decay == 0.01
    assert "linear rule" in hyper.reason


@pytest.mark.parametrize(
    ("optim", "rule", "times"),
    [("adamw", "linear", 4), ("adamw", "none", 1), ("sgd", "sqrt", 2), ("sgd", "none", 1)],
)
def test_a_rule_that_is_asked_for(optim: str, rule: str, times: float) -> None:
    hyper = scale(
        asked(
            optim=optim, batch_scaling=rule, base_batch_size=8, global_batch_size=32,
            learning_rate=0.01, weight_decay=0.1,
        )
    )  # fmt: skip
    assert hyper.learning_rate == pytest.approx(0.01 * times)
    assert (hyper.weight_decay, hyper.beta1, hyper.beta2) == (0.1, 0.9, 0.999)


def test_without_a_base_nothing_is_scaled() -> None:
    for changes in ({}, {"base_batch_size": 32}):
        hyper = scale(asked(learning_rate=0.01, **changes))
        assert (hyper.learning_rate, hyper.beta2, hyper.epsilon) == (0.01, 0.999, 1e-8)
        assert hyper.reason.startswith("as given")


def hyper_with(beta2: float) -> Hyper:
    return Hyper(1e-3, 0.0, 0.9, beta2, 1e-8, "")


@pytest.mark.parametrize(
    ("beta2", "steps", "optim", "expected"),
    [
        (0.95, 5000, "adamw", 100),  # 2/(1-beta2) = 40, 1% = 50: at least 100
        (0.999, 50_000, "adamw", 2000),  # 2/(1-beta2)
        (0.99, 50_000, "adamw", 500),  # 1%
        (0.999, 500, "adamw", 50),  # would be 2000: a tenth of a short run
        (0.999, 50_000, "sgd", 500),  # no second moment
        (0.999, 5, "adamw", 0),
    ],
)
def test_automatic_warm_up(beta2: float, steps: int, optim: str, expected: int) -> None:
    found, reason = warmup_steps(asked(optim=optim), hyper_with(beta2), steps)
    assert found == expected
    assert reason


def test_warm_up_that_is_asked_for() -> None:
    assert warmup_steps(asked(warmup_steps=30), hyper_with(0.999), 100)[0] == 30
    assert warmup_steps(asked(warmup_steps=0.25), hyper_with(0.999), 100)[0] == 25
    assert warmup_steps(asked(warmup_steps=0), hyper_with(0.999), 100)[0] == 0
    assert warmup_steps(asked(lr_scheduler_type="constant"), hyper_with(0.999), 100)[0] == 0


def test_warm_up_counts_steps_whatever_the_replicas() -> None:
    assert len({planned(n, max_steps=900).warmup_steps for n in (1, 2, 4, 8)}) == 1


# --- the schedule, against transformers' own


def theirs(kind: str, warmup: int, steps: int, min_ratio: float, decay: float) -> list[float]:
    from transformers.optimization import get_scheduler, get_wsd_schedule

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if kind == "warmup_stable_decay":
        start = max(warmup, round(steps * (1 - decay)))
        scheduler = get_wsd_schedule(
            optimizer, warmup, steps - start, num_stable_steps=start - warmup,
            min_lr_ratio=min_ratio, decay_type="linear",
        )  # fmt: skip
    else:
        extra = {"min_lr_rate": min_ratio} if kind == "cosine_with_min_lr" else {}
        scheduler = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=extra)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 37), (10, 100), (30, 30), (7, 8)])
@pytest.mark.parametrize(
    "kind",
    ["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"],
)  # fmt: skip
def test_schedule_equals_transformers_at_every_step(kind: str, warmup: int, steps: int) -> None:
    for min_ratio, decay in ((0.1, 0.2), (0.0, 0.5)):
        # Their warmup_stable_decay warms up from its floor and not from 0.
        first = warmup if kind == "warmup_stable_decay" and min_ratio else 0
        ours = [factor(kind, s, warmup, steps, min_ratio, decay) for s in range(first, steps)]
        expected = theirs(kind, warmup, steps, min_ratio, decay)[first:]
        assert ours == pytest.approx(expected, abs=1e-12)


@given(
    kind=st.sampled_from(["linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
)
def test_schedule_rises_once_and_falls_once(kind: str, warmup: int, steps: int) -> None:
    found = [factor(kind, s, warmup, steps, 0.1, 0.3) for s in range(steps)]
    assert all(0 <= f <= 1 for f in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == 1.0


# --- the vote


@given(
    size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    data=st.data(),
)
def test_votes_add_up_to_every_ranks_part(size: int, accumulation: int, data) -> None:
    leaves = size * accumulation
    number = st.floats(-1e6, 1e6)
    ballots = [
        Ballot(
            losses=data.draw(st.lists(number, min_size=accumulation, max_size=accumulation)),
            counts=data.draw(
                st.lists(st.integers(0, 10**6), min_size=accumulation, max_size=accumulation)
            ),
            stop=data.draw(st.booleans()),
            trouble=data.draw(st.sampled_from([FINE, FAILED])),
            period=Period(*data.draw(st.lists(number, min_size=len(NAMES), max_size=len(NAMES)))),
            sums=data.draw(st.lists(number, min_size=4, max_size=4)),
        )
        for _ in range(size)
    ]
    packed = [pack(b, r, size, leaves, r * leaves // size) for r, b in enumerate(ballots)]
    outcome = unpack([math.fsum(v) for v in zip(*packed, strict=True)], size, leaves)
    assert outcome.losses == [x for b in ballots for x in b.losses]
    assert outcome.count == sum(t for b in ballots for t in b.counts)
    assert outcome.stop == any(b.stop for b in ballots)
    assert outcome.trouble == [b.trouble for b in ballots]
    assert outcome.periods == [b.period for b in ballots]
    assert outcome.step_s == max(b.period.step for b in ballots)
    assert outcome.sums == [math.fsum(s) for s in zip(*(b.sums for b in ballots), strict=True)]


def test_a_rank_that_failed_half_way_spoils_nobody_elses_slots() -> None:
    whole = pack(Ballot([1.0, 2.0], [3, 4]), 0, 2, 4, 0)
    torn = pack(Ballot([5.0], [6], trouble=FAILED), 1, 2, 4, 2)
    outcome = unpack([a + b for a, b in zip(whole, torn, strict=True)], 2, 4)
    assert outcome.losses == [1.0, 2.0, 5.0, 0.0]
    assert outcome.count == 13
    assert outcome.trouble == [FINE, FAILED]


def test_loss_is_the_mean_over_target_tokens_and_not_over_ranks() -> None:
    values = [
        a + b
        for a, b in zip(
            pack(Ballot([10.0], [1]), 0, 2, 2, 0),
            pack(Ballot([20.0], [9]), 1, 2, 2, 1),
            strict=True,
        )
    ]
    assert unpack(values, 2, 2).loss == 3.0
    assert math.isnan(unpack([0.0] * len(values), 2, 2).loss)
