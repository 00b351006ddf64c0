"""Tuning on preference pairs: direct preference optimization and its published variants.

With log-probabilities summed over the tokens of an answer y to a prompt x, and a frozen reference,

    r(y) = log pi(y|x) - log ref(y|x)        d = r(chosen) - r(rejected)

    sigmoid  -(1 - e) log s(beta d) - e log s(-beta d)     Rafailov et al. 2023, eq. 7; e: label smoothing,
                                                           Mitchell 2023 (conservative DPO)
    hinge    max(0, 1 - beta d)                            Liu et al. 2023 (RSO, SLiC)
    ipo      (d - 1 / (2 beta))^2                          Azar et al. 2023, eq. 17

With `length_normalized`, and in ipo always, each r is divided by its answer's tokens, as TRL has it. The
loss is divided by pairs. Metrics are TRL's: rewards are beta r, not normalized.

Contract: `log_probabilities` needs no attention mask, because padding stands behind every token that
counts. Cost: a pair is two sequences; the output layer runs only from the first answer token on.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from unisono.config import DpoConfig
from unisono.data.blocks import NO_LABEL
from unisono.data.pairs import PairBatch
from unisono.train.objective import Measured, Objective, Sums

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip


def preference(config: DpoConfig) -> Objective:
    """The objective of a `dpo` section."""

    def measure(model: Any, batch: PairBatch, device: str, bf16: bool) -> Measured:
        logps = log_probabilities(model, batch, device, bf16)
        tokens = torch.from_numpy((batch.labels != NO_LABEL).sum(axis=1)).to(device)
        counts = torch.from_numpy(batch.counts).to(device)
        ratios = logps - torch.from_numpy(batch.reference).to(device)
        losses = pair_losses(ratios, tokens, config)
        return Measured(
            torch.where(counts, losses, 0.0 * losses).sum(),
            int(batch.counts.sum()),
            _metrics(logps.detach(), config.beta * ratios.detach(), counts),
        )

    return Objective(measure, unit="pair", metrics=METRICS, shown="rewards/accuracies")


def pair_losses(ratios: torch.Tensor, tokens: torch.Tensor, config: DpoConfig) -> torch.Tensor:
    """[n] from r of [2n] answers, the chosen first, of so many `tokens` each."""
    if config.length_normalized or config.loss_type == "ipo":
        ratios = ratios / tokens.clamp(min=1)
    chosen, rejected = ratios.chunk(2)
    difference = chosen - rejected
    if config.loss_type == "ipo":
        return (difference - 1 / (2 * config.beta)) ** 2
    if config.loss_type == "hinge":
        return torch.relu(1 - config.beta * difference)
    wrong = config.label_smoothing
    right = -(1 - wrong) * F.logsigmoid(config.beta * difference)
    return right - wrong * F.logsigmoid(-config.beta * difference) if wrong else right


def log_probabilities(model: Any, batch: PairBatch, device: str, bf16: bool) -> torch.Tensor:
    """log p of the labels of each row, in nats, float32 [2n]."""
    targets = batch.labels[:, 1:]
    length = targets.shape[1]
    wanted = (targets != NO_LABEL).any(axis=0)
    first = int(wanted.argmax()) if wanted.any() else length - 1
    ids, positions, labels = (
        torch.from_numpy(x).to(device, non_blocking=True)
        for x in (batch.input_ids[:, :-1], batch.position_ids[:, :-1], targets[:, first:].copy())
    )
    some: dict[str, Any] = {"logits_to_keep": length - first} if _can_skip(model) else {}
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **some).logits
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="none"
    )
    return -losses.view(labels.shape).sum(dim=1)


def _metrics(logps: torch.Tensor, rewards: torch.Tensor, counts: torch.Tensor) -> Sums:
    pairs = float(counts.sum())
    (logp_chosen, logp_rejected), (chosen, rejected) = logps.chunk(2), rewards.chunk(2)
    values = (
        chosen, rejected, (chosen > rejected).float(), chosen - rejected, logp_chosen, logp_rejected,
    )  # fmt: skip
    return {name: ((v * counts).sum(), pairs) for name, v in zip(METRICS, values, strict=True)}


def _can_skip(model: Any) -> bool:
    """Whether the model computes the last logits alone; wrappers pass it on."""
    model = getattr(model, "module", model)  # DDP
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters
