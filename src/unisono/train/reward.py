"""Reward models: a causal model with a head of one output, trained to rank answers as people do.

    loss = -log s(r(chosen) - r(rejected) - margin) + c (r(chosen) + r(rejected))^2

divided by pairs (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1; the second term, which centres rewards,
is Eisenstein et al. 2023's). r is what AutoModelForSequenceClassification with num_labels=1 says of prompt
and answer: the head's output at the last token that is no padding. Metrics have TRL's names.
"""

from typing import Any

import torch
import torch.nn.functional as F

from unisono.config import RewardConfig
from unisono.data.pairs import PairBatch
from unisono.train.objective import Measured, Objective

METRICS = ("accuracy", "margin", "mean_reward")


def reward(config: RewardConfig) -> Objective:
    """The objective of a `reward` section."""

    def measure(model: Any, batch: PairBatch, device: str, bf16: bool) -> Measured:
        ids, positions, counts = (
            torch.from_numpy(x).to(device, non_blocking=True)
            for x in (batch.input_ids, batch.position_ids, batch.counts)
        )
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=bf16):
            scores = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        chosen, rejected = scores.float().squeeze(-1).chunk(2)
        losses = -F.logsigmoid(chosen - rejected - config.margin)
        if config.center_rewards_coefficient is not None:
            losses = losses + config.center_rewards_coefficient * (chosen + rejected) ** 2
        pairs = int(batch.counts.sum())
        ahead = (chosen - rejected).detach() * counts
        both = (chosen + rejected).detach() * counts
        return Measured(
            torch.where(counts, losses, 0.0 * losses).sum(),
            pairs,
            {
                "accuracy": ((ahead > 0).float().sum(), pairs),
                "margin": (ahead.sum(), pairs),
                "mean_reward": (both.sum(), 2 * pairs),
            },
        )

    return Objective(measure, unit="pair", metrics=METRICS, shown="accuracy")
