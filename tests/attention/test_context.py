"""Every scheme over every number of ranks is dense attention; bytes are those of the formulas."""

import math
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import exact
import pytest
import torch

from ranks import run_ranks
from unisono.attention.context import Context, attention
from unisono.attention.mask import Documents, Mask
from unisono.attention.pattern import Pattern
from unisono.attention.schemes import Layer, sent_bytes
from unisono.attention.shard import Placement
from unisono.errors import ConfigError, LostReplicas
from unisono.sync.ledger import Group, Ledger

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """One layer's attention over two sequences."""

    mask: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    length: int = 208
    heads: tuple[int, int] = (8, 2)
    widths: tuple[int, int] = (16, 16)
    softcap: float | None = None
    sinks: bool = False
    zigzag: bool = True
    dtype: torch.dtype = torch.float32
    scale: float = 0.25


CASES = {
    "causal": Case(),
    "causal-long": Case(length=1500, heads=(2, 1)),
    "padded": Case(length=201, packed=True),
    "contiguous": Case(zigzag=False),
    "packed": Case(packed=True),
    "packed-long": Case(packed=True, length=1100, heads=(2, 1)),
    "window": Case({"window": 13}),
    "window-1": Case({"window": 1}),
    "window-wide": Case({"window": 150}),
    "window-long": Case({"window": 130}, length=1600, heads=(2, 1)),
    "window-packed": Case({"window": 9}, packed=True),
    "window-contiguous": Case({"window": 13}, zigzag=False),
    "sink-tokens": Case({"window": 10, "sinks": 3}),
    "sink-tokens-packed": Case({"window": 7, "sinks": 2}, packed=True),
    "chunk": Case({"chunk": 48}),
    "prefix": Case({"prefix": 30}),
    "prefix-packed": Case({"prefix": 5}, packed=True),
    "softcap": Case({"window": 20}, softcap=3.0),
    "learned-sinks": Case({"window": 20}, sinks=True),
    "learned-sinks-full": Case(sinks=True, softcap=5.0),
    "one-head-each": Case(heads=(8, 8)),
    "three-key-heads": Case(heads=(24, 3), length=96),
    "wider-values": Case(widths=(16, 24)),
    "blocks": Case({"pattern": Pattern("strided", 16, lambda q, k: (q - k) % 3 == 0)}),
    "float64": Case(dtype=torch.float64),
}
SCHEMES = ("ring", "halo", "allgather", "ulysses", "usp", "auto")


def make(case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Unit normal inputs of whole sequences, and document ids, the same on every rank."""
    g = torch.Generator().manual_seed(1)
    (h, hkv), (d, dv), s = case.heads, case.widths, case.length

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)

    tensors = {"q": some(2, h, s, d), "k": some(2, hkv, s, d), "v": some(2, hkv, s, dv)}
    tensors |= {"dout": some(2, h, s, dv)}
    if case.sinks:
        tensors["sinks"] = some(h)
    ids = (torch.rand(2, s, generator=g) < 6 / s).cumsum(1) if case.packed else None
    return tensors, ids


def visible(case: Case, ids: torch.Tensor | None) -> torch.Tensor:
    fields = {k: v for k, v in case.mask.items() if k != "pattern"}
    seen = exact.pairs(case.length, documents=ids, **fields)
    if (pattern := case.mask.get("pattern")) is not None:
        blocks = (torch.arange(case.length) // pattern.block).numpy()
        seen = seen & torch.from_numpy(pattern.blocks(blocks[:, None], blocks[None, :]))
    return seen


def whole(case: Case) -> dict[str, torch.Tensor]:
    """What is right: dense attention in float64, and its gradients."""
    tensors, ids = make(case)
    x = {n: t.double().requires_grad_(n != "dout") for n, t in tensors.items()}
    seen = visible(case, ids)
    out = exact.attention(
        x["q"], x["k"], x["v"], seen, scale=case.scale, softcap=case.softcap, sinks=x.get("sinks")
    )
    out.backward(x["dout"])
    found = {"out": out.detach()} | {f"d{n}": t.grad for n, t in x.items() if t.grad is not None}
    return {n: t for n, t in found.items() if t is not None}


def shared(case: Case, placement: Placement) -> Mask:
    _, ids = make(case)
    documents = None
    if placement.padded > case.length or ids is not None:
        ids = torch.zeros(2, case.length, dtype=torch.long) if ids is None else ids
        missing = placement.padded - case.length
        documents = Documents.of_ids(torch.cat([ids, torch.full((2, missing), -1)], 1))
    return Mask(**case.mask, documents=documents)


def mine(world, case: Case, context: Context, ledger: Ledger) -> dict[str, torch.Tensor]:
    """This rank's part of out and the gradients; `sent`: bytes forward and backward."""
    tensors, _ = make(case)
    placement = context.placement
    at = torch.from_numpy(placement.positions(world.rank))
    missing = placement.padded - case.length
    x = {
        n: t.clone() if n == "sinks" else torch.nn.functional.pad(t, (0, 0, 0, missing))[:, :, at]
        for n, t in tensors.items()
    }
    for n, t in x.items():
        t.requires_grad_(n != "dout")
    before = ledger.sent_bytes
    out = attention(
        x["q"], x["k"], x["v"], shared(case, placement), context, scale=case.scale,
        softcap=case.softcap, sinks=x.get("sinks"),
    )  # fmt: skip
    forward = ledger.sent_bytes
    out.backward(x["dout"])
    found = {"out": out.detach()} | {f"d{n}": t.grad for n, t in x.items() if t.grad is not None}
    found["sent"] = torch.tensor([forward - before, ledger.sent_bytes - forward])
    return {n: t for n, t in found.items() if t is not None}


def contexts(world, case: Case, ledger: Ledger, schemes=SCHEMES):
    """One for each scheme that this case allows on so many ranks."""
    size = world.size
    group = Group("context", ledger, 60)
    placement = Placement(case.length, size, case.zigzag)
    inner = outer = None
    if size > 1:
        u = 2
        blocks = [[k * u + i for i in range(u)] for k in range(size // u)]
        rows = [[k * u + i for k in range(size // u)] for i in range(u)]
        made = [torch.distributed.new_group(r) for r in blocks]
        inner = Group("inner", ledger, 60, made[world.rank // u])
        made = [torch.distributed.new_group(r) for r in rows]
        outer = Group("outer", ledger, 60, made[world.rank % u])
    for scheme in schemes:
        if scheme in ("ulysses", "usp") and (size == 1 or case.heads[0] % size):
            continue
        yield Context(group, placement, scheme, inner=inner, outer=outer)


def errors(
    world, names: tuple[str, ...], schemes=SCHEMES
) -> dict[tuple[str, str], dict[str, float]]:
    """Collective: the largest difference from dense attention on any rank, by case and scheme."""
    found = {}
    for name in names:
        case, ledger = CASES[name], Ledger()
        right = whole(case)
        for context in contexts(world, case, ledger, schemes):
            got = mine(world, case, context, ledger)
            at = torch.from_numpy(context.placement.positions(world.rank))
            here = at < case.length
            worst = {}
            for n, t in right.items():
                if n == "dsinks":
                    total = got[n].double()
                    context.group.all_reduce(total).wait()
                    worst[n] = float((total - t).abs().max())
                    continue
                difference = got[n][:, :, here].double() - t[:, :, at[here]]
                worst[n] = float(difference.abs().max()) if here.any() else 0.0
            worst["sent"] = got["sent"].tolist()
            found[name, context.scheme] = worst
    return found


@cache
def everything(size: int) -> list[dict]:
    return run_ranks(errors, size, tuple(CASES), timeout=170)


def of_case(size: int, name: str) -> dict[str, list[dict[str, Any]]]:
    """scheme -> what every rank has found."""
    by_rank = everything(size)
    return {scheme: [rank[n, scheme] for rank in by_rank] for n, scheme in by_rank[0] if n == name}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_every_scheme_is_dense_attention(size: int, name: str) -> None:
    found = of_case(size, name)
    assert len(found) == (4 if size == 1 or CASES[name].heads[0] % size else 6)
    for scheme, ranks in found.items():
        for worst in ranks:
            sent = worst.pop("sent", None)
            over = {n: e for n, e in worst.items() if not e <= (2e-6 if n == "out" else 5e-6)}
            assert not over, (scheme, over)
            worst["sent"] = sent


def formula(scheme: str, case: Case, size: int, rank: int) -> list[int] | None:
    """Bytes that a rank sends forward and backward, by notes and papers; None: no closed formula."""
    (h, hkv), (d, dv), rows, b = case.heads, case.widths, 2, case.dtype.itemsize
    held = Placement(case.length, size).padded // size
    kv = rows * hkv * (d + dv)
    if scheme in ("ring", "allgather"):
        n = (size - 1) * held * kv
        return [n * b, n * (b + max(4, b))]
    if scheme == "halo" and set(case.mask) == {"window"} and not case.packed and case.zigzag:
        w = case.mask["window"]
        if w - 1 > held // 2 or size == 1:
            return [0, 0] if size == 1 else None
        tails = (1 if rank in (0, size - 1) else 2) * (w - 1)
        return [tails * kv * b, tails * kv * max(4, b)]
    if scheme in ("ulysses", "usp"):
        u = size if scheme == "ulysses" else 2
        several = math.lcm(hkv, u)
        traded = rows * held * (h + several) * (d + dv) * b * (u - 1) // u
        around = (size // u - 1) * held * rows * several * (d + dv)
        return [traded + around * b, traded + around * (b + max(4, b))]
    return None


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_the_formulas(size: int) -> None:
    checked = set()
    for name, case in CASES.items():
        for scheme, ranks in of_case(size, name).items():
            for rank, found in enumerate(ranks):
                if (wanted := formula(scheme, case, size, rank)) is not None:
                    assert found["sent"] == wanted, (name, scheme, rank)
                    checked.add(scheme)
                elif scheme == "halo":
                    assert sum(found["sent"]) <= sum(formula("ring", case, size, rank) or [0])
            if scheme != "auto":
                placement = Placement(case.length, size, case.zigzag)
                b, mask = case.dtype.itemsize, shared(case, placement)
                told = sent_bytes(
                    scheme, Layer(2, *case.heads, *case.widths, b, mask), placement, 2
                )
                assert list(told) == [max(r["sent"][k] for r in ranks) for k in (0, 1)], (
                    name,
                    scheme,
                )
    assert checked == ({"ring", "halo", "allgather"} | ({"ulysses", "usp"} if size > 1 else set()))


def halo_bytes(world, length: int) -> tuple[list[int], list[int]]:
    case = Case({"window": 33}, length=length, heads=(2, 1))
    found = []
    for context in contexts(world, case, ledger := Ledger(), ("halo", "allgather")):
        found.append(mine(world, case, context, ledger)["sent"].tolist())
    return found[0], found[1]


def test_a_window_sends_the_same_whatever_the_length_and_ten_times_less() -> None:
    short, long = run_ranks(halo_bytes, 4, 512), run_ranks(halo_bytes, 4, 2048)
    assert [halo for halo, _ in short] == [halo for halo, _ in long]
    for halo, whole_sequence in long:
        assert 10 * sum(halo) <= sum(whole_sequence)


# --- what one token may change


def changes(world, names: tuple[str, ...], token: int) -> dict[tuple[str, str], list[int]]:
    """Positions of this rank whose output changes at all when one token's q, k and v do."""
    found = {}
    for name in names:
        case = CASES[name]
        for context in contexts(world, case, Ledger()):
            placement = context.placement
            tensors, _ = make(case)
            at = torch.from_numpy(placement.positions(world.rank))
            missing = placement.padded - case.length
            outs = []
            for change in (0.0, 3.0):
                x = [tensors[n].clone() for n in ("q", "k", "v")]
                for t in x:
                    t[:, :, token] += change
                own = [torch.nn.functional.pad(t, (0, 0, 0, missing))[:, :, at] for t in x]
                mask = shared(case, placement)
                outs.append(attention(*own, mask, context, scale=0.25, softcap=case.softcap))
            moved = (outs[0] != outs[1]).any(dim=-1).any(dim=1)
            found[name, context.scheme] = [at[row].tolist() for row in moved]
    return found


NARROW = ("causal", "packed", "padded", "window", "window-packed", "sink-tokens-packed", "blocks", "chunk")  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_token_changes_what_may_see_it_and_nothing_else(size: int) -> None:
    token = 97
    by_rank = run_ranks(changes, size, NARROW, token, timeout=150)
    for name, scheme in by_rank[0]:
        case = CASES[name]
        _, ids = make(case)
        seen = visible(case, ids).expand(2, -1, -1, -1)[:, 0, :, token]
        for row in range(2):
            moved = sorted(p for rank in by_rank for p in rank[name, scheme][row])
            allowed = set(seen[row].nonzero().flatten().tolist()) | {token}
            assert set(moved) <= allowed, (name, scheme, set(moved) - allowed)
            assert set(moved) == allowed, (name, scheme, allowed - set(moved))


def controls(world) -> dict[str, float]:
    """How far the right answer to another question is: what the tests above must be able to see."""
    base = CASES["window-packed"]
    wrong = {
        "window off by one": Case({"window": 10}, packed=True),
        "no window": Case(packed=True),
        "documents leak": Case({"window": 9}),
        "softcap": replace(base, softcap=3.0),
        "scale": replace(base, scale=0.26),
    }
    right, found = whole(base)["out"], {}
    for name, case in wrong.items():
        [context] = contexts(world, case, ledger := Ledger(), ("ring",))
        got = mine(world, case, context, ledger)["out"]
        at = torch.from_numpy(context.placement.positions(world.rank))
        found[name] = float((got - right[:, :, at]).abs().max())
    return found


def test_what_is_wrong_is_seen() -> None:
    for rank in run_ranks(controls, 2):
        for name, difference in rank.items():
            assert difference > 0.02, name


# --- half precision, and what wraps attention


def half(world, name: str, schemes=SCHEMES) -> dict[str, dict[str, float]]:
    """Error in bfloat16 by scheme, from dense attention on the same rounded numbers."""
    case = replace(CASES[name], dtype=torch.bfloat16)
    right, found = whole(case), {}
    for context in contexts(world, case, ledger := Ledger(), schemes):
        got = mine(world, case, context, ledger)
        at = torch.from_numpy(context.placement.positions(world.rank))
        here = at < case.length
        found[context.scheme] = {
            n: float((got[n][:, :, here].double() - right[n][:, :, at[here]]).square().sum())
            for n in ("out", "dq", "dk", "dv")
        }
    return found


@pytest.mark.parametrize("name", ["causal", "window", "packed"])
def test_bfloat16_is_as_good_as_on_one_device(name: str) -> None:
    [alone] = run_ranks(half, 1, name, ("ring",))
    for size in (2, 4, 8):
        ranks = run_ranks(half, size, name)
        for scheme in ranks[0]:
            for n, error in alone["ring"].items():
                together = sum(rank[scheme][n] for rank in ranks)
                assert together**0.5 <= 1.05 * error**0.5, (size, scheme, n)


def two_layers(q, k, v, mask, context):
    out = attention(q, k, v, mask, context, scale=0.25)
    return attention(out, k, v, mask, context, scale=0.25)


def checkpointed(world) -> list[tuple[bool, list[int]]]:
    from torch.utils.checkpoint import checkpoint

    case, found = CASES["window-packed"], []
    for context in contexts(world, case, ledger := Ledger()):
        tensors, _ = make(case)
        at = torch.from_numpy(context.placement.positions(world.rank))
        mask = shared(case, context.placement)
        grads = []
        for again in (False, True):
            x = [tensors[n][:, :, at].clone().requires_grad_() for n in ("q", "k", "v")]
            before = ledger.sent_bytes

            layers = partial(two_layers, mask=mask, context=context)
            out = checkpoint(layers, *x, use_reentrant=False) if again else layers(*x)
            out.backward(tensors["dout"][:, :, at])
            grads.append((torch.cat([t.grad.flatten() for t in x]), ledger.sent_bytes - before))
        found.append((torch.equal(grads[0][0], grads[1][0]), [grads[0][1], grads[1][1]]))
    return found


def test_gradient_checkpointing_changes_no_bit() -> None:
    for rank in run_ranks(checkpointed, 4):
        for equal, (once, twice) in rank:
            assert equal
            assert once < twice < 2 * once


def refusals(world) -> list[str]:
    odd = Pattern("by-head", 16, visible=lambda i, j, h: j % 2 == h % 2, by_head=True)
    tries = (
        (Case(heads=(6, 2)), "ulysses", Mask()),
        (Case(), "ulysses", Mask(pattern=odd)),
        (Case(), "usp", Mask()),
    )
    group, messages = Group("context", Ledger(), 60), []
    for case, scheme, mask in tries:
        context = Context(group, Placement(case.length, world.size), scheme)
        at = torch.from_numpy(context.placement.positions(world.rank))
        own = [make(case)[0][n][:, :, at] for n in ("q", "k", "v")]
        try:
            attention(*own, mask, context, scale=0.25)
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_what_a_scheme_cannot_do_is_refused_on_every_rank_with_the_remedy() -> None:
    for messages in run_ranks(refusals, 4):
        heads, by_head, usp = messages
        assert "multiple of 4 query heads, found 6; write ring" in heads
        assert "pattern by-head differs by head; write ring" in by_head
        assert "usp without context.ulysses" in usp


def leaves(world) -> str:
    """Rank 1 ends in the middle of a layer."""
    case, ledger = CASES["causal"], Ledger()
    [context] = contexts(world, case, ledger, ("ring",))
    try:
        for step in range(3):
            if world.rank == 1 and step == 1:
                return "left"
            mine(world, case, context, ledger)
    except LostReplicas as error:
        return str(error)
    return "finished"


def test_a_rank_that_is_gone_is_named_by_group_and_message() -> None:
    left, lost = sorted(run_ranks(leaves, 2, timeout=60), key=lambda m: m != "left")
    assert left == "left"
    assert "lost the other replicas" in lost
    assert "shift" in lost
    assert "group 'context'" in lost
