"""What does not combine: a configuration whose parts are each fine and cannot run together here.

Contract: one line that names field, value and fix, raised alike on every rank before anything is loaded. What a
section can say of itself alone is refused where it is read (config.py).
"""

from unisono.config import AttentionConfig, Config
from unisono.errors import ConfigError
from unisono.mesh import Mesh
from unisono.plan import LOCAL


def refuse(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError."""
    _lora(config, mesh)
    _grpo(config, mesh)
    _pairs(config, mesh)


def _lora(config: Config, mesh: Mesh) -> None:
    """Where adapters cannot be trained as asked."""
    if config.lora is None:
        return
    if isinstance(config.model, dict):
        raise ConfigError(
            "lora: found with an architecture for model; adapters need trained weights beside them: "
            "name a model directory"
        ).on_every_rank()
    if config.sync == "sharded":
        raise ConfigError(
            "sync: found sharded with lora; adapters are small: write sync: exact, whose replicas hold "
            "the frozen weights whole"
        ).on_every_rank()
    if mesh.tensor > 1:
        raise ConfigError(
            f"mesh.tensor: found {mesh.tensor} with lora, whose adapters are not divided; write "
            f"mesh.tensor: 1"
        ).on_every_rank()


def _grpo(config: Config, mesh: Mesh) -> None:
    """Where completions cannot be drawn as asked."""
    if config.grpo is None:
        return
    for name in ("dpo", "reward"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name}: found with grpo; a run has one objective: leave one of them out"
            ).on_every_rank()
    if config.sync in LOCAL:
        raise ConfigError(
            f"sync: found {config.sync} with grpo; completions must be drawn from the weights that learn from "
            f"them, and all replicas' outer weights are others: write sync: exact"
        ).on_every_rank()
    apart = [a for a in ("shard", "context", "tensor") if getattr(mesh, a) > 1]
    if config.sync == "sharded" or apart:
        what = "sync: found sharded" if config.sync == "sharded" else f"mesh.{apart[0]}: found {getattr(mesh, apart[0])}"  # fmt: skip
        raise ConfigError(
            f"{what} with grpo; every replica generates with the whole model: write sync: exact and "
            f"replicas only (lora makes optimizer and gradients small)"
        ).on_every_rank()
    if isinstance(config.attention, AttentionConfig):
        raise ConfigError(
            "attention: found a mapping with grpo; completions are drawn with the model's own attention, and "
            "must be learned with the same: write attention: auto"
        ).on_every_rank()
    if config.data.packing != "auto":
        raise ConfigError(
            f"data.packing: found {config.data.packing} with grpo; prompts and completions are not packed: "
            f"leave it out"
        ).on_every_rank()


def _pairs(config: Config, mesh: Mesh) -> None:
    """Where preference pairs cannot be trained on as asked."""
    name = "dpo" if config.dpo is not None else "reward"
    for axis, size in (("context", mesh.context), ("tensor", mesh.tensor)):
        if config.wants_pairs and size > 1:
            raise ConfigError(
                f"mesh.{axis}: found {size} with {name}, whose answers are scored whole by each rank; "
                f"write mesh.{axis}: 1"
            ).on_every_rank()
