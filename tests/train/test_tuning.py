"""Buckets that find their own size: never slower than at the start, and kept for the next run."""

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from unisono.sync.link import Link
from unisono.train import tuning
from unisono.train.tuning import (
    LEAST_GAIN,
    LEAST_MB,
    MOST_MB,
    STEPS,
    Tuner,
    key_of,
    recall,
    remember,
)


def run(tuner: Tuner, seconds: Callable[[float], float], waited: float = 0.2) -> int:
    """Steps until it is done. A step's time is known one step later, as in the loop."""
    previous, steps = 0.0, 0
    while not tuner.done:
        now = seconds(tuner.bucket_mb)
        tuner.step(previous, waited * previous)
        previous = now
        steps += 1
        assert steps < 1000
    return steps


def noisy(mean: Callable[[float], float], seed: int, noise: float) -> Callable[[float], float]:
    chooser = random.Random(seed)
    return lambda mb: mean(mb) * math.exp(chooser.gauss(0, noise))


def valley(best: float, slope: float) -> Callable[[float], float]:
    return lambda mb: 1 + slope * abs(math.log2(mb / best))


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03, 0.1])
def test_never_slower_than_the_start_by_more_than_the_noise(noise: float) -> None:
    """200 trials on all kinds of links; a size that is slower by so much is never the last one."""
    ended_slower = 0
    for trial in range(200):
        chooser = random.Random(1000 + trial)
        mean = valley(2 ** chooser.uniform(-1, 7), chooser.uniform(0, 0.1))
        tuner = Tuner(4.0)
        run(tuner, noisy(mean, trial, noise))
        slower = mean(tuner.bucket_mb) / mean(4.0) - 1
        # Two standard errors of a difference of medians of STEPS each, seldom three.
        error = 1.2533 * math.sqrt(2 / STEPS) * noise
        assert slower <= max(LEAST_GAIN, 2 * error)
        ended_slower += slower > LEAST_GAIN
        for change in tuner.changes:
            assert change.kept == (change.gain > change.noise >= LEAST_GAIN)
    assert ended_slower <= 6, "chance alone"


@pytest.mark.parametrize(("best", "found"), [(64.0, 64.0), (1.0, 1.0), (4.0, 4.0), (1000.0, MOST_MB), (0.01, LEAST_MB)])  # fmt: skip
def test_a_clearly_better_size_is_found(best: float, found: float) -> None:
    for seed in range(20):
        tuner = Tuner(4.0)
        run(tuner, noisy(valley(best, 0.1), seed, 0.01))
        assert tuner.bucket_mb == tuner.kept_mb == found
        kept = [c for c in tuner.changes if c.kept]
        assert [c.from_mb for c in kept] == [c.to_mb * (2 if best < 4 else 0.5) for c in kept]
        assert all(c.gain > 0.03 for c in kept)
        assert all("kept" in str(c) and f"{c.gain:+.1%}" in str(c) for c in kept)
        assert all(f"back to {c.from_mb:g}" in str(c) for c in tuner.changes if not c.kept)


def test_where_nothing_waits_nothing_is_tried() -> None:
    tuner = Tuner(4.0)
    assert run(tuner, lambda mb: 1.0, waited=0.001) <= 2 + STEPS + 1
    assert tuner.done and not tuner.changes and tuner.bucket_mb == 4.0
    assert tuner.step(9.9, 9.9) is None, "and it stays so"


def test_while_a_trial_is_under_way_the_best_size_is_the_one_to_keep() -> None:
    tuner = Tuner(4.0)
    seen = set()
    while not tuner.done:
        seen.add(tuner.bucket_mb)
        assert tuner.kept_mb == 4.0
        tuner.step(1.0 if tuner.bucket_mb == 4 else 2.0, 0.5)
    assert seen == {4.0, 2.0, 8.0}


def test_a_single_slow_step_decides_nothing() -> None:
    """Outliers, such as another process: medians do not see them."""
    for seed in range(50):
        chooser = random.Random(seed)
        tuner = Tuner(4.0)
        run(tuner, lambda mb: (20.0 if chooser.random() < 0.1 else 1.0) * chooser.gauss(1, 0.003))  # noqa: B023
        assert tuner.bucket_mb == 4.0


def test_the_settling_steps_do_not_count() -> None:
    """The first ones after a change are slow, one of them is of the old size."""
    tuner, last, since = Tuner(4.0), 4.0, 0

    def seconds(mb: float) -> float:
        nonlocal last, since
        since = since + 1 if mb == last else 0
        last = mb
        return 5.0 if since == 0 else valley(16, 0.1)(mb)

    run(tuner, seconds)
    assert tuner.bucket_mb == 16.0


def test_what_was_found_is_remembered(tmp_path: Path) -> None:
    tuner = Tuner(4.0, key="a")
    run(tuner, noisy(valley(16, 0.1), 0, 0.01))
    remember(tmp_path / "new", tuner)
    assert recall(tmp_path / "new", "a") == 16.0
    assert recall(tmp_path / "new", "b") is None
    assert recall(tmp_path / "none", "a") is None
    changes = json.loads((tmp_path / "new" / "a.json").read_text())["changes"]
    assert changes == [asdict(c) for c in tuner.changes]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe\x00", b"{}", b'{"bucket_mb": null}', b'{"bucket_mb": "x"}',
     b'{"bucket_mb": NaN}', b'{"bucket_mb": Infinity}', b'{"bucket_mb": -1}', b'{"bucket_mb": 1e9}',
     b'{"bucket_mb": [4]}', b'{"bucket_mb": 1' + b"0" * 400 + b"}"],
)  # fmt: skip
def test_a_damaged_file_is_no_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert recall(tmp_path, "a") is None


def test_a_key_is_of_the_shape_and_about_the_speed() -> None:
    link = Link(1e-4, 1e8)
    key = key_of({"parameters": 5, "replicas": 2}, link)
    assert key == key_of({"replicas": 2, "parameters": 5}, Link(1.05e-4, 1.1e8))
    others = [
        key_of({"parameters": 6, "replicas": 2}, link),
        key_of({"parameters": 5, "replicas": 3}, link),
        key_of({"parameters": 5, "replicas": 2}, Link(1e-4, 4e8)),
        key_of({"parameters": 5, "replicas": 2}, Link(1e-3, 1e8)),
    ]
    assert len({key, *others}) == 5


def test_the_error_of_a_median_is_about_what_it_says() -> None:
    chooser = random.Random(0)
    medians, errors = [], []
    for _ in range(500):
        values = [chooser.gauss(1, 0.1) for _ in range(STEPS)]
        medians.append(statistics.median(values))
        errors.append(tuning._error(values))
    assert statistics.median(errors) == pytest.approx(statistics.stdev(medians), rel=0.25)
