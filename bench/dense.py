"""T5Patches' formula of each targeted negative objective, dense: what the kernels are held against.

Written in the arrays' own module, so that JAX and torch run the same text: `softmax`, `log_softmax`
and `one_hot` are what differs between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

EPS = 1e-6
OBJECTIVES = ("tnff", "tnrr", "tnrf", "tnfll", "tnrll")


class Module(NamedTuple):
    """The few functions that JAX and torch spell differently."""

    softmax: Callable[[Any], Any]
    log_softmax: Callable[[Any], Any]
    one_hot: Callable[[Any, int], Any]
    where: Callable[[Any, Any, Any], Any]
    log: Callable[[Any], Any]


def loss(m: Module, objective: str, z: Any, r: Any, y: Any, w: Any, alpha: float = 1e4) -> Any:
    """The summed loss of logits ``[T, V]`` that are float32 already."""
    onehot, w = m.one_hot(y, z.shape[-1]), w[:, None]
    factor = m.where(w[:, 0] < 0, alpha, m.where(w[:, 0] > 0, 1.0, 0.0))
    q = m.softmax(r)
    q = m.where(w < 0, q + onehot * w * q, q)
    q = q / q.sum(-1)[:, None]
    log_p = m.log_softmax(z)
    if objective in ("tnff", "tnfll"):
        target = q if objective == "tnff" else m.where(w < 0, q, onehot)
        return (-(target * log_p).sum(-1) * factor).sum()
    if objective == "tnrll":
        q = m.where(w < 0, q, onehot)
    s = (q + EPS) / (1 + z.shape[-1] * EPS)
    reverse = (m.softmax(z) * (log_p - m.log(s))).sum(-1)
    if objective == "tnrr":
        return (reverse * factor).sum()
    forward = -(s * log_p).sum(-1)
    return (m.where(w[:, 0] < 0, reverse, forward) * factor).sum()
