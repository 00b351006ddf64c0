"""The job of the link bench, and every system that trains it, each behind one small interface.

The job is fixed by its numbers and a seed: a Llama from its configuration in float32, tokens drawn
from Zipf's law, another draw for every rank and step. All systems minimise the same mean loss with
the same fused AdamW and clip the same global norm, so what they compute is the same mathematics.
Each peer is used as its own documentation says is best; where that leaves a choice, a comment says
what was chosen and why. A peer that is not installed raises ImportError in `set_up`.
"""

import hashlib
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
SWEEP_MB = (1, 2, 4, 8, 25)
ZERO_OPTIONS = {
    "overlap_comm": True,
    "reduce_bucket_size": 4_000_000,
    "allgather_bucket_size": 4_000_000,
}
"""DeepSpeed's; sizes in values."""
Batch = tuple[Tensor, Tensor]
"""Token ids and the next token of each, int64 [batch, sequence]."""


@dataclass(frozen=True)
class Job:
    """What is trained. Everything follows from these numbers."""

    layers: int = 6
    hidden: int = 384
    vocab: int = 8192
    batch: int = 4
    sequence: int = 256
    accumulation: int = 1
    seed: int = 1

    def model(self) -> LlamaForCausalLM:
        """The same weights wherever it is called."""
        torch.manual_seed(self.seed)
        heads = max(1, self.hidden // 64)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 31 // 12,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=self.vocab,
            max_position_embeddings=max(512, self.sequence),
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
        return LlamaForCausalLM(config).float().train()

    def batches(self, rank: int, step: int) -> list[Batch]:
        """The micro-batches of a step: one draw for each rank, step and place."""
        generator = torch.Generator().manual_seed((self.seed << 48) + (rank << 32) + step)
        zipf = 1.0 / torch.arange(1, self.vocab + 1, dtype=torch.float64)
        size = self.accumulation * self.batch * (self.sequence + 1)
        drawn = torch.multinomial(zipf, size, replacement=True, generator=generator)
        ids = drawn.view(self.accumulation, self.batch, self.sequence + 1)
        return [(m[:, :-1].contiguous(), m[:, 1:].contiguous()) for m in ids]


def loss_of(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    ids, targets = batch
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def adamw(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


class System:
    """One way to train the job. As it stands: alone, the plain loop without communication."""

    wire_value_bytes: float = 4
    round_steps: int = 1
    """After so many steps what is sent repeats itself."""
    """Of a gradient on its way."""
    passes = 2.0
    """Times S (n-1)/n that each rank must send: reduce-scatter and all-gather."""
    again_at_each_rate = False
    """Whether it measures the link when it starts, so that another rate is another start."""
    replicates = True
    """Whether all ranks must hold the same weights."""

    def set_up(self, model: LlamaForCausalLM, job: Job) -> None:
        """Collective: make the model and its optimizer ready."""
        self.module, self.job = model, job
        self.model = self.wrap(model)
        self.optimizer = adamw(self.model.parameters())

    def wrap(self, model: nn.Module) -> nn.Module:
        """Collective: what the forward pass calls."""
        return model

    def keeping_quiet(self) -> AbstractContextManager[Any]:
        """Around the backward passes of a step but its last."""
        return nullcontext()

    def step(self, batches: list[Batch]) -> None:
        """Collective: one optimizer step over the micro-batches of all ranks."""
        for k, batch in enumerate(batches):
            with nullcontext() if k == len(batches) - 1 else self.keeping_quiet():
                (loss_of(self.model, batch) / len(batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def drain(self) -> None:
        """Collective: complete what the last step left on its way."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every parameter, whole."""
        for name, p in self.module.named_parameters():
            value = p.detach()
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def formula_bytes(self, gradient_values: int, ranks: int) -> float:
        """What each rank sends in a step, by the definition of its collectives."""
        return self.passes * gradient_values * self.wire_value_bytes * (ranks - 1) / ranks

    def counted_bytes(self) -> int | None:
        """What the system itself says that it has sent so far; None if it does not say."""
        return None


class Alone(System):
    passes = 0.0
    replicates = False


class DDP(System):
    """PyTorch's DistributedDataParallel; by default buckets of 25 MiB and a first one of 1 MiB."""

    def __init__(self, bucket_mb: float | None = None, hook: str | None = None) -> None:
        self.bucket_mb, self.hook = bucket_mb, hook
        if hook:
            self.wire_value_bytes = 2

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(
            model, bucket_cap_mb=self.bucket_mb, **ddp_options(self.job)
        )
        if self.hook:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            hook = getattr(default_hooks, f"{self.hook}_compress_hook")

            # A name of its own: DDP refuses the bf16 hook by name off CUDA, though gloo can.
            def compress(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
                return hook(state, bucket)

            wrapped.register_comm_hook(None, compress)
        return wrapped

    def keeping_quiet(self) -> AbstractContextManager[Any]:
        return self.model.no_sync()


def ddp_options(job: Job) -> dict[str, Any]:
    """DDP's documented best practice, for DDP and for what wraps it."""
    names = inspect.signature(DistributedDataParallel).parameters
    return {
        "gradient_as_bucket_view": True,
        # With no_sync in the first step torch 2.13 fails on an assertion of its own (reducer.cpp,
        # expect_autograd_hooks_).
        "static_graph": job.accumulation == 1,
        # The only buffers are the constants of the rotary embedding. torch 2.13 renames the option.
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False,
    }


class FSDP2(System):
    """fully_shard on every layer and the root.

    Parameters stay whole between forward and backward unless `reshard`: a third less to send, and
    what its documentation advises where memory allows.
    """

    def __init__(self, reshard: bool = False) -> None:
        self.reshard = reshard
        self.passes = 3.0 if reshard else 2.0

    def wrap(self, model: Any) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shard = partial(
            fully_shard,
            mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
            reshard_after_forward=self.reshard,
        )
        for layer in model.model.layers:
            shard(layer)
        return shard(model)

    @contextmanager
    def keeping_quiet(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)


class Accelerate(System):
    def set_up(self, model: LlamaForCausalLM, job: Job) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        options = ddp_options(job)
        options.pop("forward_sync_buffers", None)  # it knows the older name only
        options = DistributedDataParallelKwargs(**options | {"broadcast_buffers": False})
        self.accelerator = Accelerator(
            cpu=True,
            kwargs_handlers=[options],
            gradient_accumulation_steps=job.accumulation,
        )
        self.module = model
        self.model, self.optimizer = self.accelerator.prepare(model, adamw(model.parameters()))
        assert isinstance(self.model, DistributedDataParallel), "accelerate runs no DDP here"

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)


class Fabric(System):
    def set_up(self, model: LlamaForCausalLM, job: Job) -> None:
        try:
            from lightning_fabric import Fabric as LightningFabric
            from lightning_fabric.plugins.environments import TorchElasticEnvironment
            from lightning_fabric.strategies import DDPStrategy
        except ImportError:
            from lightning.fabric import Fabric as LightningFabric
            from lightning.fabric.plugins.environments import TorchElasticEnvironment
            from lightning.fabric.strategies import DDPStrategy

        self.fabric = LightningFabric(
            accelerator="cpu",
            devices=1,
            num_nodes=dist.get_world_size(),
            strategy=DDPStrategy(**ddp_options(job)),
            plugins=[TorchElasticEnvironment()],
        )
        self.fabric.launch()
        self.module = model
        self.model, self.optimizer = self.fabric.setup(model, adamw(model.parameters()))

    def step(self, batches: list[Batch]) -> None:
        for k, batch in enumerate(batches):
            last = k == len(batches) - 1
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                self.fabric.backward(loss_of(self.model, batch) / len(batches))
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeed(System):
    """ZeRO of stage 1 or 2 with torch's own AdamW on the shard.

    Buckets are sized to the model and overlap, as its guide advises; by default one bucket would
    hold all (2 to 19% slower at 500 Mbit/s for stage 1, the same for stage 2; 2026-11-23).
    """

    def __init__(self, stage: int, **options: Any) -> None:
        self.zero = {"stage": stage, **options}

    def set_up(self, model: LlamaForCausalLM, job: Job) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        self.module = model
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model.parameters()),
            config={
                "train_micro_batch_size_per_gpu": job.batch,
                "gradient_accumulation_steps": job.accumulation,
                "gradient_clipping": MAX_NORM,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": self.zero,
            },
        )

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            self.engine.backward(loss_of(self.engine, batch))
            self.engine.step()


class Unisono(System):
    """Ours. Everything that touches the seam is in this class."""

    again_at_each_rate = True

    def __init__(self, strategy: str, wire: str = "float32", bucket_mb: float | None = None, **more: Any):  # fmt: skip
        self.wire_value_bytes = {"bfloat16": 2, "int8": 1 + 4 / 256, "int4": 1 / 2 + 4 / 256}.get(wire, 4)  # fmt: skip
        self._wire = wire
        self._make = (strategy, {"wire": wire, **more})
        self._bucket_mb = bucket_mb

    def set_up(self, model: LlamaForCausalLM, job: Job) -> None:
        from unisono.sync import make_strategy
        from unisono.sync.ledger import Group, Ledger
        from unisono.sync.link import measure_link

        def optimizer(matrices: list[nn.Parameter], vectors: list[nn.Parameter]) -> Any:
            return adamw([*matrices, *vectors])

        strategy, options = self._make
        self.module = model
        group = Group("probe", Ledger(), 300.0)
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        link = measure_link(group, "cpu")
        assert link is not None
        if options.get("shard") == "auto":  # as `shard_optimizer: auto` decides
            step_s = float(group.each(self._seconds_alone(model, job, group.rank)).min())
            options["shard"] = not link.hides_whole(total, group.size, step_s)
        options["bucket_mb"] = self._bucket_mb or link.bucket_mb(
            total, self.wire_value_bytes
        )  # as `auto` begins
        self.sync = make_strategy(
            strategy, model, Ledger(), optimizer=optimizer, timeout_s=300.0, **options
        )

    def _seconds_alone(self, model: nn.Module, job: Job, rank: int) -> float:
        from unisono.train.trial import seconds_of_pass

        def run(rows: int) -> None:
            loss_of(model, job.batches(rank, 0)[0], "sum").backward()

        return seconds_of_pass(run, job.batch, model, "cpu") * job.accumulation

    def step(self, batches: list[Batch]) -> None:
        for k, batch in enumerate(batches):
            with self.sync.micro_batch(last=k == len(batches) - 1):
                loss_of(self.sync.model, batch, "sum").backward()
        (targets,) = self.sync.finish(float(sum(t.numel() for _, t in batches)))
        self.sync.update(divide_by=targets, max_norm=MAX_NORM, learning_rate=LEARNING_RATE)

    def drain(self) -> None:
        self.sync.settle()

    def formula_bytes(self, gradient_values: int, ranks: int) -> float:
        if self._make[0] == "powersgd":
            from unisono.sync.powersgd import are_embeddings, travelling_values

            params = list(self.module.parameters())
            whole, (rank, _) = are_embeddings(self.module, params), self._make[1]["low_rank"]
            gradient_values = travelling_values([p.shape for p in params], whole, rank)
        if self._wire in ("int8", "int4"):
            from unisono.sync.codec import make_codec

            row = -(-gradient_values // ranks)
            return self.passes * (ranks - 1) * make_codec(self._wire).encoded_bytes(row)
        return super().formula_bytes(gradient_values, ranks)

    def counted_bytes(self) -> int:
        return self.sync.ledger.sent_bytes


class Local(Unisono):
    """Ours, whose replicas step alone and agree every so many steps."""

    def __init__(self, strategy: str, every: int = 30) -> None:
        from unisono.sync.outer import Outer, delta_codec
        from unisono.sync.sparse import sparse_outer

        if strategy == "sparse":
            self.outer = sparse_outer(sync_every=every, top_k=64, chunk=4096, feedback_decay=0.95, learning_rate=1.0)  # fmt: skip
        else:
            self.outer = Outer(
                delta_codec("int4"), sync_every=every, num_fragments=5, fragment_sync_delay=1,
                fragment_update_alpha=0.5, learning_rate=0.6, momentum=0.9, feedback_decay=0.95,
            )  # fmt: skip
        self.round_steps = every // self.outer.num_fragments
        super().__init__(strategy, outer=self.outer)

    def formula_bytes(self, gradient_values: int, ranks: int) -> float:
        sizes = [p.numel() for p in self.module.parameters()]
        return self.outer.sent_bytes(sizes, ranks) / self.outer.sync_every


class Auto(Unisono):
    """Ours, on the rung that `sync: auto` takes on this link within a loss budget."""

    round_steps = 6
    """Of a rung that sends every 2nd or 6th step."""

    def __init__(self, loss_budget: float) -> None:
        super().__init__("exact")
        self._budget = loss_budget

    def set_up(self, model: LlamaForCausalLM, job: Job) -> None:
        from unisono.forecast.ladder import choose, ladder, table
        from unisono.sync.ledger import Group, Ledger
        from unisono.sync.link import measure_link
        from unisono.train.auto import situation_of

        votes = Group("auto", Ledger(), 300.0)
        link = measure_link(votes, "cpu")
        assert link is not None
        pass_s = self._seconds_alone(model, job, votes.rank) / job.accumulation
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        step_s = float(votes.each(pass_s * job.accumulation).min())
        ids = np.concatenate([np.asarray(x).reshape(-1) for x, _ in job.batches(votes.rank, 0)])
        situation = situation_of(
            model, link, votes, pass_s, accumulation=job.accumulation, rows=len(np.unique(ids)),
            whole=link.hides_whole(total, votes.size, step_s),
        )  # fmt: skip
        rungs = ladder(situation)
        rung, why = choose(rungs, self._budget)
        for row in table(rungs, rung):
            print(*row, flush=True)  # into the log of this rank
        print(rung.name, why, flush=True)
        self.chosen, way = rung.name, rung.way
        if way.every > 1:
            self._inner: Unisono = Local(str(way.settings["sync"]), way.every)
        elif way.wire in ("int8", "int4"):
            self._inner = Unisono("quantized", wire=way.wire)
        else:
            self._inner = Unisono(
                "exact", wire=way.wire, shard=not situation.whole or way.wire != "float32"
            )
        self._inner.set_up(model, job)
        self.module, self.sync = model, self._inner.sync

    def formula_bytes(self, gradient_values: int, ranks: int) -> float:
        return self._inner.formula_bytes(gradient_values, ranks)


SYSTEMS: dict[str, Any] = {
    "alone": Alone,
    "ddp": DDP,
    "ddp-fp16": partial(DDP, hook="fp16"),
    "ddp-bf16": partial(DDP, hook="bf16"),
    "fsdp2": FSDP2,
    "fsdp2-reshard": partial(FSDP2, reshard=True),
    "accelerate": Accelerate,
    "fabric": Fabric,
    "deepspeed-zero1": partial(DeepSpeed, 1, **ZERO_OPTIONS),
    "deepspeed-zero2": partial(DeepSpeed, 2, **ZERO_OPTIONS),
    "exact": partial(Unisono, "exact", shard="auto"),
    "exact-shards": partial(Unisono, "exact", shard=True),
    "exact-whole": partial(Unisono, "exact"),
    "exact-even": partial(Unisono, "exact", shard=True, tables=False),
    "exact-bf16": partial(Unisono, "exact", wire="bfloat16", shard=True),
    "quantized-int8": partial(Unisono, "quantized", wire="int8"),
    "quantized-int4": partial(Unisono, "quantized", wire="int4"),
    "powersgd": partial(Unisono, "powersgd", low_rank=(32, 0)),
    "sharded": partial(Unisono, "sharded"),
    "streaming": partial(Local, "streaming"),
    "streaming-10": partial(Local, "streaming", 10),
    "auto": partial(Auto, 0.005),
    "auto-1%": partial(Auto, 0.01),
    "sparse": partial(Local, "sparse"),
}
"""Also with `@MB`, a bucket size: ddp, ddp-fp16, ddp-bf16 and ours."""
GROUPS: dict[str, list[str]] = {
    "sweep": [f"ddp@{mb}" for mb in SWEEP_MB],
    "ours": ["exact", "exact-bf16", "sharded"],
    "local": ["streaming-10", "streaming", "sparse"],
    "auto": ["auto", "auto-1%"],
    "narrow": ["quantized-int8", "quantized-int4", "powersgd"],
    "peers": [
        "ddp",
        *(f"ddp@{mb}" for mb in SWEEP_MB),
        *("ddp-fp16", "ddp-bf16", "fsdp2", "accelerate", "fabric"),
        *("deepspeed-zero1", "deepspeed-zero2"),
    ],
}
GROUPS["all"] = ["alone", *GROUPS["peers"], *GROUPS["ours"], *GROUPS["narrow"]]


def make_system(name: str) -> System:
    """Raises ValueError on a name that means nothing."""
    base, at, size = name.partition("@")
    if base not in SYSTEMS:
        raise ValueError(f"{name!r}: choose from {', '.join([*SYSTEMS, *GROUPS])}")
    try:
        return SYSTEMS[base](bucket_mb=float(size)) if at else SYSTEMS[base]()
    except (TypeError, ValueError):
        raise ValueError(f"{name!r}: {base} takes no bucket size {size!r}") from None


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the bytes of all weights in their order."""
    total = hashlib.sha256()
    for value in weights.values():
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def quiet_loggers() -> None:
    for name in ("accelerate", "DeepSpeed", "lightning", "lightning_fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
