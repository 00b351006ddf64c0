"""`streaming` takes the steps that its definition says: against plain PyTorch loops that play all replicas.

The task is test_parity's: ragged target counts, tied weights, a frozen parameter, one that only some
replicas use and one that none does.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import Model, difference, global_batch, leaf_rows
from torch import nn

from ranks import run_ranks
from unisono.errors import ConfigError
from unisono.sync import make_strategy
from unisono.sync.codec import make_codec
from unisono.sync.digest import sha256
from unisono.sync.encoded import Encoded, Sum
from unisono.sync.ledger import Ledger
from unisono.sync.outer import Outer, default_rate, delta_codec, divide, gathers, sent_bytes
from unisono.sync.streaming import Streaming
from unisono.sync.topk import TopK
from unisono.sync.update import OWN, by_dimension, own_key

STEPS, LEAVES, RATE = 13, 12, 0.02
DILOCO = Outer(delta_codec("float32"), sync_every=3, learning_rate=0.6, momentum=0.9)
AVERAGE = replace(DILOCO, learning_rate=1.0, momentum=0.0)
FRAGMENTS = replace(
    DILOCO, sync_every=6, num_fragments=3, fragment_sync_delay=1, fragment_update_alpha=0.5
)
INT4 = replace(FRAGMENTS, codec=delta_codec("int4"), feedback_decay=0.95)


def adamw(matrices, vectors) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*matrices, *vectors], lr=RATE, weight_decay=0.0, fused=True)


def plain(matrices, vectors) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=0.5)


def build() -> nn.Module:
    torch.manual_seed(7)
    return Model()


def loss_of(model: nn.Module, step: int, leaf: int) -> tuple[torch.Tensor, int]:
    ids, labels = global_batch(step)
    rows = leaf_rows(leaf, LEAVES)
    rare = bool((ids[rows, 0] % 2 == 0).any())
    logits = model(ids[rows], rare).flatten(0, 1)
    loss = F.cross_entropy(logits, labels[rows].flatten(), reduction="sum")
    return loss, int((labels[rows] != -100).sum())


def one_step(
    sync, world, step: int, max_norm: float = 1.0, rate: float = RATE, poison: float = 1.0
):
    mine = LEAVES // world.size
    loss_sum, count = 0.0, 0
    for k in range(mine):
        with sync.micro_batch(last=k == mine - 1):
            loss, n = loss_of(sync.model, step, world.rank * mine + k)
            (loss * poison).backward()
        loss_sum, count = loss_sum + loss.item(), count + n
    total, tokens = sync.finish(loss_sum, count)
    done = sync.update(divide_by=tokens, max_norm=max_norm, learning_rate=rate)
    return total / tokens, done


def outer_state(sync) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in sync.replicated()}


def own_weights(sync) -> dict[str, torch.Tensor]:
    with sync.micro_batch():
        return {name: p.detach().clone() for name, p in sync.named_parameters()}


def train(
    world,
    outer: Outer,
    optimizer: Callable = adamw,
    steps: int = STEPS,
    max_norm: float = 1.0,
    rate: float = RATE,
    break_it: Callable | None = None,
):
    """Outer state and own weights after each step, losses, and what was sent."""
    if break_it is not None:
        break_it(world)
    ledger = Ledger()
    sync = Streaming(build(), ledger, optimizer=optimizer, outer=outer, timeout_s=60)
    states, owns, losses = [], [], []
    for step in range(steps):
        losses.append(one_step(sync, world, step, max_norm, rate)[0])
        states.append(outer_state(sync))
        owns.append(own_weights(sync))
    sync.close()  # what is under way arrives
    sent = sum(e.sent_bytes for e in ledger.entries if e.group.startswith("outer"))
    return states, owns, losses, sent


def weights(state: dict) -> dict:
    return {n: t for n, t in state.items() if not n.startswith("outer_momentum")}


def simulate(
    outer: Outer, replicas: int, optimizer: Callable = adamw, steps: int = STEPS,
    max_norm: float = 1.0, rate: float = RATE,
):  # fmt: skip
    """The definition, in one process: all replicas' models, and torch's SGD on the outer weights."""
    models = [build() for _ in range(replicas)]
    params = [[p for p in m.parameters() if p.requires_grad] for m in models]
    names = [n for n, p in models[0].named_parameters() if p.requires_grad]
    inner = [optimizer(*by_dimension(p)) for p in params]
    for o in inner:
        for group in o.param_groups:
            group["lr"] = rate
    fragments = divide([p.numel() for p in params[0]], outer.num_fragments)
    whole = [nn.Parameter(p.detach().clone()) for p in params[0]]
    outers = [
        torch.optim.SGD([whole[i] for i in f], lr=outer.learning_rate, momentum=outer.momentum, nesterov=outer.momentum > 0)
        for f in fragments
    ]  # fmt: skip
    apart = outer.sync_every // outer.num_fragments
    on_the_way: dict[int, list] = {}
    found = []

    def deltas(k: int) -> list:
        return [sum(whole[i].detach() - p[i].detach() for p in params) / replicas for i in fragments[k]]  # fmt: skip

    def arrive(k: int, mean: list, keep: float, averaged: bool = False) -> None:
        if averaged:
            for i, d in zip(fragments[k], mean, strict=True):
                whole[i].data -= d
        else:
            for i, d in zip(fragments[k], mean, strict=True):
                whole[i].grad = d.clone()
            outers[k].step()
        for i in fragments[k]:
            for p in params:
                p[i].data = keep * p[i].data + (1 - keep) * whole[i].data

    for step in range(steps):
        count = sum(loss_of(models[0], step, leaf)[1] for leaf in range(LEAVES))
        for m, model in enumerate(models):
            model.zero_grad()
            mine = LEAVES // replicas
            loss = sum(loss_of(model, step, m * mine + j)[0] for j in range(mine))
            (loss * replicas / count).backward()
            if max_norm:
                nn.utils.clip_grad_norm_(params[m], max_norm)
            inner[m].step()
        done, last = step + 1, step + 1 == outer.last_step
        for k in range(len(fragments)):
            if k in on_the_way and (last or on_the_way[k][0] == done):
                arrive(k, on_the_way.pop(k)[1], outer.fragment_update_alpha)
        turn = [done % outer.sync_every == (k + 1) * apart % outer.sync_every for k in range(len(fragments))]  # fmt: skip
        for k in range(len(fragments)):
            if turn[k] and not last and outer.fragment_sync_delay:
                on_the_way[k] = [done + outer.fragment_sync_delay, deltas(k)]
            elif turn[k]:
                arrive(k, deltas(k), 0.0 if last else outer.fragment_update_alpha)
            elif last:
                arrive(k, deltas(k), 0.0, averaged=True)
        found.append({n: w.detach().clone() for n, w in zip(names, whole, strict=True)})
    return found


# --- fragments


@settings(max_examples=300)
@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=60), parts=st.integers(1, 60))
def test_every_parameter_is_in_exactly_one_fragment(sizes: list[int], parts: int) -> None:
    if parts > len(sizes):
        with pytest.raises(ConfigError, match="num_fragments"):
            divide(sizes, parts)
        return
    fragments = divide(sizes, parts)
    assert sorted(i for f in fragments for i in f) == list(range(len(sizes)))
    assert all(f and f == sorted(f) for f in fragments)
    filled = [sum(sizes[i] for i in f) for f in fragments]
    assert max(filled) - min(filled) <= max(sizes), "balanced as far as whole parameters allow"


def test_layers_go_to_fragments_in_turn() -> None:
    fragments = divide([100, 40] * 6, 3)
    assert [[i // 2 for i in f if i % 2 == 0] for f in fragments] == [[0, 3], [1, 4], [2, 5]]


def every_parameter(world, outer: Outer) -> tuple[dict, dict]:
    sync = Streaming(build(), Ledger(), optimizer=adamw, outer=outer, timeout_s=60)
    start = outer_state(sync)
    for step in range(outer.sync_every + outer.fragment_sync_delay):
        one_step(sync, world, step)
    found = start, outer_state(sync)
    sync.close()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_every_parameter_moves_in_a_round(size: int) -> None:
    """One larger than all others among them: none is left behind."""
    for start, end in run_ranks(every_parameter, size, FRAGMENTS):
        still = {n for n, t in weights(start).items() if torch.equal(t, end[n])}
        assert still == {"never.weight", "never.bias"}


# --- the special cases, and the definition


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_averaging_every_step_is_exact(size: int) -> None:
    rule = replace(AVERAGE, sync_every=1)
    exact = run_ranks(train_exact, size)[0]
    states, _, losses, _ = run_ranks(train, size, rule, plain, STEPS, 0.0, 0.5)[0]
    assert difference(weights(states[-1]), exact[0]) <= 1e-6
    assert losses == pytest.approx(exact[1], rel=1e-6)


def train_exact(world):
    sync = make_strategy("exact", build(), Ledger(), optimizer=plain, timeout_s=60)
    losses = [one_step(sync, world, step, 0.0, 0.5)[0] for step in range(STEPS)]
    return {n: p.detach().clone() for n, p in sync.named_parameters()}, losses


RULES = {
    "DiLoCo": DILOCO,
    "local SGD": AVERAGE,
    "fragments": replace(FRAGMENTS, fragment_sync_delay=0, fragment_update_alpha=0.0),
    "streaming": FRAGMENTS,
    "streaming to the end": replace(FRAGMENTS, last_step=STEPS),
    "DiLoCo to the end": replace(DILOCO, last_step=STEPS),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", RULES)
def test_the_definition(name: str, size: int) -> None:
    """One replica is SNOO. With three or four, sums go in chunks."""
    rule = RULES[name]
    expected = simulate(rule, size)
    for states, owns, _, _ in run_ranks(train, size, rule):
        for state, wanted in zip(states, expected, strict=True):
            assert difference(weights(state), wanted) <= 2e-6
        if rule.last_step:
            assert all(torch.equal(owns[-1][n], w) for n, w in weights(states[-1]).items())


def flip_sign(world) -> None:
    original = Streaming._move
    Streaming._move = lambda self, outer, velocity, mean: original(self, outer, velocity, -mean)


def stale_outer(world) -> None:
    """The delta is taken from the weights that the run began with."""
    original, first = Streaming._leave, {}

    def leave(self, f, seed):
        f_outer = f.outer
        f.outer = first.setdefault(id(f), f.outer.clone())
        try:
            return original(self, f, seed)
        finally:
            f.outer = f_outer

    Streaming._leave = leave


def too_late(world) -> None:
    original = Outer.begins
    Outer.begins = lambda self, fragment, step: original(self, fragment, step - 1)


def without_mixing(world) -> None:
    original = Streaming._follow
    Streaming._follow = lambda self, own, outer, keep: original(self, own, outer, 0.0)


@pytest.mark.parametrize("break_it", [flip_sign, stale_outer, too_late, without_mixing])
def test_what_is_broken_is_not_the_definition(break_it: Callable) -> None:
    expected = simulate(FRAGMENTS, 2)
    result = run_ranks(train, 2, FRAGMENTS, adamw, STEPS, 1.0, RATE, break_it)
    for states, *_ in result:
        assert difference(weights(states[-1]), expected[-1]) > 1e-4


@pytest.mark.parametrize("delay", [0, 1, 2, 3])
def test_a_fragment_arrives_so_many_steps_later(delay: int) -> None:
    rule = replace(FRAGMENTS, sync_every=12, fragment_sync_delay=delay, codec=delta_codec("int4"))
    steps = 30
    fragments = divide([p.numel() for p in build().parameters() if p.requires_grad], 3)
    names = [n for n, p in build().named_parameters() if p.requires_grad and "never" not in n]
    all_names = [n for n, p in build().named_parameters() if p.requires_grad]
    states = run_ranks(train, 2, rule, adamw, steps)[0][0]
    for k, f in enumerate(fragments):
        mine = [all_names[i] for i in f if all_names[i] in names]
        before = weights(states[0])
        moved = []
        for step, state in enumerate(states[1:], start=2):
            if any(not torch.equal(state[n], before[n]) for n in mine):
                moved.append(step)
            before = state
        left = [s for s in range(1, steps + 1) if s % 12 == (k + 1) * 4 % 12]
        assert moved == [s + delay for s in left if s + delay <= steps]


def count_takes(world, outer: Outer) -> list[tuple[int, str]]:
    """At which step sums began, and at which they were waited for."""
    seen = []
    begin, take = Encoded.begin, Sum.take
    sync = Streaming(build(), Ledger(), optimizer=adamw, outer=outer, timeout_s=60)
    Encoded.begin = lambda *a: (seen.append((sync._step, "left")), begin(*a))[1]
    Sum.take = lambda *a: (seen.append((sync._step, "waited")), take(*a))[1]
    for step in range(8):
        one_step(sync, world, step)
    sync.close()
    return seen


def test_nothing_is_waited_for_before_it_is_due() -> None:
    rule = replace(FRAGMENTS, sync_every=8, num_fragments=2, fragment_sync_delay=3)
    for seen in run_ranks(count_takes, 3, rule):
        assert seen[:3] == [(4, "left"), (7, "waited"), (8, "left")]


# --- the wire

CODECS = {
    "float32": replace(FRAGMENTS, codec=delta_codec("float32")),
    "bfloat16": replace(FRAGMENTS, codec=delta_codec("bfloat16")),
    "int8": replace(INT4, codec=delta_codec("int8")),
    "int4": INT4,
    "sparse": Outer(TopK(64, 512), sync_every=3, feedback_decay=0.95, only_gather=True),
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CODECS)
def test_outer_state_is_the_same_bits_after_every_step(name: str, size: int) -> None:
    """And the bytes are those of the formula; the replicas' own weights differ, as a control."""
    rule = replace(CODECS[name], last_step=0)
    steps = 2 * rule.sync_every
    results = run_ranks(train, size, rule, adamw, steps)
    for step in range(steps):
        assert len({sha256(states[step]) for states, *_ in results}) == 1
    between = steps - 2
    assert len({sha256(owns[between]) for _, owns, *_ in results}) == size
    sizes = [p.numel() for p in build().parameters() if p.requires_grad]
    for *_, sent in results:
        assert sent == 2 * rule.sent_bytes(sizes, size)


def own_codes_only(world) -> None:
    """Each rank adds up what it holds itself more exactly than what it sent."""
    original = Sum._added

    def added(self, values):
        total = original(self, values)
        return total + 1e-6 * self._encoded.rank

    Sum._added = added


def test_a_difference_of_replicas_is_seen() -> None:
    results = run_ranks(train, 2, INT4, adamw, 8, 1.0, RATE, own_codes_only)
    assert len({sha256(states[-1]) for states, *_ in results}) == 2


def test_the_formula_takes_what_sends_less() -> None:
    int8 = make_codec("int8")
    assert sent_bytes(10_000, 2, int8) == int8.encoded_bytes(10_000)
    assert sent_bytes(10_000, 4, int8) == 2 * 3 * int8.encoded_bytes(2500)
    assert sent_bytes(10_000, 4, int8, only_gather=True) == 3 * int8.encoded_bytes(10_000)
    assert gathers(40, 8, delta_codec("int4")), "blocks of 32 filled up cost more than they save"
    assert sent_bytes(10_000, 1, int8) == 0


def sums(world, name: str, values: int, rounds: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Sums of random vectors, what feedback holds at the end, and all that was handed in."""
    encoded = Encoded(Ledger(), delta_codec(name), timeout_s=60)
    left = torch.zeros(encoded.padded(values))
    given, found = torch.zeros(values), []
    g = torch.Generator().manual_seed(world.rank)
    for k in range(rounds):
        vector = torch.randn(values, generator=g)
        given += vector
        left[:values] += vector
        found.append(encoded.begin(left, values, k, left).take())
    encoded.close()
    return found, left[:values], given


@pytest.mark.parametrize("values", [5, 1000, 4099])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
def test_nothing_is_lost_with_feedback(name: str, size: int, values: int) -> None:
    """All sums and what is kept make all that was handed in, wherever it was rounded."""
    results = run_ranks(sums, size, name, values, 5)
    for found, *_ in results:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0][0], strict=True))
    total = sum(results[0][0]) + sum(left for _, left, _ in results)
    given = sum(given for *_, given in results)
    assert float((total - given).abs().max()) <= 1e-4
    error = float((results[0][0][0] - sum(sums_alone(r, values) for r in range(size))).norm())
    assert error <= {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.1, "int4": 1.5}[name] * math.sqrt(values)  # fmt: skip


def sums_alone(rank: int, values: int) -> torch.Tensor:
    return torch.randn(values, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 3])
def test_int4_deltas_train(size: int) -> None:
    steps = 24
    full = run_ranks(train, size, FRAGMENTS, adamw, steps)[0]
    int4 = run_ranks(train, size, INT4, adamw, steps)[0]
    moved = difference(weights(full[0][-1]), dict(build().named_parameters()))
    apart = difference(weights(int4[0][-1]), weights(full[0][-1]))
    assert 0 < apart < 0.3 * moved
    assert sum(int4[2][-6:]) == pytest.approx(sum(full[2][-6:]), rel=0.01)


# --- the seam


def not_finite(world, poisoned: int):
    sync = Streaming(build(), Ledger(), optimizer=adamw, outer=replace(FRAGMENTS, sync_every=9), timeout_s=60)  # fmt: skip
    one_step(sync, world, 0)
    before, outer_before = own_weights(sync), outer_state(sync)
    poison = float("nan") if world.rank == poisoned else 1.0
    _, done = one_step(sync, world, 1, poison=poison)
    same = all(torch.equal(t, before[n]) for n, t in own_weights(sync).items())
    same = same and all(torch.equal(t, outer_before[n]) for n, t in outer_state(sync).items())
    blame = sync.blame()
    _, after = one_step(sync, world, 2)
    moved = any(not torch.equal(t, before[n]) for n, t in own_weights(sync).items())
    sync.close()
    return done.committed, same, blame, after, moved


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_committed_by_none(size: int) -> None:
    results = run_ranks(not_finite, size, size - 1)
    for rank, (committed, same, blame, after, moved) in enumerate(results):
        assert not committed and same
        assert blame is None if rank < size - 1 else blame[0] == rank and blame[1]
        assert after.committed and moved
        assert after.gradient_norm == results[0][3].gradient_norm > 0


def shown(world):
    """What the model holds when settled, in a pass after that, and when settled twice."""
    sync = Streaming(build(), Ledger(), optimizer=adamw, outer=DILOCO, timeout_s=60)
    for step in range(4):
        one_step(sync, world, step)
    own, whole = own_weights(sync), weights(outer_state(sync))
    sync.settle()
    sync.settle()
    seen = {n: p.detach().clone() for n, p in sync.model.named_parameters() if p.requires_grad}
    state = {n: t.clone() for n, t in sync.state_dict().items()}
    again = own_weights(sync)
    tied = sync.model.head.weight is sync.model.embed.weight
    one_step(sync, world, 4)
    sync.close()
    return own, whole, seen, state, again, tied


def test_settled_it_shows_the_outer_weights_and_goes_on_from_its_own() -> None:
    for own, whole, seen, state, again, tied in run_ranks(shown, 2):
        assert all(torch.equal(seen[n], w) and torch.equal(state[n], w) for n, w in whole.items())
        assert all(torch.equal(again[n], w) for n, w in own.items())
        assert any(not torch.equal(own[n], w) for n, w in whole.items())
        assert tied and torch.equal(state["head.weight"], state["embed.weight"])


def settled_in_between(world) -> str:
    sync = Streaming(build(), Ledger(), optimizer=adamw, outer=INT4, timeout_s=60)
    for step in range(8):
        one_step(sync, world, step)
        sync.settle()
        dict(sync.state_dict())
        for _ in sync.optimizer_state():
            pass
    return sha256({**outer_state(sync), **{f"own.{n}": t for n, t in own_weights(sync).items()}})


def test_looking_changes_nothing() -> None:
    looked = run_ranks(settled_in_between, 2)
    plain_run = run_ranks(train, 2, INT4, adamw, 8)
    for digest, (states, owns, *_) in zip(looked, plain_run, strict=True):
        assert digest == sha256({**states[-1], **{f"own.{n}": t for n, t in owns[-1].items()}})


# --- saved and resumed


def saved(world, outer: Outer, steps: int):
    sync = Streaming(build(), Ledger(), optimizer=adamw, outer=outer, timeout_s=60)
    for step in range(steps):
        one_step(sync, world, step)
    model = {n: t.clone() for n, t in sync.state_dict().items()}
    states = {k: t.detach().clone() for k, t in sync.optimizer_state()}
    sync.close()
    return model, states


def resumed(world, outer: Outer, model: dict, states: dict, first: int, steps: int, name: str):
    net = build()
    net.load_state_dict(model)
    rule = replace(outer, first_step=first)
    sync = make_strategy(name, net, Ledger(), optimizer=adamw, outer=rule, timeout_s=60)
    sync.load_optimizer_state({k: t for k, t in states.items() if OWN not in k})
    note = sync.load_own_state({k: t for k, t in states.items() if OWN in k})
    begun = {n: p.detach().clone() for n, p in sync.named_parameters()}
    losses = [one_step(sync, world, step)[0] for step in range(first, steps)]
    whole, owns = outer_state(sync), own_weights(sync)
    sync.close()
    return whole, owns, note, begun, losses


@pytest.mark.parametrize("first", [3, 4, 5, 6, 9])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_resume_goes_on_to_the_bit(size: int, first: int) -> None:
    """Before a fragment leaves, while it is under way (two steps), after."""
    rule = replace(INT4, sync_every=9, fragment_sync_delay=2, last_step=STEPS)
    model, states = run_ranks(saved, size, rule, first)[0]
    whole = run_ranks(train, size, rule, adamw)
    again = run_ranks(resumed, size, rule, model, states, first, STEPS, "streaming")
    for (states_, owns, *_), (outer, own, note, *_) in zip(whole, again, strict=True):
        assert sha256(outer) == sha256(states_[-1])
        assert sha256(own) == sha256(owns[-1])
        assert note == ""
    assert any(k.startswith(f"arriving{OWN}") for k in states) == (first in (3, 4, 6, 9))


@pytest.mark.parametrize(
    "state", ["delta_feedback@1", "weight@1", "exp_avg@1", "outer_momentum@0", "arriving@0"]
)
def test_all_that_is_saved_matters(state: str) -> None:
    """The control: a run that goes on from anything else ends elsewhere."""
    rule = replace(INT4, last_step=STEPS)
    model, states = run_ranks(saved, 2, rule, 8)[0]
    expected = sha256(run_ranks(train, 2, rule, adamw)[0][0][-1])
    changed = {k: t + 1e-3 if k.startswith(f"{state}.") else t for k, t in states.items()}
    for tensors, equal in ((states, True), (changed, False)):
        outer = run_ranks(resumed, 2, rule, model, tensors, 8, STEPS, "streaming")[0][0]
        assert (sha256(outer) == expected) == equal


def test_any_strategy_resumes_and_any_number_of_replicas() -> None:
    rule = replace(INT4, last_step=STEPS)
    model, states = run_ranks(saved, 2, rule, 8)[0]
    inner = [
        {n: t for n, t in states.items() if n.startswith(f"exp_avg{OWN}{r}.")} for r in range(2)
    ]
    name = "up.weight"
    mean = (inner[0][own_key("exp_avg", 0, name)] + inner[1][own_key("exp_avg", 1, name)]) / 2
    assert torch.allclose(states[f"exp_avg.{name}"], mean)
    losses = {}
    for sync, size in (("exact", 2), ("streaming", 3), ("streaming", 1)):
        _, _, note, begun, losses[sync, size] = run_ranks(
            resumed, size, rule, model, states, 8, STEPS, sync
        )[0]
        assert "left out what single replicas had" in note or "has 2 replicas, now" in note
        if sync == "exact":
            assert all(torch.equal(begun[n], model[n]) for n in begun)
        else:
            assert "outer momentum is kept" in note
            arrived = {k.partition(".")[2] for k in states if k.startswith("arriving")}
            assert arrived
            assert all(torch.equal(begun[n], model[n]) for n in begun if n not in arrived)
            assert any(not torch.equal(begun[n], model[n]) for n in arrived)
    values = list(losses.values())
    assert all(v == pytest.approx(values[0], rel=0.05) for v in values)


def from_exact(world) -> tuple[str, dict, dict]:
    sync = make_strategy("exact", build(), Ledger(), optimizer=adamw, timeout_s=60)
    for step in range(3):
        one_step(sync, world, step)
    model, states = dict(sync.state_dict()), dict(sync.optimizer_state())
    sync.close()
    net = build()
    net.load_state_dict(model)
    sync = Streaming(net, Ledger(), optimizer=adamw, outer=replace(INT4, first_step=3), timeout_s=60)  # fmt: skip
    sync.load_optimizer_state(states)
    note = sync.load_own_state({})
    one_step(sync, world, 3)
    found = note, {n: model[n] for n, _ in sync.named_parameters()}, outer_state(sync)
    sync.close()
    return found


def test_it_goes_on_from_exact() -> None:
    for note, model, outer in run_ranks(from_exact, 2):
        assert "no replica's own weights" in note
        assert all(torch.equal(outer[n], t) for n, t in model.items())


def half(world) -> str:
    try:
        Streaming(build().bfloat16(), Ledger(), optimizer=adamw, outer=DILOCO, timeout_s=60)
    except ConfigError as error:
        return str(error)
    return ""


def test_half_precision_is_refused() -> None:
    assert "float32" in run_ranks(half, 1)[0]


def test_outer_rates() -> None:
    """arXiv:2503.09799 at H = 30, and how they lean from there."""
    assert [default_rate(m, 30, 0.9)[0] for m in (1, 2, 4, 8)] == [0.4, 0.6, 0.6, 0.8]
    assert default_rate(2, 10, 0.9)[0] == pytest.approx(0.36)
    assert default_rate(2, 100, 0.9)[0] == pytest.approx(0.75)
    assert default_rate(8, 30, 0.0)[0] == 1.0
