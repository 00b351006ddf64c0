"""What a user may ask for: the configuration, its file, its overrides, its error messages.

A configuration is a recipe's or file's YAML, then `key=value` overrides (the later wins). Names are
Hugging Face's TrainingArguments names where one exists. The unit of a step is `global_batch_size`
in sequences; replicas and micro-batches only divide it. Nothing here imports torch.
"""

import copy
import difflib
import reprlib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from unisono.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, on and true as a bool, and Python takes that for the number 1."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted is not bool and bool not in get_args(wanted):
            raise ValueError("input should not be a yes or no")
        return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _share(value: Any) -> Any:
    """0.5% is 0.005."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError("write a share such as 0.5% or 0.005") from None
    return value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
AtLeastOne = Annotated[int, Field(ge=1)]


class DataConfig(_Section):
    """Where the text is and how it becomes blocks of `sequence_length` tokens."""

    path: Paths
    """Files, folders or globs of .txt, .md, .jsonl, .json (also .gz, .zst) or .parquet;
    `package:NAME/GLOB` reads files that an installed Python package ships."""
    eval_path: Paths | None = None
    """Held-out data of its own; without it `eval_fraction` of the blocks is held out."""
    eval_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the blocks that is held out for evaluation, chosen by `seed`."""
    text_field: str = "text"
    """The record field that holds plain text."""
    packing: Literal["auto", "concat", "best_fit"] = "auto"
    """`concat` cuts the stream of documents every `sequence_length` tokens; `best_fit` keeps every
    document whole. `auto`: best_fit for chats and prompt/completion records, else concat."""
    max_line_bytes: int = Field(16 * 2**20, ge=1024)
    """A longer line is quarantined, never held in memory whole."""


class TokenizerConfig(_Section):
    """A byte-level BPE tokenizer trained on the data, for a model from scratch."""

    vocab_size: int = Field(4096, ge=260, le=1_000_000)
    train_bytes: int = Field(64 * 2**20, ge=1)
    """At most this many bytes of the data are used to train it."""


class LoraConfig(_Section):
    """Adapters instead of the whole model (peft). Needs the extra `lora`."""

    r: int = Field(8, ge=1)
    """Rank: a layer gets r (inputs + outputs) trained values."""
    alpha: float = Field(16, gt=0)
    """Adapters are scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers that get adapters: `all-linear`, or names such as [q_proj, v_proj]."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """Learn the length of each row of the weight apart from its direction."""
    modules_to_save: Paths = ()
    """Modules that are trained whole and saved beside the adapters, such as [lm_head]."""
    load_in_4bit: bool = False
    """QLoRA: frozen weights of linear layers in 4 bits (nf4). Needs the extra `qlora`."""
    bnb_4bit_use_double_quant: bool = False
    """With it: the scales of their blocks in 8 bits, which saves another 0.05 byte a weight."""

    @model_validator(mode="after")
    def _scales_are_of_quantized_weights(self) -> Self:
        if self.bnb_4bit_use_double_quant and not self.load_in_4bit:
            raise ValueError("bnb_4bit_use_double_quant needs load_in_4bit: true")
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_names(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != "all-linear" else value


class GrpoConfig(_Section):
    """Online tuning: completions of prompts are drawn, rewarded, and learned from (GRPO, RLOO). A sample
    is then a prompt, so `global_batch_size` counts prompts."""

    reward_funcs: Paths
    """`file.py:function` or `package.module:function`, called as TRL does (prompts, completions, the
    records' other fields; a number for each completion), or the directory of a reward model."""
    reward_weights: tuple[float, ...] | None = None
    """One for each of them; by default 1."""
    num_generations: int = Field(8, ge=2)
    """Completions of a prompt."""
    num_generations_eval: int = Field(1, ge=1)
    """Completions of a held-out prompt."""
    max_completion_length: int = Field(256, ge=1)
    """Tokens; with the prompt's they are at most `sequence_length`."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    loss_type: Literal["dapo", "grpo", "dr_grpo", "rloo"] = "dapo"
    """What a mean is of: `dapo`, all tokens; `grpo`, each completion's tokens, then completions; `dr_grpo`,
    completions of a fixed length; `rloo`, whole completions against the others of their prompt."""
    scale_rewards: Literal["group", "none"] | None = None
    """`group`: advantages are divided by the deviation of the prompt's rewards; by default so, but for rloo."""
    beta: float = Field(0.0, ge=0)
    """Of the KL divergence to the model as it was before the run; 0 keeps none. rloo takes it off the reward."""
    use_bias_correction_kl: bool = True
    """Not for rloo: the KL's gradient counts that completions are drawn from the model."""
    mask_truncated_completions: bool = False
    """Completions that did not end are rewarded and compared, but not learned."""

    @model_validator(mode="after")
    def _weights_and_scale_fit(self) -> Self:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.reward_funcs)} reward_funcs; "
                f"write one for each"
            )
        if self.loss_type == "rloo" and self.scale_rewards == "group":
            raise ValueError("rloo compares rewards as they are; leave scale_rewards out")
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each reward."""
        return self.reward_weights or (1.0,) * len(self.reward_funcs)

    @property
    def scales(self) -> bool:
        """Whether advantages are divided by a deviation."""
        return self.loss_type != "rloo" and self.scale_rewards != "none"


class DpoConfig(_Section):
    """Direct preference optimization: answers that people prefer become more probable than the others,
    compared with the model as it was."""

    beta: float = Field(0.1, gt=0)
    """How much a departure from the reference costs; 1 / (2 beta) is ipo's target."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """sigmoid: the share of pairs that are taken to be labelled the wrong way round (conservative DPO)."""
    length_normalized: bool = False
    """Log-probabilities per token of the answer (TRL: sigmoid_norm); ipo always does so."""
    reference_free: bool = False
    """Compare with nothing instead of with the model as it was."""

    @model_validator(mode="after")
    def _smoothing_is_of_sigmoid(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError("label_smoothing needs loss_type: sigmoid")
        return self


class RewardConfig(_Section):
    """A reward model: one number for an answer, larger for those that people prefer."""

    center_rewards_coefficient: float | None = Field(None, gt=0)
    """Weight of (chosen + rejected)^2, which keeps rewards around zero."""
    margin: float = Field(0.0, ge=0)
    """By how much chosen is to be above rejected, for every pair."""


class MeshConfig(_Section):
    """How the ranks divide: replica x shard x context x tensor; the product is all of them."""

    replica: AtLeastOne | Literal["auto"] = "auto"
    """Copies of the model, on different samples; their gradients are summed once a step. `auto`: what
    the other axes leave, and with an automatic `shard` 1."""
    shard: AtLeastOne | Literal["auto"] = "auto"
    """sharded: ranks that share the weights of one copy, on different samples. `auto`: as many as the
    other axes leave."""
    context: AtLeastOne = 1
    """Ranks that share each sequence, for sequences too long for one. exact, sharded."""
    tensor: AtLeastOne = 1
    """Ranks that share each weight matrix and compute on the same tokens; it divides the heads. Best on
    one host. exact, sharded."""


class PowerSGDConfig(_Section):
    """sync: powersgd. Gradients of matrices travel as two thin ones."""

    rank: int = Field(default=32, ge=1)
    """Columns of the thin matrices: rows + columns times so many values travel of each matrix."""
    start: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps that come first and are exact."""


class ContextConfig(_Section):
    """How keys reach queries on other ranks, where `mesh.context` is more than 1."""

    scheme: Literal["auto", "ring", "halo", "allgather", "ulysses", "usp"] = "auto"
    """`auto`: by layer, whatever the cost model finds fastest on the measured link."""
    ulysses: AtLeastOne | None = None
    """usp: so many neighbours trade tokens for heads, and keys go around between such groups."""


class StreamingConfig(_Section):
    """Local steps, and outer weights on which replicas agree every so many (DiLoCo, streaming)."""

    sync_every: int = Field(30, ge=1)
    """Steps (H) from one synchronization of a parameter to its next."""
    num_fragments: int = Field(5, ge=1)
    """Parts of the model that take turns, every sync_every / num_fragments steps one of them."""
    fragment_sync_delay: int = Field(1, ge=0)
    """Steps (tau) that a fragment may take to arrive, while training goes on; 0 waits for it."""
    fragment_update_alpha: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """What stays of a replica's own weights when the outer ones arrive. `auto`: 0.5 with a delay, else 0."""
    outer_learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """`auto`: by the number of replicas and sync_every; 1 without outer_momentum, the replicas' mean."""
    outer_momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov's; 0 averages (local SGD, FedAvg)."""
    feedback_decay: float = Field(0.95, ge=0, le=1)
    """wire int8 and int4: of what rounding has left out so much is added to the next delta."""

    @model_validator(mode="after")
    def _turns_fit(self) -> Self:
        every, parts = self.sync_every, self.num_fragments
        if every % parts:
            fits = [p for p in range(1, every + 1) if every % p == 0]
            raise ValueError(
                f"sync_every: found {every}, which is no multiple of num_fragments {parts}; write "
                f"num_fragments: {max(p for p in fits if p <= parts)}"
            )
        if self.fragment_sync_delay and self.fragment_sync_delay >= every // parts:
            raise ValueError(
                f"fragment_sync_delay: found {self.fragment_sync_delay}, but the next fragment leaves "
                f"after {every // parts} steps (sync_every / num_fragments); write less"
            )
        return self

    @property
    def alpha(self) -> float:
        """What stays of a replica's own weights."""
        if self.fragment_update_alpha == "auto":
            return 0.5 if self.fragment_sync_delay else 0.0
        return self.fragment_update_alpha


class SparseConfig(_Section):
    """Local steps, and the largest changes of each replica every so many (SparseLoCo)."""

    sync_every: int = Field(30, ge=1)
    """Steps (H) from one synchronization to the next."""
    top_k: int = Field(64, ge=4, multiple_of=4)
    """Of each chunk, so many values are sent, 14 bits each."""
    chunk: int = Field(4096, ge=16, le=4096)
    """Values of which top_k are sent."""
    feedback_decay: float = Field(0.95, ge=0, le=1)
    """What is not sent is kept, times this, for the next time."""
    outer_learning_rate: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _few_of_many(self) -> Self:
        if self.top_k > self.chunk:
            raise ValueError(f"top_k: found {self.top_k}, more than chunk {self.chunk}; write less")
        return self


KEPT_ATTENTION = "unisono_attention"
"""In a saved model's configuration (of adapters in theirs): the AttentionConfig that it was trained with."""


class AttentionConfig(_Section):
    """What the model's layers see less of, than it says itself. Anything here asks for our kernels."""

    window: int | None = Field(None, ge=1)
    """Tokens that a query sees up to itself, in layers whose own window is not smaller."""
    sinks: int = Field(0, ge=0)
    """First tokens of each document that stay visible beyond the window."""
    pattern: Literal["bigbird", "longformer", "strided", "dilated"] | None = None
    """Sparse attention, in layers without a window of their own. `longformer` is a window of
    window_blocks with sinks of first_blocks; `dilated` sees every dilation-th token of its window."""
    block: int = Field(64, ge=16, le=512)
    """Tokens of the pattern's blocks."""
    window_blocks: int = Field(3, ge=1)
    """Blocks up to a query's own that it sees."""
    first_blocks: int = Field(1, ge=0)
    """bigbird, longformer: blocks at the start that all see."""
    random_blocks: int = Field(3, ge=0)
    """bigbird: earlier blocks that each block sees besides."""
    stride: int = Field(8, ge=1)
    """strided: every so many blocks, one is seen."""
    dilation: int = Field(4, ge=1)
    layers: tuple[int, ...] | None = None
    """Only in these layers, counted from 0; by default in all."""

    @model_validator(mode="after")
    def _sinks_have_a_window(self) -> Self:
        if self.sinks and self.window is None:
            raise ValueError("sinks need a window: without one, all earlier tokens are visible")
        if self.pattern is not None and self.window is not None:
            raise ValueError("write either window or pattern")
        return self


NARROW_WIRE = {"quantized": "int8", "streaming": "int4"}
"""Strategies that send codes, and which by default."""
WHOLE_MATRICES = ("exact", "ddp", "reference", "streaming", "sparse")
"""Strategies whose optimizer sees them."""


class Config(_Section):
    """Everything a user can ask of `unisono train`. Frozen; `Plan` holds what was decided."""

    # --- what is trained, on what
    model: str | dict[str, Any]
    """A Hugging Face directory or hub name, or the fields of a transformers config (`model_type`
    and its sizes) for random weights, for example {model_type: llama, hidden_size: 192}."""
    tokenizer: str | TokenizerConfig | None = None
    """A directory or hub name, or {vocab_size: N} to train one; by default the model's own."""
    data: DataConfig
    sequence_length: int = Field(1024, ge=2)
    """Tokens in a block (Hugging Face SFT: max_length)."""
    lora: LoraConfig | None = None
    """Train adapters of a model that stays as it is, for example {r: 8, alpha: 16}."""
    grpo: GrpoConfig | None = None
    """Tune on completions of prompts and their rewards instead of given text, for example
    {reward_funcs: reward.py:score}."""
    dpo: DpoConfig | None = None
    """Tune on preference pairs, for example {beta: 0.1}; a sample is a pair of answers."""
    reward: RewardConfig | None = None
    """Train a reward model on preference pairs: a head with one output. `reward: {}` has the defaults."""
    strict_data: bool = False
    """Stop at the first bad record instead of putting it into quarantine."""
    output_dir: str
    """The run folder: checkpoints, metrics, receipt, and the final model."""

    # --- how much, how long
    global_batch_size: int = Field(32, ge=1)
    """Sequences of one optimizer step, over all replicas and micro-batches."""
    micro_batch_size: AtLeastOne | Literal["auto"] = "auto"
    """Sequences of one forward and backward pass on one replica; `auto` finds it by trying."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; without it `num_train_epochs` decides."""
    num_train_epochs: float = Field(1.0, gt=0)

    # --- optimizer and schedule
    optim: Literal["adamw", "sgd", "muon"] = "adamw"
    """`muon`: matrices by Muon, at a rate matched to AdamW's; embeddings, head and vectors by AdamW."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak rate. With `base_batch_size` it is the rate for that batch and is scaled from there."""
    base_batch_size: int | None = Field(None, ge=1)
    """The global batch that `learning_rate` (and betas, epsilon, weight decay) was tuned for."""
    batch_scaling: Literal["auto", "linear", "sqrt", "none"] = "auto"
    """`auto`: linear for SGD, square root for AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD; Muon's is 0.95."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm; 0 clips nothing."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup",
        "warmup_stable_decay",
    ] = "linear"  # fmt: skip
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final rate as a share of the peak, for cosine_with_min_lr and warmup_stable_decay."""
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """Share of the steps that warmup_stable_decay spends decaying."""
    warmup_steps: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps, or below 1 a share of the run. `auto`: see the plan."""

    # --- attention
    attention: Literal["auto", "flash", "native"] | AttentionConfig = "auto"
    """`auto`: our kernels where they are exact for this model on a CPU, else the model's own; the plan
    says why. `flash`: ours or nothing. `native`: the model's own. Or a mapping that narrows what layers
    see: {window: 4096, sinks: 4} or {pattern: bigbird}."""

    # --- numerics
    seed: int = Field(42, ge=0, lt=2**63)
    bf16: bool = False
    """Forward and backward in bfloat16 (autocast), weights and sums in float32."""
    gradient_checkpointing: bool = False
    determinism: Literal["default", "strict"] = "default"
    """`strict`: bit-identical weights at 1, 2, 4 and 8 replicas, and across a resume."""

    # --- replicas and synchronization
    replicas: AtLeastOne | Literal["auto"] = "auto"
    """Local replicas; `auto` is one for each GPU, or one on a CPU. torchrun's WORLD_SIZE wins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU for each local replica where there are any."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of one replica; by default the cores divided among the local replicas, and 1 in
    strict mode, because the number of threads changes the order of sums."""
    sync: Literal[
        "exact", "sharded", "ddp", "reference", "quantized", "powersgd", "streaming", "sparse", "auto",
    ] = "exact"  # fmt: skip
    """`exact`: a whole model on every replica. `sharded`: FSDP2, for models that do not fit. `ddp`:
    PyTorch's. `reference`: the naive definition of correct, for tests. For slow links, no longer equal to
    one process: `quantized` sends 1 byte or half a byte a value, `powersgd` low-rank gradients; with
    `streaming` replicas step alone and agree every so many steps, with `sparse` on the largest changes. `auto`: of exact, quantized, streaming
    and sparse the first that the measured link lets be 95% busy within `loss_budget`."""
    loss_budget: Annotated[float, BeforeValidator(_share), Field(ge=0, lt=1)] = 0.005
    """sync: auto: how much the loss may be above that of exact synchronization, for example 0.5% or 0.005."""
    streaming: StreamingConfig = Field(default_factory=lambda: StreamingConfig.model_validate({}))
    """For sync: streaming, for example {sync_every: 10}."""
    sparse: SparseConfig = Field(default_factory=lambda: SparseConfig.model_validate({}))
    """For sync: sparse."""
    shard_optimizer: Literal["auto"] | bool = "auto"
    """exact: each replica keeps 1/n of the optimizer state and steps that part of the weights, which
    return during the next forward pass. `auto`: yes, except for large embeddings (their sums return
    during the backward pass, which hides more), few bytes, strict mode, or one replica."""
    wire: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """What travels; sums and master weights stay float32. exact: float32, or bfloat16, which halves the
    bytes. quantized: int8 (by default) or int4. streaming: of deltas, by default int4."""
    powersgd: PowerSGDConfig = Field(default_factory=lambda: PowerSGDConfig())
    """powersgd: how thin, and from when on."""
    mesh: MeshConfig | None = None
    """How ranks divide into replica x shard x context x tensor; by default all are replicas (sharded: all
    shard)."""
    context: ContextConfig = Field(default_factory=lambda: ContextConfig())
    """How attention crosses the ranks of `mesh.context`."""
    bucket_mb: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """exact: gradients travel in buckets of about this size (MiB). `auto`: chosen by the measured
    link, then tuned on the first steps of the run."""
    probe: str = "auto"
    """What unisono probe wrote: buckets and the run's forecast come from it. `auto`: probe.json in the
    working directory, if it is of this hardware; `none`: a quick measurement of the link instead."""
    check_replicas_every: int = Field(100, ge=0)
    """Compare digests of weights and optimizer state across replicas every so many steps."""
    timeout_s: float = Field(600.0, gt=0)
    """A collective that takes longer fails, naming what it waited for."""

    # --- evaluate, save, log
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate every so many steps; by default ten times a run, and always at the end."""
    eval_batches: int | None = Field(None, ge=1)
    """At most this many global batches an evaluation; by default the whole held-out split."""
    save_steps: int | None = Field(None, ge=1)
    """Checkpoint every so many steps; by default ten times a run."""
    save_total_limit: int = Field(2, ge=1)
    """Keep the newest so many checkpoints, and the best by evaluation loss besides."""
    resume: Literal["auto", "never"] | str = "auto"
    """`auto`: the newest valid checkpoint of `output_dir`; `never`: refuse a folder that has one;
    or the path of a checkpoint."""
    logging_steps: int = Field(10, ge=1)
    report_to: Annotated[tuple[Literal["tensorboard"], ...], BeforeValidator(_as_list)] = ()
    baseline_steps: int = Field(3, ge=0)
    """Micro-batches that measure one replica alone at the start, for the receipt; 0 measures
    nothing and the receipt has no efficiency."""
    sample_prompt: str | None = None
    """Generate from this at the end and show it."""
    sample_tokens: int = Field(120, ge=1)

    @model_validator(mode="after")
    def _whole_matrices_for_muon(self) -> Self:
        divided = self.sync not in WHOLE_MATRICES or self.shard_optimizer is True
        if self.optim == "muon" and divided:
            what = "shard_optimizer: true" if self.shard_optimizer is True else f"sync: {self.sync}"
            raise ValueError(
                f"optim: found muon with {what}, but Muon steps whole matrices; write sync: exact with "
                f"shard_optimizer: false, or sync: streaming or sparse"
            )
        return self

    @field_validator("model")
    @classmethod
    def _model_type_is_there(cls, value: Any) -> Any:
        if isinstance(value, dict) and "model_type" not in value:
            raise ValueError("an architecture needs model_type, for example llama")
        return value

    @model_validator(mode="before")
    @classmethod
    def _wire_of_sync(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "wire" not in raw and str(raw.get("sync")) in NARROW_WIRE:
            return {**raw, "wire": NARROW_WIRE[raw["sync"]]}
        return raw

    @model_validator(mode="after")
    def _one_objective(self) -> Self:
        if not self.wants_pairs:
            return self
        name = "dpo" if self.dpo is not None else "reward"
        if self.dpo is not None and self.reward is not None:
            raise ValueError("write either dpo or reward")
        if isinstance(self.model, dict):
            raise ValueError(f"{name} tunes a trained model: name a model directory")
        if self.data.packing != "auto":
            raise ValueError(f"{name} has a row for each answer: leave data.packing out")
        if self.reward is not None and self.sample_prompt is not None:
            raise ValueError("a reward model writes no text: leave sample_prompt out")
        return self

    @property
    def wants_pairs(self) -> bool:
        """A sample is a preference pair."""
        return self.dpo is not None or self.reward is not None


_HINTS = {
    "per_device_train_batch_size": "global_batch_size counts the sequences of a step over all replicas",
    "gradient_accumulation_steps": "it follows from global_batch_size, micro_batch_size and replicas",
    "warmup_ratio": "write warmup_steps as a number below 1",
    "activation_checkpointing": "write gradient_checkpointing",
    "fp16": "use bf16: true",
    "max_length": "write sequence_length",
    "lr": "write learning_rate",
    "batch_size": "write global_batch_size",
    "resume_from_checkpoint": "write resume: auto, or resume: PATH",
    "ddp_bucket_cap_mb": "write bucket_mb",
    "eval_strategy": "write eval_steps: N",
    "save_strategy": "write save_steps: N",
    "run_name": "write output_dir",
    "optimizer": "write optim",
    "beta": "write dpo: {beta: 0.1}",
    "loss_type": "write dpo: {loss_type: sigmoid}",
    "center_rewards_coefficient": "write reward: {center_rewards_coefficient: 0.01}",
    "precompute_ref_log_probs": "leave it out: with dpo they always are",
}


def load(source: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file, or of the shipped recipe of that name, with overrides.

    Raises ConfigError: no such file or recipe, not YAML, unknown key, value out of range.
    """
    path = Path(source)
    if not path.is_file():
        shipped = RECIPES / f"{source}.yaml"
        if not shipped.is_file():
            names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ConfigError(f"{source}: no such file, and no recipe of that name ({names})")
        path = shipped
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
    raw = _read_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, found {_kind(raw)}")
    return parse(apply_overrides(raw, overrides), origin=str(path))


def for_data(source: str, model: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration `source`, with the tokenizer of `model` if given; or one for a data file.

    Raises ConfigError: a data file without a model, and as `load`.
    """
    if Path(source).suffix in (".yaml", ".yml") or (RECIPES / f"{source}.yaml").is_file():
        return load(source, [*overrides, *([f"tokenizer={model}"] if model else [])])
    if not model:
        raise ConfigError(f"--model is missing: {source} is data; name a model directory")
    raw = {"model": model, "data": {"path": source}, "output_dir": "unused"}
    return parse(apply_overrides(raw, overrides), origin=source)


def parse(raw: Mapping[str, Any], origin: str = "config") -> Config:
    """Validate a mapping. Raises ConfigError that names every wrong field, its value and a fix."""
    raw = dict(raw)
    if isinstance(raw.get("data"), str | list):
        raw["data"] = {"path": raw["data"]}
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{origin}: {line}" for line in _explain(error.errors()))
        ) from None


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=value` sets raw["a"]["b"]; the value is YAML, so `[1, 2]`, `null` and `true` work."""
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r}: write key=value, for example learning_rate=3e-4")
        value = _read_yaml(text, f"override {item!r}") if text else None
        *parents, last = key.replace("-", "_").split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            if parent == "data" and isinstance(child, str | list):
                child = {"path": child}
            if not isinstance(child, dict):
                child = {}
            node[parent] = child
            node = child
        node[last] = value
    return result


def _read_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:
        # A value that does not fit its tag (a date of month 13) raises whatever its conversion does.
        raise ConfigError(f"{origin}: cannot be read as YAML: {_one_line(error)}") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {_short(value)}"


def _short(value: Any) -> str:
    """A value for a message, of bounded length however large or deep it is."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return f"{type(value).__name__} of very many digits"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3


def _explain(errors: Iterable[Any]) -> list[str]:
    """A line for each wrong field: its name, what was found, what to write instead.

    A union has an error for each of its branches. They are joined, and those of a branch that was
    not meant are left out where another branch has looked deeper.
    """
    lines: dict[str, str] = {}
    for item in errors:
        # Union branches add their tags to the location; they are no part of the user's path.
        path = [str(s) for s in item["loc"] if s in _ALL_FIELDS or isinstance(s, int)]
        message = item["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
        message = message.replace("valid dictionary", "mapping").replace("valid tuple", "list")
        message = message[0].lower() + message[1:]
        if item["type"] == "extra_forbidden":
            parent, key = path, str(item["loc"][-1])
            if parent and parent[-1] == key:
                parent = parent[:-1]
            lines[".".join([*parent, key])] = _unknown_key(parent, key)
        elif item["type"] == "missing":
            lines[".".join(path)] = f"{'.'.join(path)} is missing: add it"
        elif (field := ".".join(path) or "config") in lines:
            lines[field] += f" or {message.removeprefix('input should be ')}"
        else:
            lines[field] = f"{field}: found {_short(item['input'])}; {message}"
    return [
        line
        for field, line in lines.items()
        if not any(deeper.startswith(f"{field}.") for deeper in lines)
    ]


def _unknown_key(parent: list[str], key: str) -> str:
    dotted = ".".join([*parent, key])
    if not parent and key in _HINTS:
        return f"unknown key {dotted}: {_HINTS[key]}"
    known = _fields_at(parent)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"unknown key {dotted}: did you mean {'.'.join([*parent, near[0]])}?"
    return f"unknown key {dotted}: known: {', '.join(known)}"


def _sections(annotation: Any) -> list[type[_Section]]:
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [s for arg in get_args(annotation) for s in _sections(arg)]
    return []


def _fields_at(path: list[str]) -> list[str]:
    section: type[_Section] = Config
    for name in path:
        inner = (
            _sections(section.model_fields[name].annotation) if name in section.model_fields else []
        )
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)


_ALL_FIELDS = {
    name
    for s in (
        Config,
        DataConfig,
        TokenizerConfig,
        LoraConfig,
        GrpoConfig,
        DpoConfig,
        RewardConfig,
        MeshConfig,
        PowerSGDConfig,
        ContextConfig,
        AttentionConfig,
        StreamingConfig,
        SparseConfig,
    )
    for name in s.model_fields
}
