"""Sums over ranks of what travels encoded, in the background.

Contract: every rank hands in float32 values; later every rank has the same bits, the sum in float32 of what
all ranks' codes stand for, added in the order of the ranks. Every rank begins the same sums in the same
order. How a vector travels, whichever sends fewer bytes (sync/outer.py has the formula):

    all-gather of all codes; each rank adds them up           two ranks, and where sums cannot be encoded
    each rank's codes of n chunks -> all-to-all -> the chunk's owner adds them up and encodes the
    sum -> all-gather of codes                                more ranks

With feedback, what encoding leaves out is put back into the rank's vector `left` for the next time. What
encoding the sum leaves out, its owner keeps in its own: the next sum has it, whoever sends it.
The second trip begins when this rank looks (`advance`) and the first one is over.
"""

import torch

from unisono.sync.codec import Codec, mix
from unisono.sync.ledger import Group, Handle, Ledger
from unisono.sync.outer import gathers


class Encoded:
    """The groups that sums travel in. Collective: every rank makes it with the same arguments."""

    def __init__(
        self, ledger: Ledger, codec: Codec, *, only_gather: bool = False, timeout_s: float = 600.0
    ) -> None:
        self.codec, self._only_gather = codec, only_gather
        self._gathers = Group("outer gather", ledger, timeout_s, duplex=True)
        self.size, self.rank = self._gathers.size, self._gathers.rank
        # Another group: the order of all-to-alls against all-gathers depends on timing.
        several = self.size > 2 and not only_gather
        self._scatters = Group("outer scatter", ledger, timeout_s) if several else None

    def padded(self, values: int) -> int:
        """The length of a vector of `values`, filled up to equal chunks where it travels in chunks."""
        return values if self._at_once(values) else -(-values // self.size) * self.size

    def begin(
        self, vector: torch.Tensor, values: int, seed: int, left: torch.Tensor | None
    ) -> "Sum":
        """Collective: start the sum of `vector` [padded(values)], which is free again at once.

        `left` (perhaps `vector` itself) becomes what its code does not hold.
        """
        if self._at_once(values):
            code = self.codec.encode(vector, mix(seed, self.rank), left)
            codes = code.new_empty(self.size, len(code))
            gather = self._gathers.all_gather(codes, code)
            return Sum(self, values, seed, left, codes, code, gather=gather)
        rows = vector.view(self.size, -1)
        lefts = [None] * self.size if left is None else left.view(self.size, -1).unbind()
        sent = torch.stack([
            self.codec.encode(row, mix(seed, self.rank, k), rest)
            for k, (row, rest) in enumerate(zip(rows, lefts, strict=True))
        ])  # fmt: skip
        received = torch.empty_like(sent)
        assert self._scatters is not None
        scatter = self._scatters.all_to_all(received, sent)
        return Sum(self, values, seed, left, received, sent, scatter=scatter)

    def gather(self, codes: torch.Tensor, code: torch.Tensor) -> Handle:
        """Collective: `codes` become those of all ranks."""
        return self._gathers.all_gather(codes, code)

    def _at_once(self, values: int) -> bool:
        return gathers(values, self.size, self.codec, self._only_gather)

    def close(self) -> None:
        """Collective: end the groups; every sum must have been taken."""
        if self._scatters is not None:
            self._scatters.close()
        self._gathers.close()


class Sum:
    """One sum on its way. On every rank alike: `advance` as often as one likes, `take` once."""

    def __init__(
        self,
        encoded: Encoded,
        values: int,
        seed: int,
        left: torch.Tensor | None,
        codes: torch.Tensor,
        sent: torch.Tensor,
        *,
        scatter: Handle | None = None,
        gather: Handle | None = None,
    ) -> None:
        self._encoded, self._values, self._seed, self._left = encoded, values, seed, left
        self._codes, self._scatter, self._gather = codes, scatter, gather
        self._sent = sent  # must live as long as it travels

    def advance(self, wait: bool = False) -> None:
        """Collective once: add up this rank's chunk when all of it is here, and send the sum on."""
        if self._gather is not None:
            return
        assert self._scatter is not None
        if not (wait or self._scatter.done()):
            return
        self._scatter.wait()
        encoded = self._encoded
        chunk = encoded.padded(self._values) // encoded.size
        total = self._added(chunk)
        rest = None if self._left is None else torch.empty_like(total)
        self._sent = encoded.codec.encode(total, mix(self._seed, encoded.rank, encoded.size), rest)
        if self._left is not None and rest is not None:
            self._left[encoded.rank * chunk :][:chunk].add_(rest)
            self._left[self._values :].zero_()  # what only fills up is nobody's
        self._codes = self._sent.new_empty(encoded.size, len(self._sent))
        self._gather = encoded.gather(self._codes, self._sent)

    def take(self) -> torch.Tensor:
        """Collective: the sum, float32 [values]; stands still until it is here."""
        self.advance(wait=True)
        assert self._gather is not None
        self._gather.wait()
        if self._scatter is None:
            return self._added(self._values)
        chunks = torch.empty(len(self._codes), self._encoded.padded(self._values) // len(self._codes), device=self._codes.device)  # fmt: skip
        for chunk, code in zip(chunks, self._codes, strict=True):
            self._encoded.codec.decode(code, chunk)
        return chunks.view(-1)[: self._values]

    def _added(self, values: int) -> torch.Tensor:
        total = torch.empty(values, device=self._codes.device)
        for k, code in enumerate(self._codes):
            self._encoded.codec.decode(code, total, add=k > 0)
        return total
