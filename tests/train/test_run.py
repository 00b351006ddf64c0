"""The main job end to end: killed, stopped, out of memory, poisoned, desynchronized, disk full."""

import errno
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from jobs import make_job, run
from ranks import run_ranks, started
from unisono.data import ledger as sample_ledger
from unisono.errors import CheckpointError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from jobs import write_corpus

    folder = tmp_path_factory.mktemp("job")
    write_corpus(folder)
    return folder


def start(place: Path, output: Path, size: int, patch=None, **changes: object):
    config = make_job(place / "corpus.txt", output, **changes)
    return started(run, size, config, patch, env={"XDG_CACHE_HOME": str(place / "cache")})


def finish(place: Path, output: Path, size: int, patch=None, **changes: object) -> list:
    with start(place, output, size, patch, **changes) as ranks:
        return ranks.result()


def receipt(output: Path) -> dict:
    return json.loads((output / "receipt.json").read_text())


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# --- killed at random points


def slow_checkpoints(world) -> None:
    """Hold every save open for a while, half of its files written, so that a kill can hit it."""
    from unisono.train import loop

    original = loop.save_state

    def slow(folder, *args):
        original(folder, *args)
        last = folder / "trainer_state.json"
        content = last.read_bytes()
        last.unlink()
        time.sleep(0.25)
        last.write_bytes(content)

    loop.save_state = slow


STRICT = {"determinism": "strict", "num_train_epochs": 1}


@pytest.fixture(scope="module")
def uninterrupted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("whole")
    finish(place, output, 1, **STRICT)
    return receipt(output)


def kill_and_resume(place: Path, output: Path, digest: str, trial: int, in_save: bool) -> bool:
    """SIGKILL all ranks once or twice, go on at other sizes; returns whether a save was hit."""
    chooser = random.Random(trial)
    hit = False
    for _ in range(1 if in_save else chooser.choice([1, 2])):
        with start(place, output, chooser.choice([1, 2, 4]), slow_checkpoints, **STRICT) as ranks:
            wait_for(lambda: (output / "metrics.jsonl").exists() or not ranks.alive())
            if in_save:
                wait_for(lambda: list(output.glob(".checkpoint-*.tmp")) or not ranks.alive())
                pause(chooser.uniform(0, 0.25))
            else:
                pause(chooser.uniform(0, 3))
            ranks.signal(signal.SIGKILL)
            ranks.join()
        hit = hit or bool(list(output.glob(".checkpoint-*.tmp")))
    finish(place, output, chooser.choice([1, 2, 4]), **STRICT)
    assert receipt(output)["digest"] == digest, "not the weights of the uninterrupted run"
    used = Counter(
        s for samples in sample_ledger.read(output / "samples").values() for s in samples
    )
    total = sum(used.values())
    assert used == Counter(range(total)), "a sample was skipped or seen twice"
    assert "each exactly where the order has it" in receipt(output)["samples"]
    steps = [r["step"] for r in rows(output) if "train/loss" in r]
    assert steps == sorted(set(steps)), "a step is in the metrics twice"
    return hit


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)


def pause(seconds: float) -> None:
    """Random moment of a kill: not synchronization."""
    time.sleep(seconds)


def test_killed_anywhere_resumes_exactly(place: Path, tmp_path: Path, uninterrupted: dict) -> None:
    digest = uninterrupted["digest"]
    hits = [kill_and_resume(place, tmp_path / str(t), digest, t, in_save=t < 2) for t in range(4)]
    assert sum(hits) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_anywhere_resumes_exactly_20_times(
    place: Path, tmp_path: Path, uninterrupted: dict
) -> None:
    digest = uninterrupted["digest"]
    hits = [
        kill_and_resume(place, tmp_path / str(t), digest, 100 + t, in_save=t < 7) for t in range(20)
    ]
    print(f"{sum(hits)} of {len(hits)} jobs were killed inside a checkpoint")
    assert sum(hits) >= 5


def test_other_weights_have_another_digest(
    place: Path, tmp_path: Path, uninterrupted: dict
) -> None:
    """The control: one different bit of data order shows in the digest."""
    finish(place, tmp_path, 1, **STRICT, seed=43)
    assert receipt(tmp_path)["digest"] != uninterrupted["digest"]


# --- stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_and_a_resume_goes_on(place: Path, tmp_path: Path, number: int) -> None:
    with start(place, tmp_path, 2, max_steps=4000, save_steps=4000) as ranks:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > 3)
        ranks.signal(number)
        began = time.monotonic()
        ends = ranks.result()
        assert time.monotonic() - began < 5
    assert all(end.startswith("stopped") for end, _, _ in ends)
    last = max(r["step"] for r in rows(tmp_path))
    assert (tmp_path / f"checkpoint-{last}" / "manifest.json").exists()
    ends = finish(place, tmp_path, 1, max_steps=last + 2, save_steps=4000)
    assert ends[0][0] == "done"
    assert any(f"resumed from {tmp_path}/checkpoint-{last}" in line for line in ends[0][1])


def test_a_damaged_checkpoint_is_passed_over_and_named(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 1, max_steps=16, save_steps=8)
    weights = tmp_path / "checkpoint-16" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    [(end, told, _)] = finish(place, tmp_path, 1, max_steps=24, save_steps=8)
    assert end == "done"
    assert any("passed over checkpoint-16" in t and "model.safetensors" in t for t in told)
    assert any("checkpoint-8" in t and "resumed" in t for t in told)


def test_another_job_does_not_continue_a_run(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 1, max_steps=8)
    [(end, _, _)] = finish(place, tmp_path, 1, max_steps=16, global_batch_size=8)
    assert end.startswith("ConfigError: global_batch_size: found 8")
    [(end, _, _)] = finish(place, tmp_path, 1, max_steps=16, resume="never")
    assert "resume: never" in end


def test_two_runs_cannot_write_one_folder(place: Path, tmp_path: Path) -> None:
    with start(place, tmp_path, 1, max_steps=4000) as first:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists())
        ends = finish(place, tmp_path, 2, max_steps=8)
        assert "is in use by pid" in ends[0][0]
        assert ends[1][0].startswith("Elsewhere")
        assert first.alive()


# --- what goes wrong inside a step


def small_memory_on_rank_1(world) -> None:
    from unisono.train import job

    original = job.causal_lm

    def limited(model, batch, *args):
        if world.rank == 1 and len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return original(model, batch, *args)

    job.causal_lm = limited


def test_out_of_memory_on_one_rank_shrinks_micro_batches_on_all(
    place: Path, tmp_path: Path
) -> None:
    ends = finish(place, tmp_path / "a", 2, small_memory_on_rank_1, max_steps=4, micro_batch_size=8)
    assert [e for e, _, _ in ends] == ["done", "done"]
    assert any("rank 1 ran out of memory; micro-batches of 2 instead of 4" in t for t in ends[0][1])
    finish(place, tmp_path / "b", 2, max_steps=4, micro_batch_size=8)
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        if "train/loss" in a:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


def memory_fails_in_a_later_micro_batch(world) -> None:
    """Rank 0 fails in the second of several micro-batches, in steps that count as slow."""
    from unisono.train import job, step

    original = job.causal_lm
    step.SLOW_STEP_S = -1.0
    calls = {"n": 0}

    def limited(model, batch, *args):
        calls["n"] += 1
        if world.rank == 0 and calls["n"] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return original(model, batch, *args)

    job.causal_lm = limited


def test_failing_in_the_middle_of_a_slow_step_keeps_ranks_together(
    place: Path, tmp_path: Path
) -> None:
    """Votes between micro-batches: the failing rank must go on voting."""
    began = time.monotonic()
    ends = finish(place, tmp_path, 2, memory_fails_in_a_later_micro_batch, max_steps=4)
    assert [e for e, _, _ in ends] == ["done", "done"]
    assert any("rank 0 ran out of memory" in t for t in ends[0][1])
    assert time.monotonic() - began < 30


def test_a_model_that_was_never_published_is_on_the_next_start(place: Path, tmp_path: Path) -> None:
    """Killed between the last checkpoint and the model; and `already done` keeps what is there."""
    finish(place, tmp_path, 1, max_steps=8)
    for name in ("receipt.json", "config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    for _ in range(2):
        [(end, told, _)] = finish(place, tmp_path, 1, max_steps=8)
        assert end == "done"
        assert any("already done" in t for t in told)
        assert "model_type" in json.loads((tmp_path / "config.json").read_text())
        assert (tmp_path / "model.safetensors").exists()


def test_strict_refuses_what_would_change_the_bits(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 1, max_steps=4, determinism="strict")
    ends = finish(place, tmp_path, 2, max_steps=8, determinism="strict", micro_batch_size=1)
    assert all("micro_batches: found 16" in end for end, _, _ in ends)


def test_auto_micro_batch_agrees_on_what_fits_everywhere(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 2, small_memory_on_rank_1, max_steps=2, micro_batch_size="auto")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["micro_batch_size"] <= 2
    assert plan["global_batch_size"] == 16


def poison_rank_1(world) -> None:
    """Samples of rank 1 give a loss that is not a number, in the third step only."""
    from unisono.train import advance, job

    original, take = job.causal_lm, advance.take_step
    now = {"step": -1}

    def poisoned(model, batch, *args):
        loss = original(model, batch, *args)
        return loss * float("nan") if world.rank == 1 and now["step"] == 2 else loss

    def counted(number, *args, **kwargs):
        now["step"] = number
        return take(number, *args, **kwargs)

    job.causal_lm, advance.take_step = poisoned, counted


@pytest.mark.parametrize("sync", ["exact", "reference", "ddp"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all(
    place: Path, tmp_path: Path, sync: str
) -> None:
    ends = finish(place, tmp_path, 2, poison_rank_1, max_steps=6, sync=sync)
    assert [e for e, _, _ in ends] == ["done", "done"]
    [told] = [t for t in ends[0][1] if t.startswith("step 3: ")]
    assert "step 3: gradient not finite on rank 1, first in model.embed_tokens.weight" in told
    samples = sample_ledger.read(tmp_path / "samples")[3]
    assert str(samples[8])[:6] in told, "the first samples of rank 1 are named"
    assert "1 of 10 in a row" in told
    assert ends[0][2]["skipped_steps"] == 1
    assert all(r.get("train/loss", 0) is not None for r in rows(tmp_path) if r["step"] > 3)


def poison_always(world) -> None:
    from unisono.train import job

    original = job.causal_lm
    job.causal_lm = lambda *args: original(*args) * float("nan")


def test_ten_bad_steps_in_a_row_stop_the_run(place: Path, tmp_path: Path) -> None:
    ends = finish(place, tmp_path, 2, poison_always, max_steps=30)
    for end, _, _ in ends:
        assert "not finite 10 times in a row" in end


def one_ulp_on_rank_2(world) -> None:
    from unisono.train import loop

    original = loop.advance

    def bent(job, *args):
        result = original(job, *args)
        if world.rank == 2 and job.progress.step == 6:
            job.sync.settle()
            weight = job.model.model.layers[1].mlp.up_proj.weight
            bits = weight.data.view(-1).view(torch.int32)
            bits[7] ^= 1
        return result

    loop.advance = bent


@pytest.mark.parametrize("changes", [{"shard_optimizer": False}, {"wire": "bfloat16"}])
def test_replicas_that_differ_in_one_bit_are_named(
    place: Path, tmp_path: Path, changes: dict
) -> None:
    ends = finish(place, tmp_path, 4, one_ulp_on_rank_2, max_steps=20, **changes)
    for end, _, _ in ends:
        assert end.startswith(
            "ReplicaError: replicas differ after step 10: rank 2 in model.layers."
        )


def failure_on_rank_1(world) -> None:
    from unisono.train import job

    original = job.causal_lm
    calls = {"n": 0}

    def failing(*args):
        calls["n"] += 1
        if world.rank == 1 and calls["n"] == 5:
            raise UnisonoTestFailure("the user's own bug")
        return original(*args)

    job.causal_lm = failing


class UnisonoTestFailure(CheckpointError):
    pass


def test_a_failure_on_one_rank_stops_all_and_is_named(place: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    ends = finish(place, tmp_path, 2, failure_on_rank_1, max_steps=20)
    assert "the user's own bug" in ends[1][0]
    assert "rank 1 failed" in ends[0][0]
    assert time.monotonic() - began < 30, "a peer waited for the timeout"


def disk_fills(world) -> None:
    from unisono.train import loop

    original = loop.save_state
    calls = {"n": 0}

    def full(folder, *args):
        calls["n"] += 1
        if calls["n"] == 2:
            (folder / "torso").write_bytes(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return original(folder, *args)

    loop.save_state = full


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(place: Path, tmp_path: Path) -> None:
    ends = finish(place, tmp_path, 2, disk_fills, max_steps=24, save_steps=8, save_total_limit=9)
    assert [e for e, _, _ in ends] == ["done", "done"]
    [told] = [t for t in ends[0][1] if "no space left" in t]
    assert "checkpoint 16 failed" in told and "last good one is checkpoint-8" in told
    names = sorted(p.name for p in tmp_path.glob("*checkpoint*"))
    assert names == ["checkpoint-24", "checkpoint-8"]


# --- equal results


def test_evaluation_is_exact_whatever_the_number_of_replicas(place: Path, tmp_path: Path) -> None:
    losses = set()
    for size in (1, 2, 3, 4):
        changes = {"determinism": "strict"} if size != 3 else {}
        out = tmp_path / str(size)
        # learning rate 0 would be refused; one warm-up step of rate 0 leaves the weights alone.
        finish(place, out, size, max_steps=1, eval_steps=1, **changes)
        losses.add(next(r["eval/loss"] for r in rows(out) if "eval/loss" in r))
    assert len(losses) == 1, losses


def test_the_last_step_of_an_epoch_may_be_small(place: Path, tmp_path: Path) -> None:
    """A last batch of fewer rows than ranks have micro-batches, and strict digests still agree."""
    digests = set()
    for size in (1, 4):
        out = tmp_path / str(size)
        finish(place, out, size, determinism="strict", num_train_epochs=0.19)
        used = sample_ledger.read(out / "samples")
        assert 0 < len(used[max(used)]) < 16
        digests.add(receipt(out)["digest"])
    assert len(digests) == 1


def test_run_folder_loads_in_transformers(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 1, max_steps=8)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (tmp_path, tmp_path / "checkpoint-8"):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert model.config.vocab_size == len(tokenizer)


def test_shares_of_the_receipt_sum_to_one(place: Path, tmp_path: Path) -> None:
    finish(place, tmp_path, 2, max_steps=12, eval_steps=6, baseline_steps=2)
    found = receipt(tmp_path)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-6)
    assert found["efficiency"] > 0
    # 2 S (n-1)/n for the gradients, padded to whole chunks, and the small vote besides.
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["sent_bytes_per_step"] <= found["sent_bytes_per_step"]
    assert found["sent_bytes_per_step"] <= plan["sent_bytes_per_step"] * 1.05 + 20_000


def test_everything_is_cleaned_up() -> None:
    """run_ranks leaves no process behind, even where ranks hang."""
    with started(hang, 2) as ranks:
        ranks.signal(signal.SIGSTOP, rank=0)
        processes = ranks._processes
    assert not any(p.is_alive() for p in processes)


def hang(world) -> None:
    signal.pause()


def test_run_ranks_reports_the_failing_rank() -> None:
    with pytest.raises(AssertionError, match="rank 1 of 2 failed"):
        run_ranks(fail_on_1, 2)


def fail_on_1(world) -> None:
    assert world.rank != 1


def test_strict_weights_are_equal_at_1_2_4_and_8_replicas(place: Path, tmp_path: Path) -> None:
    digests = set()
    for size in (1, 2, 4, 8):
        finish(place, tmp_path / str(size), size, determinism="strict", max_steps=4)
        digests.add(receipt(tmp_path / str(size))["digest"])
    assert len(digests) == 1


def test_gradient_checkpointing_changes_no_bit(place: Path, tmp_path: Path) -> None:
    for name, on in (("off", False), ("on", True)):
        finish(place, tmp_path / name, 2, max_steps=4, gradient_checkpointing=on)
    assert receipt(tmp_path / "on")["digest"] == receipt(tmp_path / "off")["digest"]


def test_dropout_is_the_same_for_any_number_of_replicas(place: Path, tmp_path: Path) -> None:
    from jobs import job_fields

    model = job_fields(place, tmp_path)["model"] | {"attention_dropout": 0.3}
    digests = set()
    for size in (1, 4):
        out = tmp_path / str(size)
        finish(place, out, size, determinism="strict", max_steps=3, model=model)
        digests.add(receipt(out)["digest"])
    finish(place, tmp_path / "without", 1, determinism="strict", max_steps=3)
    assert len(digests) == 1
    assert receipt(tmp_path / "without")["digest"] not in digests, "the model has no dropout"


def test_bf16_and_sgd_train(place: Path, tmp_path: Path) -> None:
    [(end, _, _), _] = finish(
        place, tmp_path, 2, max_steps=30, bf16=True, optim="sgd", momentum=0.9, learning_rate=0.1
    )
    assert end == "done"
    losses = [r["train/loss"] for r in rows(tmp_path) if "train/loss" in r]
    assert losses[-1] < losses[0] - 0.1


def test_tensorboard_has_the_rows_of_the_metrics(place: Path, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finish(place, tmp_path, 1, max_steps=6, report_to=["tensorboard"])
    board = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = [event.value for event in board.Scalars("train/loss")]
    assert found == pytest.approx([r["train/loss"] for r in rows(tmp_path) if "train/loss" in r])


def test_chats_train_on_the_answers_only(tmp_path: Path) -> None:
    """A folder of compressed chats and prompt/completion pairs, packed whole, strict at 1 and 2."""
    import gzip

    chooser = random.Random(1)
    word = lambda: "".join(chooser.choices("abcdefgh", k=4))  # noqa: E731
    data = tmp_path / "data"
    data.mkdir()
    with gzip.open(data / "chats.jsonl.gz", "wt") as file:
        for _ in range(150):
            messages = [
                {"role": "user", "content": f"say {word()}"},
                {"role": "assistant", "content": f"{word()} {word()}"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
        file.write('{"messages": [{"role": "assistant"}]}\n')
    with open(data / "pairs.jsonl", "w") as file:
        for _ in range(50):
            file.write(json.dumps({"prompt": f"say {word()}: ", "completion": word()}) + "\n")
    digests = set()
    for size in (1, 2):
        out = tmp_path / str(size)
        ends = finish(
            tmp_path, out, size, determinism="strict", max_steps=5, data={"path": str(data)}
        )
        assert ends[0][0] == "done"
        assert any("chats.jsonl.gz:151" in t for t in ends[0][1]), "the bad record is named"
        assert (out / "quarantine.jsonl").exists()
        digests.add(receipt(out)["digest"])
    assert len(digests) == 1
