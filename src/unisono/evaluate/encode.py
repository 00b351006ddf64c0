"""Texts and conversations to tokens, for likelihoods and for generation.

A continuation's tokens are those of context + continuation after the tokens of the context alone;
spaces that end the context belong to the continuation, as most vocabularies have them there (what
lm-eval does, so that figures are equal). Conversations go through the model's own chat template.
"""

from typing import TYPE_CHECKING

from unisono.data.preferences import Messages, as_messages
from unisono.errors import ConfigError
from unisono.evaluate.items import Generation, Likelihood
from unisono.evaluate.records import BadRecord
from unisono.evaluate.text import prefix_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def likelihood(
    tokenizer: "PreTrainedTokenizerFast", context: str, continuation: str, most: int | None = None
) -> Likelihood:
    """How probable `continuation` is after `context`. Raises BadRecord above `most` tokens."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        whole = [prefix_of(tokenizer), *_ids(tokenizer, continuation)]
        return _fitting(whole, len(whole) - 1, most)
    whole = _ids(tokenizer, context + continuation, begin=True)
    before = len(_ids(tokenizer, context, begin=True))
    return _fitting(whole, len(whole) - before, most)


def response_likelihood(
    tokenizer: "PreTrainedTokenizerFast",
    prompt: str | Messages,
    response: str | Messages,
    most: int | None = None,
) -> Likelihood:
    """How probable a response is after a prompt, both texts or both messages."""
    if isinstance(prompt, str) and isinstance(response, str):
        return likelihood(tokenizer, prompt, response, most)
    prompt, response = as_messages(prompt, "user"), as_messages(response, "assistant")
    before = render(tokenizer, prompt, ask=True)
    whole = render(tokenizer, [*prompt, *response], ask=False)
    if not whole.startswith(before):
        raise BadRecord("the chat template changes the prompt when the answer follows it")
    first = _ids(tokenizer, before)
    ids = _ids(tokenizer, whole)
    if ids[: len(first)] == first:
        return _fitting(ids, len(ids) - len(first), most)
    rest = _ids(tokenizer, whole[len(before) :])  # a token spans the border: cut it there
    return _fitting([*first, *rest], len(rest), most)


def generation(
    tokenizer: "PreTrainedTokenizerFast", prompt: str | Messages, new_tokens: int, most: int,
    chat: bool = True,
) -> Generation:  # fmt: skip
    """What follows a prompt. A text is a user's message where the model has a chat template."""
    if isinstance(prompt, str) and chat and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        ids = _ids(tokenizer, prompt, begin=True) or [prefix_of(tokenizer)]
    elif tokenizer.chat_template:
        ids = _ids(tokenizer, render(tokenizer, prompt, ask=True))
    else:
        ids = _ids(tokenizer, "\n\n".join(m["content"] for m in prompt) + "\n\n")
    if len(ids) + new_tokens > most:
        raise BadRecord(
            f"{len(ids)} tokens and {new_tokens} to come: the model's context is {most}"
        )
    return Generation(tuple(ids), new_tokens)


def render(tokenizer: "PreTrainedTokenizerFast", messages: Messages, ask: bool) -> str:
    """The text of a conversation. Raises ConfigError without a template, BadRecord when it refuses."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "the model has no chat template, and the data has conversations; give texts, or a model "
            "that was tuned on chats"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))  # fmt: skip
    except Exception as error:  # templates are programs: they raise what they like
        raise BadRecord(f"the chat template refuses it ({str(error)[:120]})") from None


def _ids(tokenizer: "PreTrainedTokenizerFast", text: str, begin: bool = False) -> list[int]:
    """`begin`: with the beginning token, where the tokenizer adds one; a template writes its own."""
    return list(tokenizer(text, add_special_tokens=begin, verbose=False)["input_ids"])


def _fitting(ids: list[int], targets: int, most: int | None) -> Likelihood:
    if targets <= 0:
        raise BadRecord("an empty answer")
    if targets >= len(ids):
        raise BadRecord("an empty prompt")
    if most is not None and len(ids) - 1 > most:
        raise BadRecord(f"{len(ids) - 1} tokens: the model's context is {most}")
    return Likelihood(tuple(ids), targets)
