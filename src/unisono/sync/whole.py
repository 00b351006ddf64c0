"""What strategies share that leave whole gradients on every rank: reference, ddp, exact.

Every replica computes the same update from the same bits, so nothing is communicated after `finish`
and every rank holds everything.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from unisono.mesh import Mesh
from unisono.sync.ledger import Ledger
from unisono.sync.slices import Slices
from unisono.sync.update import (
    MASTER,
    OptimizerFactory,
    Update,
    by_dimension,
    clip_factor,
    is_finite,
    step,
    without_own,
)


class Whole:
    """The half of a strategy that is its optimizer, on all parameters."""

    can_give_up = True

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        optimizer: OptimizerFactory | None,
        mesh: Mesh | None = None,
        slices: Slices | None = None,
    ) -> None:
        """Without an `optimizer` there is no `update`: a loop of one's own has its own."""
        self.lockstep = mesh is not None and mesh.inner > 1
        self.slices = slices or Slices()
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
        """Collective: divide the gradient sums, clip their global norm, step the optimizer, drop gradients."""
        assert self._optimizer is not None
        named = [(n, p.grad) for n, p in self.named if p.grad is not None]
        grads = [g for _, g in named]
        norm = self.slices.norm(named) / divide_by
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
        """Collective: weights and optimizer state."""
        yield from self.slices.alike([*self.named, *self._states()])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Collective: the model's whole state dict; of slices, on rank 0."""
        return self.slices.state_dict(self.model.state_dict())

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: (state.parameter, whole tensor) of the optimizer's state, in a fixed order."""
        for key, value in self._states():
            yield key, self.slices.whole(key, value)

    def _states(self) -> Iterator[tuple[str, torch.Tensor]]:
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
        for key, whole in tensors.items():
            state, _, name = key.partition(".")
            p, value = by_name[name], self.slices.part(key, whole)
            if state == MASTER:
                p.copy_(value)
            else:
                # torch keeps the step count of a fused optimizer on the parameter's device.
                self._optimizer.state[p][state] = value.to(p.device, copy=True)

    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """All state is every replica's."""
        return without_own(tensors)

    def layout(self) -> dict[str, Any]:
        """Nothing is learned that a resume would need."""
        return {}
