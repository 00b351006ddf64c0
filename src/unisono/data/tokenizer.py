"""The tokenizer: the model's own, another one, or one trained on the data.

Contract: `load_tokenizer` returns a transformers fast tokenizer; nothing a tokenizer folder brings
is ever executed. A trained one is a pure function of the data and of TokenizerConfig, is kept in
the cache, and loads with AutoTokenizer like any other. Cost of training: one pass over at most
`train_bytes`, 2 s for the 5.3 MB of Shakespeare at 4,096 tokens on two cores.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.config import DataConfig, TokenizerConfig
from unisono.data.cache import locked, publish
from unisono.data.documents import Chat, Completion, Document, Text, read
from unisono.data.fingerprint import contents, digest
from unisono.data.preferences import as_messages
from unisono.data.problems import Problems
from unisono.data.source import Source, resolve
from unisono.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 1
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")

# ChatML. The generation block marks what the assistant says, its end token included: that is what
# is learned. The line break after it is no part of the answer, generation has stopped by then.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer(
    model: str | dict[str, Any],
    tokenizer: str | TokenizerConfig | None,
    data: DataConfig,
    cache_dir: Path,
    progress: Callable[[str, float], None] | None = None,
) -> "PreTrainedTokenizerFast":
    """The tokenizer of a configuration. Raises ConfigError: none named, none there, a slow one."""
    if isinstance(tokenizer, TokenizerConfig):
        return _trained(tokenizer, data, cache_dir, progress or (lambda stage, share: None))
    if tokenizer is not None:
        return _pretrained(tokenizer, "tokenizer")
    if isinstance(model, str):
        return _pretrained(model, "model")
    raise ConfigError(
        "tokenizer is missing: a model from random weights brings none; write"
        " tokenizer: {vocab_size: 4096} to train one on the data, or a directory or hub name"
    )


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """What decides which ids a text gets: the backend's JSON, special tokens, chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by whoever called the tokenizer last; transformers resets both at every call.
    backend["truncation"] = backend["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([backend, special, tokenizer.chat_template])


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size_of_model: int) -> None:
    """Raise ConfigError where the tokenizer can produce an id that the model has no row for."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size_of_model:
        raise ConfigError(
            f"tokenizer: id {largest} ({token!r}) >= the model's vocabulary {vocab_size_of_model}:"
            " use the tokenizer that the model was trained with, or enlarge its vocab_size"
        )


def _pretrained(name: str, field: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=os.path.isdir(name)
        )
    except Exception as error:  # the hub client and each tokenizer class raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{field}: found {name!r}; no tokenizer can be loaded from it: {reason}"
        ) from None
    if not found.is_fast:
        raise ConfigError(
            f"{field}: found {name!r}, a tokenizer without a tokenizer.json;"
            " convert it to a fast one and save it with save_pretrained"
        )
    return found


def _trained(
    wanted: TokenizerConfig,
    data: DataConfig,
    cache_dir: Path,
    progress: Callable[[str, float], None],
) -> "PreTrainedTokenizerFast":
    sources = resolve(data.path)
    found = contents(sources, cache_dir / "digests.json", lambda x: progress("hash", x))
    made_from = {
        "format": _FORMAT,
        "files": [content.sha256 for content in found],
        "names": [s.name for s in sources],
        "text_field": data.text_field,
        "max_line_bytes": data.max_line_bytes,
        "tokenizer": wanted.model_dump(),
        "chat_template": CHAT_TEMPLATE,
    }
    folder = cache_dir / f"tokenizer-{digest(made_from)[:16]}"
    with locked(cache_dir / f"{folder.name}.lock", lambda: progress("wait", 0.0)):
        if not (folder / "tokenizer.json").is_file():
            building = cache_dir / f"{folder.name}.partial"
            shutil.rmtree(building, ignore_errors=True)
            texts = _sample(sources, wanted.train_bytes, data, lambda x: progress("tokenizer", x))
            _train(texts, wanted.vocab_size).save_pretrained(building)
            publish(building, folder)
    return _pretrained(str(folder), "tokenizer")


def _train(texts: Iterator[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE: every byte is a token, so there is no unknown one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # As SmolLM2 and GPT-2: one token ends a text, begins one, and fills a block. Padding carries no
    # label, so the shared id teaches nothing.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _sample(
    sources: Sequence[Source], train_bytes: int, data: DataConfig, progress: Callable[[float], None]
) -> Iterator[str]:
    """The beginning of every source, each in proportion to its size on disk."""
    unreported = Problems()  # preparation reads the same records again and reports them
    sizes = [s.path.stat().st_size for s in sources]
    total = sum(sizes) or 1
    for i, (source, size) in enumerate(zip(sources, sizes)):
        left = min(train_bytes * size // total + 1, train_bytes)
        for document in read(source, data.text_field, data.max_line_bytes, unreported):
            for text in _texts(document):
                content = text.encode()
                yield content[:left].decode(errors="ignore")
                left -= len(content)
                if left <= 0:
                    break
            if left <= 0:
                break
        progress((i + 1) / len(sources))


def _texts(document: Document) -> tuple[str, ...]:
    if isinstance(document, Chat):
        return tuple(content for _, content in document.messages)
    if isinstance(document, Completion):
        both = (document.prompt, document.completion)
        return tuple(m["content"] for part in both for m in as_messages(part, ""))
    assert isinstance(document, Text)  # pairs tune a model that has its tokenizer
    return (document.text,)
