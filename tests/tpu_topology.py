"""TPUs to compile for where there is none: the real compiler, ahead of time."""

from __future__ import annotations

import functools
import importlib.util
import os

import jax
import pytest

# By the name used everywhere: the topology, and how its cores are joined. Cloud v4 is megacore.
CHIPS = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}
MISSING = "needs the TPU compiler: pip install libtpu"
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=MISSING)


@functools.cache
def topology(chip: str, shape: str | None = None):
    """A host's chips, or those of a slice of a shape like ``4x4x4``, to compile for."""
    from jax.experimental import topologies

    # libtpu otherwise asks a cloud machine's metadata, and refuses to be loaded twice at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, options = CHIPS[chip]
    if shape:
        name = f"{name.partition(':')[0]}:{shape}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


def device(chip: str) -> jax.Device:
    """A compile-only device of a chip."""
    return topology(chip).devices[0]


def compile_for(chip: str, f, *args, donate: tuple[int, ...] = ()):
    """`f` compiled ahead of time for a chip at the shapes and dtypes of `args`."""
    place = jax.sharding.SingleDeviceSharding(device(chip))
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    return jax.jit(f, donate_argnums=donate).lower(*shaped).compile()
