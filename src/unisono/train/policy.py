"""Policy gradients: advantages of a prompt's completions, and the loss of a micro-batch of them as a sum.

A prompt has G completions with rewards r_i and tokens t = 1..|o_i|. pi is the model, ref the frozen one it began
as. Each completion serves one update, so pi / (pi that drew it) is 1: there is nothing to clip, and its
gradient is that of log pi.

    advantage     A_i = (r_i - mean r) / (std r + 1e-4), without the divisor where `scale_rewards: none`
                  rloo: A_i = s_i - mean of the others' s, with s_i = r_i - beta sum_t log(pi / ref)
    of a token    l_it = -rho A_i + beta rho k3,  rho = pi / stop_gradient(pi),  k3 = ref/pi - log(ref/pi) - 1
                  (rho before k3 only with `use_bias_correction_kl`)
    loss          grpo     mean over completions of mean_t l_it
                  dapo     mean over tokens of l_it
                  dr_grpo  mean over completions of sum_t l_it / max_completion_length
                  rloo     mean over completions of -A_i prod_t rho

A micro-batch gives sums, and what they are divided by, completions or tokens, is added over the global batch:
the loss depends on neither micro-batches nor replicas. Log-probabilities are of logits / temperature.

Sources: GRPO (Shao et al., DeepSeekMath, 2024), DAPO (Yu et al., 2025), Dr. GRPO (Liu et al., 2025), RLOO
(Ahmadian et al., 2024), k3 (Schulman, 2020), its correction (DeepSeek-V3.2, 2025). Equal to TRL 1.16.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unisono.config import GrpoConfig
from unisono.data.blocks import NO_LABEL, Batch
from unisono.data.prompts import Floats, Rollout
from unisono.train.objective import Measured, Objective

SCALE_EPSILON = 1e-4


def advantages(rewards: npt.NDArray[np.float64], loss_type: str, scale: bool) -> Floats:
    """[prompts, G] rewards to advantages. rloo: `rewards` have the KL taken off."""
    if loss_type == "rloo":
        others = (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
        return (rewards - others).astype(np.float32)
    found = rewards - rewards.mean(1, keepdims=True)
    if scale:
        found /= rewards.std(1, ddof=1, keepdims=True) + SCALE_EPSILON
    return found.astype(np.float32)


def names(rewards: Sequence[str], beta: float) -> tuple[str, ...]:
    """The metrics of a run, by TRL's names."""
    return (
        "reward", "reward_std", "frac_reward_zero_std",
        *(f"rewards/{name}/mean" for name in rewards),
        "completions/mean_length", "completions/mean_terminated_length", "completions/clipped_ratio",
        "entropy", *(("kl",) if beta else ()), "sampling/sampling_logp_difference/mean",
    )  # fmt: skip


def make_objective(asked: GrpoConfig, rewards: Sequence[str], keeps: bool) -> Objective:
    """The loss of a `Rollout`. `keeps`: the model takes logits_to_keep."""

    def measure(model: Any, batch: Rollout, device: str, bf16: bool) -> Measured:
        return measure_rollout(model, batch, asked, device, bf16, keeps)

    unit = "completion token" if asked.loss_type == "dapo" else "completion"
    return Objective(measure, unit, names(rewards, asked.beta), "reward")


def measure_rollout(
    model: Any, batch: Rollout, asked: GrpoConfig, device: str, bf16: bool, keeps: bool
) -> Measured:
    """The loss as a sum and its metrics. `model`: as in `log_probabilities`."""
    logp, every = log_probabilities(model, batch, asked.temperature, device, bf16, keeps)
    inside = batch.labels[:, 1:] != NO_LABEL
    row = torch.from_numpy(np.nonzero(inside)[0]).to(device)
    lengths = torch.from_numpy(inside.sum(1)).to(device).clamp(min=1)
    advantage = torch.from_numpy(batch.advantages).to(device)
    ratio = logp - logp.detach()
    tokens = float(inside.sum())
    with torch.no_grad():
        entropy = float(-(every.exp() * every).sum())
        drawn = torch.from_numpy(batch.drawn[inside]).to(device)
        difference = float((logp - drawn).abs().sum())
    sums = {
        **batch.sums,
        "entropy": (entropy, tokens),
        "sampling/sampling_logp_difference/mean": (difference, tokens),
    }
    if asked.loss_type == "rloo":
        whole = torch.zeros_like(advantage).index_add(0, row, ratio)
        return Measured(-(whole.exp() * advantage).sum(), batch.completions, sums)
    loss = -ratio.exp() * advantage[row]
    if batch.reference is not None:
        apart = torch.from_numpy(batch.reference[inside]).to(device) - logp
        k3 = apart.exp() - apart - 1
        sums["kl"] = (float(k3.detach().sum()), tokens)
        loss = loss + asked.beta * (k3 * ratio.exp() if asked.use_bias_correction_kl else k3)
    if asked.loss_type == "grpo":
        loss = loss / lengths[row]
    elif asked.loss_type == "dr_grpo":
        loss = loss / asked.max_completion_length
    count = int(tokens) if asked.loss_type == "dapo" else batch.completions
    return Measured(loss.sum(), count, sums)


def log_probabilities(
    model: Any, batch: Batch, temperature: float, device: str, bf16: bool, keeps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p of each label [m], detached log p of every token there [m, V]), float32, labels row by row.

    `model`: causal; called without a mask, as padding stands after all that counts.
    """
    inside = batch.labels[:, 1:] != NO_LABEL
    length = inside.shape[1]
    first = int(inside.any(0).argmax()) if inside.any() else length - 1
    some: dict[str, Any] = {"logits_to_keep": length + 1 - first} if keeps else {}
    ids, positions = (
        torch.from_numpy(x).to(device, non_blocking=True)
        for x in (batch.input_ids, batch.position_ids)
    )
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **some).logits
    if not keeps:
        logits = logits[:, first:]
    where = torch.from_numpy(inside[:, first:]).to(device)
    every = (logits[:, :-1][where].float() / temperature).log_softmax(-1)
    labels = torch.from_numpy(batch.labels[:, 1:][inside]).to(device)
    return every.gather(1, labels[:, None])[:, 0], every.detach()
