"""A run, set up: data, model, plan, strategy and optimizer, from the newest checkpoint if there is one.

Everything is decided in the order in which it can be known, and each decision is the same on every
rank. A failure on one rank is every rank's (train/together.py).
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from unisono.attention.choose import Choice, choose, same, told, windows_of
from unisono.codes import wire_bytes_of
from unisono.config import AttentionConfig, Config
from unisono.data.blocks import read_index
from unisono.data.examples import examples
from unisono.data.order import Order
from unisono.data.pairs import Pairs, Samples
from unisono.data.prepare import Prepared, prepare
from unisono.data.prompts import PreparedPrompts, Prompts, prepare_prompts
from unisono.data.show import masks
from unisono.data.tokenizer import check_vocabulary, load_tokenizer
from unisono.errors import CheckpointError, ConfigError, ReplicaError, UnisonoError
from unisono.files import write_json
from unisono.forecast.probe import Probe
from unisono.mesh import Divided, Mesh
from unisono.model import adapter, quantize
from unisono.model.load import load_model
from unisono.observe.flops import Flops, count
from unisono.observe.noise import Meter
from unisono.observe.screen import Screen
from unisono.plan import (
    Facts,
    Plan,
    Rounds,
    describe,
    largest_micro_batch,
    make_plan,
    mesh_of,
)
from unisono.sync import Strategy, broadcast_model, make_strategy
from unisono.sync.digest import check_replicas, sha256_of_each
from unisono.sync.ledger import Group, Ledger
from unisono.sync.link import BUSY_S, Link, measure_link
from unisono.sync.outer import Outer, default_rate, delta_codec
from unisono.sync.powersgd import are_embeddings, travelling_values
from unisono.sync.slices import Slices
from unisono.sync.sparse import sparse_outer
from unisono.sync.tensor import apply, divide
from unisono.train import checkpoint, tuning
from unisono.train.auto import Climber, begin
from unisono.train.context import Parts, asked_attention, make_parts, with_context
from unisono.train.known import find_probe, link_of
from unisono.train.objective import Measured, Objective, causal_lm, target_tokens
from unisono.train.online import Online, OnlineFeed, make_online, policy_of
from unisono.train.preference import preference
from unisono.train.reference import reference_of, with_reference
from unisono.train.refuse import refuse
from unisono.train.reward import reward
from unisono.train.reward_funcs import load_rewards
from unisono.train.state import for_muon, load_optimizer, optimizer_factory
from unisono.train.step import Feed
from unisono.train.stopping import Stop
from unisono.train.together import attempt
from unisono.train.trial import find_micro_batch, seconds_of_pass
from unisono.train.tuning import Tuner
from unisono.train.vote import Outcome
from unisono.world import World, cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PREPARATION_TIMEOUT_S = 7 * 24 * 3600.0
"""While one rank tokenizes, the others wait as long as that takes."""
AMPLE = 0.25
"""Of the free memory may go to weights, gradients and optimizer before shards are for memory's sake."""
TUNED = "tuned"
"""In the cache folder: sizes of buckets that were found."""
SAME_RUN = (
    "seed", "global_batch_size", "sequence_length", "optim", "determinism", "lora", "dpo", "reward",
    "grpo",
)  # fmt: skip
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
    prepared: Prepared | PreparedPrompts
    train_blocks: Samples | Prompts
    eval_blocks: Samples | Prompts
    order: Order
    objective: Objective
    sync: Strategy
    plan: Plan
    flops: Flops
    """Of the whole model."""
    online: Online | None = None
    """What draws completions and rewards them, in online tuning."""
    parts: Parts | None = None
    """Of sequences, where the context axis has several ranks."""
    progress: Progress = field(default_factory=Progress)
    link: Link | None = None
    """As measured at the start, or by a probe; None where nothing was decided by it."""
    probe: Probe | None = None
    """Rank 0's, of this hardware."""
    tuner: Tuner | None = None
    """Finds the size of buckets on the first steps; None where it is given."""
    noise: Meter = field(default_factory=Meter)
    """Gradient noise scale, since the start of this process."""
    facts: Facts | None = None
    slices: Slices = field(default_factory=Slices)
    asked: Config | None = None
    """With `sync: auto`, where `config` has what it has become."""
    climber: Climber | None = None
    """Follows the link, with `sync: auto`."""

    @property
    def feed(self) -> Feed:
        if self.online:
            assert isinstance(self.train_blocks, Prompts)
            return OnlineFeed(
                self.train_blocks, self.order, self.plan, self.config.seed, self.online
            )
        assert not isinstance(self.train_blocks, Prompts)
        return Feed(self.train_blocks, self.order, self.plan, self.config.seed)

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.progress.step / self.plan.max_steps * self.plan.epochs

    @property
    def data_identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return _identity(self.prepared)

    def tokens_of(self, outcome: Outcome) -> int:
        """That the step at hand processed: padding included, or what was generated."""
        if self.online:
            length = list(self.objective.metrics).index("completions/mean_length")
            return int(outcome.sums[2 * length])
        return len(self.plan.positions(self.progress.step)) * self.plan.sample_tokens

    def measure(self, batch: Any) -> Measured:
        """The objective of `batch`, or of this rank's part of its sequences."""
        model, device, bf16 = self.sync.model, self.world.device, self.config.bf16
        if self.parts is None:
            return self.objective.measure(model, batch, device, bf16)
        part = self.parts.of(batch)
        with self.parts.reaching(part):
            return self.objective.measure(model, part, device, bf16)


def set_up(
    config: Config, world: World, screen: Screen, stop: Stop, ledger: Ledger, votes: Group
) -> Job:
    """Collective: data, model, plan, strategy and optimizer, from the newest checkpoint if any."""
    if config.determinism == "strict":
        torch.use_deterministic_algorithms(True)
    if "tensorboard" in config.report_to and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "report_to: found 'tensorboard', which is not installed; "
            "pip install 'unisono[tensorboard]'"
        ).on_every_rank()
    mesh = mesh_of(config, world.size)
    refuse(config, mesh)
    objective = make_objective(config)
    _same_threads(votes, screen)
    run = Path(config.output_dir)
    named = config.grpo.reward_funcs if config.grpo else ()
    rewards = attempt(votes, lambda: load_rewards(named, world.device)) or []
    made_by = "".join(reward.digest for reward in rewards)
    tokenizer, prepared = _prepare_data(config, world, screen, ledger, run, made_by)
    train_blocks, eval_blocks = prepared.blocks("train"), prepared.blocks("eval")
    found = _find_checkpoint(config, run, _identity(prepared), world, votes, screen)
    if config.dpo is not None and not config.dpo.reference_free:
        assert isinstance(prepared, Prepared)
        train_blocks, eval_blocks = _with_reference(
            config, mesh, world, screen, ledger, tokenizer, prepared, (train_blocks, eval_blocks)
        )

    def build_model() -> "tuple[PreTrainedModel, Choice, Any]":
        model = load_model(
            str(found.path) if found and config.lora is None else config.model,
            tokenizer,
            seed=config.seed,
            sequence_length=config.sequence_length,
            gradient_checkpointing=config.gradient_checkpointing,
            score=config.reward is not None,
            quantized=quantize.asked(config.lora, world.device, config.bf16),
        )
        if config.wants_pairs:
            _without_dropout(model)
        check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
        if config.lora is not None:
            wanted = config.lora.model_dump()
            model = adapter.attach(
                model,
                wanted,
                config.seed,
                found.path if found else None,
                score=config.reward is not None,
            )
        policy = policy_of(model) if config.grpo else None  # before anything is hooked
        return model, choose(model, asked_attention(config, mesh), world.device), policy

    built = attempt(votes, build_model)
    assert built is not None
    model, attention, policy = built
    # What is divided need never be whole on a device: slices go there, and FSDP's parts.
    whole = config.sync != "sharded"
    if whole and mesh.tensor == 1:
        model.to(world.device)
    if config.lora is None:
        broadcast_model(model, votes)
    else:
        _share_adapters(model, votes)
    online = None
    if config.grpo is not None:
        online = attempt(
            votes, lambda: make_online(config, world, policy, rewards, tokenizer, ledger.clock)
        )
        assert online is not None
        if online.reference is not None:
            check_replicas(online.reference.named_parameters(), votes, step=0)
        objective = online.objective
    division = attempt(votes, lambda: divide(model, mesh.tensor)) if mesh.tensor > 1 else None
    if division and division.note:
        screen.say(f"tensor: {division.note}", "dim")

    trained = [p for p in model.parameters() if p.requires_grad]
    asked, climber, link = config, None, None
    if config.sync == "auto":
        gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        rung = found.meta.get("rung") if found else None
        run_rows = partial(_pass, config, world, objective, model, train_blocks)
        config, climber = begin(
            config, world, mesh, model, train_blocks, gradient_bytes, run_rows, votes, screen, rung
        )
        link = climber.link if climber else None
    facts = Facts(
        parameters=sum(quantize.values(p) for p in model.parameters()),
        trainable=sum(p.numel() for p in trained),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        train_samples=len(train_blocks),
        eval_samples=len(eval_blocks),
        sample_rows=2 if config.wants_pairs else 1,
        row_tokens=_row_tokens(prepared) if config.wants_pairs else 0,
        divided=division.divided if division else Divided(),
        once=_kept(model) if config.sync == "sharded" else 0.0,
        thin_values=travelling_values(
            [p.shape for p in trained], are_embeddings(model, trained), config.powersgd.rank
        ),
        attention=(attention.name, attention.reason),
        spared_bytes=quantize.spared_bytes(model) if quantize.told(model) else 0,
        orthogonal=sum(p.numel() for p in for_muon(model)) if config.optim == "muon" else 0,
    )
    outer, rounds = rounds_of(config, mesh, [p.numel() for p in trained], screen)
    facts = replace(facts, rounds=rounds)
    strict = config.determinism == "strict"
    largest = largest_micro_batch(config, world)
    given = config.micro_batch_size
    rows = given if isinstance(given, int) else min(8, -(-config.global_batch_size // 8))
    plan = make_plan(config, world, facts, min(rows, largest))
    probe = attempt(votes, lambda: find_probe(config, world, screen.warn), world.is_main)
    link = _link(config, world, votes, probe, link)
    # A pass that communicates is not what one rank does alone.
    could_be_whole = config.sync == "exact" and config.shard_optimizer == "auto"
    if link and plan.shard_optimizer and could_be_whole and mesh.inner == 1:
        run_rows = partial(_pass, config, world, objective, model, train_blocks)
        timed = partial(seconds_of_pass, run_rows, plan.micro_batch_size, model, world.device)
        compute_s = attempt(votes, timed)
        assert compute_s is not None
        step_s = float(votes.each(compute_s * plan.accumulation).min())
        if _hides_whole(link, facts, plan, world, step_s, votes):
            facts = replace(facts, hides_whole=True)
            plan = make_plan(config, world, facts, min(rows, largest))
    plan, tuner = _buckets(facts, plan, link, votes, found, config, probe)
    flops = count(model, config.gradient_checkpointing)
    flops = replace(flops, windows=windows_of(attention, flops.windows))
    parts = make_parts(
        config, mesh, attention.hook, plan.micro_batch_size, flops.windows, ledger, world.device
    )
    if parts:
        plan = with_context(plan, config, parts)
    slices = Slices()
    if division:
        slices = apply(model, division, _tensor_group(mesh, ledger, config.timeout_s))
        if whole:
            model.to(world.device)
    sync = strategy_of(
        config,
        plan,
        model,
        ledger,
        slices,
        outer,
        layout=found.meta.get("layout") if found else None,
        first_step=found.meta["progress"]["step"] if found else 0,
    )
    job = Job(
        config, world, run, screen, stop, ledger, votes, tokenizer, model, prepared,
        train_blocks, eval_blocks, Order(len(train_blocks), config.seed), objective, sync, plan, flops, online, parts, link=link, probe=probe, tuner=tuner,
        facts=facts, slices=slices, asked=asked, climber=climber,
    )  # fmt: skip
    if found and strict:
        _check_same_bits(found, plan, config)
    if found:
        if note := attempt(votes, lambda: load_optimizer(found.path, sync)):
            screen.warn(f"resume: {note}")
        job.progress = Progress(**found.meta["progress"])
    if given == "auto" and not strict and not sync.lockstep:
        best = find_micro_batch(partial(try_rows, job), largest, sync, votes, world.device)
        if best == 0:
            raise UnisonoError(
                "micro_batch_size: memory does not hold one row; " + memory_advice()
            ).on_every_rank()
        found_plan = make_plan(config, world, facts, best)
        reasons = {**plan.reasons, **found_plan.reasons}
        job.plan = replace(found_plan, bucket_mb=plan.bucket_mb, reasons=reasons)
    screen.plan(describe(job.plan, config, world, facts))
    attempt(votes, lambda: _write_plan(job), world.is_main)
    return job


def strategy_of(
    config: Config,
    plan: Plan,
    model: "PreTrainedModel",
    ledger: Ledger,
    slices: Slices,
    outer: Outer | None,
    *,
    layout: Mapping[str, Any] | None,
    first_step: int,
) -> Strategy:
    """Collective: what `config` and `plan` say; `layout` as an earlier one has learned it."""
    return make_strategy(
        config.sync,
        model,
        ledger,
        optimizer=optimizer_factory(config, plan.hyper, model),
        bucket_mb=plan.bucket_mb,
        leaves=plan.accumulation if config.determinism == "strict" else None,
        shard=plan.shard_optimizer,
        wire=config.wire,
        tables=config.shard_optimizer is not True,
        low_rank=(config.powersgd.rank, math.ceil(config.powersgd.start * plan.max_steps)),
        layout=layout,
        mesh=plan.mesh,
        slices=slices,
        outer=outer and replace(outer, first_step=first_step, last_step=plan.max_steps),
        timeout_s=config.timeout_s,
    )


def make_objective(config: Config) -> Objective:
    """What `config` asks to minimise."""

    if config.dpo is not None:
        return preference(config.dpo)
    if config.reward is not None:
        return reward(config.reward)

    def language(model: Any, batch: Any, device: str, bf16: bool) -> Measured:
        return Measured(causal_lm(model, batch, device, bf16), target_tokens(batch))

    return Objective(language)


def _kept(model: torch.nn.Module) -> float:
    """Share of the weights that stay whole between passes (sync/sharded.py): the last block, and the rest."""
    from unisono.sync.sharded import find_blocks

    blocks = [sum(p.numel() for p in block.parameters()) for block in find_blocks(model)]
    return 1 - sum(blocks[:-1]) / sum(p.numel() for p in model.parameters())


def rounds_of(
    config: Config, mesh: Mesh, sizes: list[int], screen: Screen
) -> tuple[Outer | None, Rounds | None]:
    """How replicas that step alone come together, and what the plan says of it; `sizes`: of what is trained."""
    if config.sync == "sparse":
        outer = sparse_outer(
            sync_every=config.sparse.sync_every,
            top_k=config.sparse.top_k,
            chunk=config.sparse.chunk,
            feedback_decay=config.sparse.feedback_decay,
            learning_rate=config.sparse.outer_learning_rate,
        )
        how = (
            f"every {outer.sync_every} steps, {config.sparse.top_k} of {config.sparse.chunk} values"
        )
        why = f"as given, feedback {outer.feedback_decay:g}"
    elif config.sync == "streaming":
        asked, replicas = config.streaming, mesh.replica
        decay = asked.feedback_decay if config.wire in ("int8", "int4") else 0.0
        rate, why = default_rate(replicas, asked.sync_every, asked.outer_momentum)
        if asked.outer_learning_rate != "auto":
            rate, why = asked.outer_learning_rate, "as given"
        outer = Outer(
            codec=delta_codec(config.wire, feedback=decay > 0),
            sync_every=asked.sync_every,
            num_fragments=asked.num_fragments,
            fragment_sync_delay=asked.fragment_sync_delay,
            fragment_update_alpha=asked.alpha,
            learning_rate=rate,
            momentum=asked.outer_momentum,
            feedback_decay=decay,
        )
        if asked.sync_every == 1 and asked.outer_momentum and replicas > 1:
            screen.warn(
                "streaming.sync_every: found 1 with outer_momentum, which is momentum twice, and the worst of "
                "all sync_every (arXiv:2503.09799); write outer_momentum: 0, or sync: exact"
            )
        parts, delay = outer.num_fragments, outer.fragment_sync_delay
        how = f"every {outer.sync_every} steps" + (
            f", {parts} fragments in turn" if parts > 1 else ""
        )
        how += f", {delay} step{'s' if delay > 1 else ''} on the way" if delay else ""
        why = f"Nesterov {outer.momentum:g}, {why}" if outer.momentum else why
    else:
        return None, None
    rounds = Rounds(
        outer.sync_every,
        outer.sent_bytes(sizes, mesh.replica),
        4 * outer.state_values(sizes),
        (how, f"outer rate {outer.learning_rate:g}: {why}"),
    )
    return outer, rounds


def _tensor_group(mesh: Mesh, ledger: Ledger, timeout_s: float) -> Group:
    return Group("tensor", ledger, timeout_s, parts=mesh.groups("tensor"))


def _with_reference(
    config: Config,
    mesh: Mesh,
    world: World,
    screen: Screen,
    ledger: Ledger,
    tokenizer: "PreTrainedTokenizerFast",
    prepared: Prepared,
    splits: tuple[Samples | Prompts, Samples | Prompts],
) -> tuple[Samples, Samples]:
    """Collective: both splits with the log-probabilities of the model as it was."""
    from unisono.evaluate.model import find

    patient = Group("reference", Ledger(whereabouts=ledger.whereabouts), PREPARATION_TIMEOUT_S)
    model = str(config.model)

    def load() -> "PreTrainedModel":
        loaded = load_model(
            model,
            tokenizer,
            seed=config.seed,
            sequence_length=config.sequence_length,
            quantized=quantize.asked(config.lora, world.device, config.bf16),
        )
        choose(loaded, asked_attention(config, mesh), world.device)
        return loaded

    source = attempt(patient, lambda: find(model), world.is_main)
    made_from = {
        "model": source.digest if source else "",
        "dtype": "bfloat16" if config.bf16 else "float32",
        "attention": str(config.attention),
        "device": world.device.split(":")[0],
    }
    if config.lora is not None and config.lora.load_in_4bit:
        made_from["quantized"] = f"nf4, double: {config.lora.bnb_4bit_use_double_quant}"
    own = prepared.eval_folder
    folders = [prepared.folder, own] if own else [prepared.folder]
    values = [
        reference_of(
            folder, {**made_from, "data": folder.name}, cache_folder(), load, patient, world.device,
            config.bf16, lambda share: screen.preparing("reference", share),
        )
        for folder in folders
    ]  # fmt: skip
    train, evaluation = splits
    assert isinstance(train, Pairs) and isinstance(evaluation, Pairs)
    return with_reference(train, values[0]), with_reference(evaluation, values[-1])


def _without_dropout(model: torch.nn.Module) -> None:
    """Two answers are compared, with one another and with a reference, under the same network; as TRL has
    it. What `lora.dropout` asks for comes later and stays."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _row_tokens(prepared: Prepared | PreparedPrompts) -> int:
    """Mean of an answer with its prompt."""
    assert isinstance(prepared, Prepared)
    return max(1, round(prepared.num_tokens / read_index(prepared.folder).num_blocks))


def _share_adapters(model: torch.nn.Module, votes: Group) -> None:
    """Collective: rank 0's trained weights on all ranks; the frozen ones are only compared."""
    for p in model.parameters():
        if p.requires_grad:
            votes.broadcast(p.detach()).wait()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    try:
        check_replicas([*frozen, *quantize.scales(model)], votes, step=0)
    except ReplicaError as error:
        raise ReplicaError(
            f"model: the hosts have other base models: {error}"
        ).on_every_rank() from None


def _link(
    config: Config, world: World, votes: Group, probe: Probe | None, seen: Link | None
) -> Link | None:
    """Collective: the measured link, where anything is decided by it: as `seen` already, rank 0's probe, or a
    quick look."""
    # In strict mode the size of buckets changes nothing in the sums, but steps should be alike.
    alone = mesh_of(config, world.size).holders == 1
    if config.sync not in ("exact", "quantized") or alone or config.determinism == "strict":
        return None
    if seen:
        return seen
    mine = link_of(probe, world.device) if probe else None
    table = votes.each(*((mine.latency_s, mine.bytes_per_s) if mine else (0.0, 0.0)))
    latency_s, rate = table[0].tolist()
    if not rate:
        return measure_link(votes, world.device)
    return Link(latency_s, rate, BUSY_S if world.device == "cpu" else 0.0)


def _hides_whole(
    link: Link, facts: Facts, plan: Plan, world: World, step_s: float, votes: Group
) -> bool:
    """Collective: whether whole gradients hide, and would take little of the memory, on all ranks."""
    memory = psutil.virtual_memory().available // world.local_size
    if world.device != "cpu":
        memory = torch.cuda.mem_get_info(world.device)[0]
    # Beyond the plan's: the whole optimizer state instead of 1/n, and received gradients.
    more = 3 * facts.gradient_bytes
    roomy = plan.model_bytes + more < AMPLE * memory
    return bool(
        votes.sum(float(not roomy))[0] == 0
        and link.hides_whole(facts.gradient_bytes, world.size, step_s)
    )


def _buckets(
    facts: Facts,
    plan: Plan,
    link: Link | None,
    votes: Group,
    found: checkpoint.Manifest | None,
    config: Config,
    probe: Probe | None,
) -> tuple[Plan, Tuner | None]:
    """Collective: the plan with the size of buckets to begin with, and who tunes it further."""
    if link is None or config.bucket_mb != "auto":
        return plan, None
    mb, tuned = link.bucket_mb(facts.gradient_bytes, wire_bytes_of(config.wire)), False
    origin = "link, as probed, of" if probe else "link of"
    why = f"{origin} {link.bytes_per_s * 8 / 1e9:.3g} Gbit/s and {link.latency_s * 1e3:.2g} ms"
    key = tuning.key_of({**asdict(facts), "mesh": str(plan.mesh), "wire": config.wire}, link)
    mine = tuning.recall(cache_folder() / TUNED, key) if votes.rank == 0 else None
    recalled = votes.each(mine or 0.0)[0, 0].item()
    same = found and found.meta.get("mesh", str(Mesh(found.meta["replicas"]))) == str(plan.mesh)
    if found and same and found.meta.get("bucket_mb"):
        (mb, tuned), why = found.meta["bucket_mb"], "as in the checkpoint"
    elif recalled:
        mb, tuned, why = recalled, True, "as an earlier run has found"
    reasons = {**plan.reasons, "bucket_mb": why + ("" if tuned else ", tuned on live steps")}
    plan = replace(plan, bucket_mb=mb, reasons=reasons)
    return plan, Tuner(mb, done=tuned, key=key)


def _same_threads(votes: Group, screen: Screen) -> None:
    """Collective: the least number of threads of any rank, on all.

    It decides the order of some sums, and every replica must compute the same update.
    """
    mine = torch.get_num_threads()
    fewest = int(votes.each(float(mine)).min())
    if votes.sum(float(mine != fewest))[0]:
        screen.warn(f"hosts differ in cores: every replica uses {fewest} threads")
        torch.set_num_threads(fewest)


def _write_plan(job: Job) -> None:
    write_json(job.run / "run.json", job.config.model_dump(mode="json"))
    write_json(job.run / "plan.json", job.plan.as_json())


def _prepare_data(
    config: Config, world: World, screen: Screen, ledger: Ledger, run: Path, made_by: str
) -> tuple["PreTrainedTokenizerFast", Prepared | PreparedPrompts]:
    """Collective: tokenize once on each host, then open it on every rank.

    `made_by`: digest of what else prompts become samples by.
    """
    apart = Ledger(whereabouts=ledger.whereabouts)  # no part of the run, but a hang has a name
    patient = Group("preparation", apart, PREPARATION_TIMEOUT_S)
    cache = cache_folder()
    quarantine = run / "quarantine.jsonl"

    def both() -> tuple["PreTrainedTokenizerFast", Prepared | PreparedPrompts]:
        tokenizer = load_tokenizer(
            config.model, config.tokenizer, config.data, cache, screen.preparing
        )
        if config.grpo:
            mine = quarantine if world.is_main else None
            return tokenizer, prepare_prompts(config, tokenizer, mine, made_by)
        return tokenizer, prepare(config, tokenizer, cache, quarantine, screen.preparing)

    attempt(patient, both, mine=world.local_rank == 0)
    result = attempt(patient, both)
    assert result is not None
    same = patient.each(float(int(result[1].digest[:12], 16)))
    if (same != same[0]).any():
        raise ReplicaError(
            "data: the hosts have different data or tokenizers; copy one to all"
        ).on_every_rank()
    found = result[1]
    screen.say(f"data: {found.told()}")
    if found.num_dialogues and world.is_main:
        screen.show(masks(tuple(examples(config, result[0], count=2))))
    for note in (*found.problems, *found.notes):
        screen.warn(f"data: {note}")
    return result


def _identity(prepared: Prepared | PreparedPrompts) -> dict[str, Any]:
    return {"digest": prepared.digest, "samples": prepared.num_blocks}


def try_rows(job: Job, rows: int) -> None:
    """Forward and backward of `rows` samples, for timing."""
    _pass(job.config, job.world, job.objective, job.sync.model, job.train_blocks, rows)


def _pass(
    config: Config,
    world: World,
    objective: Objective,
    model: torch.nn.Module,
    blocks: Samples | Prompts,
    rows: int,
) -> None:
    batch = blocks.read([i % len(blocks) for i in range(rows)])
    objective.measure(model, batch, world.device, config.bf16).loss.backward()


def own_samples(job: Job) -> list[int]:
    """The samples of this rank in the step that is next; each is one rank's, also where ranks share it."""
    feed, mesh = job.feed, job.plan.mesh
    if not mesh.leads(job.world.rank):
        return []
    leaves = job.plan.leaves(job.world.rank)
    return [int(s) for leaf in leaves for s in feed.samples(job.progress.step, leaf)]


def weights_digest(job: Job, weights: dict[str, torch.Tensor]) -> str:
    """Collective: SHA-256 of all weights (as `state_dict` gave them) and optimizer state; with LoRA
    of the weights that are trained."""
    if job.config.lora is not None:
        weights = {name: weights[name] for name, _ in job.sync.named_parameters()}
    return sha256_of_each(chain(weights.items(), job.sync.optimizer_state()))


def memory_advice() -> str:
    return (
        "lower micro_batch_size or sequence_length, or set gradient_checkpointing: true; "
        "determinism: strict keeps the micro-batch it began with"
    )


# --- the checkpoint to go on from


def _find_checkpoint(
    config: Config, run: Path, data: dict[str, Any], world: World, votes: Group, screen: Screen
) -> checkpoint.Manifest | None:
    """Collective: the checkpoint to go on from, the same on every rank, or None."""

    given = Path(config.resume) if config.resume not in ("auto", "never") else None

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
            newest = checkpoint.find(run)[0]
            if newest and newest.step > found.step:
                raise ConfigError(
                    f"resume: {config.resume} is older than {newest.path}, which the next start "
                    f"would take; move that one away, or choose another output_dir"
                )
        if found:
            _check_same_run(config, found, data)
            was, now = found.meta["replicas"], world.size
            change = "" if was == now else f", {was} replicas then, {now} now"
            mesh = str(mesh_of(config, now))
            if was == now and (before := found.meta.get("mesh", mesh)) != mesh:
                change = f", on {before} then, {mesh} now"
            screen.say(f"resumed from {found.path} (step {found.step}{change})")
        return found

    found = attempt(votes, look, world.is_main)
    step = int(votes.each(float(found.step if found else -1))[0, 0])
    if step < 0:
        return None

    def follow() -> checkpoint.Manifest:
        other = checkpoint.find(run)[0] if given is None else checkpoint.verify(given)
        if other is None or other.step != step:
            raise CheckpointError(
                f"host {world.host} does not see checkpoint-{step} of {run}: every host must see "
                f"the same output_dir"
            )
        return other

    other = attempt(votes, follow, mine=not world.is_main)
    return found or other


def _check_same_bits(found: checkpoint.Manifest, plan: Plan, config: Config) -> None:
    """What strict mode needs to be equal beside the run itself."""
    now = {
        "micro_batches": plan.micro_batches,
        "threads": torch.get_num_threads(),
        "bf16": config.bf16,
    }
    before = {**found.meta, "bf16": found.meta["config"]["bf16"]}
    for name, value in now.items():
        if before[name] != value:
            raise ConfigError(
                f"{name}: found {value}, but {found.path} was trained with {before[name]}, and "
                f"determinism: strict would not give the same bits; restore it (micro_batch_size, "
                f"threads, bf16, at most 8 replicas), or choose another output_dir"
            ).on_every_rank()


def _check_same_run(config: Config, found: checkpoint.Manifest, data: dict[str, Any]) -> None:
    before = found.meta["config"]
    for name in SAME_RUN:
        now, then = config.model_dump(mode="json")[name], before.get(name)
        if then != now:
            raise ConfigError(
                f"{name}: found {now!r}, but {found.path} was trained with {then!r}; write "
                f"{name}={then!r} to go on, or another output_dir to start anew"
            )
    attention = before.get("attention", "auto")
    if not isinstance(attention, str):
        attention = AttentionConfig.model_validate(attention)
    if not same(config.attention, attention):
        raise ConfigError(
            f"attention: found {told(config.attention)}, but {found.path} was trained with "
            f"{told(attention)}; write it to go on, or another output_dir to start anew"
        )
    compared = config.dpo or (config.grpo and config.grpo.beta)
    if (config.lora or compared) and before["model"] != config.model:
        what = "holds adapters of" if config.lora else "was compared with"
        raise ConfigError(
            f"model: found {config.model!r}, but {found.path} {what} {before['model']!r}; "
            f"restore it to go on, or choose another output_dir to start anew"
        )
    if found.meta["data"] != data:
        raise ConfigError(
            f"data: not what {found.path} was trained on (files, tokenizer, packing, split "
            f"or reward functions changed); restore them to go on, or choose another output_dir to start anew"
        )
