"""A preference record: a prompt and two answers to it, of which people prefer one.

    {"prompt", "chosen", "rejected"}: each a text or messages
    {"chosen", "rejected"}: two conversations, whose common beginning is the prompt

What training and evaluation take for a pair is decided here, once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unisono.data.problems import BadRecord

Messages = Sequence[Mapping[str, str]]
Pair = tuple[str | Messages, str | Messages, str | Messages]
ROLES = ("system", "user", "assistant")


def parse(record: Mapping[str, Any]) -> Pair:
    """(prompt, chosen, rejected). Raises BadRecord."""
    for name in ("chosen", "rejected"):
        if record.get(name) in (None, "", []):
            raise BadRecord(f"no `{name}` answer", "no answer")
    chosen = messages_of(record["chosen"], "chosen")
    rejected = messages_of(record["rejected"], "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("`chosen` and `rejected` are of two kinds; write two texts or two lists")
    if "prompt" in record:
        prompt = messages_of(record["prompt"], "prompt")
    elif isinstance(chosen, str):
        raise BadRecord("no `prompt`")
    else:
        assert not isinstance(rejected, str)  # both are of one kind
        same = _common(chosen, rejected)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not (prompt and chosen and rejected):
            raise BadRecord("`chosen` and `rejected` need a common beginning and different ends")
    if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise BadRecord(f"the prompt ends with the role {role}; it must be user", "roles")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        texts = [answer] if isinstance(answer, str) else [m["content"] for m in answer]
        if not all(text.strip() for text in texts):
            raise BadRecord(f"an empty `{name}` answer", "empty answer")
        if not isinstance(answer, str) and answer[0]["role"] != "assistant":
            role = answer[0]["role"]
            reason = f"`{name}` begins with the role {role}; it must be assistant"
            raise BadRecord(reason, "roles")
    if chosen == rejected:
        raise BadRecord("`chosen` and `rejected` are the same", "no difference")
    return prompt, chosen, rejected


def messages_of(value: Any, name: str) -> str | list[dict[str, str]]:
    """A text or checked messages. Raises BadRecord."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise BadRecord(f"`{name}` is {type(value).__name__}; write a text or a list of messages")
    found: list[dict[str, str]] = []
    for number, message in enumerate(value):
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else ("", "")
        )
        where = f"`{name}` message {number}"
        if role not in ROLES or not isinstance(content, str):
            reason = f"{where}: role {role!r:.30}; write system, user or assistant, and content"
            raise BadRecord(reason, "roles")
        if role == "system" and number:
            raise BadRecord(f"{where}: a system message comes first or not at all", "roles")
        if found and found[-1]["role"] == role:
            raise BadRecord(f"{where}: two of the role {role} in a row", "roles")
        found.append({"role": str(role), "content": content})
    return found


def as_messages(text: str | Messages, role: str) -> list[Mapping[str, str]]:
    """A text as one message of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _common(first: Messages, second: Messages) -> int:
    """How many messages two conversations begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(first), len(second)))
