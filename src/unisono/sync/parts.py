"""Squared norms of the gradients that a rank has by itself, taken where they leave for the others.

The noise in a gradient (observe/noise.py) shows when the gradient of a part of the global batch is
compared with the whole one's. Which parts exist by themselves depends on the strategy:

    rank          what all of this rank's micro-batches added: in buckets, rows or FSDP's units
    micro-batch   each of them, where a fixed tree sums them (strict mode, `reference`)
    half          the first half of the micro-batches, for a replica that is alone
    none          where no rank has the whole batch's gradient to compare with (streaming, sparse)

Contract: what is measured is what leaves, before it is rounded for the wire; nothing is changed.
Cost: one pass over a rank's gradients, in measured steps only; otherwise a comparison a gradient.
"""

import time
from collections.abc import Iterable
from typing import Any, Literal

import torch


class Parts:
    """The parts of one step on this rank."""

    def __init__(self, kind: Literal["rank", "micro-batch", "half", "none"]) -> None:
        self.kind = kind
        self.begin(measure=False)

    def begin(self, measure: bool) -> None:
        """A step begins. Unless `measure`, all that follows does nothing."""
        self.measuring = measure and self.kind != "none"
        self._norms: list[tuple[float, torch.Tensor]] = []
        self._done: list[list[tuple[float, torch.Tensor]]] = []
        self._spent_s = 0.0
        self._events: list[tuple[Any, Any]] = []

    def add(self, gradient: torch.Tensor, sign: float = 1.0) -> None:
        """Take in a piece of this part's gradient; `sign` -1 takes it out again."""
        if not self.measuring:
            return
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        began = time.perf_counter()
        if gradient.is_cuda:
            self._events.append((_event(), torch.cuda.Event(enable_timing=True)))
        self._norms.append((sign, torch.linalg.vector_norm(gradient.detach(), dtype=wide)))
        if gradient.is_cuda:
            self._events[-1][1].record()
        self._spent_s += time.perf_counter() - began

    def cut(self) -> None:
        """The part is complete; what comes belongs to the next one. Without a gradient it is zero."""
        if self.measuring:
            self._done.append(self._norms)
            self._norms = []

    def after(
        self, micro_batches: int, of: int, gradients: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        """So many micro-batches of this rank are done: where the half is the part, it may be complete."""
        if self.measuring and self.kind == "half" and micro_batches == of // 2:
            for _, gradient in gradients:
                self.add(gradient)
            self.cut()

    def sizes(self, tokens: list[int]) -> list[int]:
        """Of each part, from those of each micro-batch of this rank."""
        if self.kind == "micro-batch":
            return tokens
        return [sum(tokens[: len(tokens) // 2] if self.kind == "half" else tokens)]

    def end(self) -> tuple[list[float], float]:
        """(squared norm of each part, seconds that all of it took); no parts where nothing was measured.

        Reads from the device: when the step is over.
        """
        if self.kind == "rank":
            self.cut()
        squares = [sum(sign * float(n.double()) ** 2 for sign, n in part) for part in self._done]
        for began, ended in self._events:
            ended.synchronize()
            self._spent_s += began.elapsed_time(ended) / 1e3
        spent_s = self._spent_s
        self.begin(measure=False)
        return squares, spent_s


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
