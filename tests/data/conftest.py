import pytest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of 400 ids with the ChatML template."""
    from corpus import prose

    from unisono.config import DataConfig, TokenizerConfig
    from unisono.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "prose.txt").write_text(prose(4000, seed=7))
    wanted = TokenizerConfig(vocab_size=400)
    data = DataConfig(path=str(folder / "prose.txt"))
    return load_tokenizer({"model_type": "llama"}, wanted, data, folder / "cache")
