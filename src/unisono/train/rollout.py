"""Completions of prompts by the model as it is: one batch, a cache of keys and values, one number a token.

Contract: the token at place t of row r is a function of the row's prompt, the weights and draws[r, t] alone:
the first token at which the cumulated probability exceeds it. So neighbours, replicas and batches change
nothing but the rounding of matrix products, which moves a token where a draw falls within some 1e-7 of
an edge. Batches of one composition give the same bits.

A prompt is read once for all of its completions. Prompts are padded on the left, which is masked; a row that
has ended leaves the batch at once, which costs what appending a token to the cache does.

Cost: a forward pass of all prompts, then one of a token a row for each token of the longest completion. No
graph is kept. Memory: keys and values of the rows that go on, twice while one is appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

STEP_ROWS = 32
"""A step of generation costs about what so many more rows in it would."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, and when a completion ends."""

    most: int
    """Tokens of a completion at most."""
    ends: frozenset[int]
    """Any of these ends a completion, and belongs to it."""
    padding: int
    temperature: float = 1.0
    """0: the likeliest token."""
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """One row's tokens with the log-probabilities they had (at this temperature, before top_p)."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool
    """By a token that ends; else it was cut at `most`."""


def draws(keys: Sequence[Sequence[int]], most: int) -> npt.NDArray[np.float64]:
    """[len(keys), most] random numbers in [0, 1): each row a function of its key, non-negative integers."""
    rows = [np.random.Generator(np.random.PCG64(np.random.SeedSequence(tuple(k)))) for k in keys]
    return np.stack([row.random(most) for row in rows])


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    numbers: npt.NDArray[np.float64],
    how: Sampling,
    device: str = "cpu",
    keeps: bool = True,
) -> tuple[list[Completion], float]:
    """Completions of each prompt in order, as many for each as there are rows of `numbers` for it; and
    what they cost, in rows of one token.

    `model`: a causal model in evaluation mode with a cache, which sees masks; `keeps`: it takes
    logits_to_keep. `numbers`: [rows, most].
    """
    repeats = len(numbers) // len(prompts)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), how.padding)
    mask = torch.zeros(len(prompts), width + how.most, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    some: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
    out = model(
        input_ids=ids, attention_mask=mask[:, :width], position_ids=positions, use_cache=True, **some
    )  # fmt: skip
    cache = out.past_key_values
    cache.batch_repeat_interleave(repeats)
    logits = out.logits[:, -1].repeat_interleave(repeats, 0)
    mask = mask.repeat_interleave(repeats, 0)
    position = positions[:, -1:].repeat_interleave(repeats, 0)
    uniform = torch.from_numpy(numbers).to(device)
    ends = torch.tensor(sorted(how.ends), device=device)

    rows = torch.arange(len(numbers), device=device)
    tokens = torch.full((len(numbers), how.most), how.padding, device=device)
    logps = torch.zeros(len(numbers), how.most, device=device)
    lengths = torch.full((len(numbers),), how.most, device=device)
    ended = torch.zeros(len(numbers), dtype=torch.bool, device=device)
    cost = float(ids.numel() + STEP_ROWS)
    for t in range(how.most):
        token, logp = choose(logits, uniform[rows, t], how.temperature, how.top_p)
        tokens[rows, t], logps[rows, t] = token, logp
        over = torch.isin(token, ends)
        if bool(over.any()):
            lengths[rows[over]], ended[rows[over]] = t + 1, True
            going = (~over).nonzero()[:, 0]
            rows, token, mask, position = rows[going], token[going], mask[going], position[going]
            cache.batch_select_indices(going)
        if t + 1 == how.most or not len(rows):
            break
        position = position + 1
        out = model(
            input_ids=token[:, None], attention_mask=mask[:, : width + t + 1],
            position_ids=position, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        logits = out.logits[:, -1]
        cost += len(rows) + STEP_ROWS
    kept = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    return [Completion(tuple(ids[:n]), tuple(p[:n]), end) for ids, p, n, end in kept], cost


def choose(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, their log-probabilities) [n] by inverting the cumulated distribution of logits [n, V].

    `top_p`: only the likeliest tokens whose predecessors hold less than this share (Holtzman et al., 2019).
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        p = logp.double().exp()
        if top_p < 1:
            likely, order = p.sort(dim=-1, descending=True, stable=True)
            likely[likely.cumsum(-1) - likely >= top_p] = 0.0
            p = torch.zeros_like(p).scatter_(-1, order, likely)
        below = p.cumsum(-1)
        wanted = uniform.to(below)[:, None] * below[:, -1:]
        token = torch.searchsorted(below, wanted, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]
