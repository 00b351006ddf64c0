"""Which weights does the forward pass use, and when? Asked of torch itself, function by function.

`Watch` sees every torch function while it is entered and tells its owner before a parameter is used,
whoever uses it: a module its own, a parent its child's (nn.MultiheadAttention does), or user code.
Module hooks would miss the last two. What runs outside of Python (TorchScript, C++ extensions) does
not show; sync/zero.py finds it in the first step. Cost: 1 to 3 us for each torch function called from Python.

What torch.compile has taken is not watched inside: a graph would break at every weight. A compiled module
uses all of its weights when it is called; those of a compiled function are as unseen as TorchScript's.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling
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

    def on_linear(self, x: torch.Tensor, weight: Parameter) -> torch.Tensor | None:
        """Before x @ weight.T, and after `on_use(weight)`; a result replaces it."""


class Watch(TorchFunctionMode):
    """Tells `owner` of each use of a parameter; see above."""

    def __init__(self, owner: Owner, model: nn.Module) -> None:
        """Modules of `model` that torch.compile has taken tell too, until `close`."""
        super().__init__()
        self._owner, self._entered = owner, False
        self._calls = list(_compiled(model))
        for module, name, call in self._calls:
            module.__dict__[name] = self._telling(call, list(module.parameters()))

    def _telling(self, call: Callable[..., Any], weights: list[Parameter]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not is_compiling() and self._entered:  # else it is part of a larger one
                self._each(weights)
            return call(*args, **kwargs)

        return run

    def close(self) -> None:
        """Compiled modules are as they were."""
        for module, name, call in self._calls:
            module.__dict__[name] = call

    def __enter__(self) -> "Watch":
        self._entered = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered = False
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_compiling():
            return func(*args, **kwargs)
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
        if func is F.linear and not kwargs and len(args) in (2, 3) and args[2:] in ((), (None,)):
            x, weight = args[:2]
            if type(weight) is Parameter and type(x) is torch.Tensor:
                result = self._owner.on_linear(x, weight)
                if result is not None:
                    return result
        return func(*args, **kwargs)

    def _each(self, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):  # a class of one's own may be a parameter too
                self._owner.on_use(value)
            elif isinstance(value, tuple | list):
                self._each(value)


def _compiled(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """Modules of torch.compile(module) and of module.compile(), and under which name their call is."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # seconds to import, and not needed before
    for module in model.modules():
        wraps = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        name = "forward" if wraps else "_compiled_call_impl"
        call = module.__dict__.get(name)
        if call is not None:
            yield module, name, call


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
