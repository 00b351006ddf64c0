"""Tiny Hugging Face models whose attention matters: weights are amplified, so that a wrong mask shows."""

import copy

import torch

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED},
    "qwen3": {"use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED},
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 9, "layer_types": MIXED},
    "gpt_oss": {"sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": 9},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "attention_chunk_size": 9, "layer_types": ["chunked_attention", "full_attention"],
        "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 6, "head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
}  # fmt: skip
"""Grouped heads, windows, mixtures, softcap, sinks, chunks, scaled queries, narrow values, no rotation."""


ROUTED = ("gpt_oss", "mixtral", "llama4_text", "deepseek_v3")
"""Their routers round to float32, and a token that goes to another expert changes shapes of products."""


def build(model_type: str, seed: int = 0, implementation: str | None = None, **changes: object):
    """A float64 model in training mode without dropout; the same weights for the same seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(model_type).to_dict()
    fields = {k: v for k, v in {**TINY, **MODELS[model_type], **changes}.items() if k in known}
    for name in ("resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "attention_dropout"):
        if name in known:
            fields[name] = 0.0
    register_exact()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(fields))
    how = {"attn_implementation": implementation} if implementation else {}
    if model_type in ROUTED:
        how["experts_implementation"] = "eager"  # the others have no float64
    model = AutoModelForCausalLM.from_config(config, **how).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name and "wte" not in name and "wpe" not in name:
                p.mul_(6)
            if "sinks" in name:
                p.normal_()
    return model.train()


def register_exact() -> None:
    """`exact`: eager attention under the mask that transformers spells out, all in float64.

    transformers' own eager attention takes its softmax in float32, which hides errors of 1e-7.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def exact(module, q, k, v, mask, scaling=None, softcap=None, s_aux=None, **_):
        group = q.shape[1] // k.shape[1]
        s = (
            q
            @ k.repeat_interleave(group, 1).mT
            * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        )
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        s = s if mask is None else s.masked_fill(mask < 0, -torch.inf)
        if s_aux is not None:
            s = torch.cat((s, s_aux.reshape(1, -1, 1, 1).expand(len(s), -1, s.shape[2], 1)), -1)
        p = s.softmax(-1)[..., : k.shape[2]]
        return (p @ v.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("exact", exact)
    AttentionMaskInterface.register("exact", eager_mask)


def packed(lengths=(20, 13, 27), rows=2, seed=1):
    """(ids, positions) of two rows with these documents, in the second row the other way round."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, sum(lengths)), generator=generator)
    order = [lengths, lengths[::-1]] * rows
    positions = torch.stack([torch.cat([torch.arange(n) for n in order[r]]) for r in range(rows)])
    return ids, positions


def logits_of(model, ids, positions, **how):
    return model(input_ids=ids, position_ids=positions, **{"use_cache": False, **how}).logits
