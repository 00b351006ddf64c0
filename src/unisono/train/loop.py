"""The main job: train a causal language model on N replicas. Read it from top to bottom.

`train` is what every rank runs. `set_up` makes everything that the steps need; then comes the loop,
where periodic work is an `if` in plain sight. What must not differ between ranks is decided from
the step's vote, never from what one rank knows.
"""

import platform
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unisono import __version__
from unisono.clock import PHASES
from unisono.config import Config
from unisono.data import ledger as sample_ledger
from unisono.data.blocks import Blocks
from unisono.data.order import Order
from unisono.data.prepare import Prepared, prepare
from unisono.data.tokenizer import check_vocabulary, load_tokenizer
from unisono.errors import (
    EXIT_FAILED,
    CheckpointError,
    ConfigError,
    Elsewhere,
    ReplicaError,
    Stopped,
    UnisonoError,
)
from unisono.files import RunLock, write_json
from unisono.model.load import load_model
from unisono.observe.metrics import Metrics
from unisono.observe.receipt import Receipt, make_receipt, render
from unisono.observe.screen import Screen, StepLine
from unisono.plan import Facts, Plan, describe, largest_micro_batch, make_plan, with_micro_batch
from unisono.sync import Strategy, broadcast_model, make_strategy
from unisono.sync.ddp import DDP
from unisono.sync.digest import check_replicas, sha256
from unisono.sync.ledger import Group, Ledger
from unisono.sync.update import update
from unisono.train import checkpoint
from unisono.train.evaluation import evaluate
from unisono.train.objective import causal_lm
from unisono.train.schedule import factor
from unisono.train.state import (
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    save_model,
    save_state,
)
from unisono.train.step import Feed, find_culprit, take_step
from unisono.train.stopping import Stop, watching
from unisono.train.together import attempt
from unisono.train.trial import Baseline, find_micro_batch, measure_baseline
from unisono.train.vote import OUT_OF_MEMORY, Outcome
from unisono.world import World, cache_folder, joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SKIPS_IN_A_ROW = 10
PREPARATION_TIMEOUT_S = 7 * 24 * 3600.0
"""While one rank tokenizes, the others wait as long as that takes."""
SAME_RUN = ("seed", "global_batch_size", "sequence_length", "optim", "determinism")
"""Fields that a resumed run must share with its checkpoint to be the same run."""


@dataclass
class Progress:
    """What a resume needs besides weights and optimizer state."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Processed by all replicas, padding included."""
    best_loss: float | None = None
    best_step: int | None = None
    skipped: int = 0
    skipped_in_row: int = 0


@dataclass
class Job:
    """Everything that the steps of a run need, on one rank."""

    config: Config
    world: World
    run: Path
    screen: Screen
    stop: Stop
    ledger: Ledger
    votes: Group
    tokenizer: "PreTrainedTokenizerFast"
    model: "PreTrainedModel"
    prepared: Prepared
    train_blocks: Blocks
    eval_blocks: Blocks
    order: Order
    sync: Strategy
    plan: Plan
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)

    @property
    def feed(self) -> Feed:
        return Feed(self.train_blocks, self.order, self.plan, self.config.seed)

    def loss_sum(self, batch: Any) -> torch.Tensor:
        forward = self.sync.model if isinstance(self.sync, DDP) else self.model
        return causal_lm(forward, batch, self.world.device, self.config.bf16)


def train(config: Config, world: World, screen: Screen) -> Receipt | None:
    """Collective: run the job to its end; returns the receipt, or None if there was nothing to do.

    Raises Stopped after a signal, everything committed; UnisonoError when it cannot go on.
    """
    with watching() as stop, joined(world), ExitStack() as stack:
        if config.determinism == "strict":
            torch.use_deterministic_algorithms(True)
        ledger = Ledger()
        votes = Group("votes", ledger, config.timeout_s)
        run = Path(config.output_dir)
        lock = RunLock(run)
        attempt(votes, lambda: stack.enter_context(lock), mine=world.is_main)
        job = set_up(config, world, screen, stop, ledger, votes)
        return run_steps(job)


def set_up(
    config: Config, world: World, screen: Screen, stop: Stop, ledger: Ledger, votes: Group
) -> Job:
    """Collective: data, model, plan, strategy and optimizer, from the newest checkpoint if any."""
    run = Path(config.output_dir)
    tokenizer, prepared = _prepare_data(config, world, screen, run)
    train_blocks, eval_blocks = prepared.blocks("train"), prepared.blocks("eval")
    data = {"digest": prepared.digest, "samples": len(train_blocks)}
    found = _find_checkpoint(config, run, data, world, votes, screen)

    def build_model() -> "PreTrainedModel":
        model = load_model(
            str(found.path) if found else config.model,
            tokenizer,
            seed=config.seed,
            sequence_length=config.sequence_length,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
        return model

    model = attempt(votes, build_model)
    assert model is not None
    model.to(world.device)
    broadcast_model(model, votes)

    trained = [p for p in model.parameters() if p.requires_grad]
    facts = Facts(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trained),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        train_samples=len(train_blocks),
        eval_samples=len(eval_blocks),
    )
    strict = config.determinism == "strict"
    largest = largest_micro_batch(config, world)
    given = config.micro_batch_size
    rows = given if isinstance(given, int) else min(8, -(-config.global_batch_size // 8))
    plan = make_plan(config, world, facts, min(rows, largest))
    sync = make_strategy(
        config.sync,
        model,
        ledger,
        bucket_mb=config.bucket_mb,
        leaves=plan.accumulation if strict else None,
        timeout_s=config.timeout_s,
    )
    named = sync.named_parameters()
    optimizer = make_optimizer(named, config, plan.hyper)
    job = Job(
        config, world, run, screen, stop, ledger, votes, tokenizer, model, prepared,
        train_blocks, eval_blocks, Order(len(train_blocks), config.seed), sync, plan, optimizer,
    )  # fmt: skip
    if found:
        attempt(votes, lambda: load_optimizer(found.path, optimizer, named))
        job.progress = Progress(**found.meta["progress"])
    if given == "auto" and not strict:
        best = find_micro_batch(partial(_try_rows, job), largest, sync, votes, world.device)
        if best == 0:
            raise UnisonoError(
                "micro_batch_size: memory does not hold one row; " + _memory_advice()
            )
        job.plan = make_plan(config, world, facts, best)
    screen.plan(describe(job.plan, config, world, facts))
    if world.is_main:
        write_json(run / "config.json", config.model_dump(mode="json"))
        write_json(run / "plan.json", job.plan.as_json())
    return job


def _prepare_data(
    config: Config, world: World, screen: Screen, run: Path
) -> tuple["PreTrainedTokenizerFast", Prepared]:
    """Collective: tokenize once on each host, then open it on every rank."""
    patient = Group("preparation", Ledger(), PREPARATION_TIMEOUT_S)
    cache = cache_folder()
    quarantine = run / "quarantine.jsonl"

    def both() -> tuple["PreTrainedTokenizerFast", Prepared]:
        tokenizer = load_tokenizer(
            config.model, config.tokenizer, config.data, cache, screen.preparing
        )
        return tokenizer, prepare(config, tokenizer, cache, quarantine, screen.preparing)

    attempt(patient, both, mine=world.local_rank == 0)
    result = attempt(patient, both)
    assert result is not None
    same = patient.each(float(int(result[1].digest[:12], 16)))
    if (same != same[0]).any():
        raise ReplicaError("data: the hosts have different data or tokenizers; copy one to all")
    for note in (*result[1].problems, *result[1].notes):
        screen.warn(f"data: {note}")
    return result


def _try_rows(job: Job, rows: int) -> None:
    """Forward and backward of `rows` samples, for timing."""
    wanted = [i % len(job.train_blocks) for i in range(rows)]
    job.loss_sum(job.train_blocks.read(wanted)).backward()


# --- the loop


def run_steps(job: Job) -> Receipt | None:
    """Collective: from the first step that is not done to the last, and the end of the run."""
    config, world, plan, screen, progress = (
        job.config,
        job.world,
        job.plan,
        job.screen,
        job.progress,
    )
    if progress.step >= plan.max_steps:
        screen.say(f"already done: {progress.step} steps; raise max_steps to train on")
        return None
    baseline = measure_baseline(
        partial(_try_rows, job), plan.micro_batch_size, config.baseline_steps, job.sync, job.votes,
        world.device,
    )  # fmt: skip
    samples_folder = job.run / "samples"
    attempt(job.votes, lambda: sample_ledger.truncate(samples_folder, progress.step), world.is_main)
    samples = sample_ledger.Ledger(samples_folder, world.rank)
    metrics = Metrics(job.run, progress.step, config.report_to) if world.is_main else None
    first_step, first_bytes, first_tokens = progress.step, job.ledger.sent_bytes, progress.tokens
    previous = (0.0, 0.0, 0.0)
    window = Window()
    loss = eval_loss = None
    clock = job.ledger.clock
    clock.restart()
    job.stop.graceful = True
    screen.start_steps(progress.step, plan.max_steps)
    saved = progress.step
    while progress.step < plan.max_steps:
        began, waited = time.perf_counter(), clock.seconds["waiting"]
        advanced = advance(job, previous)
        plan = job.plan
        if advanced is None:
            break
        if advanced.repeat:
            continue
        outcome = advanced.outcome
        rows = len(plan.positions(progress.step))
        samples.commit(progress.step + 1, own_samples(job))
        progress.step += 1
        progress.tokens += rows * plan.sequence_length
        loss = outcome.loss
        window.add(outcome, rows * plan.sequence_length, time.perf_counter() - began)
        step = progress.step
        last = step == plan.max_steps
        stopping = outcome.stop

        if config.check_replicas_every and step % config.check_replicas_every == 0:
            check_replicas(_replicated(job), job.votes, step)
        if step % config.logging_steps == 0 or last or stopping:
            row = window.close(advanced, step, plan, clock.read())
            if metrics:
                metrics.write(step, **row)
        screen.step(_line(job, loss, first_step, first_tokens), plan.max_steps)
        better = False
        if (step % plan.eval_steps == 0 or last) and len(job.eval_blocks) and not stopping:
            with clock("evaluation"):
                eval_loss, better = _evaluate(job, metrics)
        if step % plan.save_steps == 0 or better or last or stopping:
            with clock("checkpoint"):
                samples.sync()
                saved = step if _save(job, outcome) else saved
        previous = (clock.seconds["waiting"] - waited, time.perf_counter() - began, outcome.step_s)
        if stopping:
            break
    screen.end_steps()
    if progress.step < plan.max_steps:
        if saved < progress.step:
            with clock("checkpoint"):
                samples.sync()
                _save(job, None)
        if metrics:
            metrics.close()
        raise Stopped(
            f"stopped by a signal after step {progress.step} of {plan.max_steps}, which is "
            f"committed; run the same command again to go on"
        )
    table = job.votes.each(*(clock.read().get(p, 0.0) for p in PHASES))
    receipt = make_receipt(
        [dict(zip(PHASES, row, strict=True)) for row in table.tolist()],
        device=_device_name(world),
        steps=progress.step - first_step,
        tokens=progress.tokens - first_tokens,
        accumulation=plan.accumulation,
        baseline=baseline,
        sent_bytes=job.ledger.sent_bytes - first_bytes,
        samples=_audit(job) if world.is_main else "",
        final_loss=loss,
        eval_loss=eval_loss,
        skipped_steps=progress.skipped,
    )
    samples.close()
    attempt(job.votes, lambda: _finish(job, receipt, metrics), world.is_main)
    return receipt


@dataclass(frozen=True)
class Advanced:
    """A step that was taken on all ranks."""

    outcome: Outcome
    learning_rate: float
    gradient_norm: float
    repeat: bool = False
    """Nothing was changed but the plan: take the same step again."""


def advance(job: Job, previous: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Advanced | None:
    """Collective: one optimizer step, gradients and update; None if given up for a signal.

    `previous`: as in take_step. The caller counts the step. Raises when any rank failed.
    """
    config, plan, step = job.config, job.plan, job.progress.step
    taken = take_step(
        step, job.feed, job.loss_sum, job.sync, job.votes,
        stop=lambda: job.stop.asked is not None, previous=previous,
    )  # fmt: skip
    if taken.outcome is None:
        return None
    if any(taken.outcome.trouble):
        _handle_trouble(job, taken.outcome, taken.error)
        return Advanced(taken.outcome, 0.0, 0.0, repeat=True)
    _charge_waiting(job, taken.outcome)
    rate = plan.hyper.learning_rate * factor(
        config.lr_scheduler_type, step, plan.warmup_steps, plan.max_steps,
        config.min_lr_ratio, config.decay_ratio,
    )  # fmt: skip
    return Advanced(taken.outcome, rate, _apply(job, taken.outcome, rate))


@dataclass
class Window:
    """What happened since the last logged row."""

    loss: float = 0.0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)

    def add(self, outcome: Outcome, tokens: int, seconds: float) -> None:
        self.loss += sum(outcome.losses)
        self.targets += outcome.tokens
        self.tokens += tokens
        self.seconds += seconds
        self.steps += 1

    def close(
        self, advanced: "Advanced", step: int, plan: Plan, clock: dict[str, float]
    ) -> dict[str, float]:
        """The row of metrics, and start the next window."""
        spent = {p: clock.get(p, 0.0) - self.before.get(p, 0.0) for p in clock}
        total = sum(spent.get(p, 0.0) for p in ("compute", "communication", "waiting", "data", "optimizer", "other"))  # fmt: skip
        row = {
            "train__loss": self.loss / self.targets if self.targets else float("nan"),
            "train__learning_rate": advanced.learning_rate,
            "train__grad_norm": advanced.gradient_norm,
            "train__epoch": step / plan.max_steps * plan.epochs,
            "perf__tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "perf__step_time_s": self.seconds / max(1, self.steps),
            "comm__exposed_fraction": spent.get("communication", 0.0) / total if total else 0.0,
            "comm__waiting_fraction": spent.get("waiting", 0.0) / total if total else 0.0,
        }
        self.__init__(before=clock)  # type: ignore[misc]
        return row


def _apply(job: Job, outcome: Outcome, lr: float) -> float:
    """Update the weights, or skip the step on all ranks alike; returns the gradient norm."""
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    params = [p for _, p in job.sync.named_parameters()]
    with job.ledger.clock("optimizer"):
        done = update(
            params, job.optimizer, divide_by=max(1, outcome.tokens),
            max_norm=job.config.max_grad_norm,
        )  # fmt: skip
    progress = job.progress
    if done.committed:
        progress.skipped_in_row = 0
        return done.gradient_norm
    progress.skipped += 1
    progress.skipped_in_row += 1
    culprit = find_culprit(progress.step, job.feed, job.loss_sum, job.sync, job.votes)
    job.screen.warn(
        f"step {progress.step + 1}: gradient not finite on {culprit}; the step is skipped on all "
        f"replicas ({progress.skipped_in_row} of {SKIPS_IN_A_ROW} in a row)"
    )
    if progress.skipped_in_row >= SKIPS_IN_A_ROW:
        raise UnisonoError(
            f"step {progress.step + 1}: the gradient was not finite {SKIPS_IN_A_ROW} times in a "
            f"row, last on {culprit}; lower learning_rate or look at those samples"
        )
    return done.gradient_norm


def _handle_trouble(job: Job, outcome: Outcome, error: BaseException | None) -> None:
    """Out of memory anywhere: smaller micro-batches everywhere. Anything else: all ranks stop."""
    job.sync.discard()
    failed = [r for r, t in enumerate(outcome.trouble) if t and t != OUT_OF_MEMORY]
    if failed:
        if error is not None:
            raise error
        raise Elsewhere(failed[0], EXIT_FAILED)
    rank = outcome.trouble.index(OUT_OF_MEMORY)
    size = job.plan.micro_batch_size
    if size == 1 or job.config.determinism == "strict":
        raise UnisonoError(
            f"rank {rank} ran out of memory in step {job.progress.step + 1} with micro-batches of "
            f"{size}; " + _memory_advice()
        )
    job.plan = with_micro_batch(job.plan, job.config, job.world, -(-size // 2))
    job.screen.warn(
        f"step {job.progress.step + 1}: rank {rank} ran out of memory; micro-batches of "
        f"{job.plan.micro_batch_size} instead of {size} from here on, the global batch stays "
        f"{job.plan.global_batch_size}"
    )
    if job.world.device != "cpu":
        torch.cuda.empty_cache()


def _memory_advice() -> str:
    return (
        "lower micro_batch_size or sequence_length, or set gradient_checkpointing: true; "
        "determinism: strict keeps the micro-batch it began with"
    )


def _charge_waiting(job: Job, outcome: Outcome) -> None:
    """Of the previous step's standing still, what the fastest rank had too is communication.

    The rank that comes last waits only for the wire; what others waited beyond that, they waited
    for it. This needs no common clock.
    """
    wire = min(outcome.waited_s)
    job.ledger.clock.move("waiting", "communication", wire)


def _evaluate(job: Job, metrics: Metrics | None) -> tuple[float | None, bool]:
    """Collective: (loss on the held-out split, whether it is the best so far)."""
    config, progress = job.config, job.progress
    rows = config.eval_batches and config.eval_batches * config.global_batch_size
    result = evaluate(
        job.model, job.eval_blocks, job.loss_sum, job.votes,
        batch_rows=job.plan.micro_batch_size, most_rows=rows,
        stop=lambda: job.stop.asked is not None,
    )  # fmt: skip
    if result is None:
        return None, False
    better = progress.best_loss is None or result.loss < progress.best_loss
    if better:
        progress.best_loss, progress.best_step = result.loss, progress.step
    if metrics:
        metrics.write(progress.step, eval__loss=result.loss, eval__perplexity=result.perplexity)
    job.screen.say(
        f"step {progress.step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f}"
        + (", the best so far" if better else "")
    )
    return result.loss, better


def _save(job: Job, outcome: Outcome | None) -> bool:
    """Collective: commit a checkpoint; a disk that fails costs the checkpoint, not the run."""
    progress = job.progress

    def write() -> bool:
        state = {"global_step": progress.step, "epoch": _epoch(job), **asdict(progress)}
        meta = {
            "progress": asdict(progress),
            "config": job.config.model_dump(mode="json"),
            "data": {"digest": job.prepared.digest, "samples": len(job.train_blocks)},
            "replicas": job.world.size,
            "threads": torch.get_num_threads(),
            "versions": {"unisono": __version__, "torch": torch.__version__},
        }
        named = job.sync.named_parameters()
        try:
            checkpoint.save(
                job.run,
                progress.step,
                lambda folder: save_state(
                    folder, job.model, job.tokenizer, job.optimizer, named, state
                ),
                meta,
            )
            keep = job.config.save_total_limit
            checkpoint.prune(job.run, keep, progress.best_step)
        except CheckpointError as error:
            job.screen.warn(f"{error}; training goes on")
            return False
        return True

    saved = attempt(job.votes, write, job.world.is_main)
    return bool(job.votes.sum(float(bool(saved)))[0])


def _epoch(job: Job) -> float:
    return job.progress.step / job.plan.max_steps * job.plan.epochs


def own_samples(job: Job) -> list[int]:
    """The samples of this rank in the step that is next."""
    feed, m = job.feed, job.plan.accumulation
    leaves = range(job.world.rank * m, (job.world.rank + 1) * m)
    return [int(s) for leaf in leaves for s in feed.samples(job.progress.step, leaf)]


def _replicated(job: Job) -> list[tuple[str, torch.Tensor]]:
    named = job.sync.named_parameters()
    return [*named, *optimizer_tensors(job.optimizer, named)]


def _line(job: Job, loss: float, first_step: int, first_tokens: int) -> StepLine:
    seconds = job.ledger.clock.read()
    total = sum(seconds.values())
    done = job.progress.step - first_step
    stepping = total - seconds.get("evaluation", 0.0) - seconds.get("checkpoint", 0.0)
    exposed = seconds.get("communication", 0.0) + seconds.get("waiting", 0.0)
    return StepLine(
        step=job.progress.step,
        loss=loss,
        tokens_per_second=(job.progress.tokens - first_tokens) / stepping,
        seconds_left=total / done * (job.plan.max_steps - job.progress.step),
        exposed=exposed / stepping,
    )


# --- beginning and end


def _find_checkpoint(
    config: Config, run: Path, data: dict[str, Any], world: World, votes: Group, screen: Screen
) -> checkpoint.Manifest | None:
    """Collective: the checkpoint to go on from, the same on every rank, or None."""

    def look() -> checkpoint.Manifest | None:
        if config.resume == "auto":
            found, notes = checkpoint.find(run)
            for note in notes:
                screen.warn(f"resume: passed over {note}")
        elif config.resume == "never":
            found = checkpoint.find(run)[0]
            if found:
                raise ConfigError(
                    f"resume: never, but {found.path} exists; choose another output_dir, or "
                    f"resume: auto to go on from it"
                )
        else:
            found = checkpoint.verify(Path(config.resume))
        if found:
            _check_same_run(config, found, data)
            was = found.meta["replicas"]
            change = "" if was == world.size else f", {was} replicas then, {world.size} now"
            screen.say(f"resumed from {found.path} (step {found.step}{change})")
        return found

    found = attempt(votes, look, world.is_main)
    steps = votes.each(float(found.step if found else -1))[:, 0].tolist()
    if steps[0] < 0:
        return None
    path = Path(config.resume) if config.resume not in ("auto", "never") else None

    def follow() -> checkpoint.Manifest:
        try:
            return checkpoint.verify(path or run / f"checkpoint-{int(steps[0])}")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} on host {world.host}: every host must see the same output_dir"
            ) from None

    other = attempt(votes, follow, mine=not world.is_main)
    return found or other


def _check_same_run(config: Config, found: checkpoint.Manifest, data: dict[str, Any]) -> None:
    before = found.meta["config"]
    for name in SAME_RUN:
        now = config.model_dump(mode="json")[name]
        if before[name] != now:
            raise ConfigError(
                f"{name}: found {now!r}, but {found.path} was trained with {before[name]!r}; write "
                f"{name}={before[name]!r} to go on, or another output_dir to start anew"
            )
    if found.meta["data"] != data:
        raise ConfigError(
            f"data: not what {found.path} was trained on (files, tokenizer, packing or split "
            f"changed); restore them to go on, or choose another output_dir to start anew"
        )


def _finish(job: Job, receipt: Receipt, metrics: Metrics | None) -> None:
    """Rank 0: the model at the root of the run folder, the receipt, a sample of its text."""
    save_model(job.run, job.model, job.tokenizer)
    write_json(job.run / "receipt.json", {**receipt.as_json(), "digest": weights_digest(job)})
    if metrics:
        metrics.close()
    if job.config.sample_prompt is not None:
        from unisono.generate import continue_text

        text = continue_text(
            job.model, job.tokenizer, job.config.sample_prompt,
            max_new_tokens=job.config.sample_tokens, seed=job.config.seed,
        )  # fmt: skip
        job.screen.say("\nSample", "bold")
        job.screen.say(text + "\n")
    job.screen.show(render(receipt))
    job.screen.say(f"model, metrics and receipt: {job.run}")


def weights_digest(job: Job) -> str:
    """SHA-256 of all weights and optimizer state."""
    return sha256(dict(_replicated(job)))


def _audit(job: Job) -> str:
    complaints = sample_ledger.audit(
        job.run / "samples", job.order, job.config.global_batch_size, job.plan.samples
    )
    if complaints:
        return f"sample ledger: {len(complaints)} steps are not as ordered, first: {complaints[0]}"
    return f"sample ledger: {job.plan.samples:,} samples, each exactly where the order has it"


def _device_name(world: World) -> str:
    if world.device != "cpu":
        return torch.cuda.get_device_name(world.device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {world.threads} threads a replica"
