"""The hook into Hugging Face transformers: a model's attention layers run ours, or it is said why not.

transformers calls a registered function in place of each layer's attention (AttentionInterface), and
another in place of making its mask (AttentionMaskInterface). Ours makes a description (mask.py), which
passes through the layers untouched. Traps that this file exists for, each of them silent otherwise:

- a model that does not use the interface only warns and goes on as before; a layer that is skipped or
  runs something else is not noticed. So every pass counts each layer's calls, and a difference raises.
- a mask that transformers made special (image tokens, prefixes) arrives as a closure. So the description
  is tried against that closure on pairs of positions, once for each kind of mask and length.
- arguments that a family adds (biases, dropout) would be ignored. So what is not known here raises.

`hook` therefore tries a model before it decides: a few tokens in two packed documents run through its own
attention and through ours, and the logits must agree. Where they do not because the model's own attention
forgets where documents end (many families never pass it on), they must agree on one document, and a token
that changes in the first of two documents must change nothing in the second. At last every token sees
only itself: what then still changes with another token went past attention (state-space layers,
convolutions), which no mask keeps apart. Cost: four to seven passes of 16 tokens, once.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from unisono.attention.context import Context
from unisono.attention.context import attention as attend_across
from unisono.attention.local import attend
from unisono.attention.mask import Documents, Mask
from unisono.attention.pair import wide
from unisono.attention.pattern import Pattern
from unisono.errors import ConfigError

Tensor = torch.Tensor

NAME = "unisono"
"""What transformers knows our attention by."""
TOKENS = (10, 6)
"""Of the two packed documents of a trial."""
CLOSE = 1e-4
"""Logits of a trial may differ by this much of their largest: float32, two layers to many."""
KNOWN = frozenset(
    ("position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values",
     "past_key_value", "return_dict", "num_items_in_batch", "logits_to_keep", "cu_seq_lens_q", "cu_seq_lens_k",
     "max_length_q", "max_length_k", "output_hidden_states", "output_router_logits", "sliding_window", "is_causal",
     "layer_idx", "is_training", "deterministic")
)  # fmt: skip
"""Arguments of a layer's attention that need nothing of us, or that its mask tells already."""
LENGTHS = 32
"""Of sequences, times kinds of masks, whose plans are kept: an evaluation has very many lengths."""
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


class NotHooked(ConfigError):
    """Why a model's attention cannot be ours, in words."""


@dataclass(frozen=True)
class Wish:
    """What the user asks of layers beyond what the model has: it only ever narrows what they see."""

    window: int | None = None
    """In layers whose own window is not smaller."""
    sinks: int = 0
    pattern: Pattern | None = None
    """In layers without a window or chunks of their own."""
    layers: tuple[int, ...] | None = None
    """Only these, counted from 0; None: all."""

    def __call__(self, mask: Mask, layer: int | None) -> Mask:
        if self.layers is not None and layer not in self.layers:
            return mask
        if self.pattern is not None and mask.window is None and mask.chunk is None:
            mask = replace(mask, pattern=self.pattern)
        if self.window is not None and (mask.window is None or mask.window > self.window):
            mask = replace(mask, window=self.window, sinks=self.sinks)
        return mask


class Pass:
    """One forward pass of a hooked model: its documents, and how often each layer has called.

    No dataclass: FSDP looks for tensors in those that a layer is given, and from here it would find
    the whole model, over and over.
    """

    def __init__(
        self, hook: "Hook", documents: Documents | None, context: Context | None = None
    ) -> None:
        self.hook, self.documents, self.context = hook, documents, context
        self.calls: Counter[nn.Module] = Counter()


class Described:
    """What stands in for a mask in transformers: the description, and which pass it is of.

    No dataclass: FSDP2 looks for gradients in what layers are given, dataclasses included, and would go
    from here through the whole model.
    """

    def __init__(
        self,
        mask: Mask,
        q_start: int,
        k_start: int,
        owner: Pass,
        by_layer: dict[bool, Mask] | None = None,
    ) -> None:
        self.mask, self.q_start, self.k_start, self.owner = mask, q_start, k_start, owner
        self.by_layer = {} if by_layer is None else by_layer

    def again(self, owner: Pass) -> "Described":
        """The same, with its plans, in another pass."""
        return Described(self.mask, self.q_start, self.k_start, owner, self.by_layer)

    def of(self, layer: int | None) -> Mask:
        """The mask of a layer; those that are alike share one, and its plan."""
        wish = self.owner.hook.wish
        key = True if wish.layers is None else layer in wish.layers
        if key not in self.by_layer:
            self.by_layer[key] = wish(self.mask, layer)
        return self.by_layer[key]


@dataclass
class Hook:
    """Our attention in one model."""

    model: nn.Module
    wish: Wish
    native: Any
    """The model's own implementation's name."""
    expected: Counter[nn.Module] = field(default_factory=Counter)
    """How often each attention layer calls in a pass; empty while that is being found out."""
    static: dict[Any, Described] = field(default_factory=dict)
    """Descriptions without documents, kept over passes with their plans."""
    checked: set[Any] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)
    context: Context | None = None
    """Where sequences lie over several ranks: set before a pass, with the documents of its batch. The
    pass then gets this rank's tokens (shard.py)."""
    native_leaks: bool = False
    """The model's own attention lets packed documents see one another."""
    mixes: bool = False
    """Other layers than attention carry numbers from token to token."""

    @property
    def num_layers(self) -> int:
        return len(self.expected)

    def remove(self) -> None:
        """Give the model its own attention back."""
        for handle in self.handles:
            handle.remove()
        self.model.set_attn_implementation(self.native)  # type: ignore[operator]


_pass: ContextVar[Pass | None] = ContextVar("_pass", default=None)
"""The forward pass that runs: transformers does not tell a mask function whose mask it makes."""


def hook(model: Any, wish: Wish | None = None) -> Hook:
    """Let `model`, a PreTrainedModel, run our attention. Raises NotHooked, which says why not.

    To be trained it is float32, and the trial tells the smallest difference; in half precision its own
    rounding of the logits is what may differ.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    for name in DROPOUTS:
        rate = getattr(_text_config(model), name, 0.0)
        if isinstance(rate, float) and rate > 0:
            raise NotHooked(f"{name} is {rate:g}, and ours has no dropout; set model.{name}: 0")
    native = model.config._attn_implementation
    close = max(CLOSE, 8 * torch.finfo(model.dtype).eps)
    logits, layers = _trial(model, TOKENS, watch=True)
    hooked = Hook(model, Wish(), native)
    hooked.handles = [
        model.register_forward_pre_hook(lambda m, a, kw: _begin(hooked, kw), with_kwargs=True),
        model.register_forward_hook(lambda m, a, out: _end(hooked)),
    ]
    try:
        with _quiet():
            model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise NotHooked("its code does not go through transformers' attention interface")
        found, _ = _trial(model, TOKENS)
        _all_called(hooked, layers)
        if (worst := _differ(found, logits)) > close:
            one = (sum(TOKENS),)
            alone, _ = _trial(model, one)
            model.set_attn_implementation(native)
            if _differ(alone, _trial(model, one)[0]) > close:
                raise NotHooked(
                    f"its logits differ from its own attention's by {worst:.1e} of the largest"
                )
            model.set_attn_implementation(NAME)
            changed, _ = _trial(model, TOKENS, change=True)
            # Not to the bit: a router that sends a token elsewhere changes the shapes of products.
            if _differ(changed[:, TOKENS[0] :], found[:, TOKENS[0] :]) > close / 10:
                raise NotHooked("packed documents see one another past the attention layers")
            hooked.native_leaks = True
        hooked.mixes = _mixes(hooked) > close / 10
    except NotHooked:
        hooked.remove()
        raise
    except Exception as error:  # whatever a family does with a mask that is no tensor
        hooked.remove()
        raise NotHooked(f"it does not take our mask: {_line(error)}") from error
    hooked.expected, hooked.wish = layers, wish or Wish()
    hooked.static.clear()
    return hooked


def _differ(found: Tensor, wanted: Tensor) -> float:
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    return difference if difference == difference else float("inf")


def _mixes(hooked: Hook) -> float:
    """How much a token's logits depend on another token if attention lets it see only itself."""
    hooked.wish = Wish(window=1)
    hooked.static.clear()
    one = (sum(TOKENS),)
    some, other = (_trial(hooked.model, one, change=change)[0] for change in (False, True))
    rest = torch.arange(one[0]) != one[0] // 2
    return _differ(other[:, rest], some[:, rest])


def _all_called(hooked: Hook, layers: Counter[nn.Module]) -> None:
    calls = _pass_of(hooked)
    if calls != layers:
        names = {m: n for n, m in hooked.model.named_modules()}
        lost = sorted(names[m] for m in layers if calls[m] != layers[m])
        raise NotHooked(
            f"{len(lost)} of {len(layers)} attention layers did not call ours, first {lost[0]}"
        )


# --- the trial


def _trial(
    model: Any, documents: tuple[int, ...], watch: bool = False, change: bool = False
) -> tuple[Tensor, Counter[nn.Module]]:
    """(logits, calls of each attention layer if watched) of packed documents, in training mode.

    Random numbers are those of one seed, and the generator is left as it was. `change`: with another
    token in the middle of the first document.
    """
    size = model.get_input_embeddings().num_embeddings
    length = sum(documents)
    calls: Counter[nn.Module] = Counter()
    handles = []
    own: dict[nn.Module, str] = {}
    if watch:
        for name, module in model.named_modules():
            if _uses_interface(module):
                handles.append(module.register_forward_pre_hook(lambda m, a: calls.update([m])))
            elif _looks_like_attention(module):
                handles.append(
                    module.register_forward_pre_hook(lambda m, a, name=name: own.update({m: name}))
                )
    training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ids = torch.randint(0, size, (1, length)).to(model.device)
            if change:
                ids[0, documents[0] // 2] = (ids[0, documents[0] // 2] + 1) % size
            positions = torch.cat([torch.arange(n) for n in documents])[None].to(model.device)
            logits = model.train()(input_ids=ids, position_ids=positions, use_cache=False).logits
    except NotHooked:
        raise
    except Exception as error:
        if watch:
            raise NotHooked(f"it cannot be tried: {_line(error)}") from error
        raise
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if watch and own:
        first = next(iter(own))
        raise NotHooked(
            f"{type(first).__name__} ({own[first]}) does not go through transformers' attention interface"
        )
    if watch and not calls:
        raise NotHooked("it has no attention that goes through transformers' interface")
    return logits.double(), calls


def _uses_interface(module: nn.Module) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


def _looks_like_attention(module: nn.Module) -> bool:
    """By its name, and no part of it is hooked: an attention that would run past us."""
    return "Attention" in type(module).__name__ and not any(map(_uses_interface, module.modules()))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of what is raised here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


# --- a pass


def _begin(hooked: Hook, kwargs: dict[str, Any]) -> None:
    positions = kwargs.get("position_ids")
    documents = None
    if positions is not None and positions.dim() == 2 and positions.shape[1] > 1:
        documents = Documents.of_positions(positions)
    _pass.set(Pass(hooked, documents, context=hooked.context))


def _end(hooked: Hook) -> None:
    calls = _pass_of(hooked)
    if hooked.expected and calls != hooked.expected:
        names = {m: n for n, m in hooked.model.named_modules()}
        wrong = [m for m in hooked.expected if calls[m] != hooked.expected[m]]
        first = names.get(wrong[0] if wrong else next(iter(calls)), "?")
        raise ConfigError(
            f"attention: {sum(calls.values())} calls in this pass, {sum(hooked.expected.values())} "
            f"when the model was tried; first {first}; write attention: native"
        )


def _pass_of(hooked: Hook) -> Counter[nn.Module]:
    current = _pass.get()
    return Counter() if current is None or current.hook is not hooked else current.calls


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **_: Any,
) -> Described | None:
    """transformers' mask function: the description of a kind of mask, of one forward pass."""
    if local_size is not None and local_size < 1:
        return None  # Qwen2 MoE's windows of 0, which no layer has; one that had would be refused
    current = _pass.get()
    if current is None:
        raise NotHooked("a mask was asked for outside of a forward pass of the hooked model")
    q_start, k_start = int(q_offset), int(kv_offset)
    whole = not q_start and not k_start and kv_length == q_length  # else a step of generation
    documents = current.documents if whole else None
    if attention_mask is not None and (padding := _padding(attention_mask)) is not None:
        documents = padding if documents is None else documents.cut(padding)
    own = documents
    if current.context is not None:
        # transformers' rule is tried on this rank's tokens by themselves.
        if attention_mask is not None:
            raise NotHooked("attention_mask over several ranks; pack documents by position_ids")
        documents = current.context.documents
    key = (local_size, q_length, kv_length, q_start, k_start)
    if documents is None and key in current.hook.static:
        return current.hook.static[key].again(current)
    span = (batch_size, q_start, q_start + q_length, k_start, k_start + kv_length)
    for mask in _candidates(local_size, config):
        kind = (*key, mask.window, mask.chunk, own is None)
        # On one of several ranks, transformers counts chunks from the wrong token.
        if kind in current.hook.checked or (mask.chunk and current.context is not None):
            break
        if _agrees(replace(mask, documents=own), mask_function, span):
            current.hook.checked.add(kind)
            break
    else:
        raise NotHooked("its mask is not causal, a window or chunks within documents")
    found = Described(replace(mask, documents=documents), q_start, k_start, current)
    if documents is None and q_start == 0:
        static = current.hook.static
        static[key] = found
        if len(static) > LENGTHS:
            del static[next(iter(static))]
    return found


def _candidates(local_size: int | None, config: Any) -> Iterator[Mask]:
    if local_size is None:
        yield Mask()
        return
    if getattr(config, "attention_chunk_size", None) == local_size:
        yield Mask(chunk=local_size)
    yield Mask(window=local_size)


def _agrees(mask: Mask, function: Callable[..., Tensor], span: tuple[int, ...]) -> bool:
    """The description and transformers' rule say the same of pairs at random and of pairs near edges.

    Only within documents: where it was given a padding mask or a cache, transformers forgets them.
    """
    rows, q0, q1, k0, k1 = span
    generator = torch.Generator().manual_seed(0)

    def some(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    i = some(q0, q1, 2048)
    reach = mask.window or mask.chunk or 0
    edges = torch.tensor((-1, 0, 1, reach - 1, reach, reach + 1))[some(0, 6, 1024)]
    j = torch.cat((some(k0, k1, 1024), (i[1024:] - edges).clamp(k0, k1 - 1)))
    row = some(0, rows, 2048)
    theirs = torch.as_tensor(function(row, torch.zeros_like(row), i, j)).expand(len(i)).cpu()
    within = Mask(causal=False, documents=mask.documents).sees(row, i, j)
    return torch.equal(mask.sees(row, i, j)[within], theirs[within])


def _padding(attention_mask: Tensor) -> Documents | None:
    """Padding as documents of its own, which no token sees; the tokens of a row must be one run."""
    inside = attention_mask.bool()
    runs = inside[:, 0] + (inside.int().diff(dim=1) == 1).sum(1)
    if runs.max() > 1:
        raise NotHooked("attention_mask has padding between tokens; pack documents by position_ids")
    return Documents.of_ids(inside)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, S, D] in, [B, S, H, Dv] out."""
    name = type(module).__name__
    if not isinstance(attention_mask, Described):
        raise NotHooked(f"{name} was given no mask of ours")
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in KNOWN)  # fmt: skip
    if unknown:
        raise NotHooked(f"{name} passes {', '.join(unknown)}, which ours does not know")
    if dropout:
        raise NotHooked(f"{name} asks for dropout {dropout:g}, and ours has none; set it to 0")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotHooked(f"{name} is not causal")
    attention_mask.owner.calls[module] += 1
    device = query.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    mask = attention_mask.of(getattr(module, "layer_idx", None))
    context = attention_mask.owner.context
    scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.to(wide(query))
    if context is None:
        out = attend(
            query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks,
            q_start=attention_mask.q_start, k_start=attention_mask.k_start,
        )  # fmt: skip
    else:
        out = attend_across(
            query, key, value, mask, context, scale=scale, softcap=softcap, sinks=sinks
        )
    return out.transpose(1, 2).contiguous(), None


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
