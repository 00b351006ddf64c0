"""Text from a model: greedy or sampled, from a run folder, a checkpoint, or any Hugging Face model."""

from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import ConfigError
from unisono.model import quantize
from unisono.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from unisono.guard import Completion, Guard


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """The prompt and its continuation. Raises ConfigError when there is no such model."""
    loaded, tokenizer = load(model, device)
    return continue_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, seed=seed,
    )  # fmt: skip


def guarded(
    model: str,
    prompt: str,
    guard: "Guard",
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """What a guard lets through of a continuation, without the prompt. Raises ConfigError.

    The model is not loaded for a prompt that is blocked.
    """

    def answer(asked: str) -> "Completion":
        loaded, tokenizer = load(model, device)
        whole = continue_text(
            loaded, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, seed=seed,
        )  # fmt: skip
        return _completion(loaded, tokenizer, asked, whole)

    return guard.ask(prompt, answer).text


def load(model: str, device: str = "auto") -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """A model and its tokenizer from a run, a checkpoint, a directory or the hub. Raises ConfigError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unisono.attention.choose import follow

    folder = Path(model)
    names = ("config.json", "adapter_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        newest = checkpoint.find(folder)[0]
        if newest is None:
            raise ConfigError(f"{model}: neither a model nor a checkpoint in it yet")
        model = str(newest.path)
    local = Path(model).is_dir()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local)
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            local_files_only=local,
            use_safetensors=True,
            **quantize.beside(Path(model), device, torch.float32),
        )
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{model}: not a model that can be loaded: {line}") from None
    quantize.keep_layout(loaded)
    follow(loaded, Path(model))
    return loaded.to(device), tokenizer


def _completion(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", prompt: str, whole: str
) -> "Completion":
    """What follows the prompt, and how probable the model itself finds it."""
    import torch

    from unisono.guard import Completion

    text = whole.removeprefix(prompt)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
    count = ids.shape[1] - len(before)
    if count <= 0 or not before:
        return Completion(text, max(0, count))
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits[0, len(before) - 1 : -1]
    nats = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(before) :].to(model.device))
    return Completion(text, count, float(nats))


def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The prompt and what the model makes of it; temperature 0 is greedy. Not collective."""
    import torch

    training = model.training
    model.eval()
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = ids.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            use_cache=True,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
    model.train(training)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
