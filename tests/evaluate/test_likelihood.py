"""Log-probabilities and generation: equal to the definition, whatever the batch or the replicas."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import TEXT

from ranks import run_ranks
from unisono.evaluate import model as model_module
from unisono.evaluate import run as run_module
from unisono.evaluate.ask import ask, batches_of
from unisono.evaluate.items import Generation, Likelihood, key_of
from unisono.evaluate.run import Asked
from unisono.evaluate.text import windows
from unisono.observe.screen import Quiet
from unisono.sync.ledger import Group, Ledger


def load(folder: Path) -> model_module.Loaded:
    return model_module.load(model_module.find(str(folder)), "cpu", "float32")


def plain(loaded: model_module.Loaded, request: Likelihood) -> float:
    """The sum by its definition: one sequence, all logits, no padding."""
    ids = torch.tensor([request.tokens])
    with torch.no_grad():
        logp = torch.log_softmax(loaded.model(ids).logits[0].double(), -1)
    first = len(request.tokens) - request.targets
    return float(sum(logp[k - 1, request.tokens[k]] for k in range(first, len(request.tokens))))


def test_a_batch_of_unlike_lengths_equals_each_alone(tiny: Path) -> None:
    loaded = load(tiny)
    requests = [Likelihood(tuple(range(5, 5 + n)), t) for n, t in ((40, 3), (12, 11), (25, 25 - 1), (2, 1))]  # fmt: skip
    answers = model_module.likelihoods(loaded, requests)
    for request, answer in zip(requests, answers):
        assert answer.logp == pytest.approx(plain(loaded, request), rel=1e-5)
        assert answer.tokens == request.targets


def test_greedy_in_a_batch_equals_alone_and_stops_at_the_end(tiny: Path) -> None:
    loaded = load(tiny)
    requests = [Generation(tuple(range(9, 9 + n)), 8) for n in (3, 17, 6)]
    together = model_module.generations(loaded, requests)
    alone = [model_module.generations(loaded, [r])[0] for r in requests]
    assert [a.text for a in together] == [a.text for a in alone]
    assert all(a.ended or a.tokens == 8 for a in together)


def test_every_token_of_a_text_is_predicted_once_and_every_byte_counted(tiny: Path) -> None:
    loaded = load(tiny)
    text = TEXT * 3 + "naïve 東京 🦉 end"
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    for context, stride in ((64, 64), (64, 32), (50, 7), (4096, 2048)):
        found = list(windows(text, loaded.tokenizer, context, stride))
        targets = [t for w in found for t in w.requests[0].tokens[-w.requests[0].targets :]]
        assert targets == ids
        assert sum(w.facts["bytes"] for w in found) == len(text.encode())
        assert all(len(w.requests[0].tokens) <= context + 1 for w in found)
        for w in found[1:]:
            assert len(w.requests[0].tokens) - w.requests[0].targets >= context - stride + 1


def test_one_window_is_the_models_own_loss(tiny: Path) -> None:
    loaded = load(tiny)
    (window,) = windows(TEXT, loaded.tokenizer, 4096, 2048)
    ids = torch.tensor([window.requests[0].tokens])
    with torch.no_grad():
        expected = float(loaded.model(ids, labels=ids).loss)
    answer = model_module.likelihoods(loaded, list(window.requests))[0]
    assert -answer.logp / answer.tokens == pytest.approx(expected, rel=1e-5)


def asked(tiny: Path, folder: Path, output: Path, **changes: object) -> Asked:
    (folder / "held.txt").write_text(TEXT * 6)
    rows = [
        {"context": f"Where is the {w}? The", "choices": ["key", "owl of the mill", "river"], "answer": k % 3}
        for k, w in enumerate(["mill", "oak", "key", "wind", "rain", "night", "river", "thief"])
    ]  # fmt: skip
    (folder / "choices.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tasks = [{"prompt": f"Say {w}", "answer": w, "max_new_tokens": 6} for w in ["owl", "oak", "rain"]]  # fmt: skip
    (folder / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tasks))
    return Asked(
        model=str(tiny), text=(folder / "held.txt",), choices=(folder / "choices.jsonl",),
        tasks=(folder / "tasks.jsonl",), context=48, output=output, **changes,
    )  # fmt: skip


def evaluated(world, request: Asked):
    came = run_module.evaluate(request, world, Quiet())
    return came[0] if came else None


def test_one_and_four_replicas_give_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    one = run_ranks(evaluated, 1, asked(tiny, tmp_path, tmp_path / "one"), join=False)[0]
    four = run_ranks(evaluated, 4, asked(tiny, tmp_path, tmp_path / "four"), join=False)
    assert four[0] == one
    assert four[1:] == [None] * 3
    assert len(list((tmp_path / "four").glob("answers-*.jsonl"))) == 4
    loss = one["suites"]["text:held.txt"]["figures"][0]
    assert loss["measure"] == "loss" and 4 < loss["value"] < 9 and loss["items"] > 10


def count_asked(world, request: Asked):
    asked_again = []
    real = model_module.likelihoods

    def counting(loaded, requests):
        asked_again.extend(requests)
        return real(loaded, requests)

    model_module.likelihoods = counting
    found = evaluated(world, request)
    return len(asked_again), found


def test_a_stopped_evaluation_goes_on_and_a_torn_line_is_asked_again(
    tiny: Path, tmp_path: Path
) -> None:
    request = asked(tiny, tmp_path, tmp_path / "out")
    whole, first = run_ranks(count_asked, 1, request, join=False)[0]
    answers = tmp_path / "out" / "answers-0.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:20]) + lines[20][:17])
    again, second = run_ranks(count_asked, 2, request, join=False)[0]
    assert second == first
    assert 0 < again < whole
    nothing, third = run_ranks(count_asked, 1, request, join=False)[0]
    assert nothing == 0 and third == first


def test_another_models_answers_are_refused(tiny: Path, other: Path, tmp_path: Path) -> None:
    run_ranks(evaluated, 1, asked(tiny, tmp_path, tmp_path / "out"), join=False)
    with pytest.raises(AssertionError, match="answers of another model"):
        run_ranks(evaluated, 2, asked(other, tmp_path, tmp_path / "out"), join=False)


def test_batches_are_a_function_of_the_requests_alone() -> None:
    requests = [Likelihood(tuple(range(n)), 1) for n in range(2, 60)] + [Generation((1, 2), 5)]
    keyed = {key_of(r): r for r in requests}
    backwards = {key_of(r): r for r in reversed(requests)}
    assert batches_of(keyed) == batches_of(backwards)
    assert sorted(k for b in batches_of(keyed) for k, _ in b) == sorted(keyed)
    assert all(len({type(r) for _, r in b}) == 1 for b in batches_of(keyed))


def damaged(world, folder: Path):
    source = model_module.find(str(folder))

    def load_damaged() -> model_module.Loaded:
        loaded = model_module.load(source, "cpu", "float32")
        with torch.no_grad():
            loaded.model.lm_head.weight[3] = math.nan
        return loaded

    group = Group("test", Ledger(), 60)
    with pytest.raises(Exception, match="a log-probability is nan"):
        ask(source, [Likelihood((1, 2, 3), 2)], folder / "out", group, load_damaged)


def test_weights_that_are_not_numbers_are_named(tiny: Path) -> None:
    run_ranks(damaged, 1, tiny)
