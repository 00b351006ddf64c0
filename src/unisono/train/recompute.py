"""What gradient checkpointing costs: layers that run forward again inside the backward pass.

Exact where the processor computes. A GPU is only handed its work there; for it the receipt takes the
share of the operations instead (observe/receipt.py).
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from unisono.clock import Clock

CHECKPOINT = "_gradient_checkpointing_func"
"""What transformers' layers call with their forward pass."""


def time_recomputation(model: nn.Module, clock: Clock) -> ExitStack:
    """Charge it to the phase `recomputation` from now on; closing what is returned ends that."""
    restored = ExitStack()
    for module in model.modules():
        checkpoint = getattr(module, CHECKPOINT, None)
        if checkpoint is not None:
            setattr(module, CHECKPOINT, partial(_checkpoint, clock, checkpoint))
            restored.callback(setattr, module, CHECKPOINT, checkpoint)
    return restored


def _checkpoint(
    clock: Clock, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    def timed(*args: Any, **kw: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            return forward(*args, **kw)
        with clock("recomputation"):
            return forward(*args, **kw)

    return checkpoint(timed, *args, **kw)
