"""What a decoder or encoder asks of a device, counted from its shape: parameters and operations.

With L layers, hidden size h, heads of size d, key/value heads k, MLP width f and vocabulary V, a layer
has h (a d) x 2 + h (k d) x 2 values in attention and h f x 2 (or 3, gated) in the MLP. Each matrix
value costs 2 operations a token forward and 4 backward (Kaplan 2020, arXiv 2001.08361). Attention
costs 4 s (a d) a token and layer, half of it where causal kernels skip the upper triangle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from unisono.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """Shapes of a transformer."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    gated: bool
    """Three matrices in the MLP (SwiGLU) instead of two."""
    vocab: int
    tied: bool
    """Input and output embeddings are one table."""
    causal: bool = True
    positions: int = 0
    """Rows of a learned position table."""
    head_share: float = 1.0
    """Of the positions whose logits are computed; masked language models predict some."""
    adapters: int = 0
    """Values that are trained beside a model that stays as it is (LoRA); 0: all of its own are."""
    quantized: float = 0.0
    """Bytes of a layer's matrix value, where these are frozen in 4 bits (QLoRA); 0: as wide as the others."""

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of a layer, by Llama's names."""
        own, shared = self.heads * self.head_size, self.kv_heads * self.head_size
        mlp = {"gate_proj": (self.hidden, self.ffn)} if self.gated else {}
        return {
            "q_proj": (self.hidden, own), "k_proj": (self.hidden, shared), "v_proj": (self.hidden, shared),
            "o_proj": (own, self.hidden), **mlp, "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }  # fmt: skip

    def with_adapters(
        self, rank: int, targets: Sequence[str] | None, whole: Sequence[str]
    ) -> "Architecture":
        """LoRA of `rank` on the layers `targets`, or on all, with the modules `whole` trained as they are.

        Raises ConfigError: a name that is none of `products`, the embedding's or the output layer's.
        """
        ends = dict.fromkeys(("embed_tokens", "lm_head", "wte"), self.vocab * self.hidden)
        sizes = self.products
        for field, names, known in (("target_modules", targets or (), sizes), ("modules_to_save", whole, ends)):  # fmt: skip
            for name in names:
                if name not in known:
                    raise ConfigError(
                        f"lora.{field}: found {name!r}, whose size a plan does not know; known: "
                        f"{', '.join(known)}"
                    )
        each = sum(rank * sum(sizes[name]) for name in targets or sizes)
        return replace(self, adapters=self.layers * each + sum(ends[name] for name in whole))

    def in_4_bits(self, double: bool) -> "Architecture":
        """Frozen matrices in nf4: blocks of 64 share 4 bytes, or 1 with 4 for 256 of these (QLoRA, section 3)."""
        return replace(self, quantized=0.5 + (1 + 4 / 256 if double else 4) / 64)

    @property
    def layer_parameters(self) -> int:
        """Matrix values of one layer."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden

    @property
    def parameters(self) -> int:
        """All, with two norms a layer."""
        return self.layers * (self.layer_parameters + 2 * self.hidden) + self.embedding_parameters

    def model_flops(self, tokens: int, sequence: int) -> float:
        """Forward and backward of `tokens`, without recomputation; attention counted causal."""
        attention = 4 * sequence * self.heads * self.head_size / (2 if self.causal else 1)
        head = 2 * self.vocab * self.hidden * self.head_share
        return 3.0 * tokens * (self.layers * (2 * self.layer_parameters + attention) + head)


def _gpt(name: str, layers: int, hidden: int, heads: int, vocab: int = 50257, positions: int = 1024) -> Architecture:  # fmt: skip
    return Architecture(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, False, vocab, True, True, positions
    )  # fmt: skip


def _llama(name: str, layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int = 32000, tied: bool = False, head_size: int = 0) -> Architecture:  # fmt: skip
    return Architecture(
        name, layers, hidden, heads, kv, head_size or hidden // heads, ffn, True, vocab, tied
    )


NAMED = {
    a.name: a
    for a in [
        _gpt("gpt2", 12, 768, 12), _gpt("gpt2-medium", 24, 1024, 16), _gpt("gpt2-large", 36, 1280, 20),
        _gpt("gpt2-xl", 48, 1600, 25), _gpt("gpt3-175b", 96, 12288, 96, positions=2048),
        _llama("llama-7b", 32, 4096, 32, 32, 11008), _llama("llama-13b", 40, 5120, 40, 40, 13824),
        _llama("llama-30b", 60, 6656, 52, 52, 17920), _llama("llama-65b", 80, 8192, 64, 64, 22016),
        _llama("llama2-7b", 32, 4096, 32, 32, 11008), _llama("llama2-13b", 40, 5120, 40, 40, 13824),
        _llama("llama2-70b", 80, 8192, 64, 8, 28672), _llama("tinyllama-1.1b", 22, 2048, 32, 4, 5632),
        _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        _llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        _llama("llama3.1-405b", 126, 16384, 128, 8, 53248, 128256),
        _llama("llama3.2-1b", 16, 2048, 32, 8, 8192, 128256, True),
        _llama("llama3.2-3b", 28, 3072, 24, 8, 8192, 128256, True),
        _llama("mistral-7b", 32, 4096, 32, 8, 14336),
        _llama("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151936, True),
        _llama("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, 151936, True),
        _llama("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064),
        _llama("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064),
        replace(_gpt("bert-base", 12, 768, 12, 30522, 512), causal=False, head_share=0.15),
        replace(_gpt("bert-large", 24, 1024, 16, 30522, 512), causal=False, head_share=0.15),
    ]
}  # fmt: skip
"""Shapes that the models' own config.json files state. BERT predicts 15% of the positions."""

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite", "stablelm", "internlm2"}  # fmt: skip
"""`model_type`s whose MLP has three matrices."""


def named(name: str) -> Architecture | None:
    """A known architecture: `llama-7b`, `meta-llama/Llama-2-7b-hf`, `openai-community/gpt2`."""
    key = _key(name.rsplit("/", 1)[-1])
    key = key.replace("llama318b", "llama38b").replace("llama3170b", "llama370b")  # equal shapes
    for end in ("", "hf", "instruct", "v01", "v03", "chathf", "uncased", "cased"):
        for known, value in NAMED.items():
            if key == _key(known) + end or key == _key(known).replace("llama3", "metallama3") + end:
                return value
    return None


def of_model(model: str | Mapping[str, Any], vocab: int | None = None) -> Architecture:
    """From what a configuration says: a named architecture, a folder with config.json, or fields.

    `vocab`: the tokenizer's, where the fields state none. Raises ConfigError.
    """
    if not isinstance(model, str):
        return of_fields(model, str(model.get("model_type", "model")), vocab)
    file = Path(model) / "config.json"
    if file.is_file():
        try:
            fields = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: {file} cannot be read ({error}); write it again") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"model: {file} holds no object; it is no Hugging Face config.json")
        return of_fields(fields, Path(model).name, vocab)
    found = named(model)
    if found is None:
        near = get_close_matches(_key(model.rsplit("/", 1)[-1]), [_key(n) for n in NAMED], 3, 0.4)
        names = [n for n in NAMED if _key(n) in near] or sorted(NAMED)
        raise ConfigError(
            f"model: {model!r} has no local config.json and is no architecture known by name; "
            f"nearest: {', '.join(names)}"
        )
    return found


def of_fields(fields: Mapping[str, Any], name: str, vocab: int | None = None) -> Architecture:
    """From the fields of a Hugging Face config, which call the same thing by several names."""

    def number(*names: str, default: int | None = None) -> int:
        for key in names:
            value = fields.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            if value is not None:
                raise ConfigError(f"model.{key}: found {value!r}; write a whole number above 0")
        if default is None:
            raise ConfigError(f"model.{names[0]}: missing in {name}; state it to forecast")
        return default

    kind = str(fields.get("model_type", ""))
    hidden = number("hidden_size", "n_embd", "d_model", "dim")
    heads = number("num_attention_heads", "n_head", "n_heads", default=max(1, hidden // 64))
    gated = kind in GATED
    learned = kind in ("gpt2", "opt", "bert", "roberta", "gpt_bigcode")
    return Architecture(
        name=name,
        layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", "n_kv_heads", default=heads),
        head_size=number("head_dim", default=max(1, hidden // heads)),
        ffn=number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden),
        gated=gated,
        vocab=number("vocab_size", default=vocab),
        tied=bool(fields.get("tie_word_embeddings", not gated)),
        causal=kind not in ("bert", "roberta"),
        positions=number("max_position_embeddings", "n_positions", default=1024) if learned else 0,
        head_share=0.15 if kind in ("bert", "roberta") else 1.0,
    )  # fmt: skip


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == ".").replace(".", "").replace("meta", "")  # fmt: skip
