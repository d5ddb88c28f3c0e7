"""The microbenchmarks of the losses on a real TPU: `make bench-tpu`.

    python -m bench.tpu
    python -m pytest bench/tpu.py -k "tnrf and bfloat16"    # a part, which is shown and not stored

Value and gradient of every objective, T = 2048, and of a head from its hidden states: T5Patches'
formula and the library's XLA form beside the kernels, in one run. pytest-benchmark is the harness
and its JSON is stored; what it times is a call and the wait for its result. The device's own time
of as many more calls is taken from JAX's profile and stored beside it, `device_ms` in
`extra_info`: the median and the quartiles.

Without a TPU it says so and ends. The figures of a TPU that is not there are `bench.tpu_static`'s,
and are called static.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from bench import common

TOKENS = 2048
VOCABULARIES = (common.VOCABULARIES["T5"], common.VOCABULARIES["mT5"])
ROUNDS = 30

needs_tpu = pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")


def measure(benchmark, f: Callable, args: tuple[jax.Array, ...]) -> None:
    """Times a function by the harness and by the device, or skips what does not fit."""
    try:
        compiled = jax.jit(f).lower(*args).compile()

        def call():
            return jax.block_until_ready(compiled(*args))

        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=3)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        pytest.skip(f"does not fit: {str(error)[:100]}")
    times = common.device_times(common.profile(call, ROUNDS), f"jit_{f.__name__}")
    held = common.temporaries(compiled, 2**20)
    benchmark.extra_info.update(device_ms=vars(common.Timing.of(times)), temporaries_mib=held)


@functools.lru_cache(maxsize=1)  # the largest take 4 GB
def logits(vocabulary: int, dtype: str) -> tuple[jax.Array, ...]:
    return common.inputs((TOKENS,), vocabulary, jnp.dtype(dtype))


# --- The benchmarks -------------------------------------------------------------------------------

by_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES)
by_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
by_what = pytest.mark.parametrize("what", ["dense", "xla", "pallas_tpu"])


@needs_tpu
@by_what
@pytest.mark.parametrize("objective", [*common.OBJECTIVES, *common.ALONE])
@by_dtype
@by_vocabulary
def test_loss(benchmark, vocabulary, dtype, objective, what):
    def loss(*args):
        return jax.value_and_grad(functools.partial(common.total, what, objective))(*args)

    measure(benchmark, loss, logits(vocabulary, dtype))


@needs_tpu
@by_dtype
@by_vocabulary
def test_three_passes(benchmark, vocabulary, dtype):
    """What reading two arrays and writing one takes, whatever is done with them."""

    def add(z, r, y, w):
        return z + r

    measure(benchmark, add, logits(vocabulary, dtype))


@needs_tpu
@by_what
@pytest.mark.parametrize("objective", ["tnff", "tnrf"])
def test_head(benchmark, objective, what):
    def head(*args):
        return jax.value_and_grad(functools.partial(common.head_total, what, objective), (0, 1))(
            *args
        )

    measure(benchmark, head, common.head_inputs(**common.TPU_HEAD))


# --- The run --------------------------------------------------------------------------------------


class Setting:
    """Puts beside the times what pytest-benchmark does not know: device, JAX and commit."""

    @staticmethod
    def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
        """A hook of pytest-benchmark's."""
        machine_info.update(common.setting())


def shown(row: dict) -> str:
    """A benchmark's times as a line."""
    device, wall = row["extra_info"]["device_ms"], row["stats"]
    return (
        f"{row['name']:55s} device {device['median']:8.3f} ms "
        f"({device['low']:.3f}-{device['high']:.3f}), call {1e3 * wall['median']:8.3f} ms "
        f"({1e3 * wall['q1']:.3f}-{1e3 * wall['q3']:.3f})"
    )


def main() -> None:
    """Runs all, prints a line for each and stores pytest-benchmark's JSON."""
    common.require_device("tpu")
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = common.RESULTS / f"{kind}.json"
    part = path.with_suffix(".part")
    columns = "--benchmark-columns=min,median,iqr,rounds"
    options = ["-W", "default", "-rs", columns, f"--benchmark-json={part}"]
    code = pytest.main([__file__, *options], plugins=[Setting()])
    if part.exists():
        for row in json.loads(part.read_text())["benchmarks"]:
            print(shown(row))
        # A run that was cut short does not replace a whole one.
        print(f"stored in {part if code else part.replace(path)}")
    sys.exit(code)


if __name__ == "__main__":
    main()
