"""Attention over the whole sequence in float64 with a matrix of all pairs: what is right."""

import torch


def pairs(
    length: int,
    *,
    window: int | None = None,
    sinks: int = 0,
    chunk: int | None = None,
    prefix: int = 0,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which query sees which key, by the definition: bool [B or 1, 1, length, length]."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    ids = torch.zeros(1, length, dtype=torch.long) if documents is None else documents
    rows = []
    for row in ids:
        begins = torch.tensor([int((row == d).nonzero()[0]) for d in row.tolist()])
        near = torch.ones(length, length, dtype=torch.bool) if window is None else i - j < window
        seen = (j <= i) & (near | (j - begins < sinks)) | (j - begins < prefix)
        if chunk is not None:
            seen = seen & ((i - begins[:, None]) // chunk == (j - begins) // chunk)
        rows.append(seen & (row[:, None] == row[None, :]))
    return torch.stack(rows)[:, None]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, H, S, Dv]; 0 where a query sees nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen, -1e30)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1)[..., : k.shape[2]] * seen
    return p @ v
