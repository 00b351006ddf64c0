"""Which weights does the forward pass use, and when? Asked of torch itself, function by function.

`Watch` sees every torch function while it is entered and tells its owner before a parameter is used,
whoever uses it: a module its own, a parent its child's (nn.MultiheadAttention does), or user code.
Module hooks would miss the last two. What runs outside of Python (TorchScript, C++ extensions) does
not show; sync/zero.py finds it in the first step. Cost: 1 to 3 us for each torch function called from Python.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

ABOUT = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "grad")
)
"""Attributes that tell about a weight without reading it. Models ask an embedding for its type before
they look anything up (Gemma 3 does), and that is no use of it."""


class Owner(Protocol):
    """Who wants to know."""

    def on_use(self, tensor: torch.Tensor) -> None:
        """Before a torch function reads `tensor`, which may be a parameter."""

    def on_lookup(
        self, ids: torch.Tensor, weight: Parameter, padding_idx: int | None
    ) -> torch.Tensor | None:
        """Before an embedding lookup; a result replaces it."""


class Watch(TorchFunctionMode):
    """Tells `owner` of each use of a parameter; see above."""

    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ABOUT:
            return func(*args)
        if func is F.embedding:
            found = _plain_lookup(*args, **kwargs)
            if found is not None:
                result = self._owner.on_lookup(*found)
                if result is not None:
                    return result
        self._each(args)
        if kwargs:
            self._each(kwargs.values())
        return func(*args, **kwargs)

    def _each(self, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):  # a class of one's own may be a parameter too
                self._owner.on_use(value)
            elif isinstance(value, tuple | list):
                self._each(value)


def _plain_lookup(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[torch.Tensor, Parameter, int | None] | None:
    """The arguments of F.embedding, where it does nothing but look up."""
    if max_norm is not None or scale_grad_by_freq or sparse or type(weight) is not Parameter:
        return None
    return input, weight, padding_idx
