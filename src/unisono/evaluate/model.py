"""A model under evaluation: its name and digest, and its answers to one batch of requests.

Log-probabilities are of float32 logits. Batches are padded on the right for likelihoods, which a causal
model does not see, and on the left for generation, which is masked.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.errors import CheckpointError, ConfigError, UnisonoError
from unisono.evaluate.items import Answer, Generation, Likelihood
from unisono.model import quantize
from unisono.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer.json")
"""What makes a model another one."""


@dataclass(frozen=True)
class Source:
    """Where a model lies: `path` for transformers, `name` for people, `digest` of its content."""

    path: str
    name: str
    digest: str


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer. Use `context` tokens at most."""

    source: Source
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    context: int


def find(model: str) -> Source:
    """The source that a run folder, a checkpoint, a model directory or a hub name means.

    The digest reads every byte of a local model, about 1 GB/s. Raises ConfigError: no such model.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/")):
            raise ConfigError(f"{model}: no such model; give a run folder or a model directory")
        return Source(model, model, hashlib.sha256(model.encode()).hexdigest()[:16])
    name = folder.resolve().name
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        try:
            newest = checkpoint.find(folder)[0]
        except CheckpointError as error:
            raise ConfigError(f"{model}: {error}") from None
        if newest is None:
            raise ConfigError(f"{model}: neither a model nor a checkpoint in it yet")
        folder = newest.path
        name = f"{name}/{folder.name}"
    digest = hashlib.sha256()
    for file in sorted({f for pattern in WEIGHTS for f in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return Source(str(folder), name, digest.hexdigest()[:16])


def tokenizer_of(source: Source) -> "PreTrainedTokenizerFast":
    """Raises ConfigError when the model has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, local_files_only=Path(source.path).is_dir()
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source.path}: no tokenizer can be loaded: {_line(error)}") from None


def load(source: Source, device: str, dtype: str) -> Loaded:
    """Raises ConfigError when it cannot be loaded. Code that comes with a model is never run."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from unisono.attention.choose import follow

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=Path(source.path).is_dir(),
            use_safetensors=True,
            **quantize.beside(
                Path(source.path),
                device,
                torch.float32 if dtype == "auto" else getattr(torch, dtype),
            ),
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{source.path}: cannot be loaded: {_line(error)}") from None
    model = model.to(device).eval()
    quantize.keep_layout(model)
    follow(model, Path(source.path))
    return Loaded(source, model, tokenizer_of(source), context_of(model.config))


def context_of(config: Any) -> int:
    """How many tokens a model takes; 2048 where its configuration does not say."""
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)  # fmt: skip


def config_context(source: Source) -> int:
    """`context_of` without loading weights; of adapters, that of their base."""
    from transformers import AutoConfig

    path, adapters = source.path, Path(source.path) / "adapter_config.json"
    try:
        if adapters.is_file():
            path = json.loads(adapters.read_text())["base_model_name_or_path"]
        return context_of(AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir()))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{source.path}: no configuration can be loaded: {_line(error)}"
        ) from None


def likelihoods(loaded: Loaded, requests: Sequence[Likelihood]) -> list[Answer]:
    """One batch. Only logits that some row needs are computed, where the model can leave others out."""
    import torch

    rows = [torch.tensor(r.tokens, dtype=torch.long) for r in requests]
    ids = torch.nn.utils.rnn.pad_sequence([r[:-1] for r in rows], batch_first=True)
    first = min(len(r.tokens) - 1 - r.targets for r in requests)
    device = loaded.model.device
    with torch.inference_mode():
        some: dict[str, Any] = {"logits_to_keep": ids.shape[1] - first} if _can_skip(loaded) else {}
        logits = loaded.model(input_ids=ids.to(device), use_cache=False, **some).logits
        offset = ids.shape[1] - logits.shape[1]
        answers: list[Answer] = []
        for row, request in zip(rows, requests, strict=True):
            end = len(row) - 1 - offset
            chosen = logits[len(answers), end - request.targets : end].float()
            targets = row[-request.targets :].to(device)
            logp = float(torch.log_softmax(chosen, -1).gather(1, targets[:, None]).double().sum())
            if not math.isfinite(logp):
                raise UnisonoError(
                    f"{loaded.source.name}: a log-probability is {logp}; are its weights damaged?"
                )
            answers.append(Answer(tokens=request.targets, logp=logp))
    return answers


def generations(loaded: Loaded, requests: Sequence[Generation]) -> list[Answer]:
    """One batch of greedy continuations, all with the same limit; special tokens are not in the text."""
    import torch
    from transformers import GenerationConfig

    tokenizer, model = loaded.tokenizer, loaded.model
    ends = ends_of(loaded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    width, most = max(len(r.tokens) for r in requests), requests[0].most
    ids = torch.full((len(requests), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
        mask[row, width - len(request.tokens) :] = 1
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, pad_token_id=pad,
        eos_token_id=sorted(ends) or None, use_cache=True,
    )  # fmt: skip
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            generation_config=settings,
        )  # fmt: skip
    answers = []
    for row in out[:, width:].tolist():
        length = next((k for k, token in enumerate(row) if token in ends), None)
        kept = row if length is None else row[:length]
        text = str(tokenizer.decode(kept, skip_special_tokens=True))
        answers.append(Answer(tokens=len(kept), text=text, ended=length is not None))
    return answers


def ends_of(loaded: Loaded) -> set[int]:
    """The tokens that end a generation: the tokenizer's and the model's own."""
    found: set[int] = set()
    configured = getattr(loaded.model, "generation_config", None)
    for ids in (loaded.tokenizer.eos_token_id, getattr(configured, "eos_token_id", None)):
        found |= set(ids) if isinstance(ids, list | tuple) else {ids} if ids is not None else set()
    return found


def _can_skip(loaded: Loaded) -> bool:
    return "logits_to_keep" in inspect.signature(loaded.model.forward).parameters


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
