"""From one rung of the ladder to another in the middle of a run (`sync: auto`).

Between two steps the replicas come together, whole weights and optimizer state pass from the old strategy to
the new one as they would through a checkpoint under another strategy, and what single replicas had of their
own (feedback, outer momentum) ends there, which is said. Costs one gathering of the optimizer's state, and its
memory once more on every rank meanwhile.
"""

from dataclasses import replace

from unisono.forecast.ladder import Rung
from unisono.plan import make_plan
from unisono.sync.streaming import Streaming
from unisono.sync.update import OWN, without_own
from unisono.train.auto import settings_of
from unisono.train.job import Job, rounds_of, strategy_of


def switch(job: Job, rung: Rung) -> None:
    """Collective, between steps: go on with the strategy of `rung`."""
    assert job.asked is not None and job.facts is not None and job.climber is not None
    old, model = job.sync, job.model
    if isinstance(old, Streaming):
        old.come_together()
    kept, own = {}, []
    for key, value in old.optimizer_state():
        if OWN in key.partition(".")[0]:
            own.append(key)  # of every replica on rank 0: not worth its memory
        else:
            kept[key] = value.detach().clone()
    old.close()
    config = settings_of(job.asked, rung.way)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    outer, rounds = rounds_of(config, job.plan.mesh, trained, job.screen)
    facts = replace(job.facts, rounds=rounds)
    plan = make_plan(config, job.world, facts, job.plan.micro_batch_size)
    if config.bucket_mb == "auto":
        plan = replace(
            plan, bucket_mb=job.climber.situation.bucket_bytes.get(config.wire, 4 * 2**20) / 2**20
        )
    job.sync = strategy_of(
        config,
        plan,
        model,
        job.ledger,
        job.slices,
        outer,
        layout=None,
        first_step=job.progress.step,
    )
    job.sync.load_optimizer_state(kept)
    job.config, job.plan, job.facts, job.tuner = config, plan, facts, None
    job.climber.moved(rung)
    if note := without_own(own):
        job.screen.say(note, "dim")
