"""Generation for online tuning: transformers' own greedy text, draws that are a row's own, probabilities that hold."""

import numpy as np
import pytest
import torch

from unisono.train.rollout import Sampling, choose, complete, draws

VOCABULARY, END, PADDING = 97, 5, 0


def model_of(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "gemma3_text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # an untrained model repeats itself; let it have opinions
        for p in model.parameters():
            p.mul_(3.0)
    return model


def prompts(lengths: tuple[int, ...] = (3, 11, 7, 1)) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(6, VOCABULARY, n).tolist() for n in lengths]


def own_draws(count: int, most: int) -> np.ndarray:
    return draws([(7, k) for k in range(count)], most)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_greedy_is_what_transformers_generates(kind: str) -> None:
    model = model_of(kind)
    # Whatever the model says third in its first answer ends an answer, so that rows leave early.
    how = Sampling(most=12, ends=frozenset(), padding=PADDING, temperature=0.0)
    found, _ = complete(model, prompts(), own_draws(4, 12), how)
    end = found[0].tokens[2]
    how = Sampling(most=12, ends=frozenset((END, end)), padding=PADDING, temperature=0.0)
    found, _ = complete(model, prompts(), own_draws(4, 12), how)
    assert any(len(c.tokens) < 12 for c in found), "one of them leaves the batch early"
    for prompt, completion in zip(prompts(), found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=[END, end], pad_token_id=PADDING,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert list(completion.tokens) == expected
        assert completion.ended == (expected[-1] in (END, end))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, most, each = model_of("llama"), 16, 3
    how = Sampling(most, frozenset((END, 11, 12, 13)), PADDING)
    numbers = own_draws(4 * each, most)
    together, _ = complete(model, prompts(), numbers, how)
    lengths = {len(c.tokens) for c in together}
    assert len(lengths) > 3, "rows end at different times"
    alone = []
    for k, prompt in enumerate(prompts()):
        for g in range(each):
            row = numbers[k * each + g][None]
            alone += complete(model, [prompt], row, how)[0]
    backwards, _ = complete(
        model, prompts()[::-1], numbers.reshape(4, each, most)[::-1].reshape(-1, most), how
    )
    again = [backwards[(3 - k) * each + g] for k in range(4) for g in range(each)]
    for one, other, third in zip(together, alone, again, strict=True):
        assert one.tokens == other.tokens == third.tokens
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_log_probabilities_are_those_of_a_whole_pass() -> None:
    model = model_of("llama")
    how = Sampling(10, frozenset((END,)), PADDING, temperature=0.7)
    found, _ = complete(model, prompts(), own_draws(4, 10), how)
    for prompt, completion in zip(prompts(), found, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logp = (model(ids).logits[0] / 0.7).log_softmax(-1)
        chosen = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.tokens)[:, None])
        assert completion.logps == pytest.approx(chosen[:, 0].tolist(), abs=1e-4)


def test_draws_are_a_function_of_their_key() -> None:
    whole = draws([(1, 2, k) for k in range(5)], 8)
    np.testing.assert_array_equal(draws([(1, 2, 3)], 8)[0], whole[3])
    np.testing.assert_array_equal(draws([(1, 2, 3)], 5)[0], whole[3, :5])
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_come_as_often_as_they_should(top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12).expand(40_000, -1)
    uniform = torch.from_numpy(np.random.default_rng(1).random(40_000))
    tokens, logps = choose(logits, uniform, 0.5, top_p)
    p = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(logps[:9], p.log()[tokens[:9]])
    if top_p < 1:
        likely, order = p.sort(descending=True)
        first = int((likely.cumsum(0) < top_p).sum()) + 1
        kept = torch.zeros_like(p)
        kept[order[:first]] = likely[:first]
        p = kept / kept.sum()
        assert 0 < first < 12
    seen = torch.bincount(tokens, minlength=12) / len(tokens)
    torch.testing.assert_close(seen, p, atol=0.01, rtol=0)
    assert bool((p[tokens] > 0).all())


def test_the_edges_of_a_draw() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25]])).expand(4, -1)
    uniform = torch.tensor([0.0, 0.25, 0.7499, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = choose(logits, uniform, 1.0, 1.0)
    assert tokens.tolist() == [0, 2, 2, 3]
