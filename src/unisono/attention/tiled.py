"""The kernel's contract (kernel.py) in plain PyTorch: any device, softcap, memory of a tile of scores.

Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022): queries and keys are cut
into tiles of TILE; each tile's scores are made, used and dropped, in float32 at least. Backward makes
them again from the log-sum-exp. The heads of a group of queries are rows of one matrix, so that keys are
not repeated. With softcap c the score is t = c tanh(s / c), and ds = dt (1 - (t / c)^2).

Cost: 2 products of S^2 D a head forward and 5 backward, and B H TILE^2 floats a handful of times.
"""

from collections.abc import Iterator

import torch

TILE = 512
Tensor = torch.Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out in q's type, lse), as kernel.forward."""
    kind = _wide(q)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=kind, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for rows in _tiles(q.shape[2]):
            tall = q.shape[0], q.shape[1], rows.stop - rows.start
            acc = torch.zeros(*tall, v.shape[-1], dtype=kind, device=q.device)
            total = torch.zeros(tall, dtype=kind, device=q.device)
            top = torch.full_like(total, -torch.inf)
            for columns in _columns(rows, k.shape[2], causal):
                s, _ = _scores(q, k, rows, columns, scale, causal, mask, softcap)
                new = torch.maximum(top, s.amax(-1))
                safe = new.masked_fill(new == -torch.inf, 0)
                p = s.sub_(safe[..., None]).exp_()
                shrink = (top - safe).exp_()
                acc = acc * shrink[..., None] + _heads(_grouped(p, v) @ _part(v, columns), q)
                total, top = total * shrink + p.sum(-1), new
            some = total > 0
            out[:, :, rows] = torch.where(some[..., None], acc / total[..., None], 0).to(out.dtype)
            lse[:, :, rows] = torch.where(some, top + total.log(), -torch.inf)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), as kernel.backward: out and lse are those of all keys."""
    kind = _wide(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=kind, device=q.device) for x in (q, k, v))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(s - inf) is 0
    with torch.autocast(q.device.type, enabled=False):
        for rows in _tiles(q.shape[2]):
            do = dout[:, :, rows].to(kind)
            delta = (do * out[:, :, rows].to(kind)).sum(-1, keepdim=True)
            do_rows, q_rows = _grouped(do, v), _grouped(q[:, :, rows].to(kind), k)
            for columns in _columns(rows, k.shape[2], causal):
                s, slope = _scores(q, k, rows, columns, scale, causal, mask, softcap, slope=True)
                p = s.sub_(lse[:, :, rows, None]).exp_()
                dv[:, :, columns] += _grouped(p, v).mT @ do_rows
                ds = _heads(do_rows @ _part(v, columns).mT, q).sub_(delta).mul_(p).mul_(scale)
                if slope is not None:
                    ds *= slope
                ds_rows = _grouped(ds, k)
                dq[:, :, rows] += _heads(ds_rows @ _part(k, columns), q)
                dk[:, :, columns] += ds_rows.mT @ q_rows
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(
    q: Tensor,
    k: Tensor,
    rows: slice,
    columns: slice,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    softcap: float | None,
    slope: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Masked scores of a tile [B, H, rows, columns], and with softcap and `slope` d(capped)/d(score)."""
    part = _grouped(q[:, :, rows].to(_wide(q)), k)
    s = _heads(part @ _part(k, columns).mT, q).mul_(scale)
    slopes = None
    if softcap is not None:
        s = s.div_(softcap).tanh_()
        slopes = 1 - s * s if slope else None
        s = s.mul_(softcap)
    if mask is not None:
        tile = mask[..., rows if mask.shape[-2] > 1 else slice(None), columns]
        s = s.masked_fill_(~tile, -torch.inf) if tile.dtype == torch.bool else s.add_(tile)
    if causal and columns.stop - 1 > rows.start:
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        s.masked_fill_(torch.arange(columns.start, columns.stop, device=q.device) > i, -torch.inf)
    return s, slopes


def _tiles(length: int) -> Iterator[slice]:
    return (slice(a, min(a + TILE, length)) for a in range(0, length, TILE))


def _columns(rows: slice, length: int, causal: bool) -> Iterator[slice]:
    return (c for c in _tiles(length) if not causal or c.start < rows.stop)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _part(x: Tensor, columns: slice) -> Tensor:
    return x[:, :, columns].to(_wide(x))


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """[B, H, S, N] as [B, Hkv, H / Hkv * S, N]: the queries that share a key head, as rows."""
    return x.reshape(x.shape[0], like.shape[1], -1, x.shape[-1])


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """The way back: [B, Hkv, H / Hkv * S, N] as [B, H, S, N]."""
    heads = like.shape[1]
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])
