"""Tensor parallelism: slices and back, families of models, norms, what is compared, what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ranks import run_ranks
from unisono.errors import ConfigError, ReplicaError
from unisono.mesh import Mesh
from unisono.sync import make_strategy
from unisono.sync.digest import check_replicas
from unisono.sync.ledger import Group, Ledger
from unisono.sync.slices import Cut
from unisono.sync.tensor import Division, apply, divide

VOCAB, LENGTH = 96, 16
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}, "phi3": {}, "olmo2": {}, "gpt_neox": {},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0}, "mixtral": MOE,
    "qwen3_moe": {"head_dim": 8, **MOE},
}  # fmt: skip


def build(kind: str = "llama", **fields: object) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind], **fields})
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    with torch.no_grad():
        for p in model.parameters():  # norms and biases must not be where they change nothing
            p.add_(0.05 * torch.randn(p.shape))
    return model.train()


def batch(step: int, row: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + row)
    return torch.randint(0, VOCAB, (1, LENGTH), generator=generator)


def loss_sum(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("cut", [Cut(0), Cut(-1), Cut(1, packs=2), Cut(-2, packs=2)], ids=str)
def test_slices_make_the_whole(cut: Cut) -> None:
    whole = torch.arange(2 * 8 * 12).view(2, 8, 12)
    parts = torch.stack([cut.part(whole, r, 2) for r in range(2)])
    assert torch.equal(cut.whole(parts), whole)
    assert cut.shape(parts[0].shape, 2) == whole.shape
    if cut.packs == 2 and cut.dim == 1:  # each rank has a half of either half
        assert parts[0][0, :, 0].tolist() == [0, 12, 48, 60]


def gradients(world, kind: str, recompute: bool) -> tuple[float, dict, list, int]:
    model = build(kind)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    group = Group("tensor", ledger := Ledger(), 60)
    division = divide(model, world.size)
    slices = apply(model, division, group)
    loss = loss_sum(model, batch(0, 0))
    loss.backward()
    sent = ledger.sent_bytes
    whole = {n: slices.whole(n, p.grad) for n, p in model.named_parameters() if p.grad is not None}
    common = [n for n, _ in model.named_parameters() if n not in division.cuts]
    return loss.item(), whole, common, sent


@pytest.mark.parametrize(
    ("kind", "recompute"), [*((kind, False) for kind in FAMILIES), ("qwen3", True), ("phi3", True)]
)
def test_a_divided_model_has_the_gradients_of_the_whole_one(kind: str, recompute: bool) -> None:
    model = build(kind)
    loss = loss_sum(model, batch(0, 0))
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    divided = divide(model, 2).divided
    results = run_ranks(gradients, 2, kind, recompute)
    for found, whole, _, sent in results:
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert set(whole) == set(expected)
        for name, g in expected.items():
            assert float((whole[name] - g).abs().max() / g.abs().max()) < 1e-5, name
        told = divided.sent_bytes(LENGTH, passes=1, width=4, ranks=2, recompute=recompute)
        # Recomputation ends where nothing more is needed: before the sum that ends a layer.
        ended = 2 * LENGTH * 4 * 32 if recompute else 0
        assert told - ended <= sent <= told
    for name in results[0][2]:  # what is not divided has the same bits on all ranks
        assert torch.equal(results[0][1][name], results[1][1][name]), name


# --- under the strategies


def sgd(matrices, vectors) -> torch.optim.Optimizer:
    return torch.optim.SGD([*matrices, *vectors], lr=1.0)


def adamw(matrices, vectors) -> torch.optim.Optimizer:
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, eps=1e-4, fused=True)


ROWS, RATE, NORM = 4, 0.01, 1.0


@functools.cache
def one(kind: str, steps: int) -> tuple[dict, list]:
    """Plain PyTorch on one process: whole parameters, norms."""
    model = build(kind)
    params = list(model.parameters())
    optimizer = adamw([p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2])
    norms = []
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(loss_sum(model, batch(step, row)) for row in range(ROWS))
        (loss / (ROWS * (LENGTH - 1))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(params, NORM)))
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, norms


def strategy_on(world, mesh: Mesh, name: str, kind: str, ledger: Ledger, **options):
    model = build(kind)
    group = Group("tensor", ledger, 60, parts=mesh.groups("tensor"))
    slices = apply(model, divide(model, mesh.tensor), group) if mesh.tensor > 1 else None
    return make_strategy(
        name, model, ledger, optimizer=adamw, bucket_mb=0.01, mesh=mesh, slices=slices, timeout_s=60, **options,
    )  # fmt: skip


def train(sync, world, mesh: Mesh, first: int, steps: int) -> list[float]:
    norms = []
    for step in range(first, first + steps):
        mine = ROWS // mesh.data
        for k in range(mine):
            with sync.micro_batch(last=k == mine - 1):
                row = mesh.data_rank(world.rank) * mine + k
                loss_sum(sync.model, batch(step, row)).backward()
        (tokens,) = sync.finish(float(mesh.leads(world.rank)) * mine * (LENGTH - 1))
        done = sync.update(divide_by=tokens, max_norm=NORM, learning_rate=RATE)
        norms.append(done.gradient_norm)
    return norms


def trained(world, mesh: Mesh, name: str, kind: str, options: dict) -> tuple[dict, list, bool]:
    sync = strategy_on(world, mesh, name, kind, Ledger(), **options)
    norms = train(sync, world, mesh, 0, 3)
    check_replicas(sync.replicated(), Group("votes", Ledger(), 60), 3)
    named = {n for n, _ in sync.named_parameters()}
    return {n: t for n, t in sync.state_dict().items() if n in named}, norms, sync.lockstep


WAYS = {
    "tensor": (Mesh(tensor=2), "exact", {}),
    "replica x tensor": (Mesh(replica=2, tensor=2), "exact", {}),
    "optimizer on shards": (Mesh(replica=2, tensor=2), "exact", {"shard": True}),
    "shard x tensor": (Mesh(shard=2, tensor=2), "sharded", {}),
    "sharded tensor": (Mesh(tensor=2), "sharded", {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_strategies_train_slices_as_one_process_trains_the_whole(way: str, kind: str) -> None:
    mesh, name, options = WAYS[way]
    expected, norms = one(kind, 3)
    results = run_ranks(trained, mesh.size, mesh, name, kind, options)
    assert len({tuple(found) for _, found, _ in results}) == 1  # one norm, bit for bit
    assert results[0][1] == pytest.approx(norms, rel=1e-5)
    assert norms[0] > NORM  # clipped
    for n, p in expected.items():
        assert float((results[0][0][n] - p).abs().max()) < 1e-5, n
    assert results[0][2]


def saved(world, mesh: Mesh, name: str, options: dict) -> tuple[dict, dict]:
    sync = strategy_on(world, mesh, name, "llama", Ledger(), **options)
    train(sync, world, mesh, 0, 2)
    optimizer = {k: v.clone() for k, v in sync.optimizer_state()}
    return {k: v.clone() for k, v in sync.state_dict().items()}, optimizer


def resumed(world, mesh: Mesh, name: str, options: dict, state: dict, optimizer: dict) -> dict:
    def given(kind: str) -> nn.Module:
        model = plain(kind)
        model.load_state_dict(state)
        return model

    global build
    plain, build = build, given
    sync = strategy_on(world, mesh, name, "llama", Ledger(), **options)
    sync.load_optimizer_state(optimizer)
    train(sync, world, mesh, 2, 1)
    return {k: v for k, v in sync.state_dict().items() if not k.startswith("lm_head")}


ALONE = (Mesh(), "exact", {})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (WAYS["optimizer on shards"], ALONE),
        (ALONE, WAYS["optimizer on shards"]),
        (WAYS["shard x tensor"], WAYS["tensor"]),
        (WAYS["replica x tensor"], WAYS["shard x tensor"]),
    ],
    ids=["from shards to one", "from one to shards", "from fsdp to tensor", "to fsdp"],
)
def test_what_is_saved_goes_on_upon_any_other_mesh(before: tuple, after: tuple) -> None:
    mesh, name, options = before
    state, optimizer = run_ranks(saved, mesh.size, mesh, name, options)[0]
    assert state["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)
    mesh, name, options = after
    found = run_ranks(resumed, mesh.size, mesh, name, options, state, optimizer)[0]
    expected, _ = one("llama", 3)
    for n, p in expected.items():
        assert float((found[n] - p).abs().max()) < 1e-5, n


def flipped(world, where: str, rank: int) -> str:
    mesh = Mesh(replica=2, tensor=2)
    sync = strategy_on(world, mesh, "exact", "llama", Ledger())
    votes = Group("votes", Ledger(), 60)
    train(sync, world, mesh, 0, 1)
    check_replicas(sync.replicated(), votes, 1)
    with torch.no_grad():
        if world.rank == rank:
            dict(sync.named_parameters())[where].view(-1)[5] += 1e-3
    with pytest.raises(ReplicaError) as error:
        check_replicas(sync.replicated(), votes, 1)
    return str(error.value)


@pytest.mark.parametrize("where", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_flipped_weight_is_found_divided_or_not(where: str) -> None:
    for message in run_ranks(flipped, 4, where, 3):
        assert where in message


# --- refusals


@pytest.mark.parametrize(
    ("ranks", "fields", "told"),
    [
        (4, {}, "num_key_value_heads 2; write a divisor of 2"),
        (2, {"attention_dropout": 0.1}, "a dropout of 0.1"),
        (2, {"intermediate_size": 49}, "has 49 to divide"),
    ],
)
def test_what_cannot_be_divided_is_refused(ranks: int, fields: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=f"mesh.tensor: found {ranks}, .*{told}"):
        divide(build("llama", **fields), ranks)


def test_a_model_without_a_plan_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="no plan of how to divide the layers of GPT2LMHeadModel"):
        divide(AutoModelForCausalLM.from_config(config), 2)


def test_words_that_cannot_be_divided_stay_whole() -> None:
    division: Division = divide(build("llama", vocab_size=97), 2)
    assert "97 words" in division.note
    assert not [n for n in division.cuts if "embed" in n or "lm_head" in n]
    assert division.divided.sent == 4 * 4 * 32  # two blocks a layer, in and out of each
