"""Rewards of completions: a user's Python function, or a model that scores texts.

What `grpo.reward_funcs` names is one of

- `file.py:function`    the user's own code, run as it is, from that file and nowhere else
- `package.module:function`   the same, of an installed package
- a directory           a sequence classification model with one label; its logit is the reward

A function is called for one prompt at a time, with its completions, so that what it returns cannot depend on
how prompts are divided: `function(prompts=[p] * n, completions=[...], **columns) -> n numbers`, columns being
the record's other fields, each repeated (as TRL calls them; only those that the function takes). A prompt of
messages comes with completions of messages: [{"role": "assistant", "content": ...}].

Contract: what is no finite number for each completion raises UnisonoError, which names function and prompt.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unisono.data.encode import make_encoder
from unisono.errors import ConfigError, UnisonoError

FIELD = "grpo.reward_funcs"
SHOWN = 60
"""Characters of a prompt in messages."""


@dataclass(frozen=True)
class Reward:
    """One reward. `digest`: of what it is made of, which a resumed run must find unchanged."""

    name: str
    score: Callable[..., Any]
    digest: str

    def __call__(
        self, prompt: Any, completions: Sequence[Any], columns: Mapping[str, Any], where: str
    ) -> list[float]:
        """One number a completion of the prompt that stands at `where`."""
        count = len(completions)
        repeated = {k: [v] * count for k, v in columns.items()}
        try:
            found = self.score(prompts=[prompt] * count, completions=list(completions), **repeated)
            values = [float(value) for value in found]
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise self._error(where, prompt, f"{type(error).__name__}: {text}") from error
        if len(values) != count:
            raise self._error(
                where, prompt, f"returned {len(values)} numbers for {count} completions"
            )
        for value, completion in zip(values, completions, strict=True):
            if not math.isfinite(value):
                raise self._error(where, prompt, f"returned {value} for {_short(completion)}")
        return values

    def _error(self, where: str, prompt: Any, what: str) -> UnisonoError:
        return UnisonoError(f"reward {self.name}, {where}, prompt {_short(prompt)}: {what}")


def _short(text: Any) -> str:
    if not isinstance(text, str):
        text = text[-1]["content"]
    return repr(text if len(text) <= SHOWN else "..." + text[-SHOWN:])


def load_rewards(specs: Sequence[str], device: str = "cpu") -> list[Reward]:
    """What `specs` name, in order. Raises ConfigError: no such file, function or model."""
    rewards = [_model(s, device) if Path(s).is_dir() else _function(s) for s in specs]
    names = [r.name for r in rewards]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"{FIELD}: two are called {twice}; rename one, their metrics are apart")
    return rewards


def _function(spec: str) -> Reward:
    origin, colon, name = spec.rpartition(":")
    if not colon:
        raise ConfigError(
            f"{FIELD}: found {spec!r}; write file.py:function, package.module:function, or the "
            f"directory of a reward model"
        )
    module = _file(Path(origin), spec) if origin.endswith(".py") else _module(origin, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{FIELD}: found {spec!r}; {origin} has no function {name}")
    source = Path(str(module.__file__)).read_bytes()
    return Reward(name, _taking(function), hashlib.sha256(name.encode() + source).hexdigest())


def _file(path: Path, spec: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{FIELD}: found {spec!r}; no file {path} here")
    # A name that no import would find; dataclasses look their module up.
    name = f"_unisono_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{FIELD}: {path} cannot be run: {_line(error)}") from error
    return module


def _module(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"{FIELD}: found {spec!r}; {name} is no module: {_line(error)}") from None


def _taking(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with those of the arguments that it takes."""
    known = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return function
    return lambda **given: function(**{k: v for k, v in given.items() if k in known})


def _model(spec: str, device: str) -> Reward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            spec, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(spec, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{FIELD}: found {spec!r}; no reward model can be loaded: {_line(error)}"
        ) from None
    if model.config.num_labels != 1:
        raise ConfigError(
            f"{FIELD}: found {spec!r}, a classifier of {model.config.num_labels} labels; a reward model "
            f"has one (num_labels: 1)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model = model.to(device).eval()
    digest = hashlib.sha256()
    for file in sorted(Path(spec).glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())

    prefix, end = make_encoder(tokenizer).prefix, tokenizer.eos_token_id

    def ids(prompt: Any, completion: Any) -> list[int]:
        """As reward models are trained: texts begin and end as documents do, chats as their template says."""
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        parts = tokenizer([prompt, completion], add_special_tokens=False)["input_ids"]
        return [*prefix, *parts[0], *parts[1], end]

    @torch.no_grad()
    def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        rows = [{"input_ids": ids(p, c)} for p, c in zip(prompts, completions, strict=True)]
        batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt")
        longest, context = batch["input_ids"].shape[1], model.config.max_position_embeddings
        if longest > context:
            raise ValueError(f"a text of {longest} tokens, beyond the reward model's {context}")
        return list(model(**batch.to(device)).logits[:, 0].tolist())

    return Reward(Path(spec).resolve().name, score, digest.hexdigest())


def _line(error: object) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
