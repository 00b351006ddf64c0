"""What a run's `attention` narrows is part of the model: kept with it, followed, and the same on a resume."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import make_job, run, write_corpus
from ranks import run_ranks
from unisono.attention.choose import wish_of
from unisono.attention.hf import hook
from unisono.config import AttentionConfig
from unisono.errors import ConfigError
from unisono.evaluate import model as judged
from unisono.evaluate.items import Generation
from unisono.generate import load

ASKED = {"window": 5, "sinks": 1}
SHORT = {"max_steps": 2, "save_steps": 2, "eval_batches": 1, "threads": 1}
TOKENS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Path, output: Path, **changes: object) -> str:
    """How the run ended."""
    ((end, _, _),) = run_ranks(run, 1, make_job(corpus, output, **{**SHORT, **changes}), join=False)
    return end


def model_flops(run: Path) -> float:
    return json.loads((run / "receipt.json").read_text())["mfu"]["model_flops_per_step"]


@pytest.fixture(scope="module")
def windowed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose layers see five tokens and the first."""
    folder = tmp_path_factory.mktemp("windowed") / "run"
    assert train(corpus, folder, attention=ASKED) == "done"
    return folder


def logits(model, ids: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def far_token_matters(model) -> bool:
    """Whether a token beyond the window of two layers, and not the first, changes the last logits."""
    other = TOKENS.clone()
    other[0, 4] += 1
    return not torch.equal(logits(model)[0, -1], logits(model, other)[0, -1])


@pytest.mark.parametrize("other", ["auto", "native", {"window": 6, "sinks": 1}, {"pattern": "bigbird"}])  # fmt: skip
def test_a_resume_with_another_attention_is_refused(
    other: object, windowed: Path, corpus: Path
) -> None:
    end = train(corpus, windowed, attention=other, max_steps=3)
    assert end.startswith("ConfigError: attention: found ")
    assert "was trained with {window: 5, sinks: 1}; write it" in end


def test_a_resume_with_the_same_attention_in_other_words_goes_on(
    corpus: Path, tmp_path: Path
) -> None:
    assert train(corpus, tmp_path / "run", attention=ASKED) == "done"
    assert train(corpus, tmp_path / "run", attention={**ASKED, "stride": 8}, max_steps=3) == "done"
    assert train(corpus, tmp_path / "plain", attention="flash") == "done"
    assert train(corpus, tmp_path / "plain", attention="native", max_steps=3) == "done"


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_generate_and_eval_see_what_training_saw(place: str, windowed: Path) -> None:
    folder = windowed / place
    alone = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert far_token_matters(alone)  # the control: transformers does not follow it
    wanted = hook(alone, wish_of(AttentionConfig(**ASKED))).model
    for loaded in (
        load(str(folder), "cpu")[0],
        judged.load(judged.find(str(folder)), "cpu", "auto").model,
    ):
        assert not far_token_matters(loaded)
        assert torch.equal(logits(loaded), logits(wanted))
    half = judged.load(judged.find(str(folder)), "cpu", "bfloat16").model
    assert not far_token_matters(half)


def test_what_is_not_seen_is_no_work_of_the_model(
    windowed: Path, corpus: Path, tmp_path: Path
) -> None:
    assert train(corpus, tmp_path / "run") == "done"
    pairs = (6 * 7 // 2 + 26 * 6) - 32 * 33 // 2  # of 32 tokens, a window of 5 and the first
    fewer = 16 * 2 * 3 * 4 * 32 * pairs  # sequences, layers, passes, FLOPs of a pair of width 32
    assert model_flops(windowed) - model_flops(tmp_path / "run") == fewer


def test_a_continuation_by_a_cache_and_beside_padding_sees_the_same(windowed: Path) -> None:
    loaded = judged.load(judged.find(str(windowed)), "cpu", "auto")
    tokens = TOKENS[0].tolist()
    requests = [Generation(tokens=tuple(tokens[:n]), most=12) for n in (24, 9)]
    together = judged.generations(loaded, requests)
    with torch.no_grad():
        for request, found in zip(requests, together):
            ids = torch.tensor([request.tokens])
            for _ in range(12):
                ids = torch.cat((ids, logits(loaded.model, ids)[:, -1:].argmax(-1)), dim=1)
            plain = loaded.tokenizer.decode(ids[0, len(request.tokens) :], skip_special_tokens=True)
            assert found.text == plain


def test_a_run_from_that_model_goes_on_so(windowed: Path, corpus: Path, tmp_path: Path) -> None:
    changes = {"model": str(windowed), "tokenizer": None}
    assert train(corpus, tmp_path / "run", **changes) == "done"
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "as the model was trained" in plan["reasons"]["attention"]
    assert not far_token_matters(load(str(tmp_path / "run"), "cpu")[0])
    end = train(corpus, tmp_path / "native", **changes, attention="native")
    assert "attention: found native, but the model was trained with {window: 5, sinks: 1}" in end
    assert train(corpus, tmp_path / "wider", **changes, attention={"window": 40}) == "done"
    assert far_token_matters(load(str(tmp_path / "wider"), "cpu")[0])


def test_adapters_keep_it_and_a_merged_model_has_it(
    windowed: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from unisono.model.adapter import merge

    changes = {"model": str(windowed), "tokenizer": None, "lora": {"r": 2, "alpha": 4}}
    assert train(corpus, tmp_path / "run", **changes, attention={"window": 4}) == "done"
    with pytest.warns(UserWarning, match="unisono_attention"):  # peft's own, of what it ignores
        adapted = load(str(tmp_path / "run"), "cpu")[0]
    assert not far_token_matters(adapted)
    merge(tmp_path / "run", tmp_path / "merged")
    assert not far_token_matters(load(str(tmp_path / "merged"), "cpu")[0])
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert fields["unisono_attention"]["window"] == 4


def test_what_cannot_be_read_or_run_any_more_is_an_error(windowed: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((windowed / name).read_bytes())
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["unisono_attention"] = {"window": 5, "spiral": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="unisono_attention of the model's configuration: spiral"):
        load(str(tmp_path), "cpu")
    fields.update(unisono_attention={"window": 5}, attention_dropout=0.1)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"trained with attention \{window: 5\}, which cannot be run"):  # fmt: skip
        load(str(tmp_path), "cpu")
