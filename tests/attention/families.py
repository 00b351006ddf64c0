"""Which causal families of transformers run our attention, as docs/attention.md tells it.

    python tests/attention/families.py [FAMILY ...]      prints the rows; `--write` puts them into the page

Every family of AutoModelForCausalLM is made tiny by the same sizes, under whatever name its configuration
has for them, and hooked. What cannot be made tiny says so, which is no verdict on its attention.
"""

import copy
import re
import sys
from pathlib import Path

import torch

from unisono.attention import hf
from unisono.attention.hf import NotHooked, hook

PAGE = Path(__file__).parents[2] / "docs" / "attention.md"
MOST_PARAMETERS = 100e6
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "intermediate_size", "n_inner", "ffn_dim", "d_ff",
                     "decoder_ffn_dim", "encoder_ffn_dim", "shared_expert_intermediate_size", "intermediate_size_mlp",
                     "word_embed_proj_dim", "embedding_size", "n_positions", "n_ctx", "max_position_embeddings"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_key_value_heads", "num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "layerdrop", "decoder_layerdrop"), 0.0),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "sliding_window", "attention_chunk_size", "rotary_dim"), 8),
    "vocab_size": 128, "moe_intermediate_size": 32, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
}  # fmt: skip


OF_FAMILY: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
}
"""What a hybrid needs so that one of its few layers has attention at all."""


def names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str):
    """The model. Raises whatever a configuration or model says to these sizes; ValueError: too large."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cls = type(AutoConfig.for_model(family))
    default = cls()

    def make():
        return shrink(cls, default)

    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(make()).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} M parameters at these sizes")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make()).float()


def shrink(cls, default):
    fields = {n: v for n, v in SIZES.items() if may_be_set(cls, default, n)}
    if "kv_lora_rank" in fields:  # latent attention: a key head for each query head
        fields.update(
            num_key_value_heads=fields["num_attention_heads"], head_dim=fields["qk_rope_head_dim"]
        )
    if "is_decoder" in default.to_dict():
        fields["is_decoder"] = True
    if may_be_set(cls, default, "layer_types"):  # one of each kind, which says most about a family
        distinct = list(dict.fromkeys(default.layer_types))
        fields["layer_types"] = (distinct * 2)[: max(2, len(distinct))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    for name in getattr(default, "sub_configs", {}):
        if (sub := getattr(default, name, None)) is not None and not name.startswith(("vision", "audio")):  # fmt: skip
            fields[name] = shrink(type(sub), sub).to_dict()
    fields.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    fields.update(OF_FAMILY.get(cls.model_type, {}))
    return cls(**copy.deepcopy(fields))


def may_be_set(cls, default, name: str) -> bool:
    """A field that this configuration has, and that is not worked out from others."""
    own = getattr(cls, "attribute_map", {}).get(name, name)
    derived = getattr(cls, own, None)
    if isinstance(derived, property) and derived.fset is None:
        return False
    if name in ("head_dim", "num_key_value_heads", "num_experts_per_tok"):
        return own in default.to_dict()  # None in some, which then cannot be made as they are
    try:
        return getattr(default, name, None) is not None
    except AttributeError:  # one for each layer
        return False


def verdict(family: str) -> tuple[str, str]:
    """(ours or why not, what its layers have) of one family."""
    try:
        model = tiny(family)
    except Exception as error:
        return "not tried", f"not made tiny: {' '.join(str(error).split())[:90]}"
    seen: set[str] = set()
    attend = hf.attend

    def watching(q, k, v, mask, **how):
        if mask.window == 1:  # the trial of what goes past attention
            return attend(q, k, v, mask, **how)
        seen.add("window" if mask.window else "chunks" if mask.chunk else "full")
        seen.update({"softcap"} if how["softcap"] else ())
        seen.update({"sinks"} if how["sinks"] is not None else ())
        seen.update({"narrow values"} if v.shape[-1] != q.shape[-1] else ())
        seen.update({"grouped heads"} if k.shape[1] != q.shape[1] else ())
        return attend(q, k, v, mask, **how)

    hf.attend = watching
    try:
        hooked = hook(model)
    except NotHooked as error:
        return "its own", re.sub(r"\s+", " ", str(error))[:150]
    finally:
        hf.attend = attend
    leaks = "; its own leaks between packed documents" if hooked.native_leaks else ""
    leaks += "; other layers mix tokens too" if hooked.mixes else ""
    return "ours", ", ".join(sorted(seen)) + leaks


def row(family: str) -> str:
    """The family's line of the page."""
    whose, what = verdict(family)
    return f"| {family} | {whose} | {what.replace('|', '/')} |"


def written() -> dict[str, str]:
    """The rows of the page, by family."""
    lines = re.findall(r"^\| \S+ \| (?:ours|its own|not tried) \|.*$", PAGE.read_text(), re.M)
    return {line.split()[1]: line for line in lines}


def write(found: dict[str, str]) -> None:
    """Put rows into the page, in place of those it has of the same families."""
    import transformers

    rows = [row for _, row in sorted({**written(), **found}.items())]
    counts = {w: sum(f"| {w} |" in r for r in rows) for w in ("ours", "its own", "not tried")}
    head = (
        f"transformers {transformers.__version__}: {len(rows)} families, ours in {counts['ours']}, their own in "
        f"{counts['its own']}, {counts['not tried']} not tried.\n\n| family | attention | layers, or why not |\n|---|---|---|\n"
    )
    start, end, text = "<!-- families -->\n", "<!-- end -->", PAGE.read_text()
    before, after = text.split(start)[0], text.split(end)[1]
    PAGE.write_text(before + start + head + "\n".join(rows) + "\n" + end + after)


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for name in [a for a in sys.argv[1:] if not a.startswith("-")] or names():
        found[name] = row(name)
        print(found[name], flush=True)
        if "--write" in sys.argv:
            write(found)
