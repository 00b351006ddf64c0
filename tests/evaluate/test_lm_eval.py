"""Figures equal to lm-eval's on the same local tasks. Needs lm-eval, which CI has not."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra lm-eval)")

from test_likelihood import evaluated
from tiny import TEMPLATE, TEXT, write_model  # noqa: F401

from ranks import run_ranks
from unisono.evaluate.harness import harness
from unisono.evaluate.run import Asked

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""


def folder_of(name: str, file: Path, text: str) -> Path:
    path = file.parent / f"{name}.yaml"
    path.write_text(text.format(file=file))
    return path


def test_choices_and_bits_per_byte(tmp_path: Path) -> None:
    chosen = os.environ.get("UNISONO_LM_EVAL_MODEL")
    model = Path(chosen) if chosen else write_model(tmp_path / "tiny")
    words = ["mill", "oak", "key", "wind", "rain", "night", "river", "thief", "miller", "owl"]
    rows = [
        {"context": f"Where is the {a}? Ask the {b}. The", "choices": ["key", "owl of the mill", f"{b} or the river"], "answer": (k + j) % 3}
        for k, a in enumerate(words) for j, b in enumerate(words[:4])
    ]  # fmt: skip
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    # Longer than the context, so that windows are cut; the same window for both needs the same context.
    texts = tmp_path / "texts.jsonl"
    length = 40 if not chosen else 2
    texts.write_text("".join(json.dumps({"text": TEXT * length + w}) + "\n" for w in words[:3]))
    theirs = harness(
        str(model), [str(folder_of("local_choice", file, CHOICE)), str(folder_of("local_rolling", texts, ROLLING))],
        None, "float32", "cpu", None,
    )["results"]  # fmt: skip
    context = 512 if not chosen else 1024
    asked = Asked(
        model=str(model), choices=(file,), text=(texts,), context=context, stride=context,
        output=tmp_path / "out",
    )  # fmt: skip
    ours = run_ranks(evaluated, 1, asked, join=False, timeout=170)[0]["suites"]
    found = {f["measure"]: f["value"] for s in ours.values() for f in s["figures"]}
    choice = theirs["local_choice"]
    assert found["accuracy"] == pytest.approx(choice["acc,none"], abs=1e-12)
    assert found["accuracy_norm"] == pytest.approx(choice["acc_bytes,none"], abs=1e-12)
    assert found["accuracy_norm"] == pytest.approx(choice["acc_norm,none"], abs=1e-12)
    rolling = theirs["local_rolling"]["bits_per_byte,none"]
    print(found, choice, rolling)
    assert found["bits_per_byte"] == pytest.approx(rolling, rel=1e-5)
