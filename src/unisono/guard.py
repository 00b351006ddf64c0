"""A guard around a model: prompts and completions are checked, and every request is written down.

    guard = Guard(log=Path("guard.jsonl"), classifier=my_score)
    reply = guard.ask(prompt, my_model)     # reply.text, reply.blocked, reply.rules

A text is checked by rules (patterns, below, that a caller can replace) and by a classifier: any
callable from a text to a score, where a caller has one. Only Python code can hand one in; the command
takes a model directory instead, because naming code to import on a command line, or in a configuration
that somebody else wrote, would run it.

What holds: nothing is returned that was not checked and logged. A rule or classifier that raises
blocks the text (`guard failed`). If the log cannot be written, `ask` raises and the text is lost. A line
is in the log whole or not at all (files.JsonLines: a kill loses nothing, a power cut perhaps the
newest lines). One process writes a log. Texts are not logged unless `keep_text`: lengths, scores, and a
sketch of the prompt's words in SKETCH buckets, enough for `unisono monitor`.

Rules find words, not meanings: they stop the plain cases (docs/guard.md says how many), nothing more.
"""

import fcntl
import hashlib
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from unisono.errors import UnisonoError
from unisono.evaluate.refusals import refuses
from unisono.evaluate.toxicity import own
from unisono.files import JsonLines

Where = Literal["prompt", "completion"]
SKETCH = 256
"""Buckets of the sketch of a prompt."""
TOO_TOXIC = 2.4
BLOCKED = "I cannot help with that."
_WORDS = own()


@dataclass(frozen=True)
class Rule:
    """What must not be in a text; `finds` returns whether it is there."""

    name: str
    where: tuple[Where, ...]
    finds: Callable[[str], bool]


@dataclass(frozen=True)
class Completion:
    """A model's answer; what else is known of it goes into the log."""

    text: str
    tokens: int | None = None
    nats_per_token: float | None = None
    """-log p of the completion's tokens under the model, mean."""


@dataclass(frozen=True)
class Reply:
    """What may be shown. `blocked` says what was stopped; `rules` which rules did, `classifier` too."""

    text: str
    blocked: Where | Literal[""]
    rules: tuple[str, ...]


def pattern(expression: str) -> Callable[[str], bool]:
    """A rule's `finds` that searches without regard to case."""
    compiled = re.compile(expression, re.IGNORECASE)
    return lambda text: compiled.search(text) is not None


_HOW = r"(?:how (?:to|do i|can i|could i|would i|should i|can one)|(?:give|write|provide|create|make|design|develop|show|teach|tell|explain|describe|outline|list|instruct|generate|guide|help|suggest|offer|demonstrate|produce|draft|come up with|release|teach)\b)"  # fmt: skip
_WEAPON = r"(?:bombs?|firearms|toxins|explosives?|pipe bomb|grenades?|molotov|nerve agents?|sarin|ricin|anthrax|chemical weapons?|bioweapons?|biological weapons?|dirty bomb|landmines?|ghost guns?|silencers?|ammunition|pathogen)"  # fmt: skip
_DRUG = r"(?:meth|methamphetamines?|cocaine|heroin|fentanyl|crack cocaine|lsd|mdma|ghb|ecstasy|date rape drug|(?:illegal|illicit) drugs?|counterfeit (?:money|pills)|amphetamines?|opioids?)"  # fmt: skip
_ATTACK = r"(?:hack(?:s|ing)?\b|exploits? (?:vulnerabilit|security|weakness)\w*|virus that|hijack\w*|pirat(?:e|ed|ing) (?:software|content|movies|copyrighted)|manipulat\w+ (?:stock|people|market|election|voters|financial)\w*|bypass\w* (?:security|firewall|drm|a paywall)|without (?:their|anyone's|the user's|her|his) (?:consent|knowledge)|break(?:ing)? into|phishing|ransomware|malware|keylogger|spyware|botnet|computer (?:virus|worm)|trojan|ddos|sql injection|exploit(?:s|ing)? (?:a |the )?(?:vulnerabilit|software|zero)|brute.?force|identity theft|steal(?:s|ing)?\b|credit card fraud|money launder\w*|launder(?:ing)? money|tax (?:fraud|evasion)|insider trading|blackmail|extort\w*|scam\w*|embezzl\w*|fraud(?:ulent\w*)?|counterfeit\w*|forg(?:e|ing|ery)|fake (?:id|ids|passport|documents?|prescription|reviews?|charity)|bribe\w*|smuggl\w*|traffick\w*|pyramid scheme|plagiari\w+)"  # fmt: skip
_HARM = r"(?:kill(?:ing)? (?:someone|a person|people|my|him|her|them|myself|yourself)|murder\w*|assassinat\w*|poison (?:someone|a person|my|people|him|her)|stalk(?:ing)?|cyberstalk\w*|kidnap\w*|tortur\w*|suicide|self.?harm|eating disorders?|anorexia|rape|molest\w*|physical(?:ly)? (?:harm|assault)\w*|mass shooting|school shooting|terror(?:ist|ism)\w*|genocide|ethnic cleansing|lynch\w*|drown (?:a|someone)|dismember\w*|dispose of a (?:body|corpse)|groom(?:ing)? (?:a )?(?:child|minor|kid)\w*|domestic violence|animal (?:cruelty|abuse)|human trafficking|cannibal\w*)"  # fmt: skip
_HATE = r"(?:racis[tm]|incit\w+ (?:violence|racial|hatred|riots?)|violence against|fake news|false information|discriminat\w+ against|sexist|homophobic|antisemitic|anti-semitic|islamophobic|hateful|hate speech|inferior race|white supremac\w+|neo-?nazi|defam\w+|disinformation|misinformation|conspiracy theor\w+|holocaust denial|harass\w*|bully\w*|cyberbully\w*)"  # fmt: skip
RULES = (
    Rule("harmful request", ("prompt",), pattern(
        rf"\b{_HOW}[^.?!\n]{{0,160}}?\b(?:{_WEAPON}|{_DRUG}|{_ATTACK}|{_HARM}|{_HATE})\b")),
    Rule("minors", ("prompt", "completion"), pattern(
        r"\bchild porn\w*|\bcsam\b|\b(?:sexual\w*|nude|naked|erotic\w*|porn\w*)\b[^.?!\n]{0,40}\b(?:child|children|minors?|underage|toddlers?|preteen)\b|\b(?:child|children|minors?|underage|preteen)\b[^.?!\n]{0,40}\b(?:sexual\w*|nude|naked|erotic\w*|porn\w*)\b")),
    Rule("jailbreak", ("prompt",), pattern(
        r"\bignore (?:all |any |the |your |my )*(?:previous|prior|above|earlier|preceding)\b[^.\n]{0,30}\b(?:instruction|prompt|rule|direction|polic)\w*|\bdo anything now\b|\byou are (?:now )?(?:dan|stan|dude|aim)\b|\b(?:developer|debug|god|jailbreak) mode\b|\bnever (?:refuse|say (?:that )?you can)|\bwithout (?:any )?(?:rules|restrictions|filters|censorship|ethical)|\bno (?:rules|restrictions|ethical guidelines|filters)\b|\bbegin your answer with\b.{0,12}\bsure\b|\bdo not (?:apologi[sz]e|refuse)\b")),
    Rule("secret", ("completion",), pattern(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\b(?:sk|uk|pk|rk)[-_](?:live|test|proj)?[-_]?[A-Za-z0-9]{12,}\b|\bxox[baprs]-[0-9A-Za-z-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}|\b(?:password|passwd|api key|secret key) (?:is|=|:)\s*\S{6,}")),
    Rule("card number", ("prompt", "completion"), lambda text: any(
        _luhn(re.sub(r"\D", "", m[0])) for m in re.finditer(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?![\d.])", text))),
    Rule("toxic", ("prompt", "completion"), lambda text: _WORDS.score(text) >= TOO_TOXIC),
)  # fmt: skip


def _luhn(digits: str) -> bool:
    """Whether a card number's check digit is right (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0 and len(set(digits)) > 1


class Guard:
    """Checks, answers and logs. A context manager: it closes its log. Not thread-safe.

    `classifier` maps a text to a score; from `threshold` on a text is blocked. Raises UnisonoError when
    another process writes the log.
    """

    def __init__(
        self,
        *,
        rules: Sequence[Rule] = RULES,
        classifier: Callable[[str], float] | None = None,
        threshold: float = 0.5,
        log: Path | None = None,
        keep_text: bool = False,
    ) -> None:
        self._rules, self._classifier, self._threshold = tuple(rules), classifier, threshold
        self._keep_text = keep_text
        self._lock = _lock(log) if log is not None else -1
        self._log = JsonLines(log) if log is not None else None

    def check(self, text: str, where: Where) -> tuple[tuple[str, ...], float | None]:
        """(names of what forbids a text, the classifier's score). Logs nothing, never raises."""
        found = []
        score: float | None = None
        try:
            found = [r.name for r in self._rules if where in r.where and r.finds(text)]
            if self._classifier is not None:
                score = float(self._classifier(text))
                if not score < self._threshold:  # a NaN blocks too
                    found.append("classifier")
        except Exception:  # a check that cannot be made is not passed
            found.append("guard failed")
        return tuple(found), score

    def ask(self, prompt: str, answer: Callable[[str], str | Completion]) -> Reply:
        """The model's answer, or BLOCKED; on the disk's log before it is returned.

        `answer` is not called for a prompt that is blocked. What it raises is logged and raised.
        """
        row = {"time": round(time.time(), 3), "id": uuid.uuid4().hex, **_seen(prompt)}
        if self._keep_text:
            row["prompt"] = prompt
        rules, row["prompt_score"] = self.check(prompt, "prompt")
        if rules:
            return self._reply(row, BLOCKED, "prompt", rules)
        try:
            made = answer(prompt)
        except BaseException as error:
            self._write({**row, "blocked": "", "rules": [], "error": type(error).__name__})
            raise
        completion = made if isinstance(made, Completion) else Completion(made)
        row |= {
            "completion_characters": len(completion.text),
            "completion_words": len(completion.text.split()),
            "completion_tokens": completion.tokens,
            "nats_per_token": completion.nats_per_token,
            "refused": refuses(completion.text),
            "toxicity": _WORDS.score(completion.text),
        }
        if self._keep_text:
            row["completion"] = completion.text
        rules, row["completion_score"] = self.check(completion.text, "completion")
        if rules:
            return self._reply(row, BLOCKED, "completion", rules)
        return self._reply(row, completion.text, "", ())

    def _reply(
        self, row: dict[str, Any], text: str, blocked: Where | Literal[""], rules: tuple[str, ...]
    ) -> Reply:
        self._write({**row, "blocked": blocked, "rules": list(rules)})
        return Reply(text, blocked, rules)

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.append(row)

    def close(self) -> None:
        """Close the log; a second call does nothing."""
        if self._log is not None:
            self._log.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Guard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def model_classifier(folder: Path) -> Callable[[str], float]:
    """A text classifier of transformers from a local directory: the probability of its last label.

    Weights are safetensors; code in the directory is not run. Raises UnisonoError when there is none.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not folder.is_dir():
        raise UnisonoError(
            f"--guard-model: {folder}: no such folder; give a classifier's directory"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise UnisonoError(f"--guard-model: {folder}: not a text classifier: {line}") from None

    def score(text: str) -> float:
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.inference_mode():
            logits = model(**inputs).logits[0].float()
        return float(logits.sigmoid()[0] if len(logits) == 1 else logits.softmax(-1)[-1])

    return score


def sketch(text: str) -> list[list[int]]:
    """[bucket, count] of a text's words, by a digest: enough to see that topics change."""
    counts = Counter(
        int.from_bytes(hashlib.blake2s(w.encode(), digest_size=4).digest()) % SKETCH
        for w in re.findall(r"\w+", text.lower())
    )
    return [[bucket, count] for bucket, count in sorted(counts.items())]


def _seen(prompt: str) -> dict[str, Any]:
    return {
        "prompt_characters": len(prompt),
        "prompt_words": len(prompt.split()),
        "prompt_toxicity": _WORDS.score(prompt),
        "prompt_sketch": sketch(prompt),
    }


def _lock(log: Path) -> int:
    """Own a log for as long as the descriptor is open. Raises UnisonoError when another does."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(log, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UnisonoError(f"{log}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UnisonoError(
            f"{log}: another process writes this log; give each one its own"
        ) from None
    return fd
