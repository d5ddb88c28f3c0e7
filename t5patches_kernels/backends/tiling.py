"""Ragged edges: the only place that knows that a size need not be a multiple of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which `x` varies inside a `jax.shard_map` with ``check_vma=True``."""
    known = isinstance(x, jax.ShapeDtypeStruct | jax.core.ShapedArray)
    aval = x if known else jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset() if manual is None else frozenset(manual.varying)


def vary_over(x: Any, axes: frozenset[str]) -> Any:
    """Gives every array of `x` the mesh axes that it does not vary over yet.

    The transpose is the sum over those axes, so the gradient of what every device holds alike, a
    kernel say, is summed over the devices that hold other tokens.
    """

    def cast(leaf):
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, x)


def vary_like(x: Any, example: Any) -> Any:
    """Gives `x` the mesh axes over which `example` varies: a loop's carry must have both's type."""
    return jax.tree.map(lambda leaf, like: vary_over(leaf, varying_axes(like)), x, example)


def all_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which any array of `x` varies."""
    return frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(x)))


def axes_of_kernel(implementation: str, inputs: Any, *, interpreted: bool) -> frozenset[str]:
    """The mesh axes over which a kernel's inputs, and so its results, vary.

    Raises:
      NotImplementedError: they vary, and the kernel is interpreted, which JAX cannot do then.
    """
    axes = all_axes(inputs)
    if interpreted and axes:
        raise NotImplementedError(
            f"implementation={implementation!r} on a CPU: JAX cannot interpret a kernel inside "
            "jax.shard_map with check_vma=True. Pass check_vma=False, or "
            'implementation="xla".'
        )
    return axes


def by_platform(
    inputs: tuple, *, gpu: Callable, default: Callable, tpu: Callable | None = None
) -> Any:
    """Runs the form of a computation that suits the platform it is lowered for.

    Right for `jax.jit` on another device than the default one and for compiling ahead of time.
    """
    axes = all_axes(inputs)

    def typed(form):
        return lambda *args: vary_over(form(*args), axes)

    forms = {"cuda": typed(gpu), "rocm": typed(gpu), "default": typed(default)}
    if tpu is not None:
        forms["tpu"] = typed(tpu)
    return jax.lax.platform_dependent(*inputs, **forms)


def for_row_blocks(
    body: Callable[[Any, Any, Array, Any], tuple[Any, Any, Any]],
    inputs: Any,
    rows: int,
    block: int,
    donated: Any = (),
    counts: Array | None = None,
) -> tuple[Any, Any, Any]:
    """Runs `body` on blocks of rows and puts the blocks of its results together.

    The last block of a ragged number of rows is moved back to end with the last row, so that every
    block has the same shape: it overlaps the one before it.

    With `counts`, the rows that count are brought together, block by block, and blocks without one
    are not run. How many there are is known when the program runs.

    Args:
      body: ``(block of inputs, block of donated, fresh, sum) -> (rowwise, instead, sum)``.
        ``fresh`` ``[block]`` is false for the rows that an earlier block has had: they must not
        enter the sum again, and what `donated` has for them is a result already. The sum that it
        is given is that of the blocks before, None where there are none and where nothing is
        summed; it adds its own as suits it.
      inputs: arrays whose first dimension is `rows`.
      rows: the number of rows.
      block: rows a block, at least 1.
      donated: arrays like `inputs`, over which `instead` is written: of its shapes and dtypes.
        Where nobody else reads them, no memory is needed for the results. Whatever is computed
        from a block of them must show in `instead`: else XLA copies all of them for every block.
      counts: ``[rows]`` bool: `rowwise` may be 0 for other rows, and they may be left out of the
        sum. None: all rows count. Not with `donated`.

    Returns:
      `rowwise` and `instead` with `rows` rows, and the sum over the blocks.
    """
    if rows <= block:
        return body(inputs, donated, jnp.ones((rows,), jnp.bool_), None)

    blocks, ragged = -(-rows // block), rows % block > 0
    needed: Any = blocks
    if counts is not None:
        order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
        needed = (jnp.sum(counts, dtype=jnp.int32) + block - 1) // block

    def cut(x, start):
        if counts is None:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), x)
        at = jax.lax.dynamic_slice_in_dim(order, start, block)
        return jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), x)

    def put(x, new, start, fresh):
        if ragged:
            again = jnp.expand_dims(~fresh, range(1, x.ndim))
            new = jnp.where(again, cut(x, start), new)
        if counts is None:
            return jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)
        at = jax.lax.dynamic_slice_in_dim(order, start, block)
        return x.at[at].set(new, mode="promise_in_bounds", unique_indices=True)

    def place(step):
        start = jnp.minimum(step * block, rows - block)
        return start, start + jnp.arange(block, dtype=jnp.int32) >= step * block

    def of_block(step, donated, total):
        start, fresh = place(step)
        return start, fresh, body(cut(inputs, start), cut(donated, start), fresh, total)

    *_, (rowwise, _, total) = jax.eval_shape(lambda: of_block(jnp.int32(0), donated, None))
    whole = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), rowwise)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)
    whole, zero = vary_like((whole, zero), (rowwise, total))

    def step(i, carry):
        done, total = carry
        start, fresh, (*made, total) = of_block(i, done[1], total)
        done = jax.tree.map(lambda x, new: put(x, new, start, fresh), done, tuple(made))
        return done, total

    done, total = jax.lax.fori_loop(0, needed, step, ((whole, donated), zero))
    return *done, total
