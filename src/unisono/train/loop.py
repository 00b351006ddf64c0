"""The main job: train a causal language model on N replicas.

`train` is what every rank runs: set the job up (train/job.py), take its steps (train/advance.py),
and do what is due between them; periodic work is an `if` in plain sight. What must not differ
between ranks is decided from the step's vote, never from what one rank knows.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch

from unisono import __version__
from unisono.clock import PHASES, STEP_PHASES
from unisono.config import Config
from unisono.data import ledger as sample_ledger
from unisono.data.prompts import Prompts
from unisono.errors import CheckpointError, Stopped
from unisono.files import JsonLines, RunLock, truncate_after, up_to, write_json
from unisono.observe import goodput, metrics, timeline
from unisono.observe.account import RANKS, Account
from unisono.observe.advice import advise
from unisono.observe.arrival import Stamps
from unisono.observe.environment import device_name, environment, memory_bytes
from unisono.observe.flops import find_peak
from unisono.observe.metrics import Metrics
from unisono.observe.receipt import (
    Receipt,
    make_receipt,
    render,
    utilization,
    with_recomputation,
)
from unisono.observe.screen import Screen, StepLine
from unisono.observe.watch import watched
from unisono.sync.digest import check_replicas
from unisono.sync.exact import Exact
from unisono.sync.ledger import Group, Ledger
from unisono.sync.link import measure_link
from unisono.sync.zero import Zero
from unisono.train import batch_advice, checkpoint, foretell, tuning
from unisono.train.advance import Advanced, advance
from unisono.train.auto import Climber
from unisono.train.evaluation import evaluate
from unisono.train.job import (
    TUNED,
    Job,
    own_samples,
    set_up,
    try_rows,
    weights_digest,
)
from unisono.train.objective import means
from unisono.train.online import Online, evaluate_prompts
from unisono.train.recompute import time_recomputation
from unisono.train.state import Weights, exhaust, publish_model, save_state
from unisono.train.stopping import watching
from unisono.train.switch import switch
from unisono.train.together import attempt
from unisono.train.trial import Baseline, measure_baseline
from unisono.world import World, cache_folder, joined

RECEIPT = "receipt.json"
ENVIRONMENT = "environment.json"
SAMPLES = "samples"
COMPLETIONS = "completions.jsonl"
"""Some of each step that is logged, with their rewards, in online tuning."""


def train(config: Config, world: World, screen: Screen) -> Receipt | None:
    """Collective: run the job to its end; returns the receipt, or None if there was nothing to do.

    Raises Stopped after a signal, everything committed; UnisonoError when it cannot go on.
    """
    with watching() as stop, joined(world), ExitStack() as stack:
        ledger = Ledger()
        stack.enter_context(watched(ledger, screen.warn if world.is_main else None))
        votes = Group("votes", ledger, config.timeout_s)
        lock = RunLock(Path(config.output_dir))
        attempt(votes, lambda: stack.enter_context(lock), mine=world.is_main)
        job = set_up(config, world, screen, stop, ledger, votes)
        if job.progress.step >= job.plan.max_steps:
            screen.say(f"already done: {job.progress.step} steps; raise max_steps to train on")
            weights = job.sync.state_dict()
            attempt(votes, lambda: _publish_if_missing(job, weights), world.is_main)
            return None
        return take_steps(job)


def take_steps(job: Job) -> Receipt:
    """Collective: from the first step that is not done to the last, and the end of the run."""
    config, world, plan, progress = job.config, job.world, job.plan, job.progress
    baseline = measure_baseline(
        partial(try_rows, job),
        plan.micro_batch_size,
        0 if job.online else config.baseline_steps,  # completions are of no known length
        job.sync,
        job.votes,
        world.device,
    )
    forecast = _forecast(job, baseline)
    # What a former process logged beyond its last checkpoint goes before anybody appends.
    samples = job.run / SAMPLES
    attempt(job.votes, lambda: sample_ledger.truncate(samples, progress.step), world.is_main)
    clock, stamps = job.ledger.clock, Stamps(job.ledger.clock)
    stamps.flops = job.flops.model
    account = Account(job.votes, stamps, world.host, world.device, plan.sent_bytes_per_step)
    log = attempt(job.votes, lambda: Log(job, account))
    assert log is not None
    stamps.slowest_s = baseline.alone_s * plan.accumulation if baseline else 0.0
    clock.restart()
    stamps.began()
    job.stop.graceful = True
    if job.online and progress.step == 0 and len(job.eval_blocks):
        with clock("evaluation"):
            _evaluate(job, log)
    job.screen.start_steps(progress.step, plan.max_steps)
    stopping = False
    while progress.step < plan.max_steps and not stopping:
        began = time.perf_counter()
        sent_bytes = job.ledger.sent_bytes
        recorded = progress.step + 1 in log.recorded
        if recorded:
            log.timeline.begin()
        advanced = advance(job, stamps)
        if advanced is None:  # a signal came in the middle of a slow step, which is given up
            stopping = True
            break
        if advanced.repeat:
            baseline = None  # it was of another micro-batch
            continue
        step_s = time.perf_counter() - began
        log.sent_bytes += job.ledger.sent_bytes - sent_bytes
        if recorded:
            log.record(progress.step + 1)
        log.samples()
        tokens = job.tokens_of(advanced.outcome)
        progress.step += 1
        progress.tokens += tokens
        step, last = progress.step, progress.step == plan.max_steps
        stopping = advanced.outcome.stop and not last
        if config.check_replicas_every and step % config.check_replicas_every == 0:
            check_replicas(job.sync.replicated(), job.votes, step)
        log.follow(advanced)
        log.step(advanced, step_s, tokens, final=last or stopping)
        if job.tuner and not job.tuner.done:
            _tune(job, log, advanced)
        elif job.climber and not last and not stopping:
            _climb(job, job.climber, log, advanced)
        better = False
        if (step % plan.eval_steps == 0 or last) and len(job.eval_blocks) and not stopping:
            with clock("evaluation"):
                better = _evaluate(job, log)
        if step % plan.save_steps == 0 or better or last:
            with clock("checkpoint"):
                _save(job, log)
    job.screen.end_steps()
    if stopping:
        _stop(job, log)
    receipt = log.receipt(baseline)
    weights = job.sync.state_dict()
    digest = weights_digest(job, weights)

    def finish() -> Receipt:
        return _finish(job, log, receipt, weights, digest, forecast)

    audited = attempt(job.votes, finish, world.is_main)
    log.close()
    return audited or receipt


# --- what a run writes as it goes


@dataclass
class _Window:
    """What happened since the last row of metrics."""

    loss_sum: float = 0.0
    count: int = 0
    sums: list[float] = field(default_factory=list)
    """Of the objective's metrics."""
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    phases_before: dict[str, float] = field(default_factory=dict)


class Log:
    """Sample ledger, metrics and live line of a run on one rank, and its totals for the receipt.

    A disk that is full costs rows, which is said once, and never the run.
    """

    def __init__(self, job: Job, account: Account) -> None:
        self.job, self.account, self.flops = job, account, job.flops
        self.first_step, self.first_tokens = job.progress.step, job.progress.tokens
        self.first_skipped = job.progress.skipped
        self.sent_bytes = 0
        """In steps: not for checkpoints, evaluation and the like."""
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.saved_step = job.progress.step
        self._window = _Window()
        self._complained = False

        name = _device_name(job.world)
        chip = device_name(job.world.device)
        self.peak = find_peak(job.config, job.world.device, chip, job.probe)
        self._hooks = ExitStack()
        if job.config.gradient_checkpointing and job.world.device == "cpu":
            self._hooks = time_recomputation(job.model, job.ledger.clock)
        self._sessions: goodput.Sessions | None = None
        if job.world.is_main:
            with self._disk_may_fail(goodput.FILE):
                born, step = job.ledger.born, self.first_step
                self._sessions = goodput.Sessions(job.run, born, step, metrics.FILE)
        self._samples = sample_ledger.Ledger(job.run / SAMPLES, job.world.rank)
        report_to = job.config.report_to
        self.metrics = Metrics(job.run, self.first_step, report_to) if job.world.is_main else None
        self.timeline = timeline.Timeline(job.votes, job.world.host)
        self.recorded = timeline.steps_to_record(
            self.first_step, job.plan.max_steps, job.plan.eval_steps
        )
        self._rows: JsonLines | None = None
        self._ranks: JsonLines | None = None
        self._completions: JsonLines | None = None
        if job.world.is_main:
            facts = environment(device=name, replicas=job.world.size, unisono=__version__)
            write_json(job.run / ENVIRONMENT, facts)
            truncate_after(job.run / timeline.FILE, up_to(self.first_step))
            self._rows = JsonLines(job.run / timeline.FILE)
            truncate_after(job.run / RANKS, up_to(self.first_step))
            self._ranks = JsonLines(job.run / RANKS)
            if job.online:
                truncate_after(job.run / COMPLETIONS, up_to(self.first_step))
                self._completions = JsonLines(job.run / COMPLETIONS)

    @contextmanager
    def _disk_may_fail(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                self._complained = True
                self.job.screen.warn(f"{what} cannot be written: {error}; training goes on")

    def samples(self) -> None:
        """Record the samples of the step that has just been taken."""
        with self._disk_may_fail("the sample ledger"):
            self._samples.commit(self.job.progress.step + 1, own_samples(self.job))

    def record(self, step: int) -> None:
        """Collective: the timeline of the step that has just been taken."""
        for row in self.timeline.end(step):
            if self._rows:
                with self._disk_may_fail(timeline.FILE):
                    self._rows.append(row)

    def follow(self, advanced: Advanced) -> None:
        """Collective now and then: the time of all ranks, and what there is to say about the step."""
        step, outcome = self.job.progress.step, advanced.outcome
        lines = self.account.step(step, outcome.periods)
        for line in (*lines, *self.account.jump(step, outcome.loss, advanced.gradient_norm)):
            self.job.screen.warn(line)
            self.write(event=line)

    @property
    def stepping_s(self) -> float:
        """Seconds in steps that were not skipped, so far in this session."""
        steps = max(1, self.job.progress.step - self.first_step)
        skipped = (self.job.progress.skipped - self.first_skipped) / steps
        return (1 - skipped) * sum(self.job.ledger.clock.read().get(p, 0.0) for p in STEP_PHASES)

    def committed(self) -> None:
        """The present step is on the disk."""
        self.saved_step = self.job.progress.step
        if self._sessions:
            with self._disk_may_fail(goodput.FILE):
                self._sessions.saved(self.saved_step, self.stepping_s)

    def ended(self) -> goodput.Goodput | None:
        """Rank 0: this session is over, nothing is lost."""
        if self._sessions:
            with self._disk_may_fail(goodput.FILE):
                return self._sessions.ended(self.job.progress.step, self.stepping_s)
        return None

    def sync(self) -> None:
        """The sample ledger is on the disk, as the checkpoint will be."""
        with self._disk_may_fail("the sample ledger"):
            self._samples.sync()

    def write(self, **values: float | str) -> None:
        """A row of metrics for the current step."""
        if self.metrics:
            with self._disk_may_fail("metrics.jsonl"):
                self.metrics.write(self.job.progress.step, **values)

    def step(self, advanced: Advanced, seconds: float, tokens: int, final: bool) -> None:
        """Count a step; a row every `logging_steps` and at the end; the live line always."""
        job, window = self.job, self._window
        plan, progress, outcome = job.plan, job.progress, advanced.outcome
        self.loss = outcome.loss
        window.loss_sum += sum(outcome.losses)
        window.count += outcome.count
        window.sums = [a + b for a, b in zip_longest(window.sums, outcome.sums, fillvalue=0.0)]
        window.tokens += tokens
        window.seconds += seconds
        window.steps += 1
        phases = job.ledger.clock.read()
        if progress.step % job.config.logging_steps == 0 or final:
            spent = {p: phases.get(p, 0.0) - window.phases_before.get(p, 0.0) for p in PHASES}
            total = sum(spent[p] for p in STEP_PHASES) or 1.0
            found = means(job.objective.metrics, window.sums)
            self.write(
                train__loss=window.loss_sum / max(1, window.count),
                **{f"train__{name}": value for name, value in found.items()},
                train__learning_rate=advanced.learning_rate,
                train__grad_norm=advanced.gradient_norm,
                train__epoch=job.epoch,
                perf__tokens_per_second=window.tokens / window.seconds,
                perf__step_time_s=window.seconds / window.steps,
                **self._use(window),
                comm__exposed_fraction=spent["communication"] / total,
                comm__waiting_fraction=spent["waiting"] / total,
                **(
                    {}
                    if job.online
                    else batch_advice.metrics(job.noise.scale(), plan, progress.tokens)
                ),
                **{f"time__{p}_s": seconds for p, seconds in spent.items()},
            )
            self._window = _Window(phases_before=phases)
            if self._completions and job.online:
                with self._disk_may_fail(COMPLETIONS):
                    for row in job.online.shown:
                        self._completions.append({"step": progress.step, **row})
            if self._ranks:
                with self._disk_may_fail(RANKS):
                    self._ranks.append(self.account.row(progress.step))
        self._live_line(phases, means(job.objective.metrics, outcome.sums))

    def _use(self, window: _Window) -> dict[str, float]:
        """Of memory, and of the peak where there is a known one."""
        found = {"perf__memory_bytes": float(memory_bytes(self.job.world.device))}
        if self.peak.flops and not self.job.online:
            length = self.job.plan.row_tokens
            done = self.flops.model(window.tokens // length, length) / window.seconds
            found["perf__mfu"] = done / self.job.world.size / self.peak.flops
        return found

    def _live_line(self, phases: dict[str, float], metrics: dict[str, float]) -> None:
        job = self.job
        name = job.objective.shown
        total = sum(phases.values())
        stepping = sum(phases.get(p, 0.0) for p in STEP_PHASES)
        done = job.progress.step - self.first_step
        job.screen.step(
            StepLine(
                step=job.progress.step,
                loss=self.loss or 0.0,
                tokens_per_second=(job.progress.tokens - self.first_tokens) / stepping,
                seconds_left=total / done * (job.plan.max_steps - job.progress.step),
                exposed=(phases.get("communication", 0.0) + phases.get("waiting", 0.0)) / stepping,
                metric=f"{name} {metrics[name]:.3f}" if name in metrics else "",
            ),
            job.plan.max_steps,
        )

    def receipt(self, baseline: Baseline | None) -> Receipt:
        """Collective: where all ranks' time went, since the start of this process."""
        job, progress, plan = self.job, self.job.progress, self.job.plan
        memory = self.account.close()
        seconds = job.ledger.clock.read()
        table = job.votes.each(*(seconds.get(p, 0.0) for p in PHASES))
        by_rank = [dict(zip(PHASES, row, strict=True)) for row in table.tolist()]
        rows, length = plan.global_batch_size * plan.sample_rows, plan.row_tokens
        model, hardware = self.flops.model(rows, length), self.flops.hardware(rows, length)
        if job.world.device != "cpu":
            by_rank = [with_recomputation(s, 1 - model / hardware) for s in by_rank]
        blame = self.account.suspects.all()
        receipt = make_receipt(
            by_rank,
            device=_device_name(job.world),
            steps=progress.step - self.first_step,
            tokens=progress.tokens - self.first_tokens,
            accumulation=plan.accumulation,
            baseline=baseline,
            sent_bytes=self.sent_bytes,
            final_loss=self.loss,
            eval_loss=self.eval_loss,
            skipped_steps=progress.skipped,
        )
        return replace(
            receipt,
            mfu=None if job.online else utilization(receipt, model, hardware, self.peak),
            memory_by_rank=memory,
            blame=blame,
            events=self.account.events,
            advice=advise(receipt.shares, blame, job.config, plan),
        )

    def close(self) -> None:
        self._samples.close()
        if self.metrics:
            self.metrics.close()
        for lines in (self._rows, self._ranks, self._completions, self._sessions):
            if lines:
                lines.close()
        self._hooks.close()


# --- what is due between steps, and at the end


def _tune(job: Job, log: Log, advanced: Advanced) -> None:
    """Collective when a trial of another bucket size begins or ends."""
    tuner, outcome = job.tuner, advanced.outcome
    assert tuner is not None
    before = tuner.bucket_mb
    change = tuner.step(outcome.step_s, outcome.stood_s)
    if change:
        job.screen.say(f"step {job.progress.step}: {change}")
        log.write(comm__bucket_mb=change.to_mb, comm__bucket_gain=change.gain)
    if tuner.bucket_mb != before:
        assert isinstance(job.sync, Exact | Zero)
        job.sync.rebucket(tuner.bucket_mb)
    if tuner.done and tuner.changes and job.world.is_main:
        with suppress(OSError):  # the next run would only tune again
            tuning.remember(cache_folder() / TUNED, tuner)


def _climb(job: Job, climber: Climber, log: Log, advanced: Advanced) -> None:
    """Collective when it is time: look at the link, and go on with what it asks for now."""
    if not climber.due(advanced.outcome.step_s):
        return
    with job.ledger.clock("communication"):
        job.sync.settle()
        seen = measure_link(job.votes, job.world.device)
        assert seen is not None
        rung = climber.look(seen)
        if rung is None:
            return
        # Once more: what was seen may have been a moment.
        again = measure_link(job.votes, job.world.device)
        assert again is not None
        rung = climber.look(max(seen, again, key=lambda link: link.bytes_per_s))
        if rung is None:
            return
        assert climber.rung is not None
        before = climber.rung.name
        switch(job, rung)
    line = (
        f"step {job.progress.step}: the link has {climber.link.bytes_per_s * 8 / 1e9:.3g} Gbit/s now: "
        f"{rung.name} instead of {before}, {climber.why}"
    )
    job.screen.warn(line)
    log.write(event=line)


def _evaluate(job: Job, log: Log) -> bool:
    """Collective: loss on the held-out split; returns whether it is the best so far."""
    config, progress = job.config, job.progress
    job.sync.settle()
    if job.online:
        return _evaluate_prompts(job, job.online, log)
    assert not isinstance(job.eval_blocks, Prompts)
    result = evaluate(
        job.model,
        job.eval_blocks,
        job.measure,
        job.votes,
        batch_rows=job.plan.micro_batch_size,
        most_rows=config.eval_batches and config.eval_batches * config.global_batch_size,
        stop=job.stop.is_asked,
        lockstep=job.sync.lockstep,
        mesh=job.plan.mesh,
        metrics=job.objective.metrics,
    )
    if result is None:
        return False
    if not math.isfinite(result.loss):
        why = "the loss is not finite" if result.count else "memory ran out"
        job.screen.warn(f"step {progress.step}: no evaluation, {why}")
        return False
    log.eval_loss = result.loss
    better = progress.best_loss is None or result.loss < progress.best_loss
    if better:
        progress.best_loss, progress.best_step = result.loss, progress.step
    told = result.metrics if job.objective.metrics else {"perplexity": result.perplexity}
    log.write(eval__loss=result.loss, **{f"eval__{name}": v for name, v in told.items()})
    shown = job.objective.shown or "perplexity"
    also = f", {shown} {told[shown]:.{2 if shown == 'perplexity' else 4}f}" if shown in told else ""
    job.screen.say(
        f"step {progress.step}: held-out loss {result.loss:.4f}{also}"
        f"{', the best so far' if better else ''}"
    )
    return better


def _evaluate_prompts(job: Job, online: Online, log: Log) -> bool:
    """Collective: mean reward of held-out prompts; returns whether it is the best so far."""
    config, progress = job.config, job.progress
    assert isinstance(job.eval_blocks, Prompts)
    most = config.eval_batches and config.eval_batches * config.global_batch_size
    found = evaluate_prompts(online, job.eval_blocks, job.votes, job.plan.mesh, most)
    # Checkpoints are compared by what is to be low.
    better = progress.best_loss is None or -found["reward"] < progress.best_loss
    if better:
        progress.best_loss, progress.best_step = -found["reward"], progress.step
    log.write(**{f"eval__{name}": value for name, value in found.items()})
    job.screen.say(
        f"step {progress.step}: held-out reward {found['reward']:.4f}, completions of "
        f"{found['completions/mean_length']:.1f} tokens{', the best so far' if better else ''}"
    )
    return better


def _save(job: Job, log: Log) -> None:
    """Collective: commit a checkpoint; a disk that fails costs the checkpoint, not the run."""
    progress = job.progress
    log.sync()
    weights, optimizer = job.sync.state_dict(), job.sync.optimizer_state()

    def write() -> bool:
        state = {"global_step": progress.step, "epoch": job.epoch, **asdict(progress)}
        meta = {
            "progress": asdict(progress),
            "config": job.config.model_dump(mode="json"),
            "data": job.data_identity,
            "replicas": job.world.size,
            "mesh": str(job.plan.mesh),
            "micro_batches": job.plan.micro_batches,
            "layout": job.sync.layout(),
            "rung": job.climber.rung.name if job.climber and job.climber.rung else None,
            "bucket_mb": (job.tuner.kept_mb, job.tuner.done) if job.tuner else None,
            "threads": torch.get_num_threads(),
            "versions": {"unisono": __version__, "torch": torch.__version__},
        }
        try:
            checkpoint.save(
                job.run,
                progress.step,
                lambda folder: save_state(
                    folder, job.model, job.tokenizer, weights, optimizer, state
                ),
                meta,
                expected_bytes=job.plan.model_bytes,
            )
            checkpoint.prune(job.run, job.config.save_total_limit, progress.best_step)
        except CheckpointError as error:
            job.screen.warn(f"{error}; training goes on")
            return False
        return True

    def gather() -> bool:
        """Whatever the disk does, every rank takes part in gathering the optimizer's state."""
        try:
            return job.world.is_main and write()
        finally:
            exhaust(optimizer)

    saved = attempt(job.votes, gather)
    if job.votes.sum(float(bool(saved)))[0]:
        log.committed()


def _stop(job: Job, log: Log) -> None:
    """Collective: commit what is done and say so."""
    if log.saved_step < job.progress.step:
        _save(job, log)
    log.ended()
    log.close()
    done = f"step {job.progress.step} of {job.plan.max_steps}"
    if log.saved_step < job.progress.step:
        raise CheckpointError(
            f"stopped by a signal after {done}, which could not be committed (see above); the last "
            f"checkpoint is of step {log.saved_step}"
        )
    raise Stopped(
        f"stopped by a signal after {done}, which is committed; run the same command again to go on"
    )


def _forecast(job: Job, baseline: Baseline | None) -> foretell.Forecast | None:
    """Collective: what a step will take, written down before the first one."""
    found = foretell.make_forecast(job, baseline)

    def tell() -> None:
        if isinstance(found, str):
            job.screen.say(f"no forecast: {found}", "dim")
            return
        write_json(job.run / foretell.FILE, found.as_json())
        if job.probe is not None:
            write_json(job.run / "probe.json", job.probe.model_dump())  # for the report page
        ms, rate = found.step.total * 1e3, found.tokens_per_second
        job.screen.say(f"forecast: {ms:.4g} ms a step, {rate:,.0f} tokens/s", "dim")

    attempt(job.votes, tell, job.world.is_main)
    return None if isinstance(found, str) else found


def _finish(
    job: Job, log: Log, receipt: Receipt, weights: Weights, digest: str,
    forecast: foretell.Forecast | None,
) -> Receipt:  # fmt: skip
    """Rank 0: the model at the root of the run folder, the receipt with the audit, a sample of text."""
    publish_model(job.run, job.model, job.tokenizer, weights)
    used = log.ended()
    receipt = replace(receipt, samples=_audit(job), goodput=used.as_json() if used else None)
    # What is known of batches is of text that is given.
    advice = None
    if not job.online:
        advice = batch_advice.advise(job.noise.scale(), job.plan, job.config, job.progress.tokens)
    facts = {"step": job.progress.step, **receipt.as_json(), "digest": digest}
    if advice:
        facts["batch_advice"] = advice.as_json()
    write_json(job.run / RECEIPT, facts)
    if job.config.sample_prompt is not None:
        from unisono.generate import continue_text, generate

        wanted = {"max_new_tokens": job.config.sample_tokens, "seed": job.config.seed}
        prompt = job.config.sample_prompt
        if job.sync.lockstep:  # this rank cannot run the model alone
            text = generate(str(job.run), prompt, device=job.world.device, **wanted)
        else:
            text = continue_text(job.model, job.tokenizer, prompt, **wanted)
        job.screen.say("\nSample", "bold")
        job.screen.say(text + "\n")
    job.screen.show(render(receipt))
    if advice:
        job.screen.say("\n".join(advice.lines), "dim")
    if forecast is not None and receipt.steps:
        facts = foretell.beside(forecast, receipt, job.config.sync == "ddp")
        write_json(job.run / foretell.FILE, facts)
        job.screen.say(foretell.in_words(facts), "dim")
    job.screen.say(f"model, metrics and receipt: {job.run}; as a page: unisono report {job.run}")
    return receipt


def _publish_if_missing(job: Job, weights: Weights) -> None:
    """Rank 0: a former process may have died between its last checkpoint and the model."""
    try:
        published = json.loads((job.run / RECEIPT).read_text())["step"] == job.progress.step
    except (OSError, ValueError, KeyError):
        published = False
    if not published:
        publish_model(job.run, job.model, job.tokenizer, weights)
        job.screen.say(f"model: {job.run}")


def _audit(job: Job) -> str:
    """What the sample ledger proves of all steps, those before a resume included."""
    samples = job.plan.samples
    complaints = sample_ledger.audit(
        job.run / SAMPLES, job.order, job.config.global_batch_size, samples
    )
    if complaints:
        return f"sample ledger: {len(complaints)} steps are not as ordered, first: {complaints[0]}"
    return f"sample ledger: {samples:,} samples, each exactly where the order has it"


def _device_name(world: World) -> str:
    name = device_name(world.device)
    if world.device != "cpu":
        return name
    return f"{name}, {world.threads} {'thread' if world.threads == 1 else 'threads'} a replica"
