"""Digests: are two sets of tensors the same, bit for bit, and if not, which tensor differs?

`fingerprint` is cheap, runs on the tensor's device and is for comparing replicas as they train: two
wrapping sums over the bits, one of them weighted by position, so that a flip of the lowest bit and
a swap of two rows both show. `sha256` is the proof that verify and the tests print.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch

from unisono.errors import ReplicaError
from unisono.sync.ledger import Group

_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}
"""Wider elements count as several: weighted, their highest bits would leave the 64 of a sum."""
_LANES = 256


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2] on the tensor's device; equal tensors have equal fingerprints."""
    bits = tensor.detach().contiguous().view(-1).view(_INT[tensor.element_size()])
    whole = bits[: len(bits) // _LANES * _LANES].view(-1, _LANES)
    rest = bits[len(whole) * _LANES :].to(torch.int64)
    lanes = whole.sum(0, dtype=torch.int64)
    rows = whole.sum(1, dtype=torch.int64)
    lanes[: len(rest)] += rest * (len(rows) + 1)
    position = torch.arange(1, max(_LANES, len(rows)) + 1, device=bits.device)
    return torch.stack([(lanes * position[:_LANES]).sum(), (rows * position[: len(rows)]).sum()])


def sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_each(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Over the `sha256` of each tensor, in the order of the names; needs one tensor at a time."""
    digests = {name: sha256({name: tensor}) for name, tensor in tensors}
    return hashlib.sha256("".join(f"{digests[n]}\n" for n in sorted(digests)).encode()).hexdigest()


def check_replicas(tensors: Iterable[tuple[str, torch.Tensor]], group: Group, step: int) -> None:
    """Collective: raise ReplicaError on every rank when one rank's tensors differ from the others'.

    The message names the first tensor and the ranks that do not agree with the majority; with two
    replicas there is none, and both are named. Sends 16 (n-1) bytes for each tensor.
    """
    named = list(tensors)
    if group.size == 1 or not named:
        return
    names = [n for n, _ in named]
    mine = torch.stack([fingerprint(t).cpu() for _, t in named])
    every = mine.new_empty(group.size, *mine.shape)
    group.all_gather(every, mine).wait()
    odd = (every != every[0]).any(dim=2).any(dim=0).nonzero()
    if not len(odd):
        return
    first = int(odd[0])
    votes = [tuple(row) for row in every[:, first].tolist()]
    most = max(set(votes), key=votes.count)
    if votes.count(most) * 2 > len(votes):
        who = "rank " + ", ".join(str(r) for r, v in enumerate(votes) if v != most)
    else:
        who = "ranks " + ", ".join(map(str, range(len(votes)))) + " (no majority)"
    raise ReplicaError(
        f"replicas differ after step {step}: {who} in {names[first]}, and {len(odd)} of "
        f"{len(names)} tensors in all; a checkpoint from before the last equal check is sound"
    ).on_every_rank()
