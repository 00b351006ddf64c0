"""`verify` holds where synchronization is right, and does not where anything is broken."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from jobs import job_fields, write_corpus
from ranks import run_ranks
from unisono import config as config_module
from unisono import verify as verify_module
from unisono.errors import EXIT_FAILED, EXIT_STOPPED, Stopped, UnisonoError
from unisono.mesh import Mesh
from unisono.verify import _compare, _read, _Result, render, verify


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    fields = job_fields(write_corpus(folder), folder / "out", learning_rate=0.02)
    (folder / "job.yaml").write_text(yaml.safe_dump(fields))
    return folder


def replica(world, source: str, overrides: list[str], steps: int, break_it: Callable | None):
    if break_it is not None:
        break_it(world)
    config = config_module.load(source, overrides)
    verify_module.worker(config, world, steps)


def verdict_of(
    place: Path, monkeypatch: pytest.MonkeyPatch, counts: list[int],
    break_it: Callable | None = None, overrides: Sequence[str] = (), steps: int = 2,
    meshes: Sequence[Mesh] = (),
):  # fmt: skip
    """What `verify` finds, its replicas being ranks that are forked and not started anew.

    A run of one replica communicates nothing, so what is broken does not change it: run once.
    """

    def launch(command: list[str], count: int, threads: int) -> int:
        assert threads == 1
        source, *rest = command[4:]
        assert rest[-2] == "--steps"
        [out] = [Path(r.removeprefix("output_dir=")) for r in rest if r.startswith("output_dir=")]
        known = place / "one" / str(abs(hash((*overrides, steps))))
        if count == 1 and known.exists():
            shutil.copytree(known, out)
            return 0
        run_ranks(
            replica, count, source, rest[:-2], int(rest[-1]), break_it,
            join=False, env={"XDG_CACHE_HOME": str(place / "cache")},
        )  # fmt: skip
        if count == 1:
            shutil.copytree(out, known)
        return 0

    monkeypatch.setattr(verify_module, "launch", launch)
    source = str(place / "job.yaml")
    config = config_module.load(source, overrides)
    return verify(source, overrides, config, counts, steps, meshes)


STRICT = ["determinism=strict"]


@pytest.mark.parametrize(
    "sync", ["sync=exact", "shard_optimizer=true", "sync=reference", "sync=ddp", "sync=sharded"]
)
def test_it_holds(place: Path, monkeypatch: pytest.MonkeyPatch, sync: str) -> None:
    verdict = verdict_of(place, monkeypatch, [1, 3], overrides=[sync])
    assert verdict.holds
    assert [r.replicas for r in verdict.rows] == [1, 3]
    assert all(r.samples_identical for r in verdict.rows)
    assert 0 < verdict.rows[1].parameter_difference < 1e-5


LOCAL = ["sync=streaming", "streaming.sync_every=2", "streaming.num_fragments=1", "streaming.fragment_sync_delay=0"]  # fmt: skip


@pytest.mark.parametrize("overrides", [LOCAL, ["sync=sparse", "sparse.sync_every=2"]])
def test_of_replicas_that_step_alone_samples_and_outer_weights_must_be_equal(
    place: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    verdict = verdict_of(place, monkeypatch, [1, 3], overrides=overrides, steps=3)
    assert verdict.holds and verdict.local
    assert all(r.samples_identical for r in verdict.rows)
    assert verdict.rows[1].parameter_difference > verdict.parameter_bound, "and is not judged"


def outer_weights_differ(world) -> None:
    from unisono.sync.streaming import Streaming

    original = Streaming._move
    Streaming._move = lambda self, outer, velocity, mean: original(
        self, outer, velocity, mean + 1e-7 * world.rank
    )


def test_outer_weights_that_differ_are_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="replicas differ after step 3"):
        verdict_of(place, monkeypatch, [3], outer_weights_differ, LOCAL, steps=3)


def test_it_holds_on_meshes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meshes = [Mesh(replica=2, tensor=2), Mesh(context=2)]
    verdict = verdict_of(place, monkeypatch, [1], meshes=meshes)
    assert verdict.holds
    assert [(r.replicas, r.mesh) for r in verdict.rows] == [
        (1, ""), (4, "replica 2 x tensor 2"), (2, "context 2"),
    ]  # fmt: skip
    assert all(r.samples_identical for r in verdict.rows)
    console = Console(width=120, file=io.StringIO())
    console.print(render(verdict))
    assert "4: replica 2 x tensor 2" in console.file.getvalue()


def gradients_not_summed_over_tensor(world) -> None:
    from unisono.sync import tensor

    tensor._Enter.backward = staticmethod(lambda ctx, gradient: (gradient, None))


def test_it_does_not_hold_on_a_broken_mesh(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = verdict_of(
        place, monkeypatch, [1], gradients_not_summed_over_tensor, meshes=[Mesh(tensor=2)]
    )
    assert [r.holds for r in verdict.rows] == [True, False]


def test_strict_holds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = verdict_of(place, monkeypatch, [1, 2, 4], overrides=STRICT)
    assert verdict.holds and verdict.strict
    assert {r.digest_equal for r in verdict.rows} == {True}
    assert {r.parameter_difference for r in verdict.rows} == {0.0}


def test_a_last_step_that_is_small_is_compared_right(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are not shared like those of the others, and it may be the last that verify runs."""
    overrides = ["num_train_epochs=0.08", "warmup_steps=1"]
    verdict = verdict_of(place, monkeypatch, [1, 2], overrides=overrides, steps=50)
    assert verdict.holds


# --- broken in ways that people have broken it


def nothing_summed(world) -> None:
    from unisono.sync import exact, shard

    exact.tree_sum = shard.tree_sum = lambda pieces: pieces[0]


def one_rank_dropped(world) -> None:
    from unisono.sync import exact, shard

    original = exact.tree_sum
    exact.tree_sum = shard.tree_sum = lambda pieces: original(pieces[:-1] or pieces)


def nothing_received(world) -> None:
    from unisono.sync.ledger import Group, Handle

    original = Group.all_reduce

    def of_nothing(self, tensor):
        if self.name == "scatter":
            return Handle(None, None, self.ledger)
        return original(self, tensor)

    def rows_of_nothing(self, received, *args):
        if self.name == "scatter":
            received.zero_()
            return Handle(None, None, self.ledger)
        return rows(self, received, *args)

    rows = Group.all_to_all_rows
    Group.all_reduce, Group.all_to_all_rows = of_nothing, rows_of_nothing


def old_weights_return(world) -> None:
    """The other ranks' updated weights never arrive."""
    from unisono.sync.ledger import Group, Handle

    original = Group.exchange

    def exchange(self, received, sent):
        if self.name == "gather":
            return Handle(None, None, self.ledger)
        return original(self, received, sent)

    Group.exchange = exchange


def mean_of_ranks(world) -> None:
    from unisono.sync import exact, shard

    original = exact.tree_sum
    exact.tree_sum = shard.tree_sum = lambda pieces: original(pieces).div_(len(pieces))


def every_rank_the_same_samples(world) -> None:
    from unisono.train.step import Feed

    original = Feed.samples
    Feed.samples = lambda self, step, leaf: original(self, step, leaf % self.plan.accumulation)


def rows_dealt_round_robin(world) -> None:
    """The same samples in every step, but in another order among ranks."""
    from unisono.train.step import Feed

    original = Feed.samples
    Feed.samples = lambda self, step, leaf: original(
        self,
        step,
        leaf % self.plan.accumulation * world.size + leaf // self.plan.accumulation,
    )


@pytest.mark.parametrize(
    ("break_it", "replicas", "strict"),
    [
        (nothing_summed, 3, False),
        (one_rank_dropped, 3, False),
        (mean_of_ranks, 3, False),
        (nothing_received, 2, False),
        (every_rank_the_same_samples, 2, False),
        (rows_dealt_round_robin, 2, False),
        (nothing_summed, 4, True),
        (old_weights_return, 2, False),
    ],
)
def test_what_is_broken_does_not_hold(
    place: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable, replicas: int, strict: bool
) -> None:
    # Clipping and AdamW would both hide a gradient that is too large by a factor.
    overrides = ["optim=sgd", "learning_rate=0.5", "max_grad_norm=0"]
    overrides += STRICT if strict else ["shard_optimizer=true"]
    verdict = verdict_of(place, monkeypatch, [1, replicas], break_it, overrides)
    assert verdict.rows[0].holds
    assert not verdict.rows[1].holds
    assert not verdict.holds
    dealt = break_it in (every_rank_the_same_samples, rows_dealt_round_robin)
    assert verdict.rows[1].samples_identical != dealt


def running_sums(world) -> None:
    """Left to right instead of the tree: right up to rounding, and not the same bits."""
    from unisono.sync import bucket, exact, tree

    def left_to_right(pieces):
        for piece in pieces[1:]:
            pieces[0].add_(piece)
        return pieces[0]

    class RunningSum(tree.TreeSum):
        def __init__(self, leaves: int) -> None:
            super().__init__(leaves)
            self.run = leaves

    exact.tree_sum, bucket.TreeSum = left_to_right, RunningSum


def test_running_sums_hold_unless_strict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = verdict_of(place, monkeypatch, [1, 2], running_sums, STRICT)
    assert not verdict.holds
    assert verdict.rows[1].samples_identical
    assert not verdict.rows[1].digest_equal
    assert verdict.rows[1].parameter_difference < verdict.parameter_bound


# --- the comparison


def result(losses=(2.0, 1.0), digest="d", samples=(((0, 1), (2, 3)),), **parameters) -> _Result:
    parameters = {"w": np.ones(4, dtype=np.float32), **parameters}
    return _Result(list(losses), digest, [[list(s) for s in r] for r in samples], parameters)


def holds(mine: _Result, strict: bool = False) -> bool:
    return _compare(2, mine, result(), strict, 1e-5, 1e-4).holds


def test_equal_results_hold() -> None:
    assert holds(result(), strict=True)
    assert holds(result(samples=(((0,), (2,)), ((1,), (3,)))), strict=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": (2.0, 1.001)},
        {"losses": (2.0, float("nan"))},
        {"losses": (float("nan"), 1.0)},
        {"w": np.float32([1, 1, 1, 1.001])},
        {"w": np.float32([1, 1, 1, float("nan")])},
        {"w": np.float32([1, 1, 1, float("inf")])},
        {"samples": (((0, 1), (3, 2)),)},
        {"samples": (((0, 1, 2), (3,)),)},
    ],
    ids=str,
)
def test_a_difference_does_not_hold(changes: dict) -> None:
    assert not holds(result(**changes))


def test_what_is_not_a_number_on_both_sides_does_not_hold() -> None:
    bad = result(losses=(2.0, float("nan")))
    assert not _compare(2, bad, bad, False, 1e-5, 1e-4).holds


def test_a_digest_counts_only_when_strict() -> None:
    assert holds(result(digest="other"))
    assert not holds(result(digest="other"), strict=True)


def test_files_are_read_in_the_order_of_ranks(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for rank in range(12):
        (tmp_path / f"samples-{rank}.json").write_text(json.dumps([[rank]]))
    (tmp_path / "result.json").write_text(json.dumps({"losses": [1.0], "digest": "d"}))
    save_file({"w": np.ones(2)}, tmp_path / "parameters.safetensors")
    assert _read(tmp_path).samples == [[[rank]] for rank in range(12)]


def test_the_table_shows_every_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    verdict = verify_module.Verdict(
        3, True, 1e-5, 1e-4,
        [_compare(n, result(digest="d" * n), result(), True, 1e-5, 1e-4) for n in (1, 2)],
    )  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(verdict))
    text = console.export_text()
    assert "strict: digests must be equal" in text
    assert text.count("yes") == 1 and text.count("NO") == 1
    assert text.count("(") == text.count(")")


@pytest.mark.parametrize(("code", "error"), [(EXIT_FAILED, UnisonoError), (EXIT_STOPPED, Stopped)])
def test_a_run_that_fails_or_is_stopped(
    place: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type
) -> None:
    monkeypatch.setattr(verify_module, "launch", lambda *args: code)
    source = str(place / "job.yaml")
    with pytest.raises(error, match="verify: ") as caught:
        verify(source, [], config_module.load(source), [1, 2], 3)
    assert caught.value.exit_code == code
