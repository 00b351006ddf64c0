"""Local steps, and outer weights that replicas agree on every H of them: DiLoCo, streaming and sparse.

Contract: each replica takes its own steps, with its own optimizer state, on weights of its own. The outer
weights and their momentum are the same bits on every replica after every synchronization. They are what is
evaluated, saved and compared (`settle` shows them; the next forward pass sees the replica's own again).
sync/outer.py has the mathematics, sync/encoded.py the wire. Of one fragment:

    step t      delta = outer - own (float32), with what earlier codes left out; encoded, sent
    ...         tau steps: it travels behind forward and backward passes
    step t+tau  the mean of all replicas' deltas moves the outer weights; own <- a own + (1 - a) outer

At the run's last step all that is under way arrives, and every fragment whose round is not over is averaged
(outer <- mean of the replicas), so that the model has all work. A step whose gradient is not finite anywhere
is committed by no replica; fragments keep to their schedule.

A replica's gradient is its own sum over (global count / replicas), so that the mean over replicas is the
gradient of the global batch: with H = 1, plain SGD, outer rate 1 and no momentum this is `exact`. Clipping is
by the replica's own norm; the norm that is told is the root mean square over replicas.

Bytes that a rank sends in H steps: for each fragment of v values over n replicas, E(v) bytes being their code,
the less of (n-1) E(v) and 2 (n-1) E(ceil(v/n)); in each step the vote. Memory beside weights, gradients and
optimizer: outer weights, their momentum and feedback, 4 bytes each a parameter, and two fragments.

Failure: a lost peer is noticed at the next vote, or when what it sends is due. Between votes ranks are free.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from unisono.errors import ConfigError
from unisono.sync.codec import mix
from unisono.sync.encoded import Encoded, Sum
from unisono.sync.ledger import Group, Ledger
from unisono.sync.outer import Outer, divide
from unisono.sync.parts import Parts
from unisono.sync.update import (
    OWN,
    OptimizerFactory,
    Update,
    clip_factor,
    global_norm,
    is_finite,
    own_key,
    step,
)
from unisono.sync.whole import Whole

WEIGHT, FEEDBACK, VELOCITY, ARRIVING = "weight", "delta_feedback", "outer_momentum", "arriving"
"""States that only these strategies have: of each replica the first two, the same on all the others. What is left
of deltas is no one's who sends gradients."""
STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")
"""Of the inner optimizers. A replica that has never used a parameter has none of it."""


@dataclass
class Fragment:
    """Parameters that are synchronized together. Flat vectors are float32, laid out in their order."""

    names: list[str]
    params: list[Parameter]
    outer: torch.Tensor
    velocity: torch.Tensor | None
    """Of the outer weights."""
    feedback: torch.Tensor | None
    """What codes have left out, as long as what travels."""
    own: list[torch.Tensor] = field(default_factory=list)
    """The replica's own weights."""
    arriving: Sum | torch.Tensor | None = None
    """The sum of deltas: on its way, or here before its time."""
    due: int = 0
    """The step at whose end it is applied."""

    @property
    def values(self) -> int:
        return len(self.outer)

    def cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` by parameter."""
        pieces = flat[: self.values].split([p.numel() for p in self.params])
        return [x.view(p.shape) for x, p in zip(pieces, self.params, strict=True)]


class Streaming(Whole):
    """The strategy of this file. Collective: every rank makes it with the same arguments."""

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        optimizer: OptimizerFactory,
        outer: Outer,
        timeout_s: float = 600.0,
    ) -> None:
        """`model`: the same weights on every rank, in float32; they become the outer weights."""
        super().__init__(model, ledger, optimizer)
        _check(self.named)
        self._outer, self._step = outer, outer.first_step
        self._control = Group("control", ledger, timeout_s)
        self.replicas, self.rank = self._control.size, self._control.rank
        self._encoded = None
        if self.replicas > 1:
            only_gather = outer.only_gather
            self._encoded = Encoded(ledger, outer.codec, only_gather=only_gather, timeout_s=timeout_s)  # fmt: skip
        # Of several replicas none has the gradient of the global batch to compare its own with.
        self.parts = Parts("half" if self.replicas == 1 else "none")
        indices = divide([p.numel() for p in self.params], outer.num_fragments)
        self._fragments = [self._lay_out(i) for i in indices]
        self._shows_outer = False
        self._squares = 0.0
        self._norm = 0.0
        """Of this replica's own gradient sum."""
        self._fault: str | None = None
        hooked = self.params if self.replicas > 2 and outer.fragment_sync_delay else ()
        self._hooks = [p.register_post_accumulate_grad_hook(self._look) for p in hooked]

    def _lay_out(self, indices: Sequence[int]) -> Fragment:
        params = [self.params[i] for i in indices]
        outer = torch.cat([p.detach().reshape(-1) for p in params])
        feedback = None
        if self._encoded and self._outer.feedback_decay:
            feedback = outer.new_zeros(self._encoded.padded(len(outer)))
        velocity = torch.zeros_like(outer) if self._outer.momentum else None
        names = [self.named[i][0] for i in indices]
        return Fragment(names, params, outer, velocity, feedback, [p.data for p in params])

    @property
    def outer(self) -> Outer:
        """How replicas come together."""
        return self._outer

    @property
    def fragment_values(self) -> list[int]:
        """Of each fragment, how many it has."""
        return [f.values for f in self._fragments]

    # --- the seam

    @contextmanager
    def micro_batch(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch, on the replica's own weights."""
        self._show_own()
        yield

    def finish(self, *values: float) -> list[float]:
        """Collective: the sum over ranks of each of `values`; gradients stay this replica's own."""
        with self.ledger.clock("optimizer"):
            named = [(n, p.grad) for n, p in self.named if p.grad is not None]
            self._norm = global_norm([g for _, g in named])
            self._fault = None
            if not is_finite(self._norm):
                self._fault = next((n for n, g in named if not torch.isfinite(g).all()), None)
        with self.ledger.clock("communication"):
            *totals, self._squares = self._control.sum(*values, self._norm * self._norm)
        return totals

    @torch.no_grad()
    def update(self, *, divide_by: float, max_norm: float, learning_rate: float) -> Update:
        """Collective: clip this replica's gradient by its own norm, step its optimizer; synchronize what
        is due. No replica steps when a gradient is not finite on any."""
        assert self._optimizer is not None
        self._show_own()
        share = divide_by / self.replicas
        committed = is_finite(self._squares)
        grads = [p.grad for p in self.params if p.grad is not None]
        if committed and grads:
            torch._foreach_mul_(grads, clip_factor(self._norm / share, share, max_norm))
            step(self._optimizer, learning_rate)
        self.discard()
        self._step += 1
        with self.ledger.clock("communication"):
            self._synchronize()
        return Update(math.sqrt(self._squares / self.replicas) / share, committed)

    def settle(self) -> None:
        """The model shows the outer weights, until the next `micro_batch`."""
        if not self._shows_outer:
            self._shows_outer = True
            for f in self._fragments:
                for p, whole in zip(f.params, f.cut(f.outer), strict=True):
                    p.data = whole

    def _show_own(self) -> None:
        if self._shows_outer:
            self._shows_outer = False
            for f in self._fragments:
                for p, own in zip(f.params, f.own, strict=True):
                    p.data = own

    def blame(self) -> tuple[int, str] | None:
        """After `finish`: this rank and the first parameter whose gradient was not finite."""
        return (self.rank, self._fault) if self._fault else None

    def replicated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Outer weights and their momentum."""
        for f in self._fragments:
            yield from zip(f.names, f.cut(f.outer), strict=True)
            if f.velocity is not None:
                yield from zip([f"{VELOCITY}.{n}" for n in f.names], f.cut(f.velocity), strict=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The model's, with the outer weights."""
        self.settle()
        return dict(self.model.state_dict())

    def close(self) -> None:
        """Collective: what is under way arrives and is forgotten; the model shows the outer weights."""
        for hook in self._hooks:
            hook.remove()
        for f in self._fragments:
            self._arrive(f)
        self.settle()
        self._control.close()
        if self._encoded:
            self._encoded.close()

    @torch.no_grad()
    def come_together(self) -> None:
        """Collective, between steps: what is under way arrives, and all replicas take the mean of their own
        weights, which becomes the outer ones. Outer momentum stays."""
        self._show_own()
        with self.ledger.clock("communication"):
            for k, f in enumerate(self._fragments):
                if f.arriving is not None:
                    self._apply(f)
                f.arriving = self._leave(f, mix(self._step, k))
            for f in self._fragments:
                self._apply(f, averaged=True, alpha=0.0)

    # --- rounds

    def _look(self, _: Parameter) -> None:
        """In the backward pass: a sum that is here may go on to the others."""
        for f in self._fragments:
            if isinstance(f.arriving, Sum):
                with self.ledger.clock("communication"), torch.no_grad():
                    f.arriving.advance()

    def _synchronize(self) -> None:
        """Collective: at the end of a step, what is due arrives, and what has its turn leaves."""
        rule, now = self._outer, self._step
        last = now == rule.last_step
        for f in self._fragments:
            if f.arriving is not None and (f.due == now or last):
                self._apply(f)
        turn = [rule.begins(k, now) for k in range(len(self._fragments))]
        for k, f in enumerate(self._fragments):
            if turn[k] or last:
                f.arriving, f.due = self._leave(f, mix(now, k)), now + rule.fragment_sync_delay
        for k, f in enumerate(self._fragments):
            if last and not turn[k]:
                self._apply(f, averaged=True, alpha=0.0)
            elif f.arriving is not None and (last or f.due == now):
                self._apply(f, alpha=0.0 if last else None)

    def _leave(self, f: Fragment, seed: int) -> Sum | torch.Tensor:
        """The fragment's delta on its way; alone it is the sum at once, and nothing is encoded."""
        own = torch.cat([w.reshape(-1) for w in f.own])
        delta = torch.sub(f.outer, own, out=own)
        if self._encoded is None:
            return delta
        if f.feedback is None:
            vector = delta.new_zeros(self._encoded.padded(f.values))
            vector[: f.values].copy_(delta)
            return self._encoded.begin(vector, f.values, seed, None)
        f.feedback.mul_(self._outer.feedback_decay)[: f.values].add_(delta)
        return self._encoded.begin(f.feedback, f.values, seed, f.feedback)

    def _arrive(self, f: Fragment) -> torch.Tensor | None:
        """Collective: the sum of the fragment's deltas, if one is under way."""
        if isinstance(f.arriving, Sum):
            f.arriving = f.arriving.take()
        return f.arriving

    def _apply(self, f: Fragment, *, averaged: bool = False, alpha: float | None = None) -> None:
        """Collective: the sum that is due moves the outer weights, and they the replica's own.

        `averaged`: the outer weights become the mean of the replicas, their momentum stays.
        """
        total = self._arrive(f)
        assert total is not None
        f.arriving = None
        mean = total.div_(self.replicas)
        if averaged:
            f.outer.sub_(mean)
        else:
            self._move(f.outer, f.velocity, mean)
        keep = self._outer.fragment_update_alpha if alpha is None else alpha
        for own, whole in zip(f.own, f.cut(f.outer), strict=True):
            self._follow(own, whole, keep)

    def _move(self, outer: torch.Tensor, velocity: torch.Tensor | None, mean: torch.Tensor) -> None:
        """SGD with Nesterov momentum as torch.optim.SGD has it; `mean` is used up."""
        if velocity is not None:
            velocity.mul_(self._outer.momentum).add_(mean)
            mean.add_(velocity, alpha=self._outer.momentum)
        outer.sub_(mean, alpha=self._outer.learning_rate)

    def _follow(self, own: torch.Tensor, outer: torch.Tensor, keep: float) -> None:
        """own <- keep own + (1 - keep) outer."""
        if keep:
            own.lerp_(outer, 1 - keep)
        else:
            own.copy_(outer)

    # --- checkpoints

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: for any strategy the mean over replicas of the inner optimizers' states; then
        what is a replica's own, on rank 0 that of all; outer momentum; sums that are under way."""
        yield from self._mean_states()
        for f in self._fragments:
            self._arrive(f)
        for f in self._fragments:
            for name, own in zip(f.names, f.own, strict=True):
                yield from self._of_each(WEIGHT, name, own)
            if f.feedback is not None:
                for name, left in zip(f.names, f.cut(f.feedback), strict=True):
                    yield from self._of_each(FEEDBACK, name, left)
            for state, flat in ((VELOCITY, f.velocity), (ARRIVING, f.arriving)):
                if flat is not None:
                    assert isinstance(flat, torch.Tensor)
                    for name, value in zip(f.names, f.cut(flat), strict=True):
                        yield own_key(state, 0, name), value

    def _mean_states(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: of each state that any replica has; then each replica's own."""
        has = self._control.each(*(
            float(isinstance(self._state(p).get(state), torch.Tensor)) for p in self.params for state in STATES
        )).view(self.replicas, len(self.params), len(STATES))  # fmt: skip
        for i, (name, p) in enumerate(self.named):
            for k, state in enumerate(STATES):
                holders = has[:, i, k].nonzero().view(-1).tolist()
                if not holders:
                    continue
                mine = self._state(p).get(state)
                if state == "step":  # counts, not averaged: all replicas commit the same steps
                    counts = self._control.each(float(mine) if mine is not None else 0.0)
                    yield f"{state}.{name}", counts.max().float()
                    if self.replicas > 1:
                        yield from (
                            (own_key(state, r, name), counts[r, 0].float()) for r in holders
                        )
                    continue
                value = torch.zeros_like(p, requires_grad=False) if mine is None else mine
                if self.replicas == 1:
                    yield f"{state}.{name}", value
                    continue
                total = value.clone()
                self._control.all_reduce(total).wait()
                yield f"{state}.{name}", total.div_(len(holders))
                yield from self._of_each(state, name, value, holders)

    def _state(self, p: Parameter) -> dict[str, Any]:
        assert self._optimizer is not None
        return self._optimizer.state.get(p, {})  # of torch's defaultdict, which so makes none

    def _of_each(
        self, state: str, name: str, mine: torch.Tensor, holders: Sequence[int] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: the tensor of every replica on rank 0, its own on the others."""
        if self.replicas == 1:
            yield own_key(state, 0, name), mine
            return
        n = mine.numel()
        to_first = [n, *[0] * (self.replicas - 1)]
        from_each = [n if self.rank == 0 else 0] * self.replicas
        every = mine.new_empty(sum(from_each))
        flat = mine.detach().reshape(-1)
        self._control.all_to_all_rows(every, flat, from_each, to_first).wait()
        if self.rank:
            yield own_key(state, self.rank, name), mine
            return
        for replica in range(self.replicas) if holders is None else holders:
            yield own_key(state, replica, name), every[replica * n :][:n].view(mine.shape)

    @torch.no_grad()
    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `optimizer_state` of any strategy gave: the same on all replicas."""
        self._show_own()
        super().load_optimizer_state(tensors)
        for f in self._fragments:  # there may have been more exact weights among it
            f.outer.copy_(torch.cat([w.reshape(-1) for w in f.own]))

    @torch.no_grad()
    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Of as many replicas as there are now each gets its own again, and goes on to the bit. Else
        all start from the outer weights; outer momentum is kept, and what was under way arrives."""
        assert self._optimizer is not None
        self._show_own()
        states = {key.partition(OWN)[0] for key in tensors}
        then = 1 + max((_replica(k) for k in tensors if k.startswith(WEIGHT + OWN)), default=-1)
        same = then == self.replicas
        for f in self._fragments:
            if f.velocity is not None:
                _fill(f.cut(f.velocity), tensors, VELOCITY, 0, f.names)
            if same:
                _fill(f.own, tensors, WEIGHT, self.rank, f.names)
            if same and f.feedback is not None:
                _fill(f.cut(f.feedback), tensors, FEEDBACK, self.rank, f.names)
        if same and self.replicas > 1:
            for name, p in self.named:
                self._optimizer.state.pop(p, None)
                for state in STATES:
                    value = tensors.get(own_key(state, self.rank, name))
                    if value is not None:
                        self._optimizer.state[p][state] = value.to(p.device, copy=True)
        self._receive(tensors, then)
        if not same:
            for f in self._fragments:
                for own, whole in zip(f.own, f.cut(f.outer), strict=True):
                    own.copy_(whole)
        return self._told(then, states)

    def _receive(self, tensors: Mapping[str, torch.Tensor], then: int) -> None:
        """What was under way is so again, or arrives now where replicas, fragments or turns are others."""
        for k, f in enumerate(self._fragments):
            found = [tensors.get(own_key(ARRIVING, 0, name)) for name in f.names]
            due = self._outer.due(k, self._step)
            if then == self.replicas and due > self._step and all(x is not None for x in found):
                f.arriving, f.due = torch.zeros_like(f.outer), due
                _fill(f.cut(f.arriving), tensors, ARRIVING, 0, f.names)
                continue
            velocities = f.cut(f.velocity) if f.velocity is not None else [None] * len(f.names)
            for total, whole, velocity, own in zip(found, f.cut(f.outer), velocities, f.own, strict=True):  # fmt: skip
                if total is not None:
                    self._move(whole, velocity, total.to(whole.device) / then)
                    self._follow(own, whole, self._outer.fragment_update_alpha)

    def _told(self, then: int, states: set[str]) -> str:
        kept = ((FEEDBACK, self._fragments[0].feedback), (VELOCITY, self._fragments[0].velocity))
        mine = {WEIGHT, ARRIVING, *STATES, *(state for state, flat in kept if flat is not None)}
        left = sorted(states - mine)
        note = (
            f"; left out what single replicas had of their own ({', '.join(left)})" if left else ""
        )
        if then == self.replicas:
            return note.removeprefix("; ")
        was = f"{then} replicas, now {self.replicas}" if then else "no replica's own weights"
        return (
            f"the checkpoint has {was}: each starts from the outer weights and the mean of the optimizer "
            f"states{'; outer momentum is kept' if VELOCITY in states & mine else ''}{note}"
        )


def _check(named: list[tuple[str, Parameter]]) -> None:
    for name, p in named:
        if p.dtype != torch.float32:
            raise ConfigError(
                f"sync: streaming and sparse train float32 parameters, found {p.dtype} in {name}; write "
                f"bf16: true for a faster pass"
            ).on_every_rank()


def _replica(key: str) -> int:
    return int(key.partition(OWN)[2].partition(".")[0])


def _fill(
    targets: Sequence[torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    state: str,
    replica: int,
    names: Sequence[str],
) -> None:
    for target, name in zip(targets, names, strict=True):
        value = tensors.get(own_key(state, replica, name))
        if value is not None:
            target.copy_(value)
