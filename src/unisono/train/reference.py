"""Log-probabilities of all answers under the model as it was: computed once, kept on disk, reused.

Contract: the reference is what `model` names, without adapters, in evaluation mode; it is in memory only
while this runs, before the model that is trained. Pieces of PAIRS pairs are dealt out to the ranks in
batches that do not depend on their number, and rank 0 keeps each piece when it is done: a run that is
killed goes on at the next, a resume or a run with other settings reads them. The key holds the data as
tokenized, every byte of the model's files, precision and attention.

Cost: one forward pass over the data, over all ranks; 16 bytes a pair on disk. Under `sync: sharded`, too, each
rank holds the reference whole.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from unisono.data.blocks import Blocks
from unisono.data.fingerprint import digest
from unisono.data.pairs import PairBatch, Pairs, row_lengths
from unisono.errors import DataError, UnisonoError
from unisono.files import replacing
from unisono.sync.ledger import Group
from unisono.train.preference import log_probabilities
from unisono.train.together import attempt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS = 128
"""Of a piece."""
BATCH = 4
"""Pairs of a batch."""
FORMAT = 1

Log = npt.NDArray[np.float64]


def reference_of(
    folder: Path,
    made_from: dict[str, str],
    cache: Path,
    load: "Callable[[], PreTrainedModel]",
    group: Group,
    device: str,
    bf16: bool,
    progress: Callable[[float], None],
) -> Log:
    """Collective: log p(answer | prompt) in nats by row of the blocks in `folder`, on every rank.

    `made_from`: what the values depend on beside this file. `load` is called on each rank, if anything is
    missing. Raises UnisonoError where the reference has no finite log-probability.
    """
    pairs = Pairs(Blocks(folder))
    kept = cache / f"reference-{digest({'format': FORMAT, **made_from})[:16]}"
    found = torch.zeros(2 * len(pairs), dtype=torch.float64)
    pieces = range(0, len(pairs), PAIRS)
    missing = torch.zeros(len(pieces), dtype=torch.float64)
    if group.rank == 0:
        for k, begin in enumerate(pieces):
            rows = slice(2 * begin, 2 * min(begin + PAIRS, len(pairs)))
            values = _read(kept / f"{k:06}.f64", rows.stop - rows.start)
            missing[k] = float(values is None)
            if values is not None:
                found[rows] = values
    group.broadcast(missing).wait()
    if missing.any():
        model = attempt(group, load)
        assert model is not None
        model.to(device).eval()
        for k in torch.nonzero(missing)[:, 0].tolist():
            chosen = np.arange(k * PAIRS, min((k + 1) * PAIRS, len(pairs)))
            score = partial(_score, model, pairs, chosen, group, device, bf16)
            values = attempt(group, score)
            assert values is not None
            group.all_reduce(values).wait()
            if not torch.isfinite(values).all():
                raise UnisonoError(
                    "dpo: a log-probability under the reference is not finite; are its weights damaged?"
                ).on_every_rank()
            rows = slice(2 * int(chosen[0]), 2 * int(chosen[-1]) + 2)
            if group.rank == 0:
                found[rows] = values
            attempt(group, partial(_write, kept, k, values), mine=group.rank == 0)
            progress((k + 1) / len(pieces))
    group.broadcast(found).wait()
    return found.numpy()


def _score(
    model: "PreTrainedModel",
    pairs: Pairs,
    chosen: npt.NDArray[np.int64],
    group: Group,
    device: str,
    bf16: bool,
) -> torch.Tensor:
    """[2 len(chosen)] values, chosen and rejected in turn; zero for what other ranks compute."""
    values = torch.zeros(len(chosen), 2, dtype=torch.float64)
    rows = pairs.rows.read(np.stack([2 * chosen, 2 * chosen + 1], axis=1).reshape(-1))
    longest = row_lengths(rows.position_ids).reshape(-1, 2).max(axis=1)
    order = np.argsort(-longest, kind="stable")  # alike lengths share a batch
    with torch.no_grad():
        for number, begin in enumerate(range(0, len(order), BATCH)):
            if number % group.size != group.rank:
                continue
            some = order[begin : begin + BATCH]
            batch: PairBatch = pairs.read(chosen[some])
            logps = log_probabilities(model, batch, device, bf16).double().cpu()
            values[torch.from_numpy(some)] = logps.view(2, -1).T
    return values.view(-1)


def _read(path: Path, count: int) -> torch.Tensor | None:
    try:
        values = np.fromfile(path, "<f8")
    except OSError:
        return None
    whole = len(values) == count and bool(np.isfinite(values).all())
    return torch.from_numpy(values.astype(np.float64)) if whole else None


def _write(folder: Path, piece: int, values: torch.Tensor) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{piece:06}.f64") as file:
            file.write(values.numpy().astype("<f8").tobytes())
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None


def with_reference(pairs: Pairs, values: Log) -> Pairs:
    """The same pairs, read with their log-probabilities."""
    return replace(pairs, reference=values)
