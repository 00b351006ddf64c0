"""What a sequence over several ranks costs: time, memory and bytes, against one rank.

    python benchmarks/context.py efficiency   # ~2 min; two quiet cores
    python benchmarks/context.py memory       # ~5 min; the machine may be busy
    python benchmarks/context.py bytes        # ~1 min; the machine may be busy

Every rank is a process with one thread, pinned to a core where time counts.

- efficiency: forward and backward of one causal layer (4 query heads, 2 key heads, 64 wide, float32)
  over two ranks; the ideal is half of one rank's time. One rank alone and each scheme take turns in the
  same processes, and the median of the rounds' quotients is told. `ceiling`: what two processes reach that
  share the machine and nothing else, each with a whole sequence of its own.
- memory: a training step of a Llama of two layers; peak memory of the rank that takes most, beyond
  that of a step with 128 tokens a rank. The same tokens a rank over more ranks, and the longest
  context in a fixed amount.
- bytes: what the rank that sends most sends for a window layer, by the ledger and by the formula.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).parent
HEADS, KV_HEADS, WIDTH = 4, 2, 64
LENGTHS = (4096, 8192)
SCHEMES = ("ring", "ulysses", "allgather")
ROUNDS = 7
TOKENS = 4096
"""Of a rank, where the number of ranks changes and nothing else."""
BUDGET_MB = 256
GRAIN = 128


def ranks(part: str, size: int, **what: Any) -> Any:
    """What rank 0 of `size` processes has found."""
    from unisono.launch.local import launch

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, part, "--rank", json.dumps(what), "--json", str(found)]
        if launch(command, size, 1) != 0:
            raise SystemExit(f"{part} over {size} ranks failed: {what}")
        return json.loads(found.read_text())


# --- in a rank


def rank_main(part: str, what: dict[str, Any], path: Path) -> None:
    rank = int(os.environ["RANK"])
    if part == "efficiency":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch

    from unisono import world as world_module
    from unisono.sync.ledger import Group, Ledger

    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = {"efficiency": efficiency_of, "memory": memory_of, "bytes": bytes_of}[part]
    with world_module.joined(world_module.from_env(device="cpu", threads=1)) as world:
        found = work(Group("context", Ledger(), 240), **what)
    if world.is_main:
        path.write_text(json.dumps(found))


def layer(length: int, heads: int, kv_heads: int, width: int) -> list[Any]:
    """q, k, v and the gradient of the output, of one sequence."""
    import torch

    shapes = [(1, h, length, width) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape) for shape in shapes]


def efficiency_of(group: Any, length: int) -> dict[str, Any]:
    """Collective: seconds of each way in each round; the slower rank's."""
    import torch

    from unisono.attention.context import Context, attention
    from unisono.attention.local import attend
    from unisono.attention.mask import Mask
    from unisono.attention.shard import Placement

    mask, whole = Mask(), layer(length, HEADS, KV_HEADS, WIDTH)

    def own(placement: Placement) -> list[torch.Tensor]:
        at = torch.from_numpy(placement.positions(group.rank))
        return [x[:, :, at].contiguous() for x in whole]

    def alone() -> None:
        q, k, v, dout = (x.detach().requires_grad_() for x in whole)
        attend(q, k, v, mask, scale=0.125).backward(dout)

    def together(scheme: str, zigzag: bool) -> Callable[[], None]:
        context = Context(group, Placement(length, group.size, zigzag), scheme)
        inputs = own(context.placement)

        def step() -> None:
            q, k, v, dout = (x.detach().requires_grad_() for x in inputs)
            attention(q, k, v, mask, context, scale=0.125).backward(dout)

        return step

    ways = {"alone": alone, "both alone": alone}
    ways |= {scheme: together(scheme, True) for scheme in SCHEMES}
    ways["ring, contiguous"] = together("ring", False)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, step in ways.items():
            group.barrier()
            began = time.perf_counter()
            if name != "alone" or group.rank == 0:
                step()
            seconds[name].append(float(group.each(time.perf_counter() - began).max()))
    return {name: values[1:] for name, values in seconds.items()}


def memory_of(group: Any, tokens: int, checkpointing: bool = False) -> dict[str, float]:
    """Collective: MB beyond the base of a training step with `tokens` a rank, and its seconds."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, LlamaConfig

    from unisono.attention.context import Context
    from unisono.attention.hf import hook
    from unisono.attention.shard import Placement

    # Large tensors get pages of their own, as in any program: what a run keeps of freed memory
    # (world.py) depends on the order of sizes and would be counted by chance.
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH, intermediate_size=704, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=512, max_position_embeddings=2**20,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    hooked = hook(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(own: int) -> float:
        began = time.perf_counter()
        placement = Placement(own * group.size, group.size)
        at = torch.from_numpy(placement.positions(group.rank))[None]
        ids = (at * 7919) % 512
        if group.size > 1:
            hooked.context = Context(group, placement, "ring")
        logits = model(input_ids=ids, position_ids=at, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
        (loss / placement.length).backward()
        for p in model.parameters():
            group.all_reduce(p.grad).wait()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step(128)
    base = peak_mb()
    seconds = step(tokens)
    beyond, seconds = group.each(peak_mb() - base, seconds).amax(0).tolist()
    return {"beyond_base_mb": beyond, "base_mb": base, "step_s": seconds}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bytes_of(group: Any, lengths: list[int], windows: list[int]) -> list[dict[str, Any]]:
    """Collective: bytes of a window layer by halo and by all-gather, forward and backward."""
    from unisono.attention.context import Context, attention
    from unisono.attention.mask import Mask
    from unisono.attention.shard import Placement

    rows, width = [], 16
    for length in lengths:
        placement = Placement(length, group.size)
        inputs = layer(placement.held, 2, 1, width)
        for window in windows:
            mask, sent = Mask(window=window), {}
            for scheme in ("halo", "allgather"):
                before = group.ledger.sent_bytes
                q, k, v, dout = (x.detach().requires_grad_() for x in inputs)
                context = Context(group, placement, scheme)
                attention(q, k, v, mask, context, scale=0.25).backward(dout)
                sent[scheme] = int(group.each(group.ledger.sent_bytes - before).max())
            tails = 1 if group.size == 2 else 2
            formula = tails * (window - 1) * (width + width) * (4 + 4)
            rows.append(
                {"ranks": group.size, "tokens": length, "window": window, **sent}
                | {"formula_halo": formula, "less": sent["allgather"] / sent["halo"]}
            )
    return rows


# --- what is told


def efficiency() -> dict[str, Any]:
    found = {}
    for length in LENGTHS:
        seconds = ranks("efficiency", 2, length=length)
        alone = seconds.pop("alone")
        row: dict[str, Any] = {"one_rank_s": statistics.median(alone)}
        for name, values in seconds.items():
            share = 1 if name == "both alone" else 2
            quotients = [a / share / b for a, b in zip(alone, values)]
            key = "ceiling" if name == "both alone" else name
            row[key] = {
                "of_ideal": statistics.median(quotients),
                "quartiles": statistics.quantiles(quotients, n=4)[::2],
                "seconds": statistics.median(values),
            }
        found[str(length)] = row
        shown = ", ".join(f"{n} {v['of_ideal']:.1%}" for n, v in row.items() if n != "one_rank_s")
        print(f"RESULT {length} tokens, one rank {row['one_rank_s']:.3f} s: {shown}", flush=True)
    return {"heads": [HEADS, KV_HEADS], "width": WIDTH, "rounds": ROUNDS, "by_tokens": found}


def memory() -> dict[str, Any]:
    weak = {}
    for size in (1, 2, 4):
        weak[size] = ranks("memory", size, tokens=TOKENS)
        times = weak[size]["beyond_base_mb"] / weak[1]["beyond_base_mb"]
        print(
            f"RESULT {size} ranks, {size * TOKENS} tokens: {weak[size]['beyond_base_mb']:.0f} MB a rank "
            f"beyond the base, {times:.3f} of one rank's",
            flush=True,
        )
    longest = {}
    for size in (1, 2, 4):
        tokens, tried = longest_of(size, weak[size]["beyond_base_mb"])
        longest[size] = {"tokens": tokens * size, "tokens_a_rank": tokens, "tried": tried}
        print(
            f"RESULT {size} ranks in {BUDGET_MB} MB each: {tokens * size} tokens, "
            f"{tokens * size / longest[1]['tokens']:.2f} times one rank's",
            flush=True,
        )
    return {"budget_mb": BUDGET_MB, "same_tokens_a_rank": weak, "longest": longest}


def longest_of(size: int, at_first: float) -> tuple[int, dict[int, float]]:
    """Most tokens a rank, a multiple of GRAIN, whose step stays within the budget; and what was tried."""
    tried = {TOKENS: at_first}
    tokens = TOKENS
    while True:
        ahead = int(BUDGET_MB / (tried[tokens] / tokens)) // GRAIN * GRAIN
        fits = max((t for t, mb in tried.items() if mb <= BUDGET_MB), default=0)
        fails = min((t for t, mb in tried.items() if mb > BUDGET_MB), default=1 << 30)
        if fails - fits <= GRAIN:
            return fits, tried
        tokens = min(max(ahead, fits + GRAIN), fails - GRAIN)
        tried[tokens] = ranks("memory", size, tokens=tokens)["beyond_base_mb"]


def bytes_() -> list[dict[str, Any]]:
    rows = []
    for size in (2, 4, 8):
        for row in ranks("bytes", size, lengths=[2048, 8192, 32768], windows=[64, 128]):
            rows.append(row)
            print(
                f"RESULT {size} ranks, {row['tokens']} tokens, window {row['window']}: halo {row['halo']} B "
                f"(formula {row['formula_halo']}), all-gather {row['allgather']} B, {row['less']:.1f} times",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("efficiency", "memory", "bytes"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "context.json")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.part, args.rank, args.json)
        return
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['date']}")
    found = {"efficiency": efficiency, "memory": memory, "bytes": bytes_}[args.part]()
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    result[args.part] = {"machine": about, "found": found}
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
