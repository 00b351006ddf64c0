"""The hook: the same numbers as the model's own eager attention, never a leak, never a silent fallback."""

import pytest
import torch
import torch.nn.functional as F
from families import tiny
from models import MODELS, ROUTED, build, logits_of, packed

from unisono.attention import hf
from unisono.attention.choose import choose
from unisono.attention.hf import NotHooked, Wish, hook
from unisono.attention.mask import Mask
from unisono.attention.pattern import bigbird
from unisono.config import AttentionConfig
from unisono.errors import ConfigError

LEAKING = ("gpt_oss", "opt")
"""They make their masks without position_ids (transformers 5.23)."""


def gradients(model, ids, positions):
    model.zero_grad()
    logits = logits_of(model, ids, positions)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_computes_what_its_eager_attention_does(family: str) -> None:
    """In float64, where nothing hides behind rounding: logits and every gradient to 1e-9."""
    model = build(family)
    hooked = hook(model)
    assert hooked.num_layers == 2
    # Some families of transformers forget where documents end; then one document tells.
    assert hooked.native_leaks == (family in LEAKING)
    assert not hooked.mixes
    ids, positions = packed((60,) if hooked.native_leaks else (20, 13, 27))
    wanted, wanted_grads = gradients(build(family, implementation="exact"), ids, positions)
    found, found_grads = gradients(model, ids, positions)
    bound = 1e-6 if family in ROUTED else 1e-9
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()
    assert found_grads.keys() == wanted_grads.keys()
    for name, gradient in wanted_grads.items():
        off = (found_grads[name] - gradient).abs().max()
        assert off <= 10 * bound * max(1, gradient.abs().max()), name


@pytest.mark.parametrize(
    ("family", "broken"),
    [
        ("mistral", {"window": 10}),
        ("llama", {"documents": None}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
        ("llama4_text", {"chunk": 10}),
        ("opt", {"scale": 1.5}),
    ],
)
def test_what_is_ignored_shows(family: str, broken: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: a window or chunk off by one, a leak, softcap or sinks left out."""
    ids, positions = packed((60,) if family in LEAKING else (20, 13, 27))
    wanted = logits_of(build(family, implementation="exact"), ids, positions)
    model = build(family)
    hook(model)
    right = hf.attend

    def wrong(q, k, v, mask, **how):
        from dataclasses import replace

        of_mask = {n: x for n, x in broken.items() if hasattr(mask, n) and n != "sinks" and (n == "documents" or getattr(mask, n))}  # fmt: skip
        how.update({n: x for n, x in broken.items() if n in how})
        return right(q, k, v, replace(mask, **of_mask), **how)

    monkeypatch.setattr(hf, "attend", wrong)
    assert (logits_of(model, ids, positions) - wanted).abs().max() > 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("how", ["plain", "ones", "cache", "checkpointing"])
def test_packed_documents_never_leak(family: str, how: str) -> None:
    """Also where transformers itself forgets them: an all-ones mask, or a cache."""
    ids, positions = packed(rows=1)
    model = build(family)
    hook(model)
    extra = {}
    if how == "ones":
        extra["attention_mask"] = torch.ones_like(ids)
    if how == "cache":
        extra["use_cache"] = None
        model.config.use_cache = True
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = logits_of(model, ids, positions, **extra)
    changed = ids.clone()
    changed[0, 5] = 3 + (changed[0, 5] - 2) % 90
    after = logits_of(model, changed, positions, **extra)
    noise = 1e-9 if family in ROUTED else 0.0
    differs = ((before - after).abs() > noise * before.abs().max()).any(-1)[0]
    assert not differs[:5].any()
    assert differs[5]
    assert not differs[20:].any()


@pytest.mark.parametrize("family", ["jamba", "falcon_h1", "qwen3_next", "lfm3"])
def test_layers_that_carry_state_past_attention_are_known(family: str) -> None:
    assert hook(tiny(family)).mixes


def test_very_many_lengths_keep_few_plans() -> None:
    model = build("mistral")
    hooked = hook(model)
    for length in range(2, 2 + 2 * hf.LENGTHS):
        logits_of(model, *packed((length,)))
    assert len(hooked.static) == hf.LENGTHS


def test_transformers_itself_would_leak_there() -> None:
    """The control of the probe above."""
    ids, positions = packed(rows=1)
    model = build("llama", implementation="sdpa")
    changed = ids.clone()
    changed[0, 5] = 3 + (changed[0, 5] - 2) % 90
    ones = torch.ones_like(ids)
    a, b = (logits_of(model, x, positions, attention_mask=ones) for x in (ids, changed))
    assert (a != b).any(-1)[0, 20:].any()


def test_gradient_checkpointing_changes_no_bit() -> None:
    ids, positions = packed()
    found = []
    for checkpointing in (False, True):
        model = build("gpt_oss")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hook(model)
        found.append(gradients(model, ids, positions)[1])
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_hundred_steps_end_at_the_same_loss(family: str) -> None:
    """float32, AdamW: every loss within 1e-5 of eager attention's."""
    runs = []
    for ours in (False, True):
        model = build(family, implementation=None if ours else "eager").float()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.div_(6 if p.dim() > 1 and "embed" not in name else 1)
        if ours:
            hook(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(100):
            ids, positions = packed(seed=step % 7)
            logits = logits_of(model, ids, positions)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(torch.tensor(losses, dtype=torch.float64))
    assert runs[0][-1] < 0.9 * runs[0][0]
    assert float(((runs[1] - runs[0]).abs() / runs[0]).max()) <= 1e-5


def test_autocast_computes_attention_in_bfloat16() -> None:
    ids, positions = packed()
    model = build("llama").float()
    theirs = build("llama", implementation="sdpa").float()
    hook(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = logits_of(model, ids, positions), logits_of(theirs, ids, positions)
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "llama4_text"])
def test_a_hooked_model_generates_what_it_did(family: str) -> None:
    ids = packed()[0][:, :30]
    model = build(family).eval()
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    left = torch.ones_like(ids)
    left[1, :4] = 0  # padding before the second prompt
    wanted = model.generate(ids, attention_mask=left, **how)
    hook(model)
    assert torch.equal(model.generate(ids, attention_mask=left, **how), wanted)


def test_what_stands_in_for_a_mask_is_opaque() -> None:
    """FSDP2 and others walk through containers among a layer's arguments, up to the whole model."""
    from torch.distributed.fsdp._common_utils import collect_grad_tensors
    from torch.utils._pytree import tree_leaves

    model = build("llama")
    given = []
    model.model.layers[0].register_forward_pre_hook(
        lambda m, a, kw: given.append(kw["attention_mask"]), with_kwargs=True
    )
    hook(model)
    logits_of(model, *packed())
    described = given[-1]
    assert isinstance(described, hf.Described)
    assert tree_leaves(described) == [described]
    assert collect_grad_tensors(described) == ()


# --- what the user asks


def test_a_wish_narrows_and_never_widens() -> None:
    wish = Wish(window=8, sinks=2)
    assert wish(Mask(), 0).window == 8
    assert wish(Mask(), 0).sinks == 2
    assert (wish(Mask(window=5), 0).window, wish(Mask(window=5), 0).sinks) == (5, 0)
    sparse = Wish(pattern=bigbird(16), layers=(1,))
    assert sparse(Mask(), 0).pattern is None
    assert sparse(Mask(), 1).pattern is not None
    assert sparse(Mask(window=5), 1).pattern is None


def test_a_wished_window_is_the_models_own_window() -> None:
    """A Llama with {window: 9} is a Mistral with sliding_window 9."""
    ids, positions = packed()
    wanted = logits_of(build("mistral", implementation="exact"), ids, positions)
    model = build("mistral", sliding_window=None)
    assert choose(model, AttentionConfig(window=9), "cpu").name == "{window: 9}"
    assert (logits_of(model, ids, positions) - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_a_wish_of_some_layers_leaves_the_others() -> None:
    ids, positions = packed()
    full, one, both = build("llama"), build("llama"), build("llama")
    hook(full)
    hook(one, Wish(window=4, layers=(1,)))
    hook(both, Wish(window=4))
    a, b, c = (logits_of(m, ids, positions) for m in (full, one, both))
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)


@pytest.mark.parametrize("pattern", ["bigbird", "longformer", "strided", "dilated"])
def test_every_pattern_trains(pattern: str) -> None:
    ids, positions = packed((200,))
    model = build("llama")
    asked = AttentionConfig(pattern=pattern, block=16, window_blocks=1, random_blocks=1, dilation=2)
    choose(model, asked, "cpu")
    sparse, grads = gradients(model, ids, positions)
    assert all(g.isfinite().all() for g in grads.values())
    plain = build("llama")
    hook(plain)
    assert not torch.equal(sparse[:, -1], logits_of(plain, ids, positions)[:, -1])
    if pattern != "dilated":  # which leaves gaps from the start
        assert torch.equal(sparse[:, :8], logits_of(plain, ids, positions)[:, :8])


# --- refusals


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96))


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4))  # fmt: skip


def dropping():
    model = build("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (bloom, "BloomAttention .* does not go through transformers' attention interface"),
        (mamba, "no attention that goes through transformers' interface"),
        (
            dropping,
            "attention_dropout is 0.1, and ours has no dropout; set model.attention_dropout: 0",
        ),
    ],
)
def test_what_cannot_be_hooked_says_why_and_stays_as_it_was(make, why: str) -> None:
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(NotHooked, match=why):
        hook(model)
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks
    choice = choose(model, "auto", "cpu")
    assert choice.name == f"native ({before})"
    assert choice.hook is None
    for asked in ("flash", AttentionConfig(window=4)):
        with pytest.raises(ConfigError, match=r"attention: found .* cannot run it: .*write attention: auto"):  # fmt: skip
            choose(model, asked, "cpu")


def test_an_argument_that_is_not_known_is_refused() -> None:
    model = build("llama")
    hook(model)
    ids, positions = packed()
    with pytest.raises(NotHooked, match="LlamaAttention passes alibi, which ours does not know"):
        logits_of(model, ids, positions, alibi=torch.ones(1))


def test_dropout_that_comes_later_is_refused() -> None:
    model = build("llama")
    hook(model)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(NotHooked, match=r"dropout 0\.1"):
        logits_of(model, *packed())


def test_a_layer_that_no_longer_calls_is_missed() -> None:
    model = build("llama")
    hook(model)
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(ConfigError, match=r"1 calls in this pass, 2 .*model\.layers\.1\.self_attn"):
        logits_of(model, *packed())


def test_padding_between_tokens_is_refused() -> None:
    model = build("llama")
    hook(model)
    ids, positions = packed()
    holes = torch.ones_like(ids)
    holes[0, 7] = 0
    with pytest.raises(NotHooked, match="padding between tokens"):
        logits_of(model, ids, positions, attention_mask=holes)


def test_a_mask_that_cannot_be_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where image tokens see one another: the closure says more than causal."""
    from transformers.models.llama import modeling_llama

    make = modeling_llama.create_causal_mask
    model = build("llama")
    hook(model)
    monkeypatch.setattr(
        modeling_llama,
        "create_causal_mask",
        lambda *a, **k: make(*a, **k, or_mask_function=lambda b, h, q, kv: kv < 3),
    )
    with pytest.raises(NotHooked, match="its mask is not causal"):
        logits_of(model, *packed())


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"attention.layers: found 2; the model's layers are 0 to 1"
    ):
        choose(build("llama"), AttentionConfig(window=4, layers=(2,)), "cpu")


def test_on_a_gpu_auto_keeps_the_models_own() -> None:
    model = build("llama")
    choice = choose(model, "auto", "cuda:0")
    assert choice.name == "native (sdpa)"
    assert "write attention: flash" in choice.reason
    assert choose(model, "native", "cpu").reason == "as given"


def test_the_trial_leaves_no_trace_in_random_numbers_or_mode() -> None:
    model = build("llama").eval()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    hook(model)
    assert torch.equal(torch.rand(4), wanted)
    assert not model.training
