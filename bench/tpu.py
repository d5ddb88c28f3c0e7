"""The microbenchmarks of the losses on a real TPU: `make bench-tpu`.

Value and gradient of each objective's summed loss over logits [T, V], ours beside T5Patches' dense
formula, both jitted and timed in turn in one process; `a + b` over the same arrays is the time of
three passes over memory. Without a TPU it says so and ends. The figures of a TPU that is not there
are `bench.tpu_static`'s, and are called static.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp

from bench import common
from t5patches_kernels import targeted_negative_loss


def row(name: str, tokens: int, vocabulary: int, dtype: str) -> dict:
    """One objective's times and temporaries."""
    arrays = common.inputs((tokens,), vocabulary, jnp.dtype(dtype))
    ours = functools.partial(targeted_negative_loss, objective=name, implementation="pallas_tpu")
    programs = {
        "dense": common.value_and_gradient(functools.partial(common.dense, name)),
        "pallas_tpu": common.value_and_gradient(lambda *a: ours(*a).loss),
        "a + b": lambda z, r, y, w: z + r,
    }
    compiled = {k: jax.jit(f).lower(*arrays).compile() for k, f in programs.items()}
    times = common.timed({k: functools.partial(f, *arrays) for k, f in compiled.items()})
    unit = tokens * vocabulary * jnp.dtype(dtype).itemsize
    return {
        "objective": name,
        "T": tokens,
        "V": vocabulary,
        "dtype": dtype,
        **{f"{k} ms": vars(t) for k, t in times.items()},
        **{f"{k} temporaries / TV": common.temporaries(c, unit) for k, c in compiled.items()},
        "shown": " | ".join(f"{k} {t} ms" for k, t in times.items()),
    }


def main() -> None:
    """Prints the rows and stores them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    if jax.default_backend() != "tpu":
        print(
            f"No TPU here (JAX runs on {jax.default_backend()}): nothing to time. "
            "The compiler's static figures: make bench-tpu-static"
        )
        return
    rows = []
    for vocabulary in (common.VOCABULARIES["T5"], common.VOCABULARIES["mT5"]):
        for dtype in ("float32", "bfloat16"):
            for name in common.OBJECTIVES:
                rows.append(row(name, options.tokens, vocabulary, dtype))
                print(name, vocabulary, dtype, rows[-1].pop("shown"), flush=True)
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    print(common.save(kind, rows))


if __name__ == "__main__":
    main()
