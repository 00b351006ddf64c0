"""docs/attention.md tells of every causal family of transformers whose attention it runs, truly."""

import pytest
import transformers
from families import names, row, written

QUICK = ("llama", "mistral", "gemma2", "gpt_oss", "bloom", "mamba")


@pytest.mark.parametrize("family", QUICK)
def test_some_rows_are_true(family: str) -> None:
    assert written()[family].split("|")[2] == row(family).split("|")[2]


def test_every_family_that_the_page_was_made_with_has_a_row() -> None:
    missing = set(names()) - set(written())
    if missing:
        pytest.skip(f"transformers {transformers.__version__} has newer families: {sorted(missing)[:5]}")  # fmt: skip


def test_nine_of_ten_of_what_could_be_tried_and_has_attention_is_ours() -> None:
    rows = written().values()
    ours = sum("| ours |" in r for r in rows)
    assert ours >= 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_table_is_what_this_transformers_gives() -> None:
    """After an update of transformers: python tests/attention/families.py --write."""
    assert {f: row(f) for f in names()} == written()
