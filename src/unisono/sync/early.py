"""The first gradient, early: the output layer's own before that of its input.

The backward pass of a linear layer has two products, and autograd hands on neither before both are there.
In the layer that comes first in the backward pass the wire stands idle meanwhile, since nothing else
exists that could travel. Here the products are two nodes of the graph: the first makes the weight's
gradient, which autograd accumulates before it turns to any other node, and so it leaves during the second.
They are the same products, of the same operands: every bit is the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Parameter


class _Input(torch.autograd.Function):
    """x @ weight.T; its backward pass gives the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: list[Parameter]) -> torch.Tensor:
        # In a list it is no input: accumulation of its gradient does not wait for this node.
        ctx.weight, ctx.version = weight[0], weight[0]._version
        return F.linear(x, weight[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.weight._version != ctx.version:
            raise RuntimeError("a weight was changed between its use and the backward pass")
        return gradient @ ctx.weight, None


class _Weight(torch.autograd.Function):
    """The identity of x @ weight.T; its backward pass gives the gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any, product: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        return product.view_as(product)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        (x,) = ctx.saved_tensors
        own = gradient.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return gradient, None, own


def linear(x: torch.Tensor, weight: Parameter) -> torch.Tensor:
    """`F.linear(x, weight)` for x [..., k] and weight [m, k], of one dtype."""
    product: torch.Tensor = _Weight.apply(_Input.apply(x, [weight]), x, weight)
    return product
