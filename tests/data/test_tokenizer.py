import contextlib
import gzip

import pytest
from corpus import config, jsonl, prose

from unisono.config import DataConfig, TokenizerConfig
from unisono.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_digest
from unisono.errors import ConfigError

LLAMA = {"model_type": "llama"}


def trained(path, cache, **wanted):
    data = DataConfig(path=str(path))
    return load_tokenizer(LLAMA, TokenizerConfig(**{"vocab_size": 300, **wanted}), data, cache)


def test_a_trained_tokenizer_loses_no_byte(tokenizer):
    text = prose(50) + "  tabs\t\r\n \u4f60\u597d \U0001f3b5 caf\u00e9 \x00"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 400 and tokenizer.is_fast
    assert (
        tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
        and tokenizer.eos_token_id == 0
    )
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [1]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), None, DataConfig(path="unused"), tmp_path)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    again.backend_tokenizer.enable_truncation(5)  # as a caller may leave it
    again.backend_tokenizer.enable_padding(length=5)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert again.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    ) == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_training_is_deterministic_and_cached(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text(prose(500))
    first, second = (trained(path, tmp_path / cache) for cache in ("one", "two"))
    assert tokenizer_digest(first) == tokenizer_digest(second)
    monkeypatch.setattr("unisono.data.tokenizer._train", lambda *_: pytest.fail("trained again"))
    assert tokenizer_digest(trained(path, tmp_path / "one")) == tokenizer_digest(first)


def test_what_it_is_made_from_decides(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(prose(500))
    digests = {tokenizer_digest(trained(path, tmp_path, vocab_size=n)) for n in (280, 300)}
    path.write_text(prose(500, seed=5))
    digests.add(tokenizer_digest(trained(path, tmp_path)))
    assert len(digests) == 3


def test_every_source_gives_its_share(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 20_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(("zqzq " * 100).encode()))
    jsonl(tmp_path / "c.jsonl", [{"prompt": "vxvx " * 300, "completion": "wkwk " * 300}] * 20)
    vocabulary = trained(tmp_path, tmp_path / "cache", train_bytes=20_000).get_vocab()
    assert {"\u0120aaaa", "\u0120vxvx", "\u0120wkwk"} <= set(vocabulary)


def test_a_model_without_a_tokenizer_is_told_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer: \{vocab_size: 4096\}"):
        load_tokenizer(LLAMA, None, DataConfig(path="unused"), tmp_path)


@pytest.mark.parametrize(
    ("model", "tokenizer", "field"), [("{}", None, "model"), (LLAMA, "{}", "tokenizer")]
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, model, tokenizer, field):
    fill = lambda x: x.format(tmp_path) if isinstance(x, str) else x  # noqa: E731
    with pytest.raises(ConfigError, match=f"{field}: found '{tmp_path}'; no tokenizer"):
        load_tokenizer(fill(model), fill(tokenizer), DataConfig(path="unused"), tmp_path)


def test_code_in_a_tokenizer_folder_is_not_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "tokenizer_config.json"
    text = (
        path.read_text().rstrip().rstrip("}")
        + ', "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}'
    )
    path.write_text(text.replace("TokenizersBackend", "Evil"))
    with contextlib.suppress(ConfigError):  # SystemExit would come through
        load_tokenizer(str(tmp_path), None, DataConfig(path="unused"), tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer):
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    with pytest.raises(
        ConfigError, match=rf"id {size - 1} .* >= the model's vocabulary {size - 1}"
    ):
        check_vocabulary(tokenizer, size - 1)


def test_config_carries_the_tokenizer(tmp_path):
    assert config("x", tokenizer={"vocab_size": 300}).tokenizer == TokenizerConfig(vocab_size=300)
