"""Online tuning: before each step a replica draws the completions of its own prompts and has them rewarded.

A sample is a prompt, a micro-batch some whole prompts with all their completions, so that a reward is compared
with those of its own prompt without communication. The global batch is laid out so that any part of it
has long and short prompts alike; that is a function of the global batch alone, and draws are of the position in
the run (rollout.py), so N replicas do what one does and a resume goes on exactly. A replica draws all of its
micro-batches in one batch, as far as memory allows; in strict mode one micro-batch after another, whose
shapes are the same at any number of replicas, and so are the bits.

What generates shares its weights with what is trained, but not its attention, hooks or mode: the model's own
attention has a cache. The reference is the model as it was before the run, or the adapters switched off.

All of it is the phase `generation` of the receipt; a replica whose completions are longer is imbalance.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from unisono.clock import Clock
from unisono.config import Config
from unisono.data.blocks import NO_LABEL
from unisono.data.prompts import Prompt, Prompts, Rollout, rollout
from unisono.mesh import Mesh
from unisono.model.load import load_model
from unisono.sync.ledger import Group
from unisono.train.objective import Objective, flat, means
from unisono.train.policy import advantages, log_probabilities, make_objective, names
from unisono.train.reward_funcs import Reward
from unisono.train.rollout import Completion, Sampling, complete, draws
from unisono.train.step import Feed
from unisono.train.together import attempt
from unisono.train.trial import is_out_of_memory
from unisono.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINING, EVALUATION = 0, 1
"""What a draw is for."""
SHOWN = 4
"""Completions of rank 0 that are kept of a step that is logged."""
AT_ONCE = 64
"""Held-out completions of one batch."""
AMPLE = 0.25
"""Of the free memory may go to the cache."""


def policy_of(model: Any) -> Any:
    """What generates: the same parameters in evaluation mode, without what is hooked into `model` later."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def make_online(
    config: Config,
    world: World,
    policy: Any,
    rewards: Sequence[Reward],
    tokenizer: "PreTrainedTokenizerFast",
    clock: Clock,
) -> "Online":
    """What draws and rewards on this replica. `policy`: what `policy_of` gave. Raises ConfigError."""
    asked = config.grpo
    assert asked is not None
    reference = None
    if asked.beta and config.lora is None:
        reference = load_model(
            config.model, tokenizer, seed=config.seed, sequence_length=config.sequence_length
        )
        reference = reference.to(world.device).eval().requires_grad_(False)
    configured = getattr(policy, "generation_config", None)
    ends: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(configured, "eos_token_id", None)):
        ends |= set(ids) if isinstance(ids, list | tuple) else {ids} if ids is not None else set()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id  # fmt: skip
    how = Sampling(
        asked.max_completion_length, frozenset(ends), padding, asked.temperature, asked.top_p
    )
    return Online(
        config, policy.to(world.device), reference, rewards, tokenizer, how, world.device,
        world.local_size, clock,
    )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A prompt's completions and what became of them."""

    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    by_reward: npt.NDArray[np.float64]
    """[rewards, G]"""
    rewards: npt.NDArray[np.float64]
    """[G], weighted."""


@dataclass
class Online:
    """What draws and rewards on one replica, and what it has drawn for the step at hand."""

    config: Config
    policy: Any
    reference: Any
    """A frozen model, or None: the policy without its adapters, or no reference at all."""
    rewards: Sequence[Reward]
    tokenizer: "PreTrainedTokenizerFast"
    how: Sampling
    device: str
    neighbours: int
    """Replicas on this host."""
    clock: Clock
    shown: list[dict[str, Any]] = field(default_factory=list)
    """Of the newest step."""
    _batches: dict[int, Rollout] = field(default_factory=dict)
    """By micro-batch."""
    _most: int = 2**31
    """Prompts of a batch, where memory has run out with more."""

    @property
    def strict(self) -> bool:
        return self.config.determinism == "strict"

    @property
    def objective(self) -> Objective:
        asked = self.config.grpo
        assert asked is not None
        return make_objective(asked, [r.name for r in self.rewards], _keeps(self.policy))

    def begin(self, step: int, of: Mapping[int, Sequence[tuple[int, Prompt]]], each: int) -> float:
        """Draw and reward the micro-batches `of`, each (position in the run, prompt); what it cost."""
        self._batches, self.shown = {}, []
        cost = 0.0
        with self.clock("generation"):
            for leaves in [[leaf] for leaf in of] if self.strict else [list(of)]:
                rows = [row for leaf in leaves for row in of[leaf]]
                drawn, spent = self.draw(rows, TRAINING, each, f"step {step + 1}")
                cost += spent
                found = iter(drawn)
                for leaf in leaves:
                    self._batches[leaf] = self._batch([next(found) for _ in of[leaf]])
        return cost

    def batch(self, leaf: int) -> Rollout:
        """What `begin` has drawn."""
        return self._batches[leaf]

    def draw(
        self, rows: Sequence[tuple[int, Prompt]], purpose: int, each: int, where: str
    ) -> tuple[list[Drawn], float]:
        """`each` completions of every (key, prompt), rewarded; and what it cost. Raises UnisonoError."""
        found: list[Drawn] = []
        cost = 0.0
        while rows:
            some = rows[: self._fitting([prompt for _, prompt in rows], each)]
            keys = [(self.config.seed, purpose, key, g) for key, _ in some for g in range(each)]
            try:
                with self._autocast():
                    drawn, spent = complete(
                        self.policy, [p.ids for _, p in some], draws(keys, self.how.most), self.how,
                        self.device, _keeps(self.policy),
                    )  # fmt: skip
            except (RuntimeError, MemoryError) as error:
                if self.strict or len(some) == 1 or not is_out_of_memory(error):
                    raise
                self._most = -(-len(some) // 2)
                continue
            for k, (_, prompt) in enumerate(some):
                found.append(self._rewarded(prompt, drawn[k * each : (k + 1) * each], where))
            cost, rows = cost + spent, rows[len(some) :]
        return found, cost

    def _rewarded(self, prompt: Prompt, rows: list[Completion], where: str) -> Drawn:
        texts = [str(self.tokenizer.decode(row.tokens, skip_special_tokens=True)) for row in rows]
        said: list[Any] = list(texts)
        if not isinstance(prompt.prompt, str):
            said = [[{"role": "assistant", "content": text}] for text in texts]
        place = f"{where}, {prompt.file}:{prompt.line}"
        values = np.array([r(prompt.prompt, said, prompt.columns, place) for r in self.rewards])
        assert self.config.grpo is not None
        return Drawn(prompt, rows, texts, values, np.array(self.config.grpo.weights) @ values)

    def _batch(self, drawn: Sequence[Drawn]) -> Rollout:
        """A micro-batch of these prompts, with advantages and the reference's log-probabilities."""
        asked = self.config.grpo
        assert asked is not None
        rows = [row for d in drawn for row in d.completions]
        found = rollout(
            [d.prompt.ids for d in drawn for _ in d.completions], [row.tokens for row in rows],
            self.how.padding,
        )  # fmt: skip
        if not drawn:
            return found
        inside = found.labels[:, 1:] != NO_LABEL
        found.drawn[inside] = np.array([p for row in rows for p in row.logps])
        sums = self.told(drawn)
        rewards = np.stack([d.rewards for d in drawn])
        if asked.beta:
            with self._frozen() as reference:
                logp, _ = log_probabilities(
                    reference,
                    found,
                    asked.temperature,
                    self.device,
                    self.config.bf16,
                    _keeps(self.policy),
                )
            apart = np.zeros_like(found.drawn)
            apart[inside] = logp.cpu().numpy()
            if asked.loss_type == "rloo":
                kl = (found.drawn - apart).sum(1, dtype=np.float64)
                rewards = rewards - asked.beta * kl.reshape(rewards.shape)
                sums["kl"] = (float(kl.sum()), len(rows))
            else:
                found = replace(found, reference=apart)
        gains = advantages(rewards, asked.loss_type, asked.scales)
        self._keep(drawn, gains)
        if asked.mask_truncated_completions:
            ended = np.array([row.ended for row in rows])
            found.labels[~ended] = NO_LABEL
        return replace(found, advantages=gains.reshape(-1), sums=sums)

    def told(self, drawn: Sequence[Drawn]) -> dict[str, tuple[float, float]]:
        """Sums and counts of metrics that need no loss."""
        rows = [row for d in drawn for row in d.completions]
        each = np.stack([d.rewards for d in drawn])
        ended = [len(row.tokens) for row in rows if row.ended]
        sums: dict[str, tuple[float, float]] = {
            "reward": (float(each.sum()), each.size),
            "completions/mean_length": (sum(len(row.tokens) for row in rows), len(rows)),
            "completions/mean_terminated_length": (sum(ended), len(ended)),
            "completions/clipped_ratio": (len(rows) - len(ended), len(rows)),
        }
        if each.shape[1] > 1:
            spread = each.std(1, ddof=1)
            sums["reward_std"] = (float(spread.sum()), len(each))
            sums["frac_reward_zero_std"] = (float(np.isclose(spread, 0.0).sum()), len(each))
        for k, reward in enumerate(self.rewards):
            own = np.stack([d.by_reward[k] for d in drawn])
            sums[f"rewards/{reward.name}/mean"] = (float(own.sum()), own.size)
        return sums

    def _keep(self, drawn: Sequence[Drawn], gains: npt.NDArray[np.float32]) -> None:
        for d, gain in zip(drawn, gains, strict=True):
            for g, (text, row) in enumerate(zip(d.texts, d.completions, strict=True)):
                if len(self.shown) >= SHOWN:
                    return
                own = {r.name: float(d.by_reward[k, g]) for k, r in enumerate(self.rewards)}
                self.shown.append({
                    "prompt": d.prompt.prompt, "completion": text, "reward": float(d.rewards[g]),
                    "rewards": own, "advantage": float(gain[g]), "tokens": len(row.tokens),
                    "ended": row.ended,
                })  # fmt: skip

    # --- what it needs of the machine

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.device.split(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.config.bf16)

    @contextmanager
    def _frozen(self) -> Iterator[Any]:
        """The reference, without a graph."""
        own = self.reference is not None
        with torch.no_grad(), nullcontext() if own else self.policy.disable_adapter():
            yield self.reference if own else self.policy

    def _fitting(self, items: Sequence[Prompt], each: int) -> int:
        """Prompts whose keys and values fit into memory, at most; all in strict mode, whose batches are fixed."""
        if self.strict:
            return len(items)
        free = psutil.virtual_memory().available // self.neighbours
        if self.device != "cpu":
            free = torch.cuda.mem_get_info(self.device)[0]
        config = self.policy.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # fmt: skip
        length = max(len(p.ids) for p in items) + self.how.most
        # Twice while a token is appended; probabilities are sorted in float64.
        row = 2 * 2 * 4 * config.num_hidden_layers * heads * width * length + 32 * config.vocab_size
        return max(1, min(self._most, int(AMPLE * free / row / each)))


def _keeps(model: Any) -> bool:
    """Whether it computes logits of some positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


# --- the micro-batches of a step


@dataclass
class OnlineFeed(Feed):
    """Micro-batches of prompts, whose completions `begin` draws."""

    blocks: Prompts  # type: ignore[assignment]
    online: Online

    def samples(self, step: int, leaf: int) -> npt.NDArray[np.int64]:
        return self.order.at(self._positions(step, leaf))

    def begin(self, step: int, leaves: range) -> float:
        of = {}
        for leaf in leaves:
            at = self._positions(step, leaf)
            items = [self.blocks.items[sample] for sample in self.order.at(at)]
            of[leaf] = list(zip(at.tolist(), items, strict=True))
        return self.online.begin(step, of, self.blocks.generations)

    def batch(self, step: int, leaf: int) -> Rollout:
        return self.online.batch(leaf)

    def _positions(self, step: int, leaf: int) -> npt.NDArray[np.int64]:
        positions = np.asarray(self.plan.positions(step), np.int64)
        rows = self.plan.rows(leaf)
        laid = positions[balanced(self.blocks.lengths(self.order.at(positions)))]
        return laid[rows.start : rows.stop]


def balanced(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """An order of the rows in which every part of it has long and short ones alike.

    The k-th longest comes to the k-th place in bit-reversed order (van der Corput, 1935): any aligned
    2^j-th of the places then holds every 2^j-th length.
    """
    count = len(lengths)
    width = max(1, (count - 1).bit_length())
    places = sorted(range(count), key=lambda k: int(f"{k:0{width}b}"[::-1], 2))
    found = np.empty(count, np.int64)
    found[places] = np.argsort(-lengths, kind="stable")
    return found


# --- held-out prompts


def evaluate_prompts(
    online: Online, prompts: Prompts, votes: Group, mesh: Mesh, most: int | None
) -> dict[str, float]:
    """Collective: means over completions of the first `most` held-out prompts, or all.

    The draws are the same each time, so that two evaluations differ by the weights alone.
    """
    asked = online.config.grpo
    assert asked is not None
    told = names([r.name for r in online.rewards], 0.0)
    count = len(prompts) if most is None else min(most, len(prompts))
    each = asked.num_generations_eval
    at_once = max(1, AT_ONCE // each)
    batches = range(0, count, at_once)

    def mine() -> npt.NDArray[np.float64]:
        # A slot a batch: they are added in the same order at any number of replicas.
        sums = np.zeros((len(batches), 2 * len(told)))
        for k in range(mesh.data_rank(votes.rank), len(batches), mesh.data):
            first = batches[k]
            rows = list(enumerate(prompts.items[first : min(first + at_once, count)], first))
            drawn, _ = online.draw(rows, EVALUATION, each, "evaluation")
            sums[k] = flat(told, online.told(drawn))
        return sums

    sums = attempt(votes, mine)
    assert sums is not None
    added = np.array(votes.sum(*sums.reshape(-1).tolist())).reshape(sums.shape)
    return means(told, [float(sum(column)) for column in added.T])
