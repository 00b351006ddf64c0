"""`sync: auto`: the rung that the link asks for, and another one when the link changes."""

import itertools
import json
from pathlib import Path

import pytest

from jobs import make_job, run, write_corpus
from ranks import started
from unisono import config as config_module
from unisono.errors import ConfigError
from unisono.forecast.ladder import WAYS, Way
from unisono.train.auto import settings_of

AUTO = {"sync": "auto", "max_steps": 40, "save_steps": 20, "lr_scheduler_type": "constant", "bucket_mb": 0.02}  # fmt: skip
FAST, SLOW = (1e-4, 1e11), (1e-3, 2e4)
"""Latency (s) and bytes a second of links that are pretended: what 60 kB of gradients hides on, and does not."""


class Links:
    """In place of the measurement, on every rank alike: a link for the start and one for each look."""

    def __init__(self, *links: tuple[float, float]) -> None:
        self.links = list(links)

    def __call__(self, world) -> None:
        from unisono.sync import link
        from unisono.train import auto, loop

        seen = [link.Link(*one) for one in self.links]

        def pretended(group, device):
            group.barrier()
            return seen.pop(0) if len(seen) > 1 else seen[0]

        auto.TARGET = 0.5  # a model this small does little but wait for Python
        auto.measure_link = loop.measure_link = pretended
        auto.LOOK_SHARE = 1e9  # at every LOOK_STEPS steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Path, output: Path, links: Links, size: int = 2, **changes: object) -> list:
    config = make_job(corpus, output, **{**AUTO, **changes})
    env = {"XDG_CACHE_HOME": str(corpus.parent)}
    with started(run, size, config, links, env=env) as ranks:
        ends = ranks.result()
    assert [e for e, _, _ in ends] == ["done"] * size, ends
    return ends


def events(output: Path) -> list[str]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [r["event"] for r in rows if "the link has" in r.get("event", "")]


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [r["train/loss"] for r in rows if "train/loss" in r]


def test_a_fast_link_stays_exact(corpus: Path, tmp_path: Path) -> None:
    ends = train(corpus, tmp_path, Links(FAST))
    said = "\n".join(ends[0][1])
    assert "sync: auto" in said and "streaming, every 30" in said, "the ladder is shown"
    assert "exact: the first that keeps 50% busy" in said
    assert not events(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["sync"] == "exact"


def test_the_link_becomes_slow_and_fast_again(corpus: Path, tmp_path: Path) -> None:
    """Two looks decide; the run goes down the ladder, and up again, and learns all the while."""
    ends = train(
        corpus, tmp_path, Links(FAST, SLOW, SLOW, FAST, FAST), max_steps=60, loss_budget=0.9
    )
    moves = events(tmp_path)
    assert len(moves) == 2, moves
    assert "instead of exact" in moves[0] and moves[1].split(": ")[2].startswith("exact instead of")
    assert any(moves[0] in line for line in ends[0][1]), "and it is said"
    found = losses(tmp_path)
    assert len(found) == 60 and found[-1] < found[0] - 0.5
    assert max(b - a for a, b in itertools.pairwise(found)) < 0.6, "no jump at a change"


def test_one_disturbed_look_moves_nothing(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, Links(FAST, SLOW, FAST, FAST), loss_budget=0.9)
    assert not events(tmp_path)


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda w: w.name)
def test_every_rung_can_be_left_and_taken(corpus: Path, tmp_path: Path, way: Way) -> None:
    ends = train(corpus, tmp_path, Rungs("exact", way.name, "exact"), max_steps=36)
    assert len(events(tmp_path)) == 2, ends[0][1]
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.3
    assert (
        "each exactly where the order has it"
        in json.loads((tmp_path / "receipt.json").read_text())["samples"]
    )


class Rungs:
    """The rungs that looks shall find, by name, one after another."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def __call__(self, world) -> None:
        from unisono.train import auto

        Links(FAST)(world)
        names = list(self.names)

        def chosen(rungs, budget, target=0.95):
            return next(r for r in rungs if r.name == names[0]), "as told"

        original = auto.Climber.look

        def look(self, link):
            nonlocal names
            if len(names) > 1 and self.rung.name == names[0]:
                names = names[1:]
            original(self, link)
            rung = next(r for r in self.rungs if r.name == names[0])
            return None if rung.name == self.rung.name else rung

        auto.choose, auto.Climber.look = chosen, look


def test_a_resume_goes_on_with_the_rung_it_was_on(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, Links(SLOW), max_steps=20, loss_budget=0.9)
    before = json.loads((tmp_path / "run.json").read_text())["sync"]
    assert before != "exact"
    ends = train(corpus, tmp_path, Links(FAST, SLOW), max_steps=30, loss_budget=0.9)
    assert "as in the checkpoint" in "\n".join(ends[0][1])
    assert len(losses(tmp_path)) == 30


@pytest.mark.parametrize(
    ("size", "changes", "why"),
    [
        (1, {}, "one replica"),
        (2, {"determinism": "strict", "micro_batch_size": 1}, "determinism: strict"),
        (2, {"mesh": {"context": 2}}, "ranks share samples"),
        (2, {"optim": "sgd"}, "optim: sgd is not foretold"),
    ],
)
def test_where_nothing_is_to_be_chosen_it_is_exact(
    corpus: Path, tmp_path: Path, size: int, changes: dict, why: str
) -> None:
    ends = train(corpus, tmp_path, Links(SLOW), size, max_steps=2, **changes)
    assert f"sync: auto: exact, {why}" in "\n".join(ends[0][1])


def test_what_is_beyond_the_budget_is_said(corpus: Path, tmp_path: Path) -> None:
    ends = train(corpus, tmp_path, Links(SLOW), max_steps=2, loss_budget="0%")
    said = "\n".join(ends[0][1])
    assert "no rung keeps 50% busy within a loss of 0.00%" in said


def test_budgets_are_shares_or_percent(corpus: Path, tmp_path: Path) -> None:
    for given in ("0.5%", 0.005, " 0.5 % "):
        assert make_job(corpus, tmp_path, loss_budget=given).loss_budget == pytest.approx(0.005)
    for wrong in ("half", "-1%", 1.0, "x%"):
        with pytest.raises(ConfigError, match="loss_budget: found"):
            make_job(corpus, tmp_path, loss_budget=wrong)


def test_what_the_user_wrote_in_a_section_stays(corpus: Path, tmp_path: Path) -> None:
    config = make_job(corpus, tmp_path, sync="auto", streaming={"outer_momentum": 0.5})
    way = next(w for w in WAYS if w.name == "streaming, every 100")
    found = settings_of(config, way)
    assert (found.sync, found.wire) == ("streaming", "int4")
    assert (found.streaming.sync_every, found.streaming.outer_momentum) == (100, 0.5)
    assert config_module.parse(found.model_dump(mode="json")) == found
