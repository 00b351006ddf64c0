"""`sharded`: FSDP2 behind the seam trains what one process trains, on any mesh.

The model has blocks (a ModuleList), tied embeddings, sizes that no number of ranks divides, a frozen
parameter, one that no rank uses and one that only some ranks use in a step.
"""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_parity import STEPS, VOCAB, Model, difference, global_batch, leaf_rows, sgd
from torch import nn

from ranks import run_ranks
from unisono.errors import ConfigError, ReplicaError
from unisono.mesh import Mesh
from unisono.sync.digest import check_replicas, sha256
from unisono.sync.exact import Exact
from unisono.sync.ledger import Group, Ledger
from unisono.sync.sharded import Sharded, find_blocks

LEAVES = 12
WIDTH = 256
MESHES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (1, 3)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 33)
        self.down = nn.Linear(33, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.weight.requires_grad_(False)
        self.rare = nn.Linear(16, 16)
        self.never = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, rare: bool) -> torch.Tensor:
        y = self.frozen(self.norm(x))
        y = self.down(torch.tanh(self.up(y)))
        return x + y + self.rare(x) if rare else x + y


class Blocks(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x, rare)
        return self.head(self.norm(x))


class Shared(nn.Module):
    """One block used three times, as in ALBERT: its sums are added up within a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList([Block()] * 3)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, rare)
        return self.head(x)


def on(mesh: tuple | None) -> Mesh | None:
    """(replica, shard)."""
    return Mesh(*mesh) if mesh else None


def adamw(matrices, vectors) -> torch.optim.Optimizer:
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-6, fused=True)


def build(kind: type) -> nn.Module:
    torch.manual_seed(7)
    return kind()


def micro_loss(model, ids, labels, rows) -> torch.Tensor:
    rare = bool((ids[rows, 0] % 2 == 0).any())
    logits = model(ids[rows], rare)
    return F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum")


def run_step(
    sync, world, step: int, leaves: int = LEAVES, max_norm: float = 1.0, rate: float = 0.5
):
    ids, labels = global_batch(step)
    mine = leaves // world.size
    loss_sum, count = 0.0, 0
    for k in range(mine):
        rows = leaf_rows(world.rank * mine + k, leaves)
        with sync.micro_batch(last=k == mine - 1):
            loss = micro_loss(sync.model, ids, labels, rows)
            loss.backward()
        loss_sum += loss.item()
        count += int((labels[rows] != -100).sum())
    total, tokens = sync.finish(loss_sum, count)
    done = sync.update(divide_by=tokens, max_norm=max_norm, learning_rate=rate)
    return total / tokens, done


def whole_parameters(sync) -> dict:
    return {k: v.clone() for k, v in sync.state_dict().items() if k != "calls"}


def train(world, mesh, kind=Blocks, optimizer=sgd, steps=STEPS, leaves=LEAVES, rate=0.5):
    sync = Sharded(build(kind), Ledger(), optimizer=optimizer, mesh=on(mesh), timeout_s=60)
    results = [run_step(sync, world, step, leaves, rate=rate) for step in range(steps)]
    norms = [done.gradient_norm for _, done in results]
    return whole_parameters(sync), [loss for loss, _ in results], norms


@functools.cache
def one(
    kind=Blocks, optimizer=sgd, steps: int = STEPS, rate: float = 0.5
) -> tuple[dict, list, list]:
    """The whole global batch in one backward pass, on one process, in a plain PyTorch loop."""
    model = build(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer([p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2])
    losses, norms = [], []
    for group in optimizer.param_groups:
        group["lr"] = rate
    for step in range(steps):
        ids, labels = global_batch(step)
        optimizer.zero_grad()
        loss = sum(micro_loss(model, ids, labels, leaf_rows(k, LEAVES)) for k in range(LEAVES))
        loss = loss / (labels != -100).sum()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        losses.append(loss.item())
    state = {k: v.clone() for k, v in model.state_dict().items() if k != "calls"}
    return state, losses, norms


def assert_same(results: list, expected: tuple) -> None:
    state, losses, norms = results[0]
    assert list(state) == list(expected[0])
    assert difference(state, expected[0]) <= 1e-5
    assert losses == pytest.approx(expected[1], rel=1e-5)
    assert norms == pytest.approx(expected[2], rel=1e-5)
    assert max(norms) > 1, "nothing was clipped"
    assert all(r[1:] == results[0][1:] for r in results), "ranks disagree"


# --- the mathematics


@pytest.mark.parametrize(
    ("kind", "mesh"), [(Model, (1, 3)), (Model, (2, 2)), *((Blocks, m) for m in MESHES)], ids=str
)
def test_parameters_equal_one_process(kind: type, mesh: tuple) -> None:
    """20 SGD steps, 12 micro-batches of ragged targets in all, clipped."""
    results = run_ranks(train, mesh[0] * mesh[1], mesh, kind)
    assert_same(results, one(kind))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (1, 4)], ids=str)
def test_adamw_equals_one_process(mesh: tuple) -> None:
    """The fused AdamW on shards, of which some are empty; parameters that nobody uses keep still."""
    results = run_ranks(train, mesh[0] * mesh[1], mesh, Blocks, adamw, 5, LEAVES, 1e-2)
    assert_same(results, one(Blocks, adamw, 5, 1e-2))


def test_accumulation_does_not_matter() -> None:
    """Without a mesh all ranks share; one micro-batch a rank equals one process with four."""
    expected = run_ranks(train, 1, None, Blocks, sgd, 6, 4)[0][0]
    assert difference(run_ranks(train, 4, None, Blocks, sgd, 6, 4)[0][0], expected) <= 1e-5
    assert difference(run_ranks(train, 2, None, Blocks, sgd, 6, 4)[0][0], expected) <= 1e-5


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_a_block_used_several_times(mesh: tuple) -> None:
    assert_same(run_ranks(train, mesh[0] * mesh[1], mesh, Shared), one(Shared))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])

    def forward(self, x: torch.Tensor, skip: int) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = x if i == skip else block(x)
        return x


def skip_blocks(world, skips: list[int]) -> list[str]:
    sync = Sharded(build(Skips), Ledger(), optimizer=sgd, timeout_s=5)
    with sync.micro_batch():
        sync.model(torch.ones(2, 8), skips[world.rank]).sum().backward()
    sync.finish()
    sync.update(divide_by=1.0, max_norm=0.0, learning_rate=0.1)
    return [name for name, _ in sync.optimizer_state()]


def test_blocks_that_all_ranks_skip() -> None:
    (names, _) = run_ranks(skip_blocks, 2, [1, 1])
    assert {n.split(".")[2] for n in names} == {"0", "2", "3"}


def test_ranks_that_skip_different_blocks_are_told() -> None:
    """Equal blocks in another order would else be mixed up without a word."""
    with pytest.raises(AssertionError, match="in different orders"):
        run_ranks(skip_blocks, 2, [1, 2])


# --- what is not finite changes nothing


def poisoned(world, mesh) -> list:
    sync = Sharded(build(Blocks), Ledger(), optimizer=adamw, mesh=on(mesh), timeout_s=60)
    run_step(sync, world, 0, rate=1e-2)

    def everything() -> str:
        # The norm of the mean is in it too, since the same step follows.
        return sha256({**sync.state_dict(), **dict(sync.optimizer_state())})

    before = everything()
    ids, labels = global_batch(1)
    with sync.micro_batch():
        loss = micro_loss(sync.model, ids, labels, slice(world.rank, world.rank + 1))
        (loss * (float("inf") if world.rank == world.size - 1 else 1.0)).backward()
    sync.finish(1.0)
    done = sync.update(divide_by=1.0, max_norm=1.0, learning_rate=0.5)
    assert everything() == before
    _, following = run_step(sync, world, 1, rate=1e-2)
    return [done.committed, following.committed, following.gradient_norm]


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(mesh: tuple) -> None:
    results = run_ranks(poisoned, mesh[0] * mesh[1], mesh)
    _, _, norms = run_ranks(train, 1, None, Blocks, adamw, 2, LEAVES, 1e-2)[0]
    for committed, following, norm in results:
        assert not committed and following
        assert norm == pytest.approx(norms[1], rel=1e-5)


def given_up(world) -> tuple[list, dict]:
    """A step's first micro-batches, looked at and forgotten."""
    sync = Sharded(build(Blocks), Ledger(), optimizer=sgd, timeout_s=60)
    ids, labels = global_batch(5)
    with sync.micro_batch(last=False):
        micro_loss(sync.model, ids, labels, leaf_rows(world.rank, LEAVES)).backward()
    seen = [name for name, g in sync.local_gradients() if g.abs().sum() > 0]
    sync.discard()
    assert not list(sync.local_gradients())
    run_step(sync, world, 0)
    return seen, whole_parameters(sync)


def test_a_step_can_be_forgotten_before_it_is_sent() -> None:
    expected = run_ranks(train, 2, None, Blocks, sgd, 1)[0][0]
    (seen, state), _ = run_ranks(given_up, 2)
    assert sha256(state) == sha256(expected)
    assert "embed.weight" in seen and "blocks.2.up.bias" in seen
    assert not [name for name in seen if "never" in name]


# --- checkpoints


def saved(world, strategy: str, mesh, kind=Blocks):
    """Three AdamW steps; what rank 0 would save."""
    model = build(kind)
    sync = (
        Sharded(model, Ledger(), optimizer=adamw, mesh=on(mesh), timeout_s=60)
        if strategy == "sharded"
        else Exact(model, Ledger(), optimizer=adamw, timeout_s=60)
    )
    for step in range(3):
        run_step(sync, world, step, rate=1e-2)
    return go_on(sync, world, 0)


def go_on(sync, world, steps: int):
    for step in range(3, 3 + steps):
        run_step(sync, world, step, rate=1e-2)
    state = {k: v.clone() for k, v in sync.state_dict().items()}
    return state, {k: v.clone() for k, v in sync.optimizer_state()}


def resumed(world, strategy: str, mesh, state: dict, optimizer: dict, steps: int):
    model = build(Blocks)
    model.load_state_dict(state)
    sync = (
        Sharded(model, Ledger(), optimizer=adamw, mesh=on(mesh), timeout_s=60)
        if strategy == "sharded"
        else Exact(model, Ledger(), optimizer=adamw, timeout_s=60)
    )
    sync.load_optimizer_state(optimizer)
    return go_on(sync, world, steps)


ONE, THREE, GRID = (("sharded", mesh) for mesh in ((1, 1), (1, 3), (2, 2)))
EXACT = ("exact", (1, 2))


@functools.cache
def checkpoint(strategy: str, mesh: tuple) -> tuple:
    """What was saved there, and what it becomes in four more steps on one rank."""
    found = run_ranks(saved, mesh[0] * mesh[1], strategy, mesh)[0]
    return found, run_ranks(resumed, 1, "exact", None, *found, 4)[0]


@pytest.mark.parametrize(
    ("source", "target"),
    [(ONE, GRID), (THREE, ONE), (THREE, GRID), (THREE, EXACT), (GRID, THREE), (EXACT, THREE)],
    ids=str,
)
def test_checkpoints_are_interchangeable(source: tuple, target: tuple) -> None:
    """From any strategy on any number of ranks to any other: the same bits, then the same steps."""
    (state, optimizer), expected = checkpoint(*source)
    size = target[1][0] * target[1][1]
    again = run_ranks(resumed, size, *target, state, optimizer, 0)[0]
    assert sha256(again[0]) == sha256(state)
    assert sha256(again[1]) == sha256(optimizer)
    went_on = run_ranks(resumed, size, *target, state, optimizer, 4)[0]
    for ours, theirs in zip(went_on, expected):
        assert difference(ours, theirs) <= 1e-5


def test_a_state_dict_is_the_model_s_own() -> None:
    model = build(Blocks)
    state, *others = run_ranks(saved_at_once, 4)
    assert sha256(state) == sha256(dict(model.state_dict()))
    assert list(state) == list(model.state_dict())
    assert all(list(s) == ["calls"] for s in others), "a rank keeps what it does not need"


def saved_at_once(world):
    sync = Sharded(build(Blocks), Ledger(), optimizer=adamw, timeout_s=60)
    state = sync.state_dict()
    if world.is_main:
        assert state["embed.weight"] is state["head.weight"]
    return {k: v.clone() for k, v in state.items()}


def masters(world, whole: torch.Tensor) -> torch.Tensor:
    sync = Sharded(build(Blocks), Ledger(), optimizer=adamw, timeout_s=60)
    ids, labels = global_batch(0)
    with torch.no_grad():  # leaves what is left of the model gathered, as an evaluation does
        before = micro_loss(sync.model, ids, labels, slice(0, 4)).item()
    sync.load_optimizer_state({"master.embed.weight": whole})
    with torch.no_grad():
        assert micro_loss(sync.model, ids, labels, slice(0, 4)).item() != before
    return sync.state_dict().get("embed.weight")


def test_master_weights_are_the_weights() -> None:
    whole = torch.randn(VOCAB, 16)
    assert torch.equal(run_ranks(masters, 3, whole)[0], whole)


# --- replicas of shards


def flipped(world, mesh) -> str | None:
    sync = Sharded(build(Blocks), Ledger(), optimizer=adamw, mesh=on(mesh), timeout_s=60)
    votes = Group("votes", Ledger(), 60)
    run_step(sync, world, 0, rate=1e-2)
    check_replicas(sync.replicated(), votes, 1)
    if world.rank == 3:
        dict(sync.named_parameters())["blocks.1.up.weight"].detach().to_local()[0, 0] += 1e-6
    try:
        check_replicas(sync.replicated(), votes, 2)
    except ReplicaError as error:
        return str(error)
    return None


def test_replicas_of_a_shard_are_compared() -> None:
    for message in run_ranks(flipped, 4, (2, 2)):
        assert "replicas differ after step 2" in message
        assert "in blocks.1.up.weight, and 1 of" in message
    assert run_ranks(flipped, 4, (1, 4)) == [None] * 4, "a single row has no equal"


# --- memory and bytes


def held(world, mesh) -> tuple[int, int, int, int]:
    """Bytes of optimizer state, weights and gradients on this rank."""
    sync = Sharded(build(Wide), Ledger(), optimizer=adamw, mesh=on(mesh), timeout_s=60)
    with sync.micro_batch():
        wide_loss(sync.model).backward()
    sync.finish()
    gradients = sum(p.grad.to_local().nbytes for _, p in sync.named_parameters())
    whole = sum(p.grad.nbytes for p in sync._whole.values() if p.grad is not None)
    sync.update(divide_by=1.0, max_norm=0.0, learning_rate=1e-3)
    sync.settle()
    state = sum(t.nbytes for s in sync._optimizer.state.values() for t in s.values() if t.dim())
    stored = sum(p.untyped_storage().nbytes() for p in sync._whole.values())
    weights = sum(p.to_local().untyped_storage().nbytes() for _, p in sync.named_parameters())
    return (
        state,
        weights + stored,
        gradients + whole,
        sum(p.numel() for _, p in sync.named_parameters()) * 4,
    )


class Wide(nn.Module):
    """Sizes that two and four divide, and enough of them that messages are mostly payload."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, WIDTH)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)]
        )
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(ids))
        for block in self.blocks:
            x = x + block(x)
        return x @ self.embed.weight.T


def wide_loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(64).view(4, 16)
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum")


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)], ids=str)
def test_each_rank_holds_its_share(mesh: tuple) -> None:
    for state, weights, gradients, whole in run_ranks(held, mesh[0] * mesh[1], mesh):
        assert state == 2 * whole // mesh[1]
        assert weights == gradients == whole // mesh[1]


def interface_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def formula(mesh: tuple, micro_batches: int) -> float:
    replica, shard = mesh
    block = 4 * (WIDTH * WIDTH + WIDTH)
    rest, frozen = 4 * 512 * WIDTH, 4 * WIDTH * WIDTH
    parameters = micro_batches * (2 * 6 * block - block + rest + frozen)
    trained = 6 * block + rest
    return (parameters + trained) * (shard - 1) / shard + 2 * trained / shard * (
        replica - 1
    ) / replica


def measured(world, mesh, micro_batches: int, steps: int) -> tuple[int, int, list[str]]:
    """Bytes in the ledger without the control group's, and on the interface, of some steps."""
    ledger = Ledger()
    sync = Sharded(build(Wide), ledger, optimizer=sgd, mesh=on(mesh), timeout_s=60)
    pause = Group("pause", Ledger(), 60)

    def run_steps(steps: int) -> None:
        for _ in range(steps):
            for k in range(micro_batches):
                with sync.micro_batch(last=k == micro_batches - 1):
                    wide_loss(sync.model).backward()
            sync.finish(1.0)
            sync.update(divide_by=1e6, max_norm=0.0, learning_rate=1e-3)

    run_steps(1)
    pause.barrier()
    time.sleep(0.1)
    ledger.entries.clear()
    before = interface_bytes()
    pause.barrier()
    run_steps(steps)
    pause.barrier()
    time.sleep(0.1)
    sent = sum(e.sent_bytes for e in ledger.entries if e.group != "control")
    assert all(e.finished >= e.started > 0 for e in ledger.entries), (
        "a collective was not waited for"
    )
    return sent, interface_bytes() - before, sorted({e.operation for e in ledger.entries})


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2), (4, 1)], ids=str)
def test_bytes_are_the_formula_s(mesh: tuple, micro_batches: int) -> None:
    for sent, _, _ in run_ranks(measured, mesh[0] * mesh[1], mesh, micro_batches, 2):
        assert sent == 2 * formula(mesh, micro_batches)


def test_the_wire_carries_what_the_ledger_says() -> None:
    """In a network namespace of its own, where nobody else talks on the interface."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
    }
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", f"ip link set lo up && exec {sys.executable} {__file__} $0 $1", "2", "2"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ledger, wire = map(int, done.stdout.split())
    assert ledger * 0.99 <= wire <= ledger * 1.03


def slow_rank(world) -> tuple[float, float]:
    """Seconds that this rank stood still, in steps and in evaluations, where rank 1 is late."""
    ledger = Ledger()
    sync = Sharded(build(Wide), ledger, optimizer=sgd, timeout_s=60)
    for _ in range(2):
        ledger.clock.restart()
        with ledger.clock("compute"), sync.micro_batch():
            time.sleep(0.4 * world.rank)
            wide_loss(sync.model).backward()
        sync.finish(1.0)
        sync.update(divide_by=1e6, max_norm=0.0, learning_rate=1e-3)
    in_step = ledger.clock.read().get("waiting", 0.0)
    ledger.clock.restart()
    with ledger.clock("evaluation"), torch.no_grad():
        time.sleep(0.4 * world.rank)
        sync.settle()
        wide_loss(sync.model)
    return in_step, ledger.clock.read().get("waiting", 0.0)


def test_standing_still_is_told_from_computing() -> None:
    (first, evaluating), (late, _) = run_ranks(slow_rank, 2)
    assert first > 0.3 > late
    assert evaluating == 0.0, "what an evaluation waits for is its own"


# --- Hugging Face's models


def llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=50, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def train_llama(world, tied: bool, checkpointing: bool):
    model = llama(tied)
    assert [type(b).__name__ for b in find_blocks(model)] == ["LlamaDecoderLayer"] * 3
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    sync = Sharded(model, Ledger(), optimizer=sgd, timeout_s=60)
    for step in range(5):
        ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(step))
        with sync.micro_batch():
            llama_loss(sync.model, world.share(ids)).backward()
        sync.finish()
        sync.update(divide_by=44.0, max_norm=1.0, learning_rate=0.5)
    return {k: v.clone() for k, v in sync.state_dict().items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_hugging_face(tied: bool, checkpointing: bool) -> None:
    """With tied embeddings, and with blocks whose forward pass runs twice."""
    model = llama(tied)
    optimizer = sgd(model.parameters(), [])
    for step in range(5):
        ids = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (llama_loss(model, ids) / 44.0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    state = run_ranks(train_llama, 2, tied, checkpointing)[0]
    assert list(state) == list(model.state_dict())
    assert difference(state, dict(model.state_dict())) <= 1e-5


# --- what is wrapped, what is refused


def test_blocks_are_what_a_list_repeats() -> None:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.Tanh())

    first, looked_into = block(4), block(3)
    outer = nn.Sequential(nn.ModuleList([block(2)]), nn.ReLU())
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList([first, first, outer]),
            "lists": nn.ModuleList([nn.ModuleList([looked_into]), nn.Dropout(), nn.Linear(6, 6)]),
            "tied": nn.ModuleList([block(5)]),
            "head": nn.Linear(5, 5),
        }
    )
    model["head"].weight = model["tied"][0][0].weight
    assert find_blocks(model) == [first, outer, looked_into]


def refused(world) -> str:
    with pytest.raises(ConfigError) as error:
        Sharded(build(Blocks).to(torch.bfloat16), Ledger(), optimizer=sgd, timeout_s=60)
    return str(error.value)


def test_half_precision_weights_are_refused_in_words() -> None:
    (message, _) = run_ranks(refused, 2)
    assert "float32 parameters, found torch.bfloat16 in scale" in message


if __name__ == "__main__":
    alone = tuple(map(int, sys.argv[1:]))
    seen = run_ranks(measured, alone[0] * alone[1], alone, 1, 10)
    print(sum(sent for sent, _, _ in seen), seen[0][1])
