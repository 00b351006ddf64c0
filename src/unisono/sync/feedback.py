"""Error feedback in checkpoints: what each replica has yet to send, by parameter.

Gradients add, so what matters is the sum over replicas. Where there are as many as there were, each takes
its own back, to the bit; where there are others, each takes the same share of the sum.
"""

from collections.abc import Mapping

import torch

from unisono.sync.update import OWN, without_own

FEEDBACK = "feedback"
"""State key, of `update.own_key`."""


def by_replica(
    tensors: Mapping[str, torch.Tensor], replicas: int
) -> tuple[dict[str, torch.Tensor], str]:
    """(parameter: [replicas, *shape], line for the user or "") of saved own state."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    others = {}
    for key, value in tensors.items():
        state, _, name = key.partition(".")
        state, _, number = state.partition(OWN)
        if state == FEEDBACK:
            found.setdefault(name, {})[int(number)] = value
        else:
            others[key] = value
    note = without_own(others)
    had = 1 + max((max(numbers) for numbers in found.values()), default=-1)
    if had in (0, replicas):
        return {n: torch.stack([v[r] for r in range(had)]) for n, v in found.items()}, note
    even = {
        name: (torch.stack([*values.values()]).sum(0) / replicas).expand(replicas, *values[0].shape)
        for name, values in found.items()
    }
    divided = f"error feedback of {had} replicas is divided evenly among {replicas}"
    return even, f"{divided}; {note}" if note else divided
