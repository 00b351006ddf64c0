"""What gradient checkpointing costs: layers that run forward again inside the backward pass.

Exact where the processor computes. A GPU is only handed its work there; for it the receipt takes the
share of the operations instead (observe/receipt.py).
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from unisono.clock import Clock


def time_recomputation(model: nn.Module, clock: Clock) -> ExitStack:
    """Charge it to the phase `recomputation` from now on; closing what is returned ends that."""
    hooks = ExitStack()
    entered: list[Any] = []

    def before(*_: object) -> None:
        # -1 outside of a backward pass.
        inside = torch._C._current_graph_task_id() != -1
        entered.append(clock("recomputation") if inside else None)
        if inside:
            entered[-1].__enter__()

    def after(*_: object) -> None:
        phase = entered.pop()
        if phase is not None:
            phase.__exit__(None, None, None)

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True and is_layer(module):
            hooks.callback(module.register_forward_pre_hook(before).remove)
            # Always: the second forward pass is left by an exception once nothing more is needed.
            hooks.callback(module.register_forward_hook(after, always_call=True).remove)
    return hooks


def is_layer(module: nn.Module) -> bool:
    """What transformers checkpoints: a layer, not the model that holds the layers."""
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)
