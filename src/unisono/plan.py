"""What was decided: from what the user asked and where we run, each number with its reason.

Made once, before the first step, printed and saved with the run; nothing changes it afterwards
except an out-of-memory, which makes a new one with a smaller micro-batch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unisono.codes import encoded_bytes
from unisono.config import Config, MeshConfig
from unisono.errors import ConfigError
from unisono.mesh import Divided, Mesh
from unisono.train.scaling import Hyper, scale, warmup_steps
from unisono.world import World

DEFAULT_BUCKET_MB = 4.0
LOCAL = ("streaming", "sparse")
"""Strategies whose replicas step alone."""
SHARD_BYTES = 16 << 20
"""Gradients of fewer bytes are not worth a second trip: on loopback with 5.7 MB two replicas take 1.22
of DDP's time with shards and 0.98 with one all-reduce a bucket."""
STRICT_REPLICAS = 8
"""Strict mode cuts the global batch into a multiple of this many micro-batches, whatever the number
of replicas, so that up to this many (any power of two) hold whole subtrees of one and the same sum."""


@dataclass(frozen=True)
class Rounds:
    """Of strategies whose replicas step alone and agree every so many steps (sync/outer.py)."""

    every: int
    sent_bytes: int
    """By each rank from one synchronization of everything to the next."""
    state_bytes: int
    """On each rank, beside its own weights, gradients and optimizer."""
    shown: tuple[str, str]
    """How, and at which outer rate for what reason."""


@dataclass(frozen=True)
class Facts:
    """What model and data are, as far as the plan needs it."""

    parameters: int
    trainable: int
    gradient_bytes: int
    train_samples: int
    eval_samples: int
    divided: Divided = field(default_factory=Divided)
    """What the tensor axis divides."""
    once: float = 0.0
    """Of the weights, the share that FSDP gathers for the forward pass and keeps for the backward pass."""
    attention: tuple[str, str] | None = None
    """Whose attention runs, and why (attention/choose.py)."""
    sample_rows: int = 1
    """Sequences of a sample: two of a preference pair."""
    row_tokens: int = 0
    """Of each of them, where they are not padded to `sequence_length`: the mean."""
    spared_bytes: int = 0
    """Of 4 bytes a weight, what quantized ones do not take."""
    thin_values: int = 0
    """What sync/powersgd.py sends of `trainable` gradients in a step."""
    hides_whole: bool = False
    """Measured here: whole gradients travel in a small part of a step's compute, and memory is ample."""
    rounds: Rounds | None = None
    """With sync: streaming and sparse."""
    orthogonal: int = 0
    """Trained values that Muon steps, with one moment each instead of AdamW's two."""

    def off_rank(self, mesh: Mesh) -> int:
        """Values that other tensor ranks have, and this one has not."""
        return self.divided.values * (mesh.tensor - 1) // mesh.tensor


@dataclass(frozen=True)
class Plan:
    """How a run will go. Sizes in sequences, lengths in tokens, memory in bytes."""

    replicas: int
    """Ranks, whatever they share."""
    global_batch_size: int
    micro_batches: int
    """Of one step over all replicas: the leaves of the sum."""
    accumulation: int
    """Micro-batches of one step on one data rank."""
    micro_batch_size: int
    """Rows of the largest micro-batch."""
    sequence_length: int
    sample_rows: int
    row_tokens: int
    """Sequences of a sample, and tokens of each, on the mean; blocks have one of `sequence_length`."""
    samples: int
    """Positions of the whole run; the last step may be smaller than the others."""
    max_steps: int
    epochs: float
    hyper: Hyper
    warmup_steps: int
    eval_steps: int
    save_steps: int
    shard_optimizer: bool
    """Each holder steps the optimizer on its own 1/n (sync/zero.py)."""
    bucket_mb: float
    """What travels together at first, MiB."""
    mesh: Mesh
    """How the ranks divide."""
    sent_bytes_per_step: int
    """By each rank."""
    across_bytes_per_step: int
    """Of them, between ranks that share samples: activations, keys and values."""
    model_bytes: int
    """Weights, gradients, optimizer state and received gradients on each replica."""
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def sample_tokens(self) -> int:
        return self.sample_rows * self.row_tokens

    def rows(self, leaf: int) -> range:
        """Rows of the global batch that micro-batch `leaf` holds; sizes differ by one at most."""
        n, m = self.global_batch_size, self.micro_batches
        return range(leaf * n // m, (leaf + 1) * n // m)

    def leaves(self, rank: int) -> range:
        """The micro-batches of `rank`: of its data rank."""
        first = self.mesh.data_rank(rank) * self.accumulation
        return range(first, first + self.accumulation)

    def positions(self, step: int) -> range:
        """Positions in the order of samples that optimizer step `step` uses."""
        start = step * self.global_batch_size
        return range(start, min(start + self.global_batch_size, self.samples))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def largest_micro_batch(config: Config, world: World) -> int:
    """The most rows that a micro-batch can have here."""
    return math.ceil(config.global_batch_size / mesh_of(config, world.size).data)


def make_plan(config: Config, world: World, facts: Facts, micro_batch: int) -> Plan:
    """Decide. `micro_batch`: the most rows of a forward pass, as given or found by trying.

    Raises ConfigError where strict mode cannot hold or the data are too few.
    """
    reasons: dict[str, str] = {}
    mesh = mesh_of(config, world.size)
    leaves = _micro_batches(config, mesh, micro_batch, reasons)
    steps, samples = _length(config, facts, reasons)
    hyper = scale(config)
    reasons["learning_rate"] = hyper.reason
    warmup, reasons["warmup_steps"] = warmup_steps(config, hyper, steps)
    tenth = max(1, round(steps / 10))
    shard = _shard_optimizer(config, facts, mesh.holders, reasons)
    across = _across_bytes(config, facts, mesh, leaves // mesh.data)
    sent = _sent_bytes(config, facts, mesh, leaves // mesh.data) + across
    memory = _memory_bytes(config, facts, mesh, shard)
    reasons["mesh"] = _why_mesh(mesh, config, world, facts)
    reasons["sent_bytes_per_step"] = f"{facts.trainable / 1e6:.2f} M gradients, {config.sync}" + (
        f", {config.wire} on the wire" if config.wire != "float32" else ""
    )
    if facts.rounds:
        every, sent_mb = facts.rounds.every, facts.rounds.sent_bytes / 1e6
        what = "the largest changes" if config.sync == "sparse" else f"deltas in {config.wire}"
        reasons["sent_bytes_per_step"] = f"{what}, {sent_mb:.2f} MB in {every} steps"
        reasons["outer"] = ": ".join(facts.rounds.shown)
    if facts.attention:
        reasons["attention"] = ": ".join(facts.attention)
    return Plan(
        replicas=world.size,
        global_batch_size=config.global_batch_size,
        micro_batches=leaves,
        accumulation=leaves // mesh.data,
        micro_batch_size=math.ceil(config.global_batch_size / leaves),
        sequence_length=config.sequence_length,
        sample_rows=facts.sample_rows,
        row_tokens=facts.row_tokens or config.sequence_length,
        samples=samples,
        max_steps=steps,
        epochs=samples / facts.train_samples,
        hyper=hyper,
        warmup_steps=warmup,
        eval_steps=config.eval_steps or tenth,
        save_steps=config.save_steps or tenth,
        shard_optimizer=shard,
        bucket_mb=DEFAULT_BUCKET_MB if config.bucket_mb == "auto" else config.bucket_mb,
        mesh=mesh,
        sent_bytes_per_step=sent,
        across_bytes_per_step=across,
        model_bytes=memory,
        reasons=reasons,
    )


def with_micro_batch(plan: Plan, config: Config, micro_batch: int) -> Plan:
    """The same plan with smaller micro-batches; the global batch stays."""
    reasons = dict(plan.reasons)
    leaves = _micro_batches(config, plan.mesh, micro_batch, reasons)
    return replace(
        plan,
        micro_batches=leaves,
        accumulation=leaves // plan.mesh.data,
        micro_batch_size=math.ceil(config.global_batch_size / leaves),
        reasons=reasons,
    )


def _micro_batches(config: Config, mesh: Mesh, micro_batch: int, reasons: dict[str, str]) -> int:
    batch, n = config.global_batch_size, mesh.data
    if config.determinism != "strict":
        count = n * math.ceil(batch / (n * micro_batch))
        found = "found by trying" if config.micro_batch_size == "auto" else "as given"
        reasons["micro_batch_size"] = found
        if n > batch:
            reasons["micro_batch_size"] = f"{n - batch} of {n} replicas have no row: batch {batch}"
        return count
    if n & (n - 1):
        raise ConfigError(
            f"replicas: found {n}; determinism: strict needs a power of two "
            f"(a fixed binary tree is cut at whole subtrees)"
        ).on_every_rank()
    if config.sync in LOCAL:
        raise ConfigError(
            f"sync: found {config.sync}, whose replicas step alone, with determinism: strict, which gives "
            f"the same bits at any number of replicas; write determinism: default, or sync: exact"
        ).on_every_rank()
    if config.sync not in ("exact", "reference"):
        raise ConfigError(
            f"sync: found {config.sync}; its order of sums depends on the number of replicas, so "
            f"determinism: strict needs sync: exact"
        ).on_every_rank()
    unit = max(STRICT_REPLICAS, n)
    count = unit * math.ceil(batch / (unit * micro_batch))
    reasons["micro_batch_size"] = (
        f"strict: {count} micro-batches a step, the same for every number of replicas up to {unit}"
    )
    return count


def mesh_of(config: Config, n: int) -> Mesh:
    """How `n` ranks divide. Raises ConfigError for a product that is not `n`, and for what does not combine."""
    asked = config.mesh or MeshConfig()
    sharded = config.sync == "sharded"
    _refuse_on_mesh(config, asked)
    left = max(1, n // (asked.context * asked.tensor))
    copies = 1 if asked.replica == "auto" else asked.replica
    whole = left // copies if sharded else 1
    shard = max(1, whole) if asked.shard == "auto" else asked.shard
    replica = max(1, left // shard) if asked.replica == "auto" else asked.replica
    mesh = Mesh(replica, shard, asked.context, asked.tensor)
    if mesh.size != n:
        further = "".join(
            f" x {axis} {size}"
            for axis, size in (("context", mesh.context), ("tensor", mesh.tensor))
            if size > 1
        )
        raise ConfigError(
            f"mesh: found replica {replica} x shard {shard}{further} = {mesh.size}, but there are {n} "
            f"ranks; make the product {n}, or leave {'shard' if sharded else 'replica'} out"
        ).on_every_rank()
    return mesh


def _refuse_on_mesh(config: Config, asked: MeshConfig) -> None:
    """ConfigError for axes that a strategy, or strict mode, does not have."""
    if isinstance(asked.shard, int) and asked.shard > 1 and config.sync in LOCAL:
        raise ConfigError(
            f"mesh.shard: found {asked.shard} with sync: {config.sync}, each of whose replicas is one rank so "
            f"far; leave shard out"
        ).on_every_rank()
    if config.optim == "muon" and asked.tensor > 1:
        raise ConfigError(
            f"mesh.tensor: found {asked.tensor} with optim: muon, which steps whole matrices; leave tensor out"
        ).on_every_rank()
    if isinstance(asked.shard, int) and asked.shard > 1 and config.sync != "sharded":
        raise ConfigError(
            f"mesh.shard: found {asked.shard} with sync: {config.sync}, which keeps the weights whole; "
            f"write sync: sharded, or leave shard out"
        ).on_every_rank()
    for axis, size in (("context", asked.context), ("tensor", asked.tensor)):
        if size == 1:
            continue
        narrow = config.sync in ("quantized", "powersgd") and axis == "tensor"
        if config.sync in ("ddp", "reference", *LOCAL) or narrow:
            raise ConfigError(
                f"mesh.{axis}: found {size} with sync: {config.sync}, which knows no such axis; write "
                f"sync: exact or sharded, or leave {axis} out"
            ).on_every_rank()
        if config.determinism == "strict":
            raise ConfigError(
                f"mesh.{axis}: found {size} with determinism: strict; a sample's own sums would depend on "
                f"the mesh; write determinism: default, or leave {axis} out"
            ).on_every_rank()


def _shard_optimizer(config: Config, facts: Facts, n: int, reasons: dict[str, str]) -> bool:
    """Whether the optimizer runs on shards; raises ConfigError for what does not combine."""
    strict = config.determinism == "strict"
    asked = config.shard_optimizer
    if config.sync == "quantized":
        return _quantized(config, n, reasons)
    deltas = config.sync == "streaming"  # have a wire of their own
    if config.wire in ("int8", "int4") and not deltas:
        raise ConfigError(
            f"wire: found {config.wire} with sync: {config.sync}, which sends float32 or bfloat16; write "
            f"sync: quantized"
        ).on_every_rank()
    muon = config.optim == "muon"
    whole = config.sync != "exact" or strict or asked is False or muon
    if config.wire != "float32" and whole and not deltas:
        with_ = "determinism: strict" if strict else "optim: muon" if muon else "shard_optimizer: false"  # fmt: skip
        if config.sync != "exact":
            with_ = f"sync: {config.sync}"
        raise ConfigError(
            f"wire: found {config.wire} with {with_}, which sums and keeps whole float32 "
            f"gradients; write wire: float32, or sync: exact alone"
        ).on_every_rank()
    if asked is True and (config.sync != "exact" or strict):
        raise ConfigError(
            "shard_optimizer: found true, which needs sync: exact and not determinism: strict "
            "(the order of the norm's sum would depend on the number of replicas)"
        ).on_every_rank()
    few = facts.gradient_bytes < SHARD_BYTES and config.wire == "float32" and asked == "auto"
    fast = facts.hides_whole and config.wire == "float32" and asked == "auto"
    if strict or n == 1 or few or fast or asked is False or config.sync != "exact" or muon:
        why = "few bytes" if few else "as given" if asked is False else "alone" if n == 1 else ""
        why = "muon steps whole matrices" if muon else why
        why = why or ("fast link" if fast else config.sync)
        reasons["shard_optimizer"] = "strict" if strict else why
        return False
    reasons["shard_optimizer"] = f"1/{n} of the optimizer's memory and time on each replica"
    return True


def _quantized(config: Config, n: int, reasons: dict[str, str]) -> bool:
    """As `_shard_optimizer`."""
    if config.wire not in ("int8", "int4"):
        raise ConfigError(
            f"wire: found {config.wire} with sync: quantized, which sends codes; write wire: int8 or int4, "
            f"or sync: exact"
        ).on_every_rank()
    if config.shard_optimizer is False:
        raise ConfigError(
            "shard_optimizer: found false with sync: quantized, whose optimizer runs where gradients are "
            "summed; leave it out"
        ).on_every_rank()
    reasons["shard_optimizer"] = "quantized" if n > 1 else "alone"
    return n > 1


def _sent_bytes(config: Config, facts: Facts, mesh: Mesh, accumulation: int) -> int:
    """Gradients and weights that each rank sends in a step; formulas in the strategies' files."""
    n = mesh.holders
    size = facts.gradient_bytes - facts.off_rank(mesh) * _width(facts)
    if facts.rounds:
        return facts.rounds.sent_bytes // facts.rounds.every
    if config.sync == "reference":
        return size * (n - 1) * accumulation
    if config.sync == "quantized":
        return 2 * (n - 1) * encoded_bytes(config.wire, -(-size // _width(facts) // n))
    if config.sync == "powersgd":
        size = facts.thin_values * _width(facts)
    sent = 2 * size * (n - 1) // n // (2 if config.wire == "bfloat16" else 1)
    if config.sync == "sharded":
        over = mesh.shard * mesh.context
        # Weights for each forward pass, most of them again for the backward pass; gradients once.
        sent = int(size * (over - 1) // over * ((2 - facts.once) * accumulation + 1))
        sent += 2 * size // over * (mesh.replica - 1) // mesh.replica
    return sent


def _across_bytes(config: Config, facts: Facts, mesh: Mesh, accumulation: int) -> int:
    """What tensor ranks send each other in a step (sync/tensor.py)."""
    rows = math.ceil(config.global_batch_size / mesh.data)
    length, chunks = config.sequence_length, 2 * mesh.context
    held = (
        2 * math.ceil(length / chunks) if mesh.context > 1 else length
    )  # as attention/shard.py pads
    return facts.divided.sent_bytes(
        rows * held,
        passes=accumulation,
        width=2 if config.bf16 else 4,
        ranks=mesh.tensor,
        recompute=config.gradient_checkpointing,
    )


def _memory_bytes(config: Config, facts: Facts, mesh: Mesh, shard: bool) -> int:
    """Weights, gradients, optimizer state and received pieces on each rank."""
    moments = {"adamw": 2, "sgd": int(config.momentum > 0), "muon": 2}[config.optim]
    size = facts.gradient_bytes - facts.off_rank(mesh) * _width(facts)
    weights = 4 * (facts.parameters - facts.off_rank(mesh)) - facts.spared_bytes
    if config.optim == "muon":
        weights -= 4 * facts.orthogonal  # one moment less
    if facts.rounds:
        return weights + size * (1 + moments) + facts.rounds.state_bytes
    if config.sync == "sharded":
        return (weights + size * (1 + moments)) // (mesh.shard * mesh.context)
    n = mesh.holders
    if shard:
        moments += int(config.wire != "float32")  # master weights
        feedback = size * (n - 1) // n if config.wire == "int4" else 0
        return weights + size + size * moments // n + feedback
    received = int(n > 2 and config.sync == "exact")
    feedback = size if config.sync == "powersgd" and n > 1 else 0
    return weights + size * (1 + moments + received) + feedback


def _width(facts: Facts) -> int:
    return facts.gradient_bytes // max(1, facts.trainable)


def _why_mesh(mesh: Mesh, config: Config, world: World, facts: Facts) -> str:
    """What each axis does here."""
    parts = [f"{mesh.data} data {'rank' if mesh.data == 1 else 'ranks'}"]
    if mesh.shard > 1:
        over = mesh.shard * mesh.context
        parts.append(f"weights over {over}" + (" (shard x context)" if mesh.context > 1 else ""))
    if mesh.context > 1:
        parts.append(f"{config.sequence_length // mesh.context} tokens of a sequence on each rank")
    if mesh.tensor > 1:
        share = facts.divided.values / max(1, facts.trainable)
        beyond = "" if world.local_size % mesh.tensor == 0 else ", ACROSS hosts, which is slow"
        parts.append(f"{share:.0%} of the weights in {mesh.tensor} slices{beyond}")
    return ", ".join(parts)


def _length(config: Config, facts: Facts, reasons: dict[str, str]) -> tuple[int, int]:
    """(optimizer steps, samples) of the run."""
    if config.max_steps is not None:
        reasons["max_steps"] = "as given"
        return config.max_steps, config.max_steps * config.global_batch_size
    samples = max(1, round(config.num_train_epochs * facts.train_samples))
    steps = math.ceil(samples / config.global_batch_size)
    reasons["max_steps"] = f"{config.num_train_epochs:g} epochs of {facts.train_samples} samples"
    return steps, samples


def _sync(plan: Plan, config: Config) -> str:
    if config.sync == "sharded":
        over = plan.mesh.shard * plan.mesh.context
        return f"sharded {plan.mesh.replica} x {over}"
    return config.sync + (", optimizer on shards" if plan.shard_optimizer else "")


def _outer_row(facts: Facts) -> list[tuple[str, str, str]]:
    """How replicas that step alone come together."""
    return [("outer", *facts.rounds.shown)] if facts.rounds else []


def _mesh_row(plan: Plan) -> list[tuple[str, str, str]]:
    """Where ranks share more than gradients."""
    if plan.mesh.shard * plan.mesh.inner == 1:
        return []
    rows = [("mesh", str(plan.mesh), plan.reasons["mesh"])]
    if "context" in plan.reasons:
        scheme, _, why = plan.reasons["context"].partition(": ")
        rows.append(("context", scheme, why))
    return rows


def _buckets(plan: Plan) -> list[tuple[str, str, str]]:
    if "bucket_mb" not in plan.reasons:
        return []
    return [("buckets", f"{plan.bucket_mb:g} MiB", plan.reasons["bucket_mb"])]


def _global_batch(plan: Plan, config: Config) -> str:
    if config.grpo:
        count = config.grpo.num_generations
        return f"{plan.global_batch_size} prompts x {count} completions"
    tokens = plan.global_batch_size * plan.sample_tokens
    each = str(plan.sequence_length)
    if plan.sample_rows > 1:
        each = f"{plan.sample_rows} x about {plan.row_tokens}"
    return f"{plan.global_batch_size} x {each} = {tokens:,} tokens"


def describe(plan: Plan, config: Config, world: World, facts: Facts) -> list[tuple[str, str, str]]:
    """(what, value, reason) rows of the table that is shown before the first step."""
    place = "CPU" if world.device == "cpu" else world.device.split(":")[0].upper()
    count = f"{world.threads} thread{'' if world.threads == 1 else 's'}"
    threads = f", {count} each" if world.device == "cpu" else ""
    h = plan.hyper
    optimizer = f"lr {h.learning_rate:.4g}, weight decay {h.weight_decay:.3g}"
    if config.optim != "sgd":
        optimizer = ("muon, " if config.optim == "muon" else "") + optimizer
        optimizer += f", betas {h.beta1:.3g} {h.beta2:.4g}"
    return [
        ("model", f"{facts.parameters / 1e6:.2f} M parameters", f"{facts.trainable / 1e6:.2f} M trained"),
        *([("attention", *facts.attention)] if facts.attention else []),
        ("replicas", f"{plan.replicas} on {place}", f"sync {_sync(plan, config)}{threads}"),
        *_mesh_row(plan),
        (
            "global batch",
            _global_batch(plan, config),
            f"{plan.mesh.data} {'replicas' if plan.mesh.data == plan.replicas else 'data ranks'} x "
            f"{plan.accumulation} micro-batches of up to "
            f"{plan.micro_batch_size}",
        ),
        ("micro-batch", str(plan.micro_batch_size), plan.reasons["micro_batch_size"]),
        ("steps", f"{plan.max_steps:,}", plan.reasons["max_steps"]),
        ("optimizer", optimizer, plan.reasons["learning_rate"]),
        (
            "schedule",
            f"{config.lr_scheduler_type}, warm-up {plan.warmup_steps}",
            plan.reasons["warmup_steps"],
        ),
        (
            "on the wire",
            f"{plan.sent_bytes_per_step / 1e6:.2f} MB a step and rank",
            plan.reasons["sent_bytes_per_step"],
        ),
        *_outer_row(facts),
        *_buckets(plan),
        ("memory", f"{plan.model_bytes / 1e6:.1f} MB a replica", "without activations"),
        (
            "held out",
            f"{facts.eval_samples:,} of {facts.eval_samples + facts.train_samples:,} samples",
            f"evaluation every {plan.eval_steps} steps, checkpoint every {plan.save_steps}",
        ),
    ]  # fmt: skip
