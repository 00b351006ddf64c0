"""What is said of the batch follows from the noise scale, and says what it does not know."""

import json
import math

import pytest

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.forecast.price import critical_batch_tokens
from unisono.observe import noise
from unisono.observe.noise import NoiseScale
from unisono.plan import Facts, make_plan
from unisono.train.batch_advice import advise, doubling, halving, metrics
from unisono.world import World


@pytest.fixture
def config(tmp_path):
    return make_job(write_corpus(tmp_path), tmp_path / "run", max_steps=50)


@pytest.fixture
def plan(config):
    world = World(rank=0, size=1, local_rank=0, local_size=1, device="cpu", threads=1)
    return make_plan(config, world, Facts(1000, 1000, 4000, 4000, 100), 2)


def scale(share: float, low: float = 0.8, high: float = 1.3) -> NoiseScale:
    """Of a batch of 16 x 32 tokens, 500 of which are targets."""
    tokens = 500 / share
    return NoiseScale(tokens, low * tokens, high * tokens, 500.0, 60)


def test_a_third_of_the_critical_size(plan, config) -> None:
    advice = advise(scale(0.3), plan, config, 10**6)
    assert advice.share == pytest.approx(0.3)
    assert advice.noise_scale_tokens == pytest.approx(512 / 0.3)
    assert advice.noise_scale_low_tokens == pytest.approx(0.8 * 512 / 0.3)
    assert advice.lines[0] == (
        "Batch: 512 tokens are 0.3 of the gradient noise scale, 1,707 (1,365 to 2,219); doubling "
        "devices at this batch per device still pays: 1.6x faster for 1.2x the tokens"
    )
    assert "global_batch_size=32 base_batch_size=16" in advice.lines[2]
    assert "from 0.003 to 0.00424" in advice.lines[2]
    json.dumps(advice.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("share", "says", "larger"),
    [(0.49, "still pays", True), (0.6, "gains little", True), (1.9, "gains little", True), (4.0, "does not pay", False)],
)  # fmt: skip
def test_the_verdict_turns_at_half_and_at_twice_the_size(plan, config, share, says, larger) -> None:
    advice = advise(scale(share), plan, config, 10**6)
    assert says in advice.lines[0]
    assert any("To double" in line for line in advice.lines) is larger


def test_doubling_and_halving_are_inverse() -> None:
    for share in (0.01, 0.3, 1.0, 7.0):
        faster, tokens = doubling(share)
        longer, fewer = halving(2 * share)
        assert faster * tokens == pytest.approx(2)
        assert (longer, fewer) == (pytest.approx(faster), pytest.approx(1 / tokens))
    assert doubling(0.3) == (pytest.approx(1.625), pytest.approx(1.6 / 1.3))


@pytest.mark.parametrize(
    ("noise", "says"),
    [
        (None, "not known: too few"),
        (scale(0.3, 0.3, 2.0), "not certain enough to go by: 512 to 3,413"),
        (NoiseScale(math.inf, 900.0, math.inf, 500.0, 60), "922 to no bound"),
        (NoiseScale(0.0, 0.0, 0.0, 500.0, 60), "not known"),
    ],
)
def test_without_a_certain_noise_scale_the_law_decides(plan, config, noise, says) -> None:
    advice = advise(noise, plan, config, 10**6)
    law = critical_batch_tokens(10**6)
    assert advice.critical_tokens == law
    assert advice.share == pytest.approx(512 / law)
    assert "published critical batch" in advice.lines[0]
    assert says in advice.lines[1]
    json.dumps(advice.as_json(), allow_nan=False)


def test_one_replica_with_one_micro_batch_is_told_what_to_do(config, plan) -> None:
    from dataclasses import replace

    advice = advise(None, replace(plan, accumulation=1), config, 10**6)
    assert "a smaller micro_batch_size or a second replica" in advice.lines[1]


def test_a_scaled_learning_rate_goes_on_from_its_base(plan, tmp_path) -> None:
    config = make_job(tmp_path, tmp_path / "run", base_batch_size=4, optim="sgd")
    advice = advise(scale(0.3), plan, config, 10**6)
    assert "global_batch_size=32 base_batch_size=4" in advice.lines[2]
    assert "to 0.024 " in advice.lines[2], "8 x 0.003, linear"


def test_rows_leave_out_what_is_not_known(plan) -> None:
    assert metrics(None, plan, 10**6) == {"batch__critical_tokens": critical_batch_tokens(10**6)}
    row = metrics(NoiseScale(math.inf, 900.0, math.inf, 500.0, 60), plan, 10**6)
    assert set(row) == {"batch__critical_tokens", "batch__noise_scale_low_tokens"}


# --- in a run


def measured(place, output, size: int, **changes) -> tuple[dict, list[dict]]:
    changes = {"max_steps": 24, **changes}
    config = make_job(place / "corpus.txt", output, **changes)
    ends = run_ranks(
        run, size, config, often, env={"XDG_CACHE_HOME": str(place / "cache")}, join=False
    )
    assert [e for e, _, _ in ends] == ["done"] * size
    said = "\n".join(ends[0][1])
    facts = json.loads((output / "receipt.json").read_text())
    assert facts["batch_advice"]["lines"][0] in said
    rows = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
    return facts, [r for r in rows if "batch/critical_tokens" in r]


def often(world) -> None:
    """Steps of a few milliseconds would be measured too rarely for so short a run."""
    from unisono.observe.noise import Meter

    Meter.__init__.__defaults__ = (math.inf,)


def never(world) -> None:
    from unisono.observe.noise import Meter

    Meter.due = lambda self: False


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice")
    write_corpus(folder)
    return folder


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (2, {}),
        (2, {"shard_optimizer": True}),
        (2, {"sync": "sharded"}),
        (2, {"sync": "ddp"}),
    ],
)
def test_a_run_says_its_noise_scale(place, tmp_path, size: int, changes: dict) -> None:
    facts, rows = measured(place, tmp_path, size, **changes)
    assert rows[-1]["batch/noise_scale_tokens"] > 0
    assert rows[-1]["batch/noise_scale_low_tokens"] <= rows[-1]["batch/noise_scale_tokens"]
    assert facts["batch_advice"]["noise_scale_tokens"] == rows[-1]["batch/noise_scale_tokens"]
    assert facts["batch_advice"]["noise_scale_samples"] == 24 - 3, "two warm, the last one untold"
    assert rows[-1]["batch/critical_tokens"] == critical_batch_tokens(24 * 16 * 32)


def test_strict_bits_are_the_same_measured_or_not(place, tmp_path) -> None:
    digests, scales = set(), []
    for size in (1, 2):
        facts, rows = measured(place, tmp_path / str(size), size, determinism="strict")
        digests.add(facts["digest"])
        scales.append([r["batch/noise_scale_tokens"] for r in rows[noise.ENOUGH + 3 :]])
    config = make_job(place / "corpus.txt", tmp_path / "never", max_steps=24, determinism="strict")
    env = {"XDG_CACHE_HOME": str(place / "cache")}
    [(end, _, facts)] = run_ranks(run, 1, config, never, env=env, join=False)
    assert end == "done" and facts
    digests.add(json.loads((tmp_path / "never" / "receipt.json").read_text())["digest"])
    assert len(digests) == 1
    # The parts are the same micro-batches, so the estimate is the same but for rounding.
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
