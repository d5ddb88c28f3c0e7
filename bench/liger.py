r"""Liger's fused linear divergences, at its own benchmark's shapes and ours beside them.

    pip install liger-kernel            # or a wheel of it that was carried along
    JAX_PLATFORMS=cpu python -m bench.liger

Hidden states to loss and both gradients, in bfloat16. Torch and JAX do not share a card's memory,
so that Liger has a process of its own; `make bench-gpu` runs it right after `bench.card`, whose
rows of the same shapes are ours, for a minute at most. Times are taken as there
(`bench.gpu.time_of`). A row is stored in `results/gpu-liger.json` once it is there; without torch,
a card or Liger it says so.

Of Liger's generalised Jensen-Shannon divergence beta 0 is the forward divergence, that of our
``tnff`` where no token is pushed down; 0.5 is its default and what its benchmark times.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
from collections.abc import Callable
from typing import Any

from bench import common, gpu

TOKENS = 8192
# By the name of Liger's class: the vocabulary, and the widths of the model and of the reference.
SHAPES = {
    "LigerFusedLinearJSD": {"vocabulary": 128256, "width": 4096, "reference_width": 4096},
    "LigerFusedLinearJSDLoss": {"vocabulary": 128256, "width": 2048, "reference_width": 4096},
}
BETAS = (0.0, 0.5)


def loss_of(name: str, beta: float) -> Callable[..., Any]:
    """Liger's loss of ``(hidden, kernel, reference hidden, reference kernel, targets)``."""
    if name == "LigerFusedLinearJSD":
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=beta)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Its mean with the cross-entropy of the targets, all of it the divergence.
    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)


def call_of(
    name: str,
    beta: float,
    device: str,
    tokens: int,
    vocabulary: int,
    width: int,
    reference_width: int,
) -> Callable[[], tuple[Any, ...]]:
    """What is timed: the gradients to the hidden states and to the kernel."""
    import torch

    def normal(rows: int, columns: int, scale: float = 1.0) -> Any:
        return scale * torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    h, rh = normal(tokens, width), normal(tokens, reference_width)
    # Liger has kernels as torch's linear layers do, a row for each entry of the vocabulary.
    k, rk = (normal(vocabulary, x, common.head_scale(x)) for x in (width, reference_width))
    y = torch.randint(vocabulary, (tokens,), device=device)
    h.requires_grad_(), k.requires_grad_()
    loss = loss_of(name, beta)
    return lambda: torch.autograd.grad(loss(h, k, rh, rk, y), (h, k))


def run(name: str, beta: float) -> dict[str, Any]:
    """Milliseconds, and bytes beyond inputs and outputs."""
    import torch

    call = call_of(name, beta, "cuda", TOKENS, **SHAPES[name])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row = gpu.time_of(call, lambda _: torch.cuda.synchronize())
    outputs = sum(x.nbytes for x in call())
    return row | {"temporary_bytes": torch.cuda.max_memory_allocated() - before - outputs}


def about() -> dict[str, Any]:
    """The card, and the versions of Liger and torch."""
    import torch

    versions = {x: importlib.metadata.version(x) for x in ("liger-kernel", "torch", "triton")}
    return versions | {"card": torch.cuda.get_device_name()}


def main() -> None:
    """Measures, prints and stores, row by row."""
    rows: list[dict[str, Any]] = []
    seen = gpu.guarded(about)
    for name, beta in itertools.product(SHAPES, BETAS):
        of = {"what": name, "beta": beta, "tokens": TOKENS, "dtype": "bfloat16"} | SHAPES[name]
        rows.append(of | gpu.guarded(functools.partial(run, name, beta)))
        print(rows[-1], flush=True)
        path = common.save("gpu-liger", rows, about=seen)
    print(path)


if __name__ == "__main__":
    main()
