"""Tensor parallelism: each rank holds a slice of every large matrix and computes with it on the same tokens.

Which matrix is divided how is told by the model's own plan, which transformers has for its families
(`base_model_tp_plan`); the slices are plain parameters and the collectives ours, so that every strategy
takes them as the model they are, and the ledger sees what travels. Per block, as in Megatron-LM (Shoeybi et
al. 2019, arXiv 1909.08053), with x and y the same on all T ranks and A, B the first and second matrix:

    y = sum over ranks of f(x A_r) B_r        A_r: columns (colwise), B_r: rows (rowwise)

The sum is an all-reduce of y in the forward pass (`_Leave`) and, of the gradient of x, one in the backward
pass (`_Enter`; matrices with the same input share it). With recomputation the forward one comes twice. The
output layer computes the logits of V/T words, which are gathered (`_Gather`); the embedding looks up the
words that it has, and a sum completes them. Where T does not divide the vocabulary both stay whole.

What is not divided (norms) sees the same numbers on every rank and gets the same gradient there. A norm of
the heads that a rank has sees only those: its gradient is summed (`replicated_with_grad_allreduce`).

Every rank must run the same modules in the same order, forward and backward.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from unisono.errors import ConfigError
from unisono.mesh import Divided
from unisono.sync.ledger import Group
from unisono.sync.slices import Cut, Slices

VOCABULARY = ("embedding_rowwise", "colwise_gather_output")
_ENTER, _LEAVE = ("colwise", "colwise_gather_output"), ("rowwise", "rowwise_split_input")


@dataclass(frozen=True)
class Division:
    """How a model is divided over `ranks`: styles by module, cuts by parameter, and what that costs."""

    ranks: int
    styles: Mapping[str, str]
    cuts: Mapping[str, Cut]
    """By every name of a parameter, tied ones included."""
    divided: Divided
    note: str = ""
    """What stays whole against the plan, and why."""


def divide(model: Any, ranks: int) -> Division:
    """What `apply` will do, from transformers' plan for `model`. Changes nothing.

    Raises ConfigError: no plan, a style that is not known here, sizes that `ranks` does not divide,
    dropout.
    """
    name = type(model).__name__
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    modules = dict(model.named_modules())
    params = dict(model.named_parameters(remove_duplicate=False))
    styles: dict[str, str] = {}
    for known in [*modules, *params]:
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", known))
        if style is not None:
            styles[known] = style
    if not any(s in (*_ENTER, "packed_colwise") and "layers" in n for n, s in styles.items()):
        raise _refusal(ranks, f"transformers has no plan of how to divide the layers of {name}")
    _check_heads(model.config.get_text_config(), styles, ranks)
    refuse_dropout(model, "tensor", ranks)

    cuts: dict[str, Cut] = {}
    for known, style in styles.items():
        if style not in _STYLES and style not in ("packed_colwise", "packed_rowwise"):
            raise _refusal(
                ranks, f"the plan of {name} divides {known} as {style!r}, not known here"
            )
        if known in params:
            cuts[known] = _cut_of(params[known], style, "weight")
        elif style in (*_ENTER, *_LEAVE, "embedding_rowwise"):
            if style != "embedding_rowwise" and not isinstance(modules[known], nn.Linear):
                raise _refusal(
                    ranks, f"{known} of {name} is no linear layer, which {style!r} needs"
                )
            for own, p in modules[known].named_parameters(recurse=False):
                if not (own == "bias" and style in _LEAVE):
                    cuts[f"{known}.{own}"] = _cut_of(p, style, own)
    note = _leave_whole(model, params, styles, cuts, ranks)
    for known, cut in cuts.items():
        size = params[known].shape[cut.dim]
        if size % (ranks * cut.packs):
            raise _refusal(ranks, f"{known} of {name} has {size // cut.packs} to divide")
    return Division(ranks, styles, cuts, _costs(model, params, styles, cuts), note)


def apply(model: nn.Module, division: Division, group: Group) -> Slices:
    """Collective: divide `model` in place, along `group`. Its parameters are slices afterwards."""
    params = dict(model.named_parameters(remove_duplicate=False))
    new: dict[int, nn.Parameter] = {}
    for name, cut in division.cuts.items():
        old = params[name]
        if id(old) not in new:
            with torch.no_grad():
                mine = cut.part(old.detach(), group.rank, group.size)
            new[id(old)] = nn.Parameter(mine, requires_grad=old.requires_grad)
        path, _, own = name.rpartition(".")
        model.get_submodule(path)._parameters[own] = new[id(old)]
    modules = dict(model.named_modules())
    entrances: dict[str, _Entrance] = {}
    for name, style in division.styles.items():
        if name not in modules:
            continue
        block = entrances.setdefault(name.rpartition(".")[0], _Entrance(group))
        block.is_left |= style in _LEAVE
        modules[name].forward = _STYLES[style](modules[name], modules[name].forward, block)
    return Slices(group, division.cuts)


def _refusal(ranks: int, why: str) -> ConfigError:
    return ConfigError(
        f"mesh.tensor: found {ranks}, but {why}; write mesh.tensor: 1, and sync: sharded with "
        f"mesh.shard for a model that does not fit"
    ).on_every_rank()


def _check_heads(config: Any, styles: Mapping[str, str], ranks: int) -> None:
    """Slices of the projections must be whole heads, each key-value head with its queries."""
    keys = ("k_proj", "qkv_proj", "query_key_value")
    if not any(n.rpartition(".")[2] in keys and s == "colwise" for n, s in styles.items()):
        return
    heads = getattr(config, "num_attention_heads", None)
    for field in ("num_key_value_heads", "num_attention_heads"):
        count = getattr(config, field, None) or heads
        if count and count % ranks:
            raise ConfigError(
                f"mesh.tensor: found {ranks}, but the model has {field} {count}; write a divisor of {count}"
            ).on_every_rank()


def refuse_dropout(model: nn.Module, axis: str, ranks: int) -> None:
    """ConfigError for dropout where ranks share samples: with one seed they would drop the same places of
    different numbers, with several different places of the same ones.
    """
    config: Any = model.config
    rate = max(
        [float(getattr(config.get_text_config(), "attention_dropout", 0.0) or 0.0)]
        + [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    )
    if rate:
        raise ConfigError(
            f"mesh.{axis}: found {ranks}, but the model has a dropout of {rate:g}, whose masks would "
            f"depend on the mesh; set the model's dropout fields to 0, or write mesh.{axis}: 1"
        ).on_every_rank()


def _cut_of(p: torch.Tensor, style: str, own: str) -> Cut:
    packs = 2 if style.startswith("packed") else 1
    if "rowwise" in style and style != "embedding_rowwise":
        return Cut(-1 if own != "bias" else 0, packs)
    return Cut(0 if style == "embedding_rowwise" else max(p.dim() - 2, 0), packs)


def _leave_whole(
    model: nn.Module,
    params: Mapping[str, torch.Tensor],
    styles: dict[str, str],
    cuts: dict[str, Cut],
    ranks: int,
) -> str:
    """Take out of the plan what cannot be divided without loss: words, and what is tied to a whole one."""
    names: dict[int, list[str]] = {}
    for name, p in params.items():
        names.setdefault(id(p), []).append(name)
    notes = []
    for aliases in names.values():
        cut = [n for n in aliases if n in cuts]
        if not cut:
            continue
        style = styles.get(cut[0].rpartition(".")[0], "")
        odd = style in VOCABULARY and params[cut[0]].shape[0] % ranks != 0
        if odd or len(cut) < len(aliases):
            why = (
                f"{params[cut[0]].shape[0]} words" if odd else "tied to what the plan leaves whole"
            )
            notes.append(f"{cut[0]} stays whole ({why})")
            for name in aliases:
                cuts.pop(name, None)
                module = name.rpartition(".")[0]
                styles.pop(module, None)
                cuts.pop(f"{module}.bias", None)
    return "; ".join(notes)


def _costs(
    model: Any, params: Mapping[str, torch.Tensor], styles: Mapping[str, str], cuts: Mapping[str, Cut]
) -> Divided:  # fmt: skip
    """In numbers."""
    modules = dict(model.named_modules())
    trained = {id(params[n]): params[n] for n in cuts if params[n].requires_grad}
    sent = again = calls = shared = 0
    entered: set[str] = set()
    for name, style in styles.items():
        module: Any = modules.get(name)
        if module is None:
            continue
        block = name.rpartition(".")[0]
        forward = backward = 0
        if style in _ENTER and block not in entered:
            entered.add(block)
            backward = 2 * module.in_features
        if style == "colwise_gather_output":
            forward = module.out_features
        if style in _LEAVE:
            forward = 2 * module.out_features
            backward = module.in_features if style == "rowwise_split_input" else 0
        if style == "embedding_rowwise":
            forward = 2 * module.embedding_dim
        if style == "replicated_with_grad_allreduce":
            shared += sum(p.numel() for p in module.parameters(recurse=False))
            calls += 1
        if style == "moe_tp_experts":
            config = model.config.get_text_config()
            forward = 2 * config.hidden_size
            backward = 2 * (config.hidden_size + getattr(config, "num_experts_per_tok", 0))
        sent += forward + backward
        calls += bool(forward) + bool(backward)
        again += forward if ".layers." in f".{name}." else 0
    return Divided(sum(p.numel() for p in trained.values()), sent, again, calls, shared)


# --- what crosses between ranks


class _Enter(torch.autograd.Function):
    """The same numbers on every rank; each uses them for its part, so gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(total).wait()
        return total, None


class _Leave(torch.autograd.Function):
    """The sum of what the ranks have; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        group.all_reduce(total).wait()
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _own(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x.chunk(group.size, dim=-1)[group.rank].contiguous()


def _beside(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The last dimensions of all ranks, in order."""
    every = x.new_empty(group.size, *x.shape)
    group.all_gather(every, x.contiguous()).wait()
    return every.movedim(0, -2).flatten(-2)


class _Gather(torch.autograd.Function):
    """What the ranks have, beside one another in the last dimension; then the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _beside(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    """This rank's part of the last dimension of what is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _own(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _beside(gradient, ctx.group), None


class _Entrance:
    """Siblings that are given the same tensor, such as the projections of attention, sum its gradient once."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.is_left = False
        """Something in the block ends what its siblings begin."""
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        entered: torch.Tensor = _Enter.apply(x, self.group)
        if self.is_left:  # else nothing would end the keeping
            self._last = x, entered
        return entered

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        self._last = None
        total: torch.Tensor = _Leave.apply(x, self.group)
        return total


# --- styles: (module, its own forward, what its block shares) -> its forward

Forward = Callable[..., Any]


def _colwise(module: Any, inner: Forward, block: _Entrance) -> Forward:
    return lambda x: inner(block(x))


def _colwise_gather(module: Any, inner: Forward, block: _Entrance) -> Forward:
    return lambda x: _Gather.apply(inner(block(x)), block.group)


def _rowwise(module: Any, inner: Forward, block: _Entrance, split: bool = False) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        mine = _Scatter.apply(x, block.group) if split else x
        total = block.leave(nn.functional.linear(mine, module.weight))
        return total if module.bias is None else total + module.bias.to(total.dtype)

    return forward


def _embedding(module: Any, inner: Forward, block: _Entrance) -> Forward:
    rows = module.weight.shape[0]
    first = rows * block.group.rank
    padding = module.padding_idx
    if padding is not None:
        here = first <= padding % module.num_embeddings < first + rows
        module.padding_idx = padding % module.num_embeddings - first if here else None

    def forward(ids: torch.Tensor) -> torch.Tensor:
        here = (ids >= first) & (ids < first + rows)
        found = inner(torch.where(here, ids - first, 0))
        return block.leave(found * here.unsqueeze(-1).to(found.dtype))

    return forward


def _summed_gradient(module: Any, inner: Forward, block: _Entrance) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        own = dict(module._parameters)
        for name, p in own.items():
            if p is not None:
                module._parameters[name] = _Enter.apply(p.view_as(p), block.group)
        try:
            return inner(*args, **kwargs)
        finally:
            module._parameters.update(own)

    return forward


def _experts(module: Any, inner: Forward, block: _Entrance) -> Forward:
    def forward(
        hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, *rest: Any
    ) -> Any:
        weights = _Enter.apply(weights, block.group)
        return block.leave(inner(block(hidden), chosen, weights, *rest))

    return forward


_STYLES: dict[str, Callable[[Any, Forward, _Entrance], Forward]] = {
    "colwise": _colwise,
    "colwise_gather_output": _colwise_gather,
    "rowwise": _rowwise,
    "rowwise_split_input": partial(_rowwise, split=True),
    "embedding_rowwise": _embedding,
    "replicated_with_grad_allreduce": _summed_gradient,
    "replicate": lambda module, inner, block: inner,
    "moe_tp_experts": _experts,
}
