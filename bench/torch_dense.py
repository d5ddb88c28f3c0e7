"""T5Patches' formulas in torch, for ``torch.compile``: the baseline outside JAX."""

from __future__ import annotations

import torch


def dense(name: str, z, r, y, w, alpha: float = 1.0, smoothing: float = 1e-6):
    """The losses ``[T]``: whole arrays, in float32, as `bench.common.dense` has them in JAX."""
    z, r = z.float(), r.float()
    onehot = torch.nn.functional.one_hot(y, z.shape[-1]).to(z.dtype)
    sign = w[:, None]
    kept, pushed = (w > 0).to(z.dtype), (w < 0).to(z.dtype)
    log_p = torch.log_softmax(z, -1)
    if name in ("tnff", "tnfll"):
        q = torch.softmax(r, -1)
        target = torch.where(sign > 0, onehot if name == "tnfll" else q, q + onehot * sign * q)
        target = target / target.sum(-1, keepdim=True)
        return -(target * log_p).sum(-1) * (pushed * alpha + kept)
    wanted = torch.where(sign > 0, onehot * 1e9 if name == "tnrll" else r, r + onehot * sign * 1e9)
    s = torch.softmax(wanted, -1) + smoothing
    log_s = torch.log(s / s.sum(-1, keepdim=True))
    reverse = (torch.exp(log_p) * (log_p - log_s)).sum(-1)
    if name == "tnrr":
        return reverse * (pushed * alpha + kept)
    forward = -(torch.exp(log_s) * log_p).sum(-1)
    return reverse * pushed * alpha + forward * kept
