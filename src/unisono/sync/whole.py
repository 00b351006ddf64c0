"""What strategies share that leave whole gradients on every rank: reference, ddp, exact.

Every replica computes the same update from the same bits, so nothing is communicated after `finish`
and every rank holds everything.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from unisono.sync.ledger import Ledger
from unisono.sync.update import (
    MASTER,
    OptimizerFactory,
    Update,
    by_dimension,
    clip_factor,
    global_norm,
    is_finite,
    step,
)


class Whole:
    """The half of a strategy that is its optimizer, on all parameters."""

    lockstep = False
    can_give_up = True

    def __init__(
        self, model: nn.Module, ledger: Ledger, optimizer: OptimizerFactory | None
    ) -> None:
        """Without an `optimizer` there is no `update`: a loop of one's own has its own."""
        self.model = model
        self.ledger = ledger
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.params = [p for _, p in self.named]
        self._optimizer = optimizer(*by_dimension(self.params)) if optimizer else None

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """Those that are trained, each once, in the model's order."""
        return self.named

    @torch.no_grad()
    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Divide the gradient sums, clip their global norm, step the optimizer, drop gradients."""
        assert self._optimizer is not None
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = global_norm(grads) / divide_by
        committed = is_finite(norm)
        if committed:
            torch._foreach_mul_(grads, clip_factor(norm, divide_by, max_norm))
            step(self._optimizer, learning_rate)
        for p in self.params:
            p.grad = None
        return Update(norm, committed)

    def settle(self) -> None:
        """Nothing is under way between steps."""

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradients that this rank has accumulated itself, before `finish`."""
        for name, p in self.named:
            if p.grad is not None:
                yield name, p.grad

    def blame(self) -> tuple[int, str] | None:
        """(rank, parameter) of a non-finite contribution, where the strategy still knows it."""
        return None

    def discard(self) -> None:
        """Forget the gradients of this step without communicating. Every rank must agree on it."""
        for p in self.params:
            p.grad = None

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights and optimizer state."""
        yield from self.named
        yield from self.optimizer_state()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The model's whole state dict."""
        return dict(self.model.state_dict())

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(state.parameter, tensor) of every tensor of the optimizer's state, in a fixed order."""
        for name, p in self.named if self._optimizer else ():
            assert self._optimizer is not None
            for key, value in sorted(self._optimizer.state.get(p, {}).items()):
                if isinstance(value, torch.Tensor):
                    yield f"{key}.{name}", value

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a saved state back. Keys and shapes must be this model's."""
        assert self._optimizer is not None
        by_name = dict(self.named)
        for key, value in tensors.items():
            state, _, name = key.partition(".")
            p = by_name[name]
            if state == MASTER:
                p.copy_(value)
            else:
                # torch keeps the step count of a fused optimizer on the parameter's device.
                self._optimizer.state[p][state] = value.to(p.device, copy=True)

    def layout(self) -> dict[str, Any]:
        """Nothing is learned that a resume would need."""
        return {}
