"""What to change about each line of the receipt: a field and a value, and what all of it is worth.

A line's `gain` is throughput without it over throughput, minus 1, all else equal: s / (t - s) of the
time t of a step for the phases of a step, of the whole wall time for checkpoints and evaluation. What
the advice itself brings may be less; where it halves a line, the line says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unisono.clock import STEP_PHASES
from unisono.config import Config
from unisono.observe.blame import Blame
from unisono.plan import Plan

LEAST = 0.001
"""Of the time, for a line to be worth advice."""
PHASE_OF = {
    "slow rank": "waiting", "slow loader": "waiting", "uneven load": "imbalance",
    "slow link": "communication",
}  # fmt: skip
"""Where the others' time goes that a cause costs."""


def gain_without(phase: str, shares: Mapping[str, float]) -> float | None:
    """Throughput without this line of the receipt over throughput, minus 1; None for compute."""
    whole = sum(shares[p] for p in STEP_PHASES) if phase in STEP_PHASES else 1.0
    rest = whole - shares[phase]
    return shares[phase] / rest if phase != "compute" and rest > 0 else None


def advise(
    shares: Mapping[str, float],
    blames: Sequence[Blame],
    config: Config,
    plan: Plan,
    memory: str = "",
) -> list[dict[str, Any]]:
    """What costs most first: {"phase", "what", "share", "gain", "do"}, as the report page reads it.

    `memory`: what is known of it, for what would need more.
    """
    rows: list[dict[str, Any]] = []
    told: dict[str, str] = {}
    for b in blames:
        phase, do = PHASE_OF[b.kind], _against(b, config, plan)
        what = b.kind if b.rank is None else f"{b.kind}, rank {b.rank}"
        rows.append({"phase": phase, "what": what, "share": b.cost, "gain": b.gain, "do": do})
        for covered in {phase, "data"} if b.kind == "slow loader" else {phase}:
            told.setdefault(covered, f"see {what}")
    for phase, share in shares.items():
        gain = gain_without(phase, shares)
        if gain is not None and share >= LEAST:
            do = told.get(phase) or _for_phase(phase, config, plan, memory)
            rows.append({"phase": phase, "what": phase, "share": share, "gain": gain, "do": do})
    return sorted(rows, key=lambda r: -float(str(r["gain"])))


def _against(blame: Blame, config: Config, plan: Plan) -> str:
    n = plan.replicas
    match blame.kind:
        case "slow rank":
            without = f"; until then replicas={n - 1} without it is faster" if n > 2 and blame.gain > 1 / (n - 1) else ""  # fmt: skip
            return f"look for other processes, heat or a lower clock there{without}"
        case "slow loader":
            return _for_phase("data", config, plan, "")
        case "uneven load":
            return _for_phase("imbalance", config, plan, "")
        case "slow link":
            return f"look at that host's cable, port and driver; until then {_fewer_bytes(config, plan)}"


def _for_phase(phase: str, config: Config, plan: Plan, memory: str) -> str:
    n, batch = plan.mesh.data, plan.global_batch_size
    match phase:
        case "communication":
            return _fewer_bytes(config, plan)
        case "waiting":
            return (
                f"no rank is slow by itself: leave a core to the system (threads), or let chance "
                f"even out over more work: {_larger_batch(config, plan)}"
            )
        case "imbalance":
            fitting = -(-batch // (n * plan.micro_batch_size)) * n * plan.micro_batch_size
            if fitting != batch:
                return f"global_batch_size={fitting} gives every replica as many rows"
            return (
                "data.packing=concat fills every row; in a loop of your own, sort by length first"
            )
        case "data":
            return "put the cache on a local disk: XDG_CACHE_HOME=/local/path"
        case "generation":
            most = config.grpo.max_completion_length if config.grpo else 2
            return f"grpo.max_completion_length={most // 2} halves it at least, where answers may be cut"
        case "optimizer":
            holders = plan.mesh.holders
            if holders > 1 and config.sync == "exact" and config.determinism != "strict" and not plan.shard_optimizer:  # fmt: skip
                return f"shard_optimizer=true steps 1/{holders} on each replica"
            return f"{_larger_batch(config, plan)} halves it for a token"
        case "checkpoint":
            return f"save_steps={2 * plan.save_steps} halves it"
        case "evaluation":
            return f"eval_steps={2 * plan.eval_steps} halves it, eval_batches bounds it"
        case "recomputation":
            return f"gradient_checkpointing=false, where memory allows{memory and f' ({memory})'}"
        case _:
            return f"logging_steps={2 * config.logging_steps}, check_replicas_every={2 * config.check_replicas_every}"


def _fewer_bytes(config: Config, plan: Plan) -> str:
    can = config.sync == "exact" and config.determinism != "strict"
    if can and config.wire == "float32" and config.shard_optimizer is not False:
        return "wire=bfloat16 halves the bytes"
    if can and config.wire == "float32":
        return "shard_optimizer=auto wire=bfloat16 halves the bytes"
    return f"{_larger_batch(config, plan)} halves the bytes of a token"


def _larger_batch(config: Config, plan: Plan) -> str:
    return f"global_batch_size={2 * plan.global_batch_size}"
