"""Documents become token ids, each with two flags: is it learned, does it end its document.

Contract: a document is a list of (text, learned) pieces. Pieces are tokenized apart, so that in
training a reply follows exactly the ids that generation will put before it: those of the prompt
alone. A tokenizer for which that would change the text (SentencePiece puts a space before each
piece) tokenizes growing prefixes instead, and the ids of each must begin those of the next; where
they do not, the record is reported and left out.

- text: what the tokenizer itself puts before a text (Llama's begin token; nothing for most), the
  text, the end token. Everything is learned.
- completion: the same with the prompt before it; of messages, the template's rendering. The completion, or
  what it adds to the rendered prompt, and the end token are learned.
- chat: the chat template's rendering. What stands in its {% generation %} blocks is learned; a
  template without them is rendered message by message, and what each assistant message adds
  after the generation prompt is learned.

- pair: two sequences, the prompt with each answer, as a completion where all are texts, else as the
  template's rendering: what the answer adds to the prompt alone is learned. Both can be used or neither.

A chat, completion or pair longer than `longest` tokens is reported and left out: a reply whose beginning is
cut off would be learned without what it answers.

Cost: the Rust tokenizer on all cores; about 120 bytes of memory a token of one batch.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unisono.data.documents import Chat, Completion, Document, Pair, Text
from unisono.data.preferences import Messages, as_messages
from unisono.data.problems import Problems
from unisono.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEARNED = 1
"""The token counts in the loss."""
ENDS = 2
"""The token is the last of its document."""

Pieces = list[tuple[str, bool]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and what preparation must know of it. Made by `make_encoder`."""

    tokenizer: "PreTrainedTokenizerFast"
    prefix: tuple[int, ...]
    """What the tokenizer puts before a text."""
    end: int
    padding: int
    vocab_size: int
    """One more than the largest id."""
    splits: bool
    """Whether pieces tokenized apart are the text tokenized whole."""
    marks: bool
    """Whether the chat template marks what is generated."""
    longest: int | None = None
    """Tokens of a chat, completion or answer that can stay whole; a longer one is reported and left out."""

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32


def make_encoder(tokenizer: "PreTrainedTokenizerFast", longest: int | None = None) -> Encoder:
    """Raises ConfigError when the tokenizer cannot mark the end of a document."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("tokenizer: it has no eos token to end a document with: set eos_token")
    whole, bare = (tokenizer("x", add_special_tokens=s)["input_ids"] for s in (True, False))
    found = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    apart = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x\n", "y", "x\ny")
    ]
    return Encoder(
        tokenizer=tokenizer,
        prefix=tuple(whole[: found[0]]) if found else (),
        end=end,
        padding=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        splits=apart[0] + apart[1] == apart[2],
        marks=bool(_GENERATION.search(tokenizer.chat_template or "")),
        longest=longest,
    )


def encode(
    documents: Sequence[Document], encoder: Encoder, problems: Problems
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Ids and flags of the documents in order, one after the other."""
    kept: list[tuple[Document, list[Pieces]]] = []
    for document in documents:
        try:
            kept.append((document, _sequences(document, encoder)))
        except _NoTemplate as error:
            _report(document, str(error), problems)
    texts = [text for _, pieces in kept for each in pieces for text in _texts(each, encoder)]
    ids = iter(_tokenize(texts, encoder))
    all_ids: list[npt.NDArray[np.uint32]] = []
    all_flags: list[npt.NDArray[np.uint8]] = []
    for document, pieces in kept:
        sequences = [[next(ids) for _ in each] for each in pieces]
        framed = []
        for each, parts in zip(pieces, sequences):
            whole: list[npt.NDArray[np.uint32]] | None = parts
            if len(each) > 1 and not encoder.splits:
                whole = _differences(parts)
            if whole is None:
                _report(document, "the ids of its beginning change with what follows", problems)
                break
            framed.append(_framed(document, whole, [learned for _, learned in each], encoder))
        if len(framed) < len(pieces):
            continue
        length = max(len(ids) for ids, _ in framed)
        if encoder.longest and not isinstance(document, Text) and length > encoder.longest:
            reason = f"{length:,} tokens are more than sequence_length {encoder.longest:,}"
            _report(document, f"{reason}: it would not stay whole", problems, "too long")
            continue
        all_ids += [ids for ids, _ in framed]
        all_flags += [flags for _, flags in framed]
    if not all_ids:
        return np.empty(0, np.uint32), np.empty(0, np.uint8)
    return np.concatenate(all_ids), np.concatenate(all_flags)


class _NoTemplate(Exception):
    """The chat template cannot render this conversation so that the replies are known."""


def _report(
    document: Document, reason: str, problems: Problems, kind: str = "chat template"
) -> None:
    record = repr(document).encode("utf-8", "backslashreplace")
    problems.add(kind, document.file, document.line, reason, record)


def _sequences(document: Document, encoder: Encoder) -> list[Pieces]:
    """One for a document, two for a pair."""
    if isinstance(document, Pair):
        return [_answer(document, a, encoder) for a in (document.chosen, document.rejected)]
    if isinstance(document, Completion):
        return [_answer(document, document.completion, encoder)]
    return [_pieces(document, encoder)]


def _answer(asked: Pair | Completion, answer: str | Messages, encoder: Encoder) -> Pieces:
    """The prompt of `asked`, and what `answer` adds to it."""
    if isinstance(asked.prompt, str) and isinstance(answer, str):
        return [(asked.prompt, False), (answer, True)]
    _need_template(asked, encoder)
    prompt = as_messages(asked.prompt, "user")

    def render(messages: Messages, prompt: bool) -> str:
        return str(encoder.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        ))  # fmt: skip

    try:
        before = render(prompt, True)
        whole = render([*prompt, *as_messages(answer, "assistant")], False)
    except Exception as error:  # a template may raise anything: it is a program of its own
        raise _NoTemplate(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    if not whole.startswith(before) or whole == before:
        raise _NoTemplate("the chat template changes the prompt when the answer follows it")
    return [(before, False), (whole[len(before) :], True)]


def _need_template(document: Chat | Completion | Pair, encoder: Encoder) -> None:
    if not encoder.tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer: it has no chat template, but {document.file}:{document.line} holds messages:"
            " use the tokenizer of a chat model, or one trained here ({vocab_size: 4096})"
        )


def _pieces(document: Text | Chat, encoder: Encoder) -> Pieces:
    if isinstance(document, Text):
        return [(document.text, True)]
    return _chat_pieces(document, encoder)


def _chat_pieces(chat: Chat, encoder: Encoder) -> Pieces:
    _need_template(chat, encoder)
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    render = _marked if encoder.marks else _grown
    try:
        text, spans = render(messages, encoder)
    except _NoTemplate:
        raise
    except Exception as error:  # a template may raise anything: it is a program of its own
        raise _NoTemplate(f"the chat template refuses it: {' '.join(str(error).split())}") from None
    pieces: Pieces = []
    at = 0
    for begin, end in spans:
        pieces += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    pieces.append((text[at:], False))
    return [piece for piece in pieces if piece[0]]


def _marked(messages: list[dict[str, str]], encoder: Encoder) -> tuple[str, list[tuple[int, int]]]:
    """The rendering, and where its generation blocks lie."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = encoder.tokenizer
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    replies = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    marked = [texts[0][begin:end] for begin, end in spans[0]]
    if len(marked) != len(replies) or any(r not in m for r, m in zip(replies, marked)):
        raise _NoTemplate(
            "the chat template's generation blocks do not hold the assistant messages"
        )
    return texts[0], spans[0]


def _grown(messages: list[dict[str, str]], encoder: Encoder) -> tuple[str, list[tuple[int, int]]]:
    """The rendering, and what each assistant message adds to the one before it."""

    def render(count: int, prompt: bool = False) -> str:
        rendered: str = encoder.tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )
        return rendered

    text = render(len(messages))
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, prompt=True), render(i + 1)
            if not (text.startswith(before) and text.startswith(after)):
                raise _NoTemplate(
                    f"the chat template renders messages[:{i + 1}] anew when more follow"
                )
            spans.append((len(before), len(after)))
    return text, spans


def _texts(pieces: Pieces, encoder: Encoder) -> list[str]:
    if encoder.splits or len(pieces) == 1:
        return [text for text, _ in pieces]
    return ["".join(text for text, _ in pieces[: i + 1]) for i in range(len(pieces))]


def _differences(prefixes: list[npt.NDArray[np.uint32]]) -> list[npt.NDArray[np.uint32]] | None:
    """What each prefix adds to the one before it, or None if one does not begin the next."""
    for short, long in itertools.pairwise(prefixes):
        if len(short) > len(long) or not np.array_equal(short, long[: len(short)]):
            return None
    lengths = [0, *map(len, prefixes)]
    return [prefix[begin:] for prefix, begin in zip(prefixes, lengths)]


def _tokenize(texts: list[str], encoder: Encoder) -> list[npt.NDArray[np.uint32]]:
    backend = encoder.tokenizer.backend_tokenizer
    # What a tokenizer.json or an earlier caller left set would silently cut documents.
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.uint32) for e in encodings]


def _framed(
    document: Document,
    parts: list[npt.NDArray[np.uint32]],
    learned: list[bool],
    encoder: Encoder,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """The begin and end tokens around a document's ids, its flags, and its last token marked."""
    text = isinstance(document, Text)
    rendered = isinstance(document, Chat) or (
        isinstance(document, Pair | Completion) and document.is_chat
    )
    opens = not rendered and (not isinstance(document, Text) or document.first)
    closes = not rendered and (not isinstance(document, Text) or document.last)
    prefix = np.array(encoder.prefix if opens else (), np.uint32)
    suffix = np.array([encoder.end] if closes else [], np.uint32)
    ids = np.concatenate([prefix, *parts, suffix])
    flags = np.repeat(
        np.array([text, *learned, True], np.uint8) * np.uint8(LEARNED),
        [len(prefix), *map(len, parts), len(suffix)],
    )
    # A chat ends where its rendering ends; the template has its own end tokens.
    if len(flags) and (closes or rendered):
        flags[-1] |= ENDS
    return ids, flags
